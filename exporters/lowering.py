"""One graph per target, without a change in its numbers.

===========  =====================================================================
target       what is rewritten
===========  =====================================================================
portable     codes narrower than int8 are clipped as real values before they are
TensorRT     rounded (TensorRT knows no integer Clip); 4-bit weights as int8
ort          activations as uint8 (x86 has no fast signed kernel), 4-bit weights
             as INT4 widened by nodes that are folded at load, int32 bias for Gemm,
             ConvInteger for a convolution that writes the network's output, Max for
             ReLU and Sub for Add behind a linear layer whose output stays real
all          scales with which a bias would leave int32 (bundles of earlier versions)
===========  =====================================================================

Measured reasons: docs of the patterns that ONNX Runtime and TensorRT run in INT8.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import ExportError
from ..graph.biases import LARGEST, bias_sites, fitted
from ..graph.edits import constant, drop_unused, insert
from ..graph.operators import CLAMPS, LINEAR, QUANTIZABLE, REQUANTIZED
from ..graph.qdq import (
    Quantizer,
    array,
    in_blocks,
    producer,
    quantizer_behind,
    quantizers,
    weight_dequantizers,
)

__all__ = ["lower_ort", "lower_portable"]


def lower_portable(model: ir.Model, pack_int4: bool = False) -> ir.Model:
    """Signed int8 Q/DQ pairs and nothing between them; int8 weights. In place.

    clip(x, lo*s, hi*s) before rounding gives the codes that clip(round(x/s), lo, hi) gives,
    because rounding keeps the order of values and lo and hi are integers.

    Args:
        model: As ``graph.load`` gives it.
        pack_int4: Linear layers with one step per channel keep INT4 weights, which TensorRT
            widens to int8 before every product; convolutions cannot.
    """
    for q in list(quantizers(model)):
        if q.unsigned:
            raise ExportError(
                "found the grid 'paper' (codes 0 to 255); TensorRT executes signed int8 only: "
                "calibrate with --grid int8, or export with --engine ort"
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
    _fit_biases(model, {})
    for node in list(model.graph):
        if node.op_type in QUANTIZABLE:
            _requantize_operands(model, node)
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
    """An even number of codes of a linear layer, one step per channel."""
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


def lower_ort(model: ir.Model, exact: bool = True) -> ir.Model:
    """The graph that ONNX Runtime's CPU kernels run in INT8. In place.

    Signed codes c become c + 128 with zero point 128; codes of tensors that are never
    negative stay as they are with zero point 0. The range is kept by an integer Clip behind
    QuantizeLinear, which leaves every fusion intact but costs about 2%.

    Args:
        model: As ``graph.load`` gives it.
        exact: Keep that Clip where 8-bit codes of a tensor that is never negative end at
            127. Otherwise they go on to 255 at the same step: less saturates.
    """
    weights = _weights(model)
    shift = {str(codes.name): _spare_bits(array(codes).astype(np.int64)) for codes in weights}
    _fit_biases(model, shift)
    for q in list(quantizers(model)):
        if not q.unsigned:
            _to_unsigned(model, q, exact)
    for codes, dequantizers in weights.items():
        _widen_weight(model, codes, dequantizers, shift[str(codes.name)])
        for dequantize in dequantizers:
            _zero_point(model, dequantize)
    for node in list(model.graph):
        if node.op_type in QUANTIZABLE:
            _requantize_operands(model, node)
    # A clamp that was absorbed must not count as a reader of its convolution.
    drop_unused(model)
    for node in list(model.graph):
        if node.op_type == "MatMul":
            _part_bias(model, node)
        if node.op_type in LINEAR:
            _settle_clamps(model, node)
        if node.op_type == "Gemm":
            _integer_bias(model, node)
        elif node.op_type == "Conv" and quantizer_behind(node) is None:
            _integer_convolution(model, node)
    drop_unused(model)
    return model


def _to_unsigned(model: ir.Model, q: Quantizer, exact: bool) -> None:
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
    codes. round(clamp(x, a, b) / s) = clamp(round(x / s), round(a / s), round(b / s)).
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


def _weights(model: ir.Model) -> dict[ir.Value, list[ir.Node]]:
    """The codes of every weight, and the DequantizeLinear nodes that read them, in graph order."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for dequantize in weight_dequantizers(model):
        codes = dequantize.inputs[0]
        if codes is not None and not in_blocks(dequantize):  # MatMulNBits takes those as they are
            found.setdefault(codes, []).append(dequantize)
    return found


