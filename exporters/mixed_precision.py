"""Layers whose activations stay real: 4-bit linear layers in blocks, and float ones.

TensorRT and ONNX Runtime have fused kernels for INT4 weights in blocks along the input
channels, and none for one scale per output channel. A scale that is repeated for every block
is the same number, so the bundle needs no other calibration.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import ExportError
from ..formats.bundle_manifest import CODED, Layer
from ..graph.edits import constant, drop_unused, free_operand, insert, quantize_only
from ..graph.operators import LINEAR
from ..graph.patterns import check_patterns, named
from ..graph.qdq import array, transposes_weight, weight_dequantizer
from ..numerics.quantization import along, dequantize
from ..typing import Array

__all__ = ["BLOCKS", "keep_float", "real_weights", "weights_only"]

_log = logging.getLogger("hdrq_deploy")
# Block sizes that both engines' kernels take, the fastest first.
BLOCKS = (128, 64, 32, 16)


def weights_only(model: ir.Model, layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """Rewrite, in place, the 4-bit linear layers that a pattern names.

    A layer whose weight cannot be held in blocks stays as it is; its ``reason`` and the log say
    why.

    Args:
        model: The graph as :func:`~hdrq_deploy.graph.model_files.load` gives it.
        layers: The bundle's layers.
        patterns: fnmatch patterns of module paths.

    Returns:
        ``layers``, those that were rewritten with ``requested`` ``int4``.

    Raises:
        ExportError: A pattern names no 4-bit linear layer, or only such as cannot be rewritten.
    """
    nodes = {node.name: node for node in model.graph}
    able = {
        layer.node: layer.module
        for layer in layers
        if layer.op in LINEAR and layer.weight and (layer.weight_bits or 8) <= 4
    }
    what = "linear layer with weights of 4 bits or fewer"
    check_patterns("weights_only", patterns, list(able.values()), what)
    obstacles: dict[str, str] = {}
    result = []
    for layer in layers:
        if layer.node in able and named(layer.module, patterns):
            obstacle = _rewrite(model, nodes[layer.node])
            if obstacle:
                obstacles[layer.node] = obstacle
                update: dict[str, Any] = {"reason": f"activations stay quantized: {obstacle}"}
                _log.info("%s: activations stay quantized, %s", layer.module, obstacle)
            else:
                update = {"requested": "int4", "activation_bits": ()}
            layer = layer.model_copy(update=update)
        result.append(layer)
    for pattern in patterns:
        matched = [node for node, module in able.items() if named(module, [pattern])]
        if all(node in obstacles for node in matched):
            raise ExportError(
                f"found no layer of {pattern!r} (`weights_only`) that can keep real activations "
                f"({able[matched[0]]}: {obstacles[matched[0]]}); name other layers"
            )
    drop_unused(model)
    return result


def keep_float(model: ir.Model, layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """Let, in place, the layers that a pattern names compute in float.

    Their weights keep the values of their codes; quantizers that serve no other layer go.

    Returns:
        ``layers``, those with ``requested`` ``float32``.

    Raises:
        ExportError: A pattern names no layer.
    """
    nodes = {node.name: node for node in model.graph}
    check_patterns("keep_float", patterns, [layer.module for layer in layers])
    result = []
    for layer in layers:
        if layer.requested in CODED and named(layer.module, patterns):
            if layer.weight:
                _real_weight(model, nodes[layer.node])
            layer = layer.model_copy(
                update={"requested": "float32", "reason": "kept in float by --keep-float"}
            )
        result.append(layer)
    quantize_only(model, {layer.node for layer in result if layer.requested in CODED})
    drop_unused(model)
    return result


def real_weights(model: ir.Model, layers: Sequence[Layer]) -> None:
    """Give, in place, layers that compute in float by the bundle's own account real weights.

    From codes an engine would compute the same weights again at every run. A weight that a layer
    in integers shares stays in codes.

    Args:
        model: The graph as :func:`~hdrq_deploy.graph.model_files.load` gives it.
        layers: The bundle's layers.
    """
    nodes = {node.name: node for node in model.graph}
    in_codes = {layer.weight for layer in layers if layer.requested != "float32"}
    for layer in layers:
        if layer.requested == "float32" and layer.weight and layer.weight not in in_codes:
            _real_weight(model, nodes[layer.node])
    drop_unused(model)


def _real_weight(model: ir.Model, node: ir.Node) -> None:
    """Make the weight, in place, a real constant: engines take a lone DequantizeLinear for codes.

    Layers that share the weight read the constant too.
    """
    source, _ = weight_dequantizer(node.inputs[1])
    if source is None:  # another layer that shares the weight came first
        return
    codes, scale, axis = _codes(source)
    real = constant(model, f"{node.name}/weight_real", dequantize(codes, scale, axis))
    source.outputs[0].replace_all_uses_with(real)


def _codes(source: ir.Node) -> tuple[Array, Array, int | None]:
    """Codes and scales of a weight's DequantizeLinear, and the axis of the scales."""
    codes, scale = array(source.inputs[0]), array(source.inputs[1])
    return codes, scale, source.attributes["axis"].as_int() if scale.ndim else None


def _rewrite(model: ir.Model, node: ir.Node) -> str:
    """Make a layer, in place, MatMul(real, DQ of INT4 blocks); or say what keeps it from that."""
    source, behind_transpose = weight_dequantizer(node.inputs[1])
    if source is None:
        return "found no quantized weight in front of it"
    codes, scale, axis = _codes(source)
    scales = np.broadcast_to(along(scale, codes.ndim, axis), codes.shape)
    if transposes_weight(node) != behind_transpose:
        codes, scales = codes.T, scales.T
    if codes.ndim != 2 or (scales != scales[:1]).any():
        return (
            f"found a weight of shape {codes.shape} with scales of shape {scale.shape}; needed a "
            "matrix with one scale, or one per output channel"
        )
    # TensorRT takes a single block a column for one scale per channel, and unpacks it.
    block = next((b for b in BLOCKS if codes.shape[0] % b == 0 and codes.shape[0] > b), None)
    if block is None:
        return (
            f"found {codes.shape[0]} input channels; needed a multiple of {BLOCKS[-1]}, "
            f"{2 * BLOCKS[-1]} or more"
        )
    name = str(source.inputs[0].name if source.inputs[0] else node.name)
    packed = np.ascontiguousarray(codes).astype(np.int8)
    weight = constant(model, f"{name}_blocks", packed)
    weight.const_value = ir.tensor(packed, dtype=ir.DataType.INT4, name=weight.name)
    weight.dtype = ir.DataType.INT4
    per_block = np.ascontiguousarray(scales[::block]).astype(np.float32)
    real = insert(
        model,
        node,
        ir.node(
            "DequantizeLinear",
            [weight, constant(model, f"{name}_block_scale", per_block)],
            {"axis": 0, "block_size": block},
            name=f"{node.name}/weight",
        ),
    )
    real.name, real.dtype = f"{node.name}/weight/out", ir.DataType.FLOAT
    real.shape = ir.Shape(packed.shape)
    node.replace_input_with(1, real)
    if node.op_type == "Gemm":
        node.attributes.pop("transB", None)
    free_operand(model, node, 0)
    return ""
