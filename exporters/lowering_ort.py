"""The graph that ONNX Runtime's CPU kernels run in INT8, without a change in its numbers.

==================================  ======================================================
what                                becomes
==================================  ======================================================
activations                         uint8 codes (x86 has no fast signed kernel)
4-bit weights                       INT4, widened by nodes that are folded at load
bias of Gemm                        int32
convolution with real output        ConvInteger, then scale and bias in float; its weights
                                    are uint8 with zero point 128: ONNX Runtime 1.23 has no
                                    other kernel, and this one is 4 times as fast in 1.32
ReLU behind a linear layer whose    Max, and Add becomes Sub: ONNX Runtime would fuse them
output stays real                   with the layer and compute both in float
scale with which a bias would       a larger one (bundles of earlier versions)
leave int32
weights whose products this         uint8 with zero point 128, which another kernel takes; those
processor adds wrongly              adds in 32 bits (``graph/products.py``)
==================================  ======================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import ExportError
from ..graph.biases import LARGEST
from ..graph.edits import constant, drop_unused, insert
from ..graph.operators import CLAMPS, LINEAR, QUANTIZABLE
from ..graph.products import largest_weight, reach, weight_behind
from ..graph.qdq import (
    array,
    in_blocks,
    producer,
    quantizer_behind,
    quantizers,
    weight_dequantizers,
)
from .lowering_shared import fit_biases, requantize_operands, to_unsigned

__all__ = ["lower_ort"]

# The code of which two products wrap, and the zero point of weights that are held as uint8.
_WRAPS, _MIDDLE = -128, 128


def lower_ort(
    model: ir.Model, exact: bool = True, wraps: bool = False, saturates: bool = False
) -> ir.Model:
    """Edit a graph in place to what ONNX Runtime's CPU kernels run in INT8; return it.

    Signed codes c become c + 128 with zero point 128; codes of tensors that are never
    negative stay as they are with zero point 0. The range is kept by an integer Clip behind
    QuantizeLinear, which leaves every fusion intact but costs about 2%.

    Args:
        model: The graph as :func:`~hdrq_deploy.graph.model_files.load` gives it.
        exact: Keep that Clip where 8-bit codes of a tensor that is never negative end at
            127. Otherwise they extend to 255 at the same scale: less saturates.
        wraps: Products of -128 and -128 wrap on this processor
            (:func:`~hdrq_deploy.graph.processors.products_wrap`).
        saturates: Sums of two products of uint8 and int8 saturate on it
            (:func:`~hdrq_deploy.graph.processors.saturates`).

    Raises:
        ExportError: A bias is not finite, or does not fit int32.
    """
    for q in list(quantizers(model)):
        to_unsigned(model, q, exact)
    weights = _weights(model)
    limits = _limits(model) if saturates else {}
    shift, raised = {}, set()
    for codes in weights:
        name, values = str(codes.name), array(codes).astype(np.int64)
        # No bit less on such a processor: biases of a bundle are whole at this spacing.
        shift[name] = _spare_bits(values)
        if np.abs(values).max(initial=0) << shift[name] > limits.get(codes, 128):
            raised.add(name)
        if wraps and int(values.min(initial=0)) << shift[name] == _WRAPS:
            raised.add(name)
    fit_biases(model, shift)
    for codes, dequantizers in weights.items():
        name = str(codes.name)
        _widen_weight(model, codes, dequantizers, shift[name], name in raised)
        for dequantize in dequantizers:
            _zero_point(model, dequantize)
    for node in list(model.graph):
        if node.op_type in QUANTIZABLE:
            requantize_operands(model, node)
    # A clamp that was absorbed must not count as a reader of its convolution.
    drop_unused(model)
    for node in list(model.graph):
        if node.op_type == "MatMul":
            _subtract_bias(model, node)
        if node.op_type in LINEAR:
            _settle_clamps(model, node)
        if node.op_type == "Gemm":
            _integer_bias(model, node)
        elif node.op_type == "Conv" and quantizer_behind(node) is None:
            _integer_convolution(model, node)
    drop_unused(model)
    return model


def _weights(model: ir.Model) -> dict[ir.Value, list[ir.Node]]:
    """The codes of every weight, and the DequantizeLinear nodes that read them, in graph order."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for dequantize in weight_dequantizers(model):
        codes = dequantize.inputs[0]
        if codes is not None and not in_blocks(dequantize):  # MatMulNBits takes those as they are
            readers.setdefault(codes, []).append(dequantize)
    return readers


