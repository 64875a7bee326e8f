"""Finding quantizers and dequantizers in a graph, and reading its constants. Nothing is edited."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import ExportError
from ..numerics import e4m3
from .operators import CLAMPS, MOVES_VALUES

__all__ = [
    "Quantizer",
    "array",
    "batch_norm_epsilon",
    "chain",
    "in_blocks",
    "producer",
    "quantizer_behind",
    "quantizer_of",
    "quantizers",
    "transposes_weight",
    "weight_dequantizer",
    "weight_dequantizers",
    "weight_name",
]


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

    @property
    def floating(self) -> bool:
        """Whether the codes are numbers of E4M3."""
        return self.hi == e4m3.LARGEST


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value; None of an input, a constant or an absent operand."""
    return value.producer() if value is not None else None


def array(value: ir.Value | None) -> npt.NDArray[Any]:
    """The constant behind an initializer.

    Raises:
        ExportError: The value is computed, or absent.
    """
    if value is None or value.const_value is None:
        raise ExportError(
            f"found no constant behind {value.name if value else 'an input'}; scales and zero "
            "points must be constants: make the bundle again"
        )
    return value.const_value.numpy()


def batch_norm_epsilon(node: ir.Node) -> float:
    """What a BatchNormalization adds to the variance."""
    epsilon = node.attributes.get("epsilon")
    return epsilon.as_float() if epsilon is not None else 1e-5


def quantizers(model: ir.Model) -> Iterator[Quantizer]:
    """All activation quantizers, in graph order.

    Raises:
        ExportError: A QuantizeLinear has no DequantizeLinear behind it, several nodes read its
            codes, or its scale, zero point or range is not a constant that fits.
    """
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear":
            continue
        reader = _only_reader(node)
        clip = reader if reader.op_type == "Clip" else None
        dequantize = _only_reader(clip) if clip else reader
        if dequantize.op_type != "DequantizeLinear":
            raise ExportError(f"found {dequantize.op_type} behind {node.name}; needed a DQ")
        kind = None if node.inputs[2] is None else array(node.inputs[2]).dtype
        unsigned = kind == np.uint8
        lo, hi = (0, 255) if unsigned else (-128, 127)
        if kind == e4m3.DTYPE:
            lo, hi = -e4m3.LARGEST, e4m3.LARGEST
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


def _only_reader(node: ir.Node) -> ir.Node:
    readers = list(node.outputs[0].uses())
    if len(readers) != 1:
        raise ExportError(f"found {len(readers)} readers of {node.name}; needed one")
    return readers[0].node


def quantizer_of(value: ir.Value | None) -> tuple[list[ir.Node], ir.Node] | None:
    """The nodes that move an operand's values, nearest first, and the QuantizeLinear behind."""
    path: list[ir.Node] = []
    node = producer(value)
    while node is not None and node.op_type in MOVES_VALUES:
        path.append(node)
        node = producer(node.inputs[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    while node is not None and node.op_type != "QuantizeLinear":
        node = producer(node.inputs[0])
    return (path, node) if node is not None else None


def quantizer_behind(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear that alone reads a layer's output, perhaps behind ReLU or Clip."""
    uses = list(node.outputs[0].uses())
    while len(uses) == 1 and uses[0].node.op_type in CLAMPS:
        uses = list(uses[0].node.outputs[0].uses())
    reader = uses[0].node if len(uses) == 1 else None
    return reader if reader is not None and reader.op_type == "QuantizeLinear" else None


def chain(quantize: ir.Node) -> list[ir.Node]:
    """QuantizeLinear, perhaps Clip, DequantizeLinear."""
    nodes = [quantize]
    while nodes[-1].op_type != "DequantizeLinear":
        (use,) = nodes[-1].outputs[0].uses()
        nodes.append(use.node)
    return nodes


def weight_dequantizer(value: ir.Value | None) -> tuple[ir.Node | None, bool]:
    """The DequantizeLinear behind an operand, and whether a Transpose lies between."""
    node = producer(value)
    transposed = node is not None and node.op_type == "Transpose"
    if node is not None and transposed:
        node = producer(node.inputs[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None, False
    return node, transposed


def weight_dequantizers(model: ir.Model) -> list[ir.Node]:
    """DequantizeLinear nodes that read an initializer."""
    return [
        node
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].const_value is not None
    ]


def weight_name(node: ir.Node | None) -> str | None:
    """Name of the initializer behind a layer's second operand; None where it is computed."""
    value = node.inputs[1] if node is not None and len(node.inputs) > 1 else None
    while value is not None and value.const_value is None:
        source = producer(value)
        if source is None or not source.inputs:
            return None
        value = source.inputs[0]
    return value.name if value is not None else None


def transposes_weight(node: ir.Node) -> bool:
    """Whether a Gemm takes its weight as (out, in)."""
    flag = node.attributes.get("transB")
    return flag is not None and bool(flag.as_int())


def in_blocks(dequantize: ir.Node) -> bool:
    """Whether a weight has one scale per block of a channel."""
    block = dequantize.attributes.get("block_size")
    return block is not None and block.as_int() > 0
