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
==================================  ======================================================

The last row: OpenVINO fuses a layer, the quantizer of its output, a sum with another tensor and
the quantizer of that into one kernel, and leaves the first quantizer out of it
(github.com/openvinotoolkit/openvino/pull/5405 proposed it). One code in seven of the sum was then
off by one on MobileNetV2. A Round of its own is kept, and computed in the same kernel.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.edits import constant, drop_unused, insert
from ..graph.operators import LAYERS, LINEAR, MOVES_VALUES, POOLS, QUANTIZABLE
from ..graph.qdq import Quantizer, array, in_blocks, producer, quantizers, weight_dequantizers
from .lowering_shared import as_int8, fit_biases, requantize_operands, to_signed, to_unsigned

__all__ = ["lower_openvino"]

# No kernel goes on from a quantizer into one of these.
_ENDS = LAYERS | MOVES_VALUES | POOLS | {"Concat", "Resize"}


def lower_openvino(model: ir.Model) -> ir.Model:
    """Edit a graph in place to what OpenVINO's CPU plugin runs in INT8; return it.

    Args:
        model: The graph as :func:`~hdrq_deploy.graph.model_files.load` gives it.

    Raises:
        ExportError: A bias is not finite.
    """
    fit_biases(model, {})
    for q in list(quantizers(model)):
        if not q.unsigned:
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
    drop_unused(model)
    return model


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
        node = ir.node(op, [value, *operands], name=f"{name}/{op.lower()}")
        value = insert(model, q.quantize, node)
        value.name, value.dtype = f"{node.name}/out", ir.DataType.FLOAT
        value.shape = source.shape if source is not None else None
    q.quantize.replace_input_with(0, value)
