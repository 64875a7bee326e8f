"""Which weights keep 8 bits: those of the first layer and of every last one.

A last layer reaches the network's output without another layer on the way that has a weight in
codes. Calibration places quantizers so (:mod:`hdrq_deploy.calibration.placement`); here the same
layers are found in the graph that it wrote.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from .operators import QUANTIZABLE
from .qdq import producer, weight_dequantizer

__all__ = ["end_weights"]

# What a tensor's shape is computed with; it says nothing of the tensor's values.
_SIZES = {"Shape", "Size"}


def end_weights(model: ir.Model, codes: Container[str]) -> set[str]:
    """Codes of the first layer and of the last ones, by name.

    Args:
        model: A bundle's graph.
        codes: Names of the tensors of codes.
    """
    weights = [name for node in model.graph if (name := _codes(node, codes))]
    return {*weights[:1], *_last(model, codes)}


def _codes(node: ir.Node, codes: Container[str]) -> str:
    """The codes that a layer reads as its weight, or ""."""
    if node.op_type not in QUANTIZABLE:
        return ""
    for value in node.inputs[:2]:
        dequantize, _ = weight_dequantizer(value)
        read = dequantize.inputs[0] if dequantize is not None else None
        if read is not None and read.name in codes:
            return str(read.name)
    return ""


def _last(model: ir.Model, codes: Container[str]) -> set[str]:
    found: set[str] = set()
    seen: set[ir.Node] = set()
    waiting = [producer(value) for value in model.graph.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node.op_type in _SIZES:
            continue
        seen.add(node)
        if name := _codes(node, codes):
            found.add(name)
            continue
        waiting += [producer(value) for value in node.inputs]
    return found
