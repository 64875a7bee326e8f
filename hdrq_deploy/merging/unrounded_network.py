"""A network that is run with real weights in the place of its codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir

from ..errors import DataError, EngineError
from ..formats.bundle import WEIGHTS, Bundle
from ..formats.safetensors_layout import serialize
from ..graph import reference_session
from ..graph.model_files import serialized
from ..numerics.batches import in_batches
from ..typing import Array

__all__ = ["BATCH", "put_weights", "unrounded_network"]

# Activations of so many images stay in the caches of a core: of EfficientNet-Lite0 at 96 x 96 an
# image takes 4.1 ms in batches of 4, and 7.0 ms in batches of 16.
BATCH = 4


def put_weights(model: ir.Model, bundle: Bundle, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Put real weights in the place of codes and their dequantizers; returns codes to store."""
    graph, codes = model.graph, {}
    for name, entry in bundle.manifest.tensors.items():
        if entry.role != "codes":
            continue
        (use,) = graph.initializers.pop(name).uses()
        real = ir.Value(name=name, const_value=ir.tensor(weights[name], name=name))
        use.node.outputs[0].replace_all_uses_with(real)
        graph.remove(use.node, safe=True)
        graph.initializers[name] = real
        codes[name] = bundle.tensor(name)
    return codes


def unrounded_network(
    bundle: Bundle, tensors: Mapping[str, Array]
) -> Callable[[Array, str], Array]:
    """A network whose weights need not be rounded to be run; activations are quantized.

    Every batch is run by one thread, so that results do not depend on the number of threads.

    Args:
        bundle: Gives graph and entries.
        tensors: All tensors, real weights in place of codes; see :meth:`.Merger.unrounded`.

    Returns:
        A function of images (N, C, H, W) and of what an error calls them, that gives their logits
        and raises DataError where the images do not fit.
    """
    model = bundle.graph_ir()
    stored = {**tensors, **put_weights(model, bundle, tensors)}
    weights = serialize(stored, bundle.manifest.tensors)
    session = reference_session.float_session(serialized(model), {WEIGHTS: weights}, threads=1)
    port = session.get_inputs()[0].name
    threads = reference_session.threads_of_sessions()

    def run(images: Array, name: str) -> Array:
        try:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(
                    pool.map(
                        lambda rows: session.run(None, {port: rows})[0], in_batches(images, BATCH)
                    )
                )
        except EngineError as error:
            raise DataError(f"the images of {name} do not fit the model: {error}") from error
        return np.concatenate(parts)

    return run
