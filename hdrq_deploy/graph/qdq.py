"""Quantizers taken out of a bundle's graph, for all readers or for some layers only."""

from __future__ import annotations

from collections.abc import Collection, Container
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

__all__ = [
    "chain",
    "constant",
    "distinct_names",
    "free_operand",
    "quantize_only",
    "quantizer_of",
    "serialized",
    "weight_dequantizer",
]

_READERS = ("Conv", "Gemm", "MatMul")  # a transposed convolution computes in float
_LAYERS = (*_READERS, "ConvTranspose")
# What only moves values: codes pass through it unchanged.
_MOVES = (
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "MaxPool",
    "Split",
    "Slice",
    "Gather",
    "Identity",
)


def quantizer_of(value: ir.Value | None) -> tuple[list[ir.Node], ir.Node] | None:
    """The nodes that move an operand's values, nearest first, and the QuantizeLinear behind."""
    path: list[ir.Node] = []
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVES:
        path.append(node)
        node = _producer(node)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    while node is not None and node.op_type != "QuantizeLinear":
        node = _producer(node)
    return (path, node) if node is not None else None


def weight_dequantizer(value: ir.Value | None) -> tuple[ir.Node | None, bool]:
    """The DequantizeLinear behind an operand, and whether a Transpose lies between."""
    node = value.producer() if value is not None else None
    transposed = node is not None and node.op_type == "Transpose"
    if node is not None and transposed:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None, False
    return node, transposed


def free_operand(model: ir.Model, node: ir.Node, place: int) -> bool:
    """Let one operand read what its quantizer reads; other readers keep theirs.

    Returns:
        Whether there was a quantizer.
    """
    found = quantizer_of(node.inputs[place])
    if found is None:
        return False
    path, quantize = found
    current = quantize.inputs[0]
    read = node.inputs[place]
    for move in reversed(path):
        copy = ir.Node(
            move.domain,
            move.op_type,
            [current, *list(move.inputs)[1:]],
            attributes=move.attributes.values(),
            num_outputs=len(move.outputs),
            name=f"{node.name}/{place}/{move.name}",
        )
        model.graph.insert_before(node, copy)
        for old, new in zip(move.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = f"{copy.name}/{old.name}", old.type, old.shape
        onward = path[path.index(move) - 1].inputs[0] if move is not path[0] else read
        assert onward is not None
        current = copy.outputs[list(move.outputs).index(onward)]
    node.replace_input_with(place, current)
    return True


def quantize_only(model: ir.Model, chosen: Collection[str]) -> None:
    """Only layers with these node names read codes. In place.

    A quantizer stays, for residual adds and whatever else reads it, where a chosen layer
    reads it or it is all that a chosen layer's output is for.
    """
    used: set[ir.Node] = set()
    read: set[ir.Node] = set()
    for node in [n for n in model.graph if n.op_type in _READERS]:
        for place in range(min(2, len(node.inputs))):
            found = quantizer_of(node.inputs[place])
            if found is None:
                continue
            read.add(found[1])
            if node.name in chosen:
                used.add(found[1])
            else:
                free_operand(model, node, place)
    for quantize in [n for n in model.graph if n.op_type == "QuantizeLinear"]:
        source = quantize.inputs[0]
        own = quantize not in read and _layer_behind(source) in chosen
        if quantize in used or own or source is None:
            continue
        chain(quantize)[-1].outputs[0].replace_all_uses_with(source)


def chain(quantize: ir.Node) -> list[ir.Node]:
    """QuantizeLinear, perhaps Clip, DequantizeLinear."""
    nodes = [quantize]
    while nodes[-1].op_type != "DequantizeLinear":
        (use,) = nodes[-1].outputs[0].uses()
        nodes.append(use.node)
    return nodes


def constant(model: ir.Model, name: str, value: npt.NDArray[Any]) -> ir.Value:
    """A new initializer; where ``name`` is taken, its name gets a number."""
    name = _numbered(name, model.graph.initializers)
    made = ir.Value(
        name=name,
        shape=ir.Shape(value.shape),
        type=ir.TensorType(ir.DataType.from_numpy(value.dtype)),
        const_value=ir.tensor(value, name=name),
    )
    model.graph.register_initializer(made)
    return made


def distinct_names(model: ir.Model) -> None:
    """Rename what nodes compute where an input, an initializer or another node has the name.

    A model may hold a buffer ``mean`` beside a node that the exporter calls ``mean``; in a
    file the two would be one value. In place; ports and initializers keep their names.
    """
    outputs = set(model.graph.outputs)
    kept = [*model.graph.inputs, *model.graph.initializers.values(), *outputs]
    taken = {value.name or "" for value in kept}
    for node in model.graph:
        for value in node.outputs:
            if value in outputs:
                continue
            value.name = _numbered(value.name or node.op_type, taken)
            taken.add(value.name)


def serialized(model: ir.Model) -> bytes:
    """The model as the bytes of a file, after :func:`distinct_names`."""
    distinct_names(model)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _numbered(name: str, taken: Container[str]) -> str:
    """``name``, or the first of ``name_2``, ``name_3``, ... that is not taken."""
    number, tried = 1, name
    while tried in taken:
        number += 1
        tried = f"{name}_{number}"
    return tried


def _producer(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs[0] is not None else None


def _layer_behind(value: ir.Value | None) -> str | None:
    """The layer whose output, perhaps through an activation function, this is."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in {"Relu", "Clip"}:
        node = _producer(node)
    return node.name if node is not None and node.op_type in _LAYERS else None