def _widen_weight(
    model: ir.Model, codes: ir.Value, dequantizers: list[ir.Node], shift: int, unsigned: bool
) -> None:
    """Codes of b < 8 bits times 2^(8-b), the scale divided by as much: the same real values.

    ONNX Runtime rounds every bias to s_x * s_w, which is coarse for few bits; this makes it
    finer. INT4 initializers stay packed in the file: Cast, Mul and Cast are folded at load.
    ``unsigned`` makes them uint8, 128 more than they are.
    """
    kind, zero = (ir.DataType.UINT8, _MIDDLE) if unsigned else (ir.DataType.INT8, 0)
    if shift:
        scale = array(dequantizers[0].inputs[1]) / np.float32(1 << shift)
        finer = constant(model, f"{codes.name}/step", scale.astype(np.float32))
        for dequantize in dequantizers:
            dequantize.replace_input_with(1, finer)
    if codes.dtype != ir.DataType.INT4:
        if shift or unsigned:
            wide = (array(codes).astype(np.int64) << shift) + zero
            codes.const_value = ir.tensor(wide.astype(kind.numpy()), name=codes.name)
            codes.dtype = kind
        return
    factor = constant(model, f"{codes.name}/factor", np.array(1 << shift, np.int32))
    parts = [ir.node("Cast", [codes], {"to": ir.DataType.INT32}, name=f"{codes.name}/wide")]
    parts.append(ir.node("Mul", [parts[0].outputs[0], factor], name=f"{codes.name}/shift"))
    if unsigned:
        middle = constant(model, f"{codes.name}/middle", np.array(zero, np.int32))
        parts.append(ir.node("Add", [parts[-1].outputs[0], middle], name=f"{codes.name}/raise"))
    parts.append(ir.node("Cast", [parts[-1].outputs[0]], {"to": kind}, name=f"{codes.name}/cast"))
    for part in parts:
        insert(model, dequantizers[0], part)
        part.outputs[0].name = f"{part.name}/out"
        part.outputs[0].dtype, part.outputs[0].shape = ir.DataType.INT32, codes.shape
    parts[-1].outputs[0].dtype = kind
    parts[-1].outputs[0].name = f"{codes.name}_{'uint8' if unsigned else 'int8'}"
    for dequantize in dequantizers:
        dequantize.replace_input_with(0, parts[-1].outputs[0])


def _limits(model: ir.Model) -> dict[ir.Value, int]:
    """The largest magnitude that weights may have where two products must stay in int16."""
    limits: dict[ir.Value, int] = {}
    for node in model.graph:
        dequantize = weight_behind(node)
        codes = dequantize.inputs[0] if dequantize is not None else None
        if codes is not None:
            limit = largest_weight(reach(node.inputs[0]))
            limits[codes] = min(limit, limits.get(codes, limit))
    return limits


