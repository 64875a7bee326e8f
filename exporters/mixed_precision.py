"""Layers whose activations stay real: 4-bit linear layers in blocks, and float ones.

TensorRT and ONNX Runtime have fused kernels for INT4 weights in blocks along the input
channels, and none for one step per output channel. A step that is repeated for every block
is the same number, so the bundle needs no other calibration.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..formats.bundle_manifest import Layer
from ..graph.edits import constant, drop_unused, free_operand, insert, quantize_only
from ..graph.operators import LINEAR
from ..graph.patterns import check_patterns, named
from ..graph.qdq import array, transposes_weight, weight_dequantizer
from ..numerics.quantization import along, dequantize

__all__ = ["BLOCKS", "keep_float", "weights_only"]

# Block sizes that both engines' kernels take, the fastest first.
BLOCKS = (128, 64, 32, 16)


def weights_only(model: ir.Model, layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """Rewrite the 4-bit linear layers that a pattern names. In place.

    Args:
        model: As ``graph.load`` gives it.
        layers: The bundle's.
        patterns: fnmatch patterns of module paths.

    Returns:
        ``layers``, those that were rewritten with ``requested`` ``int4``.

    Raises:
        ExportError: A pattern names no 4-bit linear layer.
    """
    nodes = {node.name: node for node in model.graph}
    able = {
        layer.node: layer
        for layer in layers
        if layer.op in LINEAR and layer.weight and (layer.weight_bits or 8) <= 4
    }
    modules = [layer.module for layer in able.values()]
    check_patterns(
        "--weights-only", patterns, modules, "linear layer with weights of 4 bits or fewer"
    )
    result = []
    for layer in layers:
        chosen = layer.node in able and named(layer.module, patterns)
        if chosen and _rewrite(model, nodes[layer.node]):
            layer = layer.model_copy(update={"requested": "int4", "activation_bits": ()})
        result.append(layer)
    drop_unused(model)
    return result


def keep_float(model: ir.Model, layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """Let the layers that a pattern names compute in float. In place.

    Their weights keep the values of their codes; quantizers that serve no other layer go.

    Returns:
        ``layers``, those with ``requested`` ``float32``.

    Raises:
        ExportError: A pattern names no layer.
    """
    nodes = {node.name: node for node in model.graph}
    check_patterns("--keep-float", patterns, [layer.module for layer in layers])
    result = []
    for layer in layers:
        if layer.requested == "int8" and named(layer.module, patterns):
            if layer.weight:
                _settle_weight(model, nodes[layer.node])
            layer = layer.model_copy(
                update={"requested": "float32", "reason": "kept in float by --keep-float"}
            )
        result.append(layer)
    quantize_only(model, {layer.node for layer in result if layer.requested == "int8"})
    drop_unused(model)
    return result


def _settle_weight(model: ir.Model, node: ir.Node) -> None:
    """The real weight as a constant: engines would take a lone DequantizeLinear for codes."""
    found, _ = weight_dequantizer(node.inputs[1])
    if found is None:
        return
    codes, scale = array(found.inputs[0]), array(found.inputs[1])
    axis = found.attributes["axis"].as_int() if scale.ndim else None
    real = constant(model, f"{node.name}/weight_real", dequantize(codes, scale, axis))
    found.outputs[0].replace_all_uses_with(real)


def _rewrite(model: ir.Model, node: ir.Node) -> bool:
    """MatMul(real, DQ of INT4 blocks); False where no block size divides the input channels."""
    found, behind_transpose = weight_dequantizer(node.inputs[1])
    if found is None:
        return False
    turned = transposes_weight(node) != behind_transpose
    codes, scale = array(found.inputs[0]), array(found.inputs[1])
    axis = found.attributes["axis"].as_int() if scale.ndim else None
    steps = np.broadcast_to(along(scale, codes.ndim, axis), codes.shape)
    if turned:
        codes, steps = codes.T, steps.T
    # TensorRT takes a single block a column for one step per channel, and unpacks it.
    block = next((b for b in BLOCKS if codes.shape[0] % b == 0 and codes.shape[0] > b), None)
    if block is None or codes.ndim != 2 or (steps != steps[:1]).any():
        return False
    name = str(found.inputs[0].name if found.inputs[0] else node.name)
    packed = np.ascontiguousarray(codes).astype(np.int8)
    weight = constant(model, f"{name}_blocks", packed)
    weight.const_value = ir.tensor(packed, dtype=ir.DataType.INT4, name=weight.name)
    weight.dtype = ir.DataType.INT4
    per_block = np.ascontiguousarray(steps[::block]).astype(np.float32)
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
    return True
