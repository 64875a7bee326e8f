"""The graph that OpenVINO's CPU plugin runs in INT8, without a change in its numbers.

==================================  ======================================================
what                                becomes
==================================  ======================================================
activations                         uint8 codes, their range kept by an integer Clip, which
                                    OpenVINO computes inside the kernel in front
operands of matrix products that    int8 codes with zero point 0: another one is subtracted in
are negative too                    front of a linear layer, and makes a product of two
                                    activations float. Of convolutions they are uint8, for int8
                                    and uint8 codes that are concatenated come out wrong
4-bit weights                       int8: 4-bit ones it would multiply in float
quantizer between a layer and a     the same with Div, Round and Mul in front of it, because
residual sum or the like            OpenVINO leaves out the rounding there
layer whose products saturate on    two layers, each of half its codes, and their sum, which
this processor                      OpenVINO adds in the second kernel (``graph/products.py``)
==================================  ======================================================

On the last row but one: OpenVINO fuses a layer, the quantizer of its output, a sum with another
tensor and the quantizer of that into one kernel, and leaves the first quantizer out of it
(github.com/openvinotoolkit/openvino/pull/5405 proposed it). One code in seven of the sum was then
off by one on MobileNetV2. A Round of its own is kept, and computed in the same kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.edits import constant, drop_unused, insert
from ..graph.operators import LAYERS, LINEAR, MOVES_VALUES, POOLS, QUANTIZABLE
from ..graph.products import may_saturate, weight_behind
from ..graph.qdq import (
    Quantizer,
    array,
    in_blocks,
    producer,
    quantizer_of,
    quantizers,
    weight_dequantizers,
)
from .lowering_shared import as_int8, fit_biases, requantize_operands, to_signed, to_unsigned

__all__ = ["lower_openvino"]

# No kernel goes on from a quantizer into one of these.
_ENDS = LAYERS | MOVES_VALUES | POOLS | {"Concat", "Resize"}


def lower_openvino(model: ir.Model, saturates: bool = False) -> ir.Model:
    """Edit a graph in place to what OpenVINO's CPU plugin runs in INT8; return it.

    Args:
        model: The graph as :func:`~hdrq_deploy.graph.model_files.load` gives it.
        saturates: Sums of two products of uint8 and int8 saturate on this processor
            (:func:`~hdrq_deploy.graph.processors.saturates`).

    Raises:
        ExportError: A bias is not finite.
    """
    fit_biases(model, {})
    for q in list(quantizers(model)):
        signed = q.lo < 0 and _is_multiplied(q.dequantize.outputs[0])
        (to_signed if signed else to_unsigned)(model, q)
        if _may_lose_its_rounding(q):
            _round_apart(model, q)
    for node in list(model.graph):
        if node.op_type in QUANTIZABLE:
            requantize_operands(model, node)
    for dequantize in weight_dequantizers(model):
        codes = dequantize.inputs[0]
        assert codes is not None
        if codes.dtype == ir.DataType.INT4 and not in_blocks(dequantize):
            as_int8(codes)
    if saturates:
        for node in list(model.graph):
            if node.op_type in QUANTIZABLE:
                _keep_in_int16(model, node)
    drop_unused(model)
    return model


def _keep_in_int16(model: ir.Model, node: ir.Node) -> None:
    """Compute a layer as the sum of two, in place, where sums of two products could saturate."""
    if not may_saturate(node):
        return
    dequantize = weight_behind(node)
    if dequantize is None:
        _halve(model, node, _cut(model, node))
        return
    codes = array(dequantize.inputs[0]).astype(np.int64)
    parts = {"half": codes >> 1, "rest": codes - (codes >> 1)}
    _halve(model, node, [_with_codes(model, node, dequantize, *part) for part in parts.items()])


def _halve(model: ir.Model, node: ir.Node, parts: Sequence[ir.Value]) -> None:
    """Compute a layer as the sum of two, in place, whose second operands add up to its own."""
    out = node.outputs[0]
    node.replace_input_with(1, parts[0])
    other = ir.node(
        node.op_type, [node.inputs[0], parts[1]], dict(node.attributes), name=f"{node.name}/rest"
    )
    total = ir.node("Add", [out, other.outputs[0]], name=f"{node.name}/total")
    ir.convenience.replace_all_uses_with(out, total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, out)  # it was one of those that read the layer
    model.graph.insert_after(node, [other, total])
    for value in (other.outputs[0], total.outputs[0]):
        value.shape, value.dtype = out.shape, ir.DataType.FLOAT
    total.outputs[0].name, out.name = out.name, f"{node.name}/half_real"
    other.outputs[0].name = f"{other.name}_real"


def _cut(model: ir.Model, node: ir.Node) -> list[ir.Value]:
    """The second operand of a product of activations as the sum of codes up to 64."""
    origin, operand = quantizer_of(node.inputs[1]), node.inputs[1]
    assert origin is not None and operand is not None
    parameters = list(origin[1].inputs[1:])
    scale = array(parameters[0]).astype(np.float32)
    bounds = [
        constant(model, f"{node.name}/{side}", np.float32(code) * scale)
        for side, code in (("low", -64), ("high", 64))
    ]

    def coded(name: str, value: ir.Value) -> ir.Value:
        for op, others in (("Clip", bounds), ("QuantizeLinear", parameters)):
            value = _step(
                model, node, f"{node.name}/{name}/{op}", op, [value, *others], operand.shape
            )
        value.dtype = ir.DataType.INT8
        inputs = [value, *parameters]
        return _step(
            model, node, f"{node.name}/{name}/real", "DequantizeLinear", inputs, operand.shape
        )

    half = coded("half", operand)
    left = _step(model, node, f"{node.name}/left", "Sub", [operand, half], operand.shape)
    return [half, coded("rest", left)]


def _step(
    model: ir.Model,
    before: ir.Node,
    name: str,
    op: str,
    inputs: Sequence[ir.Value | None],
    shape: ir.Shape | None,
    attributes: Mapping[str, ir.Attr] | None = None,
) -> ir.Value:
    """A node in front of another, and what it computes."""
    value = insert(model, before, ir.node(op, inputs, attributes, name=name))
    value.name, value.dtype, value.shape = f"{name}/out", ir.DataType.FLOAT, shape
    return value


def _with_codes(
    model: ir.Model, node: ir.Node, dequantize: ir.Node, name: str, codes: npt.NDArray[np.int64]
) -> ir.Value:
    """A layer's second operand, made as before of other codes."""
    last = producer(node.inputs[1])
    path = [dequantize] if last is dequantize or last is None else [dequantize, last]
    value = constant(model, f"{node.name}/{name}_codes", codes.astype(np.int8))
    for step in path:
        inputs = [value, *step.inputs[1:]]
        shape, attributes = step.outputs[0].shape, dict(step.attributes)
        label = f"{node.name}/{name}/{step.op_type}"
        value = _step(model, node, label, step.op_type, inputs, shape, attributes)
    return value