def _spare_bits(codes: npt.NDArray[np.int64]) -> int:
    """How far all codes can be shifted left within int8; 0 where all are 0."""
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
    shape = array(scale).shape
    points: npt.NDArray[Any] = np.zeros(shape, np.int8)
    if codes.dtype == ir.DataType.UINT8:
        points = np.full(shape, _MIDDLE, np.uint8)
    zeros = constant(model, f"{dequantize.name}/zero", points)
    dequantize.resize_inputs(3)
    dequantize.replace_input_with(2, zeros)


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = producer(value)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _integer_bias(model: ir.Model, node: ir.Node) -> None:
    """Give Gemm an int32 bias of scale s_x * s_w: without it ONNX Runtime keeps it in float."""
    operand, weight = _dequantizer(node.inputs[0]), _dequantizer(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if operand is None or weight is None or bias is None or bias.const_value is None:
        return
    real = array(bias).astype(np.float64)
    scales = [array(dq.inputs[1]).astype(np.float64) for dq in (operand, weight)]
    unit = np.broadcast_to(scales[0] * scales[1], real.shape).astype(np.float32)
    codes = np.rint(real / unit)
    if np.abs(codes).max(initial=0) > 2 * LARGEST - 1:
        raise ExportError(
            f"{node.name}: found a bias of {np.abs(real).max():g} in units of {unit.min():g}; "
            "needed one that fits int32: calibrate again"
        )
    codes = codes.astype(np.int32)
    uniform = scales[1].ndim == 0
    inputs = [
        constant(model, f"{node.name}/bias_codes", codes),
        constant(model, f"{node.name}/bias_scale", unit[0].reshape(()) if uniform else unit),
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


def _subtract_bias(model: ir.Model, node: ir.Node) -> None:
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
    difference = insert(model, add, ir.node("Sub", [out, negative], name=add.name))
    _replace(model, add, difference)


def _settle_clamps(model: ir.Model, node: ir.Node) -> None:
    """Turn ReLU and Clip behind a layer into Max and Min where they pass real values on.

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


def _raised(model: ir.Model, node: ir.Node, codes: ir.Value, name: str) -> ir.Value:
    """Weight codes as uint8, 128 more than they are; those of INT4 are folded at load."""
    if codes.dtype == ir.DataType.UINT8:
        return codes
    cast = producer(codes)
    if cast is None:
        raised = array(codes).astype(np.int16) + _MIDDLE
        return constant(model, name, raised.astype(np.uint8))
    wide = cast.inputs[0]  # int32 codes, see _widen_weight
    middle = constant(model, f"{name}/middle", np.array(_MIDDLE, np.int32))
    more = ir.node("Add", [wide, middle], name=f"{name}/raise")
    less = ir.node("Cast", [more.outputs[0]], {"to": ir.DataType.UINT8}, name=f"{name}/cast")
    for part, kind in ((more, ir.DataType.INT32), (less, ir.DataType.UINT8)):
        insert(model, node, part)
        part.outputs[0].name = f"{part.name}/out"
        part.outputs[0].dtype, part.outputs[0].shape = kind, codes.shape
    return less.outputs[0]


def _integer_convolution(model: ir.Model, node: ir.Node) -> None:
    """ConvInteger, then scale and bias: a convolution with codes in and real values out."""
    operand, weight = _dequantizer(node.inputs[0]), _dequantizer(node.inputs[1])
    if operand is None or weight is None or weight.inputs[0] is None:
        return
    name = node.name or "conv"
    rank = len(weight.inputs[0].shape or ())
    shape = (1, -1, *[1] * (rank - 2))
    unit = (array(operand.inputs[1]) * array(weight.inputs[1])).astype(np.float32)
    middle = constant(model, f"{name}/middle", np.array(_MIDDLE, np.uint8))
    codes = _raised(model, node, weight.inputs[0], f"{name}/weight")
    inputs = [operand.inputs[0], codes, operand.inputs[2], middle]
    integer = ir.node("ConvInteger", inputs, dict(node.attributes), name=name)
    nodes = [
        integer,
        ir.node("Cast", [integer.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}/real"),
    ]
    factor = constant(model, f"{name}/step", unit.reshape(shape) if unit.ndim else unit)
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], factor], name=f"{name}/scale"))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(model, f"{name}/bias", array(node.inputs[2]).reshape(shape))
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias], name=f"{name}/add"))
    for part, label in zip(nodes, ("int", "real", "scaled", "biased"), strict=False):
        part.outputs[0].name = f"{name}/{label}"
        insert(model, node, part)
    _replace(model, node, nodes[-1].outputs[0])