def _fit_biases(model: ir.Model, shift: Mapping[str, int]) -> None:
    """Raise the scales with which a bias would leave int32. In place.

    A bundle's biases fit as they are, unless it is of an earlier version, or one scale serves
    channels that need different ones: here every channel may have its own.

    Args:
        model: As ``graph.load`` gives it.
        shift: By how many bits the codes of each weight will be widened; 0 by default.
    """
    sites = bias_sites(model)
    values = model.graph.initializers
    names = {n for s in sites for n in (s.codes, s.scale, s.bias, s.operand)}
    tensors = {name: array(values[name]) for name in names}
    shift = {site.codes: shift.get(site.codes, 0) for site in sites}
    for site in sites:
        if not np.isfinite(tensors[site.bias]).all():
            raise ExportError(
                f"found a bias {site.bias} that is not finite; integer kernels add a bias as a "
                "whole number: check the checkpoint, and calibrate again"
            )
    changed = fitted(tensors, sites, shift, split=True, whole=False)
    for name, tensor in changed.items():
        value = values[name]
        assert value.dtype is not None
        value.const_value = ir.tensor(tensor, dtype=value.dtype, name=name)
        value.shape = ir.Shape(tensor.shape)
    for site in sites:
        scale = values[site.scale]
        if site.scale in changed and changed[site.scale].ndim:
            for use in scale.uses():
                use.node.attributes["axis"] = ir.AttrInt64("axis", site.axis)


def _widen_weight(
    model: ir.Model, codes: ir.Value, dequantizers: list[ir.Node], shift: int
) -> None:
    """Codes of b < 8 bits times 2^(8-b), the step divided by as much: the same real values.

    ONNX Runtime rounds every bias to s_x * s_w, which is coarse for few bits; this makes it
    finer. INT4 initializers stay packed in the file: Cast, Mul and Cast are folded at load.
    """
    if shift:
        scale = array(dequantizers[0].inputs[1]) / np.float32(1 << shift)
        finer = constant(model, f"{codes.name}/step", scale.astype(np.float32))
        for dequantize in dequantizers:
            dequantize.replace_input_with(1, finer)
    if codes.dtype != ir.DataType.INT4:
        if shift:
            wide = array(codes).astype(np.int64) << shift
            codes.const_value = ir.tensor(wide.astype(np.int8), name=codes.name)
        return
    factor = constant(model, f"{codes.name}/factor", np.array(1 << shift, np.int32))
    parts = [ir.node("Cast", [codes], {"to": ir.DataType.INT32}, name=f"{codes.name}/wide")]
    parts.append(ir.node("Mul", [parts[0].outputs[0], factor], name=f"{codes.name}/shift"))
    parts.append(
        ir.node("Cast", [parts[1].outputs[0]], {"to": ir.DataType.INT8}, name=f"{codes.name}/cast")
    )
    kinds = (ir.DataType.INT32, ir.DataType.INT32, ir.DataType.INT8)
    for part, kind in zip(parts, kinds, strict=True):
        insert(model, dequantizers[0], part)
        part.outputs[0].name = f"{part.name}/out"
        part.outputs[0].dtype, part.outputs[0].shape = kind, codes.shape
    parts[-1].outputs[0].name = f"{codes.name}_int8"
    for dequantize in dequantizers:
        dequantize.replace_input_with(0, parts[-1].outputs[0])


def _spare_bits(codes: npt.NDArray[np.int64]) -> int:
    """How far all codes can be shifted left within int8; 0 where all of them are 0."""
    if not codes.any():
        return 0
    shift = 0
    while shift < 7 and codes.min() << shift + 1 >= -128 and codes.max() << shift + 1 <= 127:
        shift += 1
    return shift


def _zero_point(model: ir.Model, dequantize: ir.Node) -> None:
    """Write the zero point out: without one ONNX Runtime 1.32 does not fuse Gemm to QGemm."""
    codes, scale = dequantize.inputs[:2]
    if len(dequantize.inputs) > 2 or codes is None:
        return
    zeros = constant(model, f"{dequantize.name}/zero", np.zeros(array(scale).shape, np.int8))
    dequantize.resize_inputs(3)
    dequantize.replace_input_with(2, zeros)


