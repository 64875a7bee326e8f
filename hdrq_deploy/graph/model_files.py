"""A bundle's graph read into memory, and graphs written to a file or to bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ..formats.bundle import Bundle
from ..formats.engine_folder import DATA
from .edits import distinct_names

__all__ = ["OutsideTensors", "load", "save", "serialized", "with_tensors"]

# Shapes and zero points stay in the file; ONNX Runtime cannot read int64 shapes from outside.
_INLINE_BYTES = 1024


def with_tensors(bundle: Bundle, tensors: Mapping[str, npt.NDArray[Any]] | None = None) -> ir.Model:
    """The bundle's graph as it is written, with all its tensors in memory.

    Args:
        bundle: Gives the graph.
        tensors: Taken in place of the bundle's own, codes unpacked.
    """
    model = bundle.graph_ir()
    if tensors is None:
        ir.external_data.load_to_model(model)
        return model
    for name in bundle.manifest.graph_tensors:
        value = model.graph.initializers[name]
        assert value.dtype is not None
        value.const_value = ir.tensor(tensors[name], dtype=value.dtype, name=name)
    return model


def load(bundle: Bundle, tensors: Mapping[str, npt.NDArray[Any]] | None = None) -> ir.Model:
    """The graph of :func:`with_tensors` with its constants as initializers, as passes need it."""
    model = with_tensors(bundle, tensors)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write ``model`` with its larger tensors in ``model.onnx.data`` beside it.

    Values whose names are taken get others in ``model`` too (:func:`~.edits.distinct_names`).
    """
    distinct_names(model)
    ir.save(model, path, external_data=DATA, size_threshold_bytes=_INLINE_BYTES)


def serialized(model: ir.Model) -> bytes:
    """The model as the bytes of a file, after :func:`~.edits.distinct_names`."""
    distinct_names(model)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


class OutsideTensors:
    """Float tensors of a graph that lie in a file beside it; the file is only held in memory.

    The graph is written once, and opened as often as there are values for these tensors.

    Args:
        location: What the graph calls the file.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._size = 0

    def add(self, name: str, shape: Sequence[int]) -> ir.Value:
        """Add a tensor; the value that is returned is to be an initializer of the graph.

        Args:
            name: A name that was not added before.
            shape: Its shape.
        """
        assert name not in self._shapes, name
        length = 4 * math.prod(shape)
        tensor = ir.ExternalTensor(
            self._location,
            self._size,
            length,
            ir.DataType.FLOAT,
            shape=ir.Shape(shape),
            name=name,
        )
        self._shapes[name] = tuple(shape)
        self._size += length
        return ir.Value(name=name, const_value=tensor)

    def file(self, values: Mapping[str, npt.NDArray[Any]]) -> dict[str, bytes]:
        """Give the file, by its location, to :func:`.reference_session.open_session`.

        Without tensors there is no file.

        Args:
            values: Every tensor that was added, with as many elements as its shape has.

        Raises:
            KeyError, ValueError: A tensor is missing, or has another number of elements.
        """
        parts = [
            np.ascontiguousarray(values[name], np.float32).reshape(shape).tobytes()
            for name, shape in self._shapes.items()
        ]
        return {self._location: b"".join(parts)} if parts else {}
