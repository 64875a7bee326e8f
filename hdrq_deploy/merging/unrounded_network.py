"""One session that runs a network at any merge weights, its weights as inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..errors import DataError
from ..formats.bundle import Bundle
from ..graph import reference_session
from ..graph.model_files import serialized
from ..numerics.batches import in_batches
from ..typing import Array

__all__ = ["BATCH", "Network", "put_real"]

# Activations of so many images stay in the caches of a core.
BATCH = 16


def put_real(graph: ir.Graph, real: ir.Value) -> None:
    """Let a graph read real weights in place of the codes of their name, and of their dequantizer.

    Whether ``real`` is an input of the graph or an initializer is the caller's to say.
    """
    (use,) = graph.initializers.pop(str(real.name)).uses()
    use.node.outputs[0].replace_all_uses_with(real)
    graph.remove(use.node, safe=True)


class Network:
    """A bundle's graph in one session whose weights, scales and biases are inputs.

    Weights come as real values in place of codes, so that the mean of several models need not
    be rounded to be run, and one session serves all merge weights.
    """

    def __init__(self, bundle: Bundle) -> None:
        model = bundle.graph_ir()
        graph = model.graph
        tensors = bundle.manifest.tensors
        for name, value in list(graph.initializers.items()):
            if name not in tensors:
                continue
            if tensors[name].role == "codes":
                shape = value.shape
                real = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
                put_real(graph, real)
                graph.inputs.append(real)
                continue
            graph.initializers.pop(name)
            if value.uses():
                value.const_value = None
                graph.inputs.append(value)
        # Nothing reads the scales of the codes any more.
        graph.inputs[:] = [value for value in graph.inputs if value.uses()]
        self._session = reference_session.unfused_session(serialized(model))
        self._image, *rest = (port.name for port in self._session.get_inputs())
        self._tensors = set(rest)

    def __call__(self, tensors: Mapping[str, Array], images: Array, name: str) -> Array:
        """Logits of ``images``; ``name`` is what an error calls them."""
        feeds = {key: np.asarray(tensors[key]) for key in self._tensors}
        try:
            parts = [
                self._session.run(None, {**feeds, self._image: rows})[0]
                for rows in in_batches(images, BATCH)
            ]
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            raise DataError(
                f"the images of {name} do not fit the model: {' '.join(str(error).split())[:200]}"
            ) from error
        return np.concatenate(parts)
