"""What several lowerings need: biases that fit int32, codes where kernels look for them, uint8."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..errors import ExportError
from ..graph.biases import bias_sites, fitted
from ..graph.edits import constant, insert
from ..graph.operators import REQUANTIZED
from ..graph.qdq import Quantizer, array, producer, quantizers

__all__ = [
    "as_int8",
    "fit_biases",
    "refuse_e4m3",
    "requantize_operands",
    "to_signed",
    "to_unsigned",
]


def fit_biases(model: ir.Model, shift: Mapping[str, int]) -> None:
    """Raise, in place, the scales with which a bias would leave int32.

    A bundle's biases fit as they are, unless it is of an earlier version, or one scale serves
    channels that need different ones: here every channel may have its own.

    Args:
        model: The graph as :func:`~hdrq_deploy.graph.model_files.load` gives it.
        shift: By how many bits the codes of each weight will be widened; 0 by default.

    Raises:
        ExportError: A bias is not finite.
    """
    sites = bias_sites(model)
    initializers = model.graph.initializers
    names = {n for s in sites for n in (s.codes, s.scale, s.bias, s.operand)}
    tensors = {name: array(initializers[name]) for name in names}
    shift = {site.codes: shift.get(site.codes, 0) for site in sites}
    for site in sites:
        if not np.isfinite(tensors[site.bias]).all():
            raise ExportError(
                f"found a bias {site.bias} that is not finite; integer kernels add a bias as a "
                "whole number: check the checkpoint, and calibrate again"
            )
    changed = fitted(tensors, sites, shift, split=True, whole=False)
    for name, tensor in changed.items():
        value = initializers[name]
        assert value.dtype is not None
        value.const_value = ir.tensor(tensor, dtype=value.dtype, name=name)
        value.shape = ir.Shape(tensor.shape)
    for site in sites:
        scale = initializers[site.scale]
        if site.scale in changed and changed[site.scale].ndim:
            for use in scale.uses():
                use.node.attributes["axis"] = ir.AttrInt64("axis", site.axis)


def refuse_e4m3(model: ir.Model, runtime: str) -> None:
    """Say that a runtime on the CPU computes no FP8.

    Args:
        model: The graph.
        runtime: Name of the runtime.

    Raises:
        ExportError: The codes are numbers of E4M3.
    """
    if any(q.floating for q in quantizers(model)):
        raise ExportError(
            f"found the grid 'e4m3' (FP8); {runtime} has no kernel on a CPU that multiplies FP8: "
            "calibrate with `grid` int8, or export with `engine` trt-rtx, trt or onnx"
        )


def as_int8(codes: ir.Value) -> None:
    """Hold 4-bit codes as int8, in place."""
    values = array(codes).astype(np.int8)
    codes.const_value = ir.tensor(values, name=codes.name)
    codes.dtype = ir.DataType.INT8


def requantize_operands(model: ir.Model, node: ir.Node) -> None:
    """Repeat Q and DQ, in place, behind pooling and reordering, where kernels look for them.

    The values are on the grid already, so the second pair changes nothing.
    """
    for i, operand in enumerate(node.inputs[:2]):
        origin = producer(operand)
        if origin is None or origin.op_type not in REQUANTIZED:
            continue
        while origin is not None and origin.op_type in REQUANTIZED:
            origin = producer(origin.inputs[0])
        if origin is None or origin.op_type != "DequantizeLinear" or len(origin.inputs) < 3:
            continue
        assert origin.inputs[2] is not None
        name, parameters = f"{node.name}/operand_{i}", list(origin.inputs[1:3])
        codes = insert(
            model, node, ir.node("QuantizeLinear", [operand, *parameters], name=f"{name}/q")
        )
        codes.name = f"{name}/codes"
        if origin.inputs[2].dtype is not None:
            codes.dtype = origin.inputs[2].dtype
        real = insert(
            model, node, ir.node("DequantizeLinear", [codes, *parameters], name=f"{name}/dq")
        )
        real.name, real.dtype = f"{name}/real", ir.DataType.FLOAT
        node.replace_input_with(i, real)


def to_signed(model: ir.Model, q: Quantizer) -> None:
    """Leave a quantizer its int8 codes, in place, without the integer Clip behind it.

    clip(x, lo*s, hi*s) before rounding gives the codes that clip(round(x/s), lo, hi) gives,
    because rounding keeps the order of values and lo and hi are integers.

    Args:
        model: The graph.
        q: A quantizer of signed codes.
    """
    if q.clip is None:
        return
    q.dequantize.replace_input_with(0, q.quantize.outputs[0])
    if q.hi == 127:  # int8 ends there by itself, and lo is 0 only where nothing is negative
        return
    source, name = q.quantize.inputs[0], q.quantize.name or "quantize"
    bounds = [
        constant(model, f"{name}/{side}", np.array(code, np.float32) * np.float32(q.scale))
        for side, code in (("low", q.lo), ("high", q.hi))
    ]
    node = ir.node("Clip", [source, *bounds], name=f"{name}/clip")
    clipped = insert(model, q.quantize, node)
    clipped.name = f"{name}/clipped"
    q.quantize.replace_input_with(0, clipped)


def to_unsigned(model: ir.Model, q: Quantizer, exact: bool = True) -> None:
    """Give a quantizer uint8 codes, in place; its real values stay.

    Signed codes c become c + 128 with zero point 128; codes of tensors that are never negative
    stay as they are with zero point 0, those of the grid ``paper`` (0 to 255) too. An integer Clip
    behind QuantizeLinear keeps the range, and that of a clamp in front of it.

    Args:
        model: The graph.
        q: A quantizer.
        exact: Keep that Clip where 8-bit codes of a tensor that is never negative end at 127.
            Otherwise they extend to 255 at the same scale.
    """
    name = q.quantize.name or "quantize"
    source = q.quantize.inputs[0]
    assert source is not None
    signed = q.lo < 0
    zero, lo, hi = (128, q.lo + 128, q.hi + 128) if signed else (0, 0, q.hi)
    if (lo, hi) == (0, 127) and not exact:
        hi = 255
    clamp = source.producer()
    if clamp is not None and clamp.op_type == "Clip":
        lo, hi = _absorb_clamp(clamp, q, zero, lo, hi)
    point = constant(model, f"{name}/zero", np.array(zero, np.uint8))
    q.quantize.replace_input_with(2, point)
    q.quantize.outputs[0].dtype = ir.DataType.UINT8
    if q.clip is not None:
        q.clip.outputs[0].dtype = ir.DataType.UINT8
    q.dequantize.replace_input_with(2, point)
    codes = q.quantize.outputs[0]
    if (lo, hi) != (0, 255):
        bounds = [
            constant(model, f"{name}/{side}", np.array(code, np.uint8))
            for side, code in (("low", lo), ("high", hi))
        ]
        codes = insert(
            model,
            q.dequantize,
            ir.node("Clip", [codes, *bounds], name=f"{name}/range"),
        )
        codes.name, codes.dtype = f"{name}/clipped", ir.DataType.UINT8
        codes.shape = q.quantize.outputs[0].shape
    q.dequantize.replace_input_with(0, codes)


def _absorb_clamp(clamp: ir.Node, q: Quantizer, zero: int, lo: int, hi: int) -> tuple[int, int]:
    """Turn a clamp of real values before a quantizer into one of its codes; returns their range.

    ONNX Runtime fuses Conv and Q, but with a Clip between them only where it ends beyond the
    codes; other engines compute one clamp in place of two.
    round(clamp(x, a, b) / s) = clamp(round(x / s), round(a / s), round(b / s)).
    """
    bounds = [*clamp.inputs[1:3], None, None][:2]
    if any(b is not None and (b.const_value is None or np.isnan(array(b)).any()) for b in bounds):
        return lo, hi
    source = clamp.inputs[0]
    ends = (source, clamp.outputs[0])
    if any(v is None or v.is_graph_output() or len(list(v.uses())) != 1 for v in ends):
        return lo, hi  # somebody else reads real values
    low, high = (
        None if b is None else float(np.rint(array(b).reshape(()) / np.float32(q.scale))) + zero
        for b in bounds
    )
    q.quantize.replace_input_with(0, source)
    if low is not None:
        lo = int(min(max(lo, low), hi))
    if high is not None:
        hi = int(max(min(hi, high), lo))
    return lo, hi
