"""The portable graph, which TensorRT takes too: signed int8 codes, ONNX's own operators.

Codes narrower than int8 are clipped as real values before they are rounded, because TensorRT
knows no integer Clip; 4-bit weights become int8. The numbers do not change.
"""

from __future__ import annotations

import onnx_ir as ir

from ..errors import ExportError
from ..graph.edits import drop_unused
from ..graph.operators import LINEAR, QUANTIZABLE
from ..graph.qdq import array, in_blocks, quantizers, weight_dequantizers
from .lowering_shared import as_int8, fit_biases, requantize_operands, to_signed

__all__ = ["lower_portable"]


def lower_portable(model: ir.Model, pack_int4: bool = False) -> ir.Model:
    """Edit a graph in place to signed int8 Q/DQ pairs with nothing between them; return it.

    Args:
        model: The graph as :func:`~hdrq_deploy.graph.model_files.load` gives it.
        pack_int4: Linear layers with one scale per channel keep INT4 weights, which TensorRT
            widens to int8 before every product; convolutions cannot.

    Raises:
        ExportError: The bundle's codes are unsigned, or a bias is not finite.
    """
    for q in list(quantizers(model)):
        if q.unsigned:
            raise ExportError(
                "found the grid 'paper' (codes 0 to 255); TensorRT executes signed int8 only: "
                "calibrate with `grid` int8, or export with `engine` ort"
            )
        to_signed(model, q)
    fit_biases(model, {})
    for node in list(model.graph):
        if node.op_type in QUANTIZABLE:
            requantize_operands(model, node)
    for dequantize in weight_dequantizers(model):
        codes = dequantize.inputs[0]
        assert codes is not None
        if codes.dtype != ir.DataType.INT4 or in_blocks(dequantize):
            continue
        if not (pack_int4 and _packable(dequantize)):
            as_int8(codes)
    drop_unused(model)
    return model


def _packable(dequantize: ir.Node) -> bool:
    """Whether TensorRT can hold a weight as INT4: an even number of codes, linear, per channel."""
    readers = [use.node for use in dequantize.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Transpose":
        readers = [use.node for use in readers[0].outputs[0].uses()]
    linear = all(node.op_type in LINEAR for node in readers)
    per_channel = array(dequantize.inputs[1]).ndim == 1
    return linear and per_channel and array(dequantize.inputs[0]).size % 2 == 0
