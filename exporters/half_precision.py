"""Everything that is not INT8 in half precision, for engines that take types as written.

A strongly typed TensorRT network computes in the types of its graph: float32 around the INT8
layers makes a float32 engine. Here tensors, scales and biases become float16, and two casts
keep the network's inputs and outputs float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.edits import insert
from ..graph.operators import QDQ

__all__ = ["SMALLEST_SCALE", "to_fp16"]

# The smallest number above 0; a smaller scale would be 0, which the parser refuses.
SMALLEST_SCALE = 2.0**-24
_LARGEST = float(np.finfo(np.float16).max)
# Inputs that ONNX defines as float32.
_FLOAT32_INPUTS = {"Resize": (1, 2)}


def to_fp16(model: ir.Model) -> ir.Model:
    """Turn, in place, every float32 tensor inside the graph into float16; return the graph.

    Values beyond float16's range (masks of -1e9, infinities) end at its last number.
    """
    graph = model.graph
    stays_float = {
        node.inputs[i]
        for node in graph
        for i in _FLOAT32_INPUTS.get(node.op_type, ())
        if i < len(node.inputs)
    }
    scales = {node.inputs[1] for node in graph if node.op_type in QDQ}
    for value in graph.initializers.values():
        if value.dtype != ir.DataType.FLOAT or value in stays_float or value.const_value is None:
            continue
        real = np.clip(value.const_value.numpy(), -_LARGEST, _LARGEST)
        if value in scales:
            real = np.maximum(real, SMALLEST_SCALE)
        value.const_value = ir.tensor(real.astype(np.float16), name=value.name)
        value.dtype = ir.DataType.FLOAT16
    for node in graph:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.dtype = ir.DataType.FLOAT16
    first = graph[0]
    for value in list(graph.inputs):
        if value.dtype == ir.DataType.FLOAT:
            readers = list(value.uses())
            cast = _cast(f"{value.name}/fp16", value, ir.DataType.FLOAT16)
            insert(model, first, cast)
            for use in readers:
                use.node.replace_input_with(use.idx, cast.outputs[0])
    for i, value in enumerate(list(graph.outputs)):
        if value.dtype != ir.DataType.FLOAT16:
            continue
        cast = _cast(f"{value.name}/fp32", value, ir.DataType.FLOAT)
        graph.append(cast)
        value.name, cast.outputs[0].name = f"{value.name}/half", value.name
        graph.outputs[i] = cast.outputs[0]
    return model


def _cast(name: str, value: ir.Value, to: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": to}, name=name)
    out = node.outputs[0]
    out.name, out.dtype, out.shape = f"{name}/out", to, value.shape
    return node
