"""Which layers of a graph have products whose sums leave 16 bits; see :mod:`.processors`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .operators import QDQ, QUANTIZABLE, REQUANTIZED, WITHIN_RANGE
from .qdq import array, in_blocks, producer, weight_dequantizer

__all__ = [
    "Reach",
    "codes_of",
    "holds_saturating_products",
    "holds_wrapping_weights",
    "largest_weight",
    "may_saturate",
    "reach",
    "weight_behind",
]

# Between its quantizer and a layer, codes may go through these.
_PASSED = QDQ | WITHIN_RANGE
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reach:
    """The codes that an operand can have, lowest and highest, and whether its type is signed."""

    low: int
    high: int
    signed: bool

    @property
    def unsigned(self) -> int:
        """The highest code as a kernel takes it, which reads signed codes as c + 128."""
        return self.high + 128 if self.signed else self.high

    @property
    def magnitude(self) -> int:
        """The largest magnitude of a code."""
        return max(-self.low, self.high)

    def within(self, low: float, high: float) -> Reach:
        """The codes that a clamp lets through."""
        lowest, highest = (int(np.clip(end, self.low, self.high)) for end in (low, high))
        return Reach(lowest, highest, self.signed)


def reach(value: ir.Value | None) -> Reach | None:
    """The codes of a layer's operand; None where it holds none."""
    node = producer(value)
    if node is None or node.op_type not in _PASSED:
        return None
    if node.op_type == "QuantizeLinear":
        return _written(node)
    parts = [found for each in node.inputs if (found := reach(each)) is not None]
    if not parts:
        return None
    whole = Reach(
        min(part.low for part in parts),
        max(part.high for part in parts),
        any(part.signed for part in parts),
    )
    bounds = _bounds(node)
    if bounds is None or bounds[0].dtype.kind == "f":
        return whole
    return whole.within(float(bounds[0]), float(bounds[1]))


def _written(quantize: ir.Node) -> Reach | None:
    """The codes that QuantizeLinear writes."""
    node = producer(quantize.inputs[0])
    while node is not None and node.op_type in REQUANTIZED:
        node = producer(node.inputs[0])
    dequantizes = node is not None and node.op_type == "DequantizeLinear"
    if node is not None and dequantizes and node.inputs[1:] == quantize.inputs[1:]:
        return reach(node.outputs[0])  # a second quantizer with the scale of the first
    point = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    zero = np.uint8(0) if point is None else array(point)
    if zero.dtype.kind not in "iu":
        return None
    kind = np.iinfo(zero.dtype)
    codes = Reach(int(kind.min), int(kind.max), kind.min < 0)
    front = producer(quantize.inputs[0])
    bounds = _bounds(front) if front is not None else None
    if bounds is None:
        return codes
    scale = array(quantize.inputs[1])
    return codes.within(*(float(np.rint(bound / scale) + zero) for bound in bounds))


def _bounds(node: ir.Node) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    """Both constant bounds of a Clip."""
    if node.op_type != "Clip" or len(node.inputs) != 3:
        return None
    low, high = (each.const_value if each is not None else None for each in node.inputs[1:])
    return None if low is None or high is None else (low.numpy(), high.numpy())


def largest_weight(operand: Reach | None) -> int:
    """The largest magnitude of int8 codes of which two products with an operand stay in int16."""
    return 128 if operand is None else min(128, 32767 // max(1, 2 * operand.unsigned))


def weight_behind(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a layer's weight, where the layer adds products of its codes.

    None of a depthwise convolution, whose kernels take every product alone, and of a weight that
    is computed, has a scale per block or is not int8.
    """
    if node.op_type not in QUANTIZABLE or len(node.inputs) < 2:
        return None
    dequantize, _ = weight_dequantizer(node.inputs[1])
    if dequantize is None or in_blocks(dequantize):
        return None
    codes = codes_of(dequantize.inputs[0])
    if codes is None or codes.min(initial=0) < -128 or codes.max(initial=0) > 127:
        return None
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    depthwise = groups > 1 and codes.shape[:2] == (groups, 1)
    return None if depthwise else dequantize


def codes_of(value: ir.Value | None) -> Codes | None:
    """A weight's codes as a kernel gets them: those of 4 bits may be widened in the graph."""
    steps: list[ir.Node] = []
    while value is not None and value.const_value is None:
        step = producer(value)
        if step is None or step.op_type not in {"Cast", "Mul", "Add"}:
            return None
        steps.append(step)
        value = step.inputs[0]
    if value is None:
        return None
    codes = array(value).astype(np.int64)
    for step in reversed(steps):
        if step.op_type != "Cast":
            other = array(step.inputs[1]).astype(np.int64)
            codes = codes * other if step.op_type == "Mul" else codes + other
    return codes


def may_saturate(node: ir.Node) -> bool:
    """Whether the sum of two products of a layer can leave int16, where its kernel adds in that."""
    limit = largest_weight(reach(node.inputs[0]))
    if limit == 128:  # as behind most ReLUs; no weight need be read
        return False
    dequantize, other = weight_behind(node), reach(node.inputs[1])
    codes = codes_of(dequantize.inputs[0]) if dequantize is not None else None
    if codes is not None:
        return bool(np.abs(codes).max(initial=0) > limit)
    return other is not None and other.signed and other.magnitude > limit


def holds_saturating_products(path: Path) -> bool:
    """Whether a lowered graph has layers that :func:`~.processors.saturates` is about."""
    return any(may_saturate(node) for node in ir.load(path).graph if node.op_type in QUANTIZABLE)


def holds_wrapping_weights(path: Path) -> bool:
    """Whether a lowered graph has weights that :func:`~.processors.products_wrap` is about."""
    for node in ir.load(path).graph:
        codes = codes_of(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.max(initial=0) <= 127 and (codes == -128).any():
            return True
    return False
