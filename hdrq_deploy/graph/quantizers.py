"""Reading and rewriting the bundle's graph with onnx_ir."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from ..errors import ExportError
from ..formats.bundle import Bundle
from ..formats.engine_folder import DATA
from .qdq import distinct_names

__all__ = ["Quantizer", "load", "quantizers", "save"]

# Shapes and zero points stay in the file; ONNX Runtime cannot read int64 shapes from outside.
_INLINE_BYTES = 1024


@dataclass(frozen=True)
class Quantizer:
    """QuantizeLinear, an optional integer Clip, DequantizeLinear; codes ``lo`` to ``hi``."""

    quantize: ir.Node
    clip: ir.Node | None
    dequantize: ir.Node
    scale: float
    lo: int
    hi: int
    unsigned: bool


def load(bundle: Bundle, tensors: Mapping[str, npt.NDArray[Any]] | None = None) -> ir.Model:
    """The bundle's graph with all its tensors in memory and constants as initializers.

    Args:
        bundle: Gives the graph.
        tensors: Taken in place of the bundle's own, codes unpacked.
    """
    model = bundle.graph_ir()
    if tensors is None:
        ir.external_data.load_to_model(model)
    else:
        for name in bundle.manifest.graph_tensors:
            value = model.graph.initializers[name]
            assert value.dtype is not None
            value.const_value = ir.tensor(tensors[name], dtype=value.dtype, name=name)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write ``model`` with its larger tensors in ``model.onnx.data`` beside it."""
    distinct_names(model)
    ir.save(model, path, external_data=DATA, size_threshold_bytes=_INLINE_BYTES)


def array(value: ir.Value | None) -> npt.NDArray[Any]:
    """The constant behind an initializer."""
    if value is None or value.const_value is None:
        raise ExportError(
            f"found no constant behind {value.name if value else 'an input'}; scales and zero "
            "points must be constants: make the bundle again"
        )
    return value.const_value.numpy()


def quantizers(model: ir.Model) -> Iterator[Quantizer]:
    """All activation quantizers, in graph order."""
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear":
            continue
        reader = _only_reader(node)
        clip = reader if reader.op_type == "Clip" else None
        dequantize = _only_reader(clip) if clip else reader
        if dequantize.op_type != "DequantizeLinear":
            raise ExportError(f"found {dequantize.op_type} behind {node.name}; needed a DQ")
        unsigned = node.inputs[2] is not None and array(node.inputs[2]).dtype == np.uint8
        lo, hi = (0, 255) if unsigned else (-128, 127)
        if clip:
            lo, hi = _range(clip, lo, hi)
        scale = float(array(node.inputs[1]))
        yield Quantizer(node, clip, dequantize, scale, lo, hi, unsigned)


def _range(clip: ir.Node, least: int, most: int) -> tuple[int, int]:
    """Lowest and highest code that a Clip lets through, of those that the type has."""
    bounds = [array(value) for value in clip.inputs[1:3]]
    if any(bound.size != 1 or bound.dtype.kind not in "iu" for bound in bounds):
        raise ExportError(f"found {clip.name} without two whole bounds; make the bundle again")
    lo, hi = (int(bound.reshape(())) for bound in bounds)
    if not least <= lo <= 0 < hi <= most:
        raise ExportError(
            f"found codes {lo} to {hi} at {clip.name}; needed a range with 0 within {least} to "
            f"{most}: make the bundle again"
        )
    return lo, hi


def weight_dequantizers(model: ir.Model) -> list[ir.Node]:
    """DequantizeLinear nodes that read an initializer."""
    return [
        node
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].const_value is not None
    ]


def in_blocks(dequantize: ir.Node) -> bool:
    """One step per block of a channel."""
    block = dequantize.attributes.get("block_size")
    return block is not None and block.as_int() > 0


def insert(model: ir.Model, before: ir.Node, node: ir.Node) -> ir.Value:
    """Put ``node`` before another and return its output."""
    model.graph.insert_before(before, node)
    return node.outputs[0]


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads."""
    RemoveUnusedNodesPass()(model)


def _only_reader(node: ir.Node) -> ir.Node:
    readers = list(node.outputs[0].uses())
    if len(readers) != 1:
        raise ExportError(f"found {len(readers)} readers of {node.name}; needed one")
    return readers[0].node
