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
from ..graph.model_files import OutsideTensors, serialized
from ..numerics.batches import in_batches
from ..typing import Array

__all__ = ["BATCH", "RealWeights", "UnroundedNetwork", "put_weights"]

# Activations of so many images stay in the caches of a core: of EfficientNet-Lite0 at 96 x 96 an
# image takes 4.1 ms in batches of 4, and 7.0 ms in batches of 16.
BATCH = 4


def put_weights(
    model: ir.Model, bundle: Bundle, value_of: Callable[[str], ir.Value]
) -> dict[str, Array]:
    """Put real weights in the place of codes and their dequantizers.

    Args:
        model: The bundle's graph; changed in place.
        bundle: Gives the entries.
        value_of: Called with the name of codes; gives the initializer to put there.

    Returns:
        The codes by name: the graph reads them no longer, but its file of weights has room for
        them.
    """
    graph, codes = model.graph, {}
    for name, entry in bundle.manifest.tensors.items():
        if entry.role != "codes":
            continue
        (use,) = graph.initializers.pop(name).uses()
        real = value_of(name)
        use.node.outputs[0].replace_all_uses_with(real)
        graph.remove(use.node, safe=True)
        graph.initializers[name] = real
        codes[name] = bundle.tensor(name)
    return codes


class RealWeights:
    """Real weights in the place of a graph's codes, other ones for every session.

    Args:
        model: The bundle's graph; changed in place.
        bundle: Gives the entries.
    """

    def __init__(self, model: ir.Model, bundle: Bundle) -> None:
        self._entries = bundle.manifest.tensors
        self._real = OutsideTensors("real")
        self._codes = put_weights(
            model, bundle, lambda name: self._real.add(name, self._entries[name].shape)
        )

    def files(self, tensors: Mapping[str, Array]) -> dict[str, bytes]:
        """The graph's external data, as :func:`.reference_session.open_session` takes them.

        Args:
            tensors: All tensors, real weights in place of codes; see :meth:`.Merger.unrounded`.
        """
        weights = serialize({**tensors, **self._codes}, self._entries)
        return {WEIGHTS: weights, **self._real.file(tensors)}


class UnroundedNetwork:
    """A network whose weights need not be rounded to be run; activations are quantized.

    The graph is read and written once, and opened with as many weights as there are.

    Args:
        bundle: Gives graph and entries.
    """

    def __init__(self, bundle: Bundle) -> None:
        model = bundle.graph_ir()
        self._weights = RealWeights(model, bundle)
        self._text = serialized(model)

    def opened(self, tensors: Mapping[str, Array]) -> Callable[[Array, str], Array]:
        """The network with these weights.

        Every batch is run by one thread, so that results do not depend on the number of threads.

        Args:
            tensors: All tensors, real weights in place of codes; see :meth:`.Merger.unrounded`.

        Returns:
            A function of images (N, C, H, W) and of what an error calls them, that gives their
            logits and raises DataError where the images do not fit.
        """
        # Many networks are open at a time. Without their arenas a search on three PACS bundles
        # takes 0.8 GB in the place of 1.4, and 4% longer.
        session = reference_session.float_session(
            self._text, self._weights.files(tensors), threads=1, keeps_memory=False
        )
        port = session.get_inputs()[0].name
        threads = reference_session.threads_of_sessions()

        def run(images: Array, name: str) -> Array:
            try:
                with ThreadPoolExecutor(threads) as pool:
                    parts = list(
                        pool.map(
                            lambda rows: session.run(None, {port: rows})[0],
                            in_batches(images, BATCH),
                        )
                    )
            except EngineError as error:
                raise DataError(f"the images of {name} do not fit the model: {error}") from error
            return np.concatenate(parts)

        return run
