"""The portable graph, which TensorRT takes too: signed int8 codes, ONNX's own operators.

Codes narrower than int8 are clipped as real values before they are rounded, because TensorRT
knows no integer Clip; 4-bit weights become int8. The numbers do not change.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..errors import ExportError
from ..graph.edits import constant, drop_unused, insert
from ..graph.operators import LINEAR, QUANTIZABLE
from ..graph.qdq import array, in_blocks, quantizers, weight_dequantizers
from .lowering_shared import fit_biases, requantize_operands

__all__ = ["lower_portable"]


def lower_portable(model: ir.Model, pack_int4: bool = False) -> ir.Model:
    """Edit a graph in place to signed int8 Q/DQ pairs with nothing between them; return it.

    clip(x, lo*s, hi*s) before rounding gives the codes that clip(round(x/s), lo, hi) gives,
    because rounding keeps the order of values and lo and hi are integers.

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
        if q.clip is None:
            continue
        if q.hi == 127:  # int8 ends there by itself, and lo is 0 only where nothing is negative
            q.dequantize.replace_input_with(0, q.quantize.outputs[0])
            continue
        source = q.quantize.inputs[0]
        name = q.quantize.name or "quantize"
        scale = np.float32(q.scale)
        bounds = [
            constant(model, f"{name}/{side}", np.array(code, np.float32) * scale)
            for side, code in (("low", q.lo), ("high", q.hi))
        ]
        clipped = insert(
            model,
            q.quantize,
            ir.node("Clip", [source, *bounds], name=f"{name}/clip"),
        )
        clipped.name = f"{name}/clipped"
        q.quantize.replace_input_with(0, clipped)
        q.dequantize.replace_input_with(0, q.quantize.outputs[0])
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
            _as_int8(codes)
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


def _as_int8(codes: ir.Value) -> None:
    values = array(codes).astype(np.int8)
    codes.const_value = ir.tensor(values, name=codes.name)
    codes.dtype = ir.DataType.INT8