def _requantize_operands(model: ir.Model, node: ir.Node) -> None:
    """Repeat Q and DQ behind pooling and reordering, where kernels look for them.

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


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = producer(value)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _integer_bias(model: ir.Model, node: ir.Node) -> None:
    """Give Gemm an int32 bias (step s_x * s_w): without it ONNX Runtime keeps it in float."""
    operand, weight = _dequantizer(node.inputs[0]), _dequantizer(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if operand is None or weight is None or bias is None or bias.const_value is None:
        return
    real = array(bias).astype(np.float64)
    scales = [array(dq.inputs[1]).astype(np.float64) for dq in (operand, weight)]
    step = np.broadcast_to(scales[0] * scales[1], real.shape).astype(np.float32)
    codes = np.rint(real / step)
    if np.abs(codes).max(initial=0) > 2 * LARGEST - 1:
        raise ExportError(
            f"{node.name}: found a bias of {np.abs(real).max():g} in steps of {step.min():g}; "
            "needed one that fits int32: calibrate again"
        )
    codes = codes.astype(np.int32)
    uniform = scales[1].ndim == 0
    inputs = [
        constant(model, f"{node.name}/bias_codes", codes),
        constant(model, f"{node.name}/bias_scale", step[0].reshape(()) if uniform else step),
    ]
    dequantize = ir.node(
        "DequantizeLinear",
        inputs,
        {} if uniform else {"axis": 0},
        name=f"{node.name}/bias",
    )
    out = insert(model, node, dequantize)
    out.name, out.dtype, out.shape = f"{node.name}/bias_real", ir.DataType.FLOAT, bias.shape
    node.replace_input_with(2, out)


def _part_bias(model: ir.Model, node: ir.Node) -> None:
    """Subtract the negative bias behind a MatMul of matrices whose sum stays real.

    ONNX Runtime fuses MatMul and Add to Gemm, with a bias in float that keeps the layer in float
    unless it writes codes. Sub it leaves alone.
    """
    out = node.outputs[0]
    uses = list(out.uses())
    if out.is_graph_output() or len(uses) != 1 or len(out.shape or ()) != 2:
        return
    add = uses[0].node
    if add.op_type != "Add" or quantizer_behind(add) is not None:
        return
    bias = add.inputs[1 - uses[0].idx]
    if bias is None or bias.const_value is None:
        return
    negative = constant(model, f"{node.name}/negative_bias", -array(bias))
    made = insert(model, add, ir.node("Sub", [out, negative], name=add.name))
    _replace(model, add, made)


def _settle_clamps(model: ir.Model, node: ir.Node) -> None:
    """Turn ReLU and Clip behind a layer into Max and Min where they give real values on.

    ONNX Runtime takes the layer and its clamp for one, looks in vain for codes behind them, and
    then computes both in float (FusedGemm). It does not look behind Max.
    """
    readers = [use.node for use in node.outputs[0].uses()]
    for clamp in dict.fromkeys(readers):
        alone = len(readers) == 1 and (_last(clamp) or _clamps_codes(clamp))
        if clamp.op_type in CLAMPS and not alone:
            _as_max(model, clamp)


def _last(clamp: ir.Node) -> bool:
    return clamp.outputs[0].is_graph_output() and not list(clamp.outputs[0].uses())


def _clamps_codes(clamp: ir.Node) -> bool:
    """ReLU before uint8 codes from 0 on, which end there by themselves."""
    readers = [use.node for use in clamp.outputs[0].uses()]
    if clamp.op_type != "Relu" or len(readers) != 1:
        return False
    reader = readers[0]
    return reader.op_type == "QuantizeLinear" and not array(reader.inputs[2])


def _as_max(model: ir.Model, clamp: ir.Node) -> None:
    bounds: list[ir.Value | None] = [*clamp.inputs[1:3], None, None][:2]
    if clamp.op_type == "Relu":
        bounds[0] = constant(model, f"{clamp.name}/zero", np.array(0, np.float32))
    value = clamp.inputs[0]
    for op, bound in zip(("Max", "Min"), bounds, strict=True):
        if bound is not None:
            name = f"{clamp.name}/{op.lower()}"
            value = insert(model, clamp, ir.node(op, [value, bound], name=name))
            value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, clamp.outputs[0].shape
    if value is not None and value is not clamp.inputs[0]:
        _replace(model, clamp, value)


def _replace(model: ir.Model, node: ir.Node, new: ir.Value) -> None:
    """Let all readers of a node read ``new``, which takes its name; remove the node."""
    old, name = node.outputs[0], node.outputs[0].name
    new.shape, new.dtype = old.shape, ir.DataType.FLOAT
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node)
    new.name = name


def _integer_convolution(model: ir.Model, node: ir.Node) -> None:
    """ConvInteger, then scale and bias: a convolution with codes in and real values out."""
    operand, weight = _dequantizer(node.inputs[0]), _dequantizer(node.inputs[1])
    if operand is None or weight is None or weight.inputs[0] is None:
        return
    name = node.name or "conv"
    rank = len(weight.inputs[0].shape or ())
    shape = (1, -1, *[1] * (rank - 2))
    step = (array(operand.inputs[1]) * array(weight.inputs[1])).astype(np.float32)
    inputs = [operand.inputs[0], weight.inputs[0], operand.inputs[2]]
    integer = ir.node("ConvInteger", inputs, dict(node.attributes), name=name)
    steps = [
        integer,
        ir.node("Cast", [integer.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}/real"),
    ]
    factor = constant(model, f"{name}/step", step.reshape(shape) if step.ndim else step)
    steps.append(ir.node("Mul", [steps[-1].outputs[0], factor], name=f"{name}/scale"))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(model, f"{name}/bias", array(node.inputs[2]).reshape(shape))
        steps.append(ir.node("Add", [steps[-1].outputs[0], bias], name=f"{name}/add"))
    for part, label in zip(steps, ("int", "real", "scaled", "biased"), strict=False):
        part.outputs[0].name = f"{name}/{label}"
        insert(model, node, part)
    _replace(model, node, steps[-1].outputs[0])
