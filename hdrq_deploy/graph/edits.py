"""Edits of a graph: constants, names, and quantizers taken out. All functions edit in place."""

from __future__ import annotations

from collections.abc import Collection, Container
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .operators import CLAMPS, LAYERS, QUANTIZABLE
from .qdq import chain, producer, quantizer_of

__all__ = [
    "constant",
    "distinct_names",
    "drop_unused",
    "free_operand",
    "insert",
    "quantize_only",
]


def free_operand(model: ir.Model, node: ir.Node, place: int) -> bool:
    """Let one operand read what its quantizer reads, in place; other readers keep theirs.

    Returns:
        Whether there was a quantizer.
    """
    source = quantizer_of(node.inputs[place])
    if source is None:
        return False
    path, quantize = source
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
    """Let only layers with these node names read codes, in place.

    A quantizer stays, for residual adds and whatever else reads it, where a chosen layer
    reads it or it is all that a chosen layer's output is for.
    """
    used: set[ir.Node] = set()
    read: set[ir.Node] = set()
    for node in [n for n in model.graph if n.op_type in QUANTIZABLE]:
        for place in range(min(2, len(node.inputs))):
            source = quantizer_of(node.inputs[place])
            if source is None:
                continue
            read.add(source[1])
            if node.name in chosen:
                used.add(source[1])
            else:
                free_operand(model, node, place)
    for quantize in [n for n in model.graph if n.op_type == "QuantizeLinear"]:
        real = quantize.inputs[0]
        own = quantize not in read and _layer_behind(real) in chosen
        if quantize in used or own or real is None:
            continue
        chain(quantize)[-1].outputs[0].replace_all_uses_with(real)


def _layer_behind(value: ir.Value | None) -> str | None:
    """The layer whose output, perhaps through an activation function, this is."""
    node = producer(value)
    while node is not None and node.op_type in CLAMPS:
        node = producer(node.inputs[0])
    return node.name if node is not None and node.op_type in LAYERS else None


def constant(model: ir.Model, name: str, value: npt.NDArray[Any]) -> ir.Value:
    """Add an initializer in place; where ``name`` is taken, its name gets a number."""
    name = _numbered(name, model.graph.initializers)
    initializer = ir.Value(
        name=name,
        shape=ir.Shape(value.shape),
        type=ir.TensorType(ir.DataType.from_numpy(value.dtype)),
        const_value=ir.tensor(value, name=name),
    )
    model.graph.register_initializer(initializer)
    return initializer


def insert(model: ir.Model, before: ir.Node, node: ir.Node) -> ir.Value:
    """Put ``node`` before another, in place, and return its output."""
    model.graph.insert_before(before, node)
    return node.outputs[0]


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads, in place."""
    RemoveUnusedNodesPass()(model)


def distinct_names(model: ir.Model) -> None:
    """Rename, in place, what nodes compute where another value has the name.

    A model may hold a buffer ``mean`` beside a node that the exporter calls ``mean``; in a
    file the two would be one value. Inputs, outputs and initializers keep their names.
    """
    outputs = set(model.graph.outputs)
    fixed = [*model.graph.inputs, *model.graph.initializers.values(), *outputs]
    taken = {value.name or "" for value in fixed}
    for node in model.graph:
        for value in node.outputs:
            if value in outputs:
                continue
            value.name = _numbered(value.name or node.op_type, taken)
            taken.add(value.name)


def _numbered(name: str, taken: Container[str]) -> str:
    """``name``, or the first of ``name_2``, ``name_3``, ... that is not taken."""
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