def _is_multiplied(value: ir.Value) -> bool:
    """Whether a matrix product reads a value, perhaps after it was moved around."""
    readers = [use.node for use in value.uses()]
    return any(
        node.op_type in LINEAR
        or (node.op_type in MOVES_VALUES and any(map(_is_multiplied, node.outputs)))
        for node in readers
    )


def _may_lose_its_rounding(q: Quantizer) -> bool:
    """Whether a kernel could go on behind the quantizer, with the values that it gives."""
    if producer(q.quantize.inputs[0]) is None:
        return False
    readers = [use.node for use in q.dequantize.outputs[0].uses()]
    return len(readers) == 1 and readers[0].op_type not in _ENDS


def _round_apart(model: ir.Model, q: Quantizer) -> None:
    """Bring values to the grid, in place, before the quantizer; their ends are left to that."""
    source, name = q.quantize.inputs[0], q.quantize.name or "quantize"
    scale = constant(model, f"{name}/unit", array(q.quantize.inputs[1]).astype(np.float32))
    value = source
    for op, operands in (("Div", [scale]), ("Round", []), ("Mul", [scale])):
        inputs = [value, *operands]
        shape = source.shape if source is not None else None
        value = _step(model, q.quantize, f"{name}/{op.lower()}", op, inputs, shape)
    q.quantize.replace_input_with(0, value)
