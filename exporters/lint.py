"""Look at an ONNX file before a native parser does.

TensorRT's parser accepts empty files, dies of a scale that is not constant, takes unsigned
zero points for signed ones, and runs layers in float without a word when scales lie on the
wrong axis. All of that is found here, named by node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..errors import ExportError
from ..graph.biases import channel_axis
from ..graph.operators import QDQ, QUANTIZABLE
from ..graph.qdq import weight_dequantizer
from .half_precision import SMALLEST_SCALE

__all__ = ["lint", "problems", "read"]

# A scale below it is 0 in its type.
_SMALLEST = {
    ir.DataType.FLOAT16: SMALLEST_SCALE,
    ir.DataType.FLOAT: float(np.finfo(np.float32).tiny),
}
_UNSUPPORTED = {"QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear", "ConvInteger"}


def lint(path: Path, tensorrt: bool = True) -> None:
    """Refuse a file that a builder would crash on, misread or silently run in float.

    Args:
        path: ONNX file.
        tensorrt: Apply TensorRT's rules too, not only ONNX's.

    Raises:
        ExportError: The first problem, and how many there are.
    """
    wrong = list(problems(read(path), tensorrt))
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ExportError(f"{path.name}: {wrong[0]}{more}")


def read(path: Path) -> ir.Model:
    """The model with its external data, all of them there.

    Raises:
        ExportError: No file, no ONNX in it, or data missing or short.
    """
    if not path.is_file():
        raise ExportError(f"{path}: found no file; needed an ONNX model")
    data = path.read_bytes()
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ExportError(
            f"{path}: not an ONNX model ({len(data)} bytes that protobuf cannot read); export again"
        ) from error
    if not proto.graph.node or not proto.graph.output:
        raise ExportError(
            f"{path}: found a model of {len(data)} bytes without "
            f"{'outputs' if proto.graph.node else 'nodes'}; export again"
        )
    for initializer in proto.graph.initializer:
        _check_external(path, initializer)
    return ir.load(path)


def _check_external(path: Path, initializer: onnx.TensorProto) -> None:
    entries = {item.key: item.value for item in initializer.external_data}
    if not entries:
        return
    file = path.parent / entries.get("location", "")
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    size = file.stat().st_size if file.is_file() else -1
    if size < end:
        present = "no file" if size < 0 else f"{size} bytes"
        raise ExportError(
            f"{path}: the data of {initializer.name} lie in {file.name} up to byte {end}, found "
            f"{present}; keep both files together, or export again"
        )


def problems(model: ir.Model, tensorrt: bool = True) -> Iterator[str]:
    """Tell everything that is wrong with a graph, one line each."""
    graph = model.graph
    names = Counter(node.name or "" for node in graph)
    tensors = set(graph.initializers) | {value.name for value in graph.inputs}
    for name, count in names.items():
        if not name:
            yield f"found {count} nodes without a name; needed one for each, to report its layer"
        elif count > 1:
            yield f"found {count} nodes named {name}; needed unique names"
        elif tensorrt and "]" in name:
            yield f"found ']' in the node name {name}; TensorRT's layer report ends names there"
        elif tensorrt and name in tensors:
            yield f"found a node and a tensor named {name}; needed different names"
    for node in graph:
        if tensorrt and node.op_type in _UNSUPPORTED:
            yield (
                f"node {node.name}: {node.op_type} is not known to TensorRT; needed QuantizeLinear "
                "and DequantizeLinear around a float operator"
            )
        if node.op_type in QDQ:
            yield from (f"node {node.name} ({node.op_type}): {text}" for text in _scales(node))
            if tensorrt:
                yield from (f"node {node.name} ({node.op_type}): {t}" for t in _zero(node))
        elif tensorrt and node.op_type in QUANTIZABLE:
            yield from (f"node {node.name} ({node.op_type}): {text}" for text in _weight(node))


def _scales(node: ir.Node) -> Iterator[str]:
    scale = node.inputs[1]
    if scale is None or scale.const_value is None:
        name = scale.name if scale else "none"
        yield f"found a scale {name} that is computed; needed a constant"
        return
    values = scale.const_value.numpy().astype(np.float64)
    smallest = _SMALLEST.get(scale.dtype or ir.DataType.FLOAT, 0.0)
    if not np.isfinite(values).all() or (values < smallest).any():
        wrong = values[~np.isfinite(values) | (values < smallest)][0]
        yield f"found a scale of {wrong:g}; needed finite scales of {smallest:g} or more"
    if values.ndim > 2 or (values.ndim == 2 and not _attribute(node, "block_size", 0)):
        yield f"found scales of shape {values.shape}; needed () or one per channel"
    source = node.inputs[0]
    rank = len(source.shape) if source is not None and source.shape is not None else None
    if values.ndim == 1 and rank and source is not None and source.shape is not None:
        axis = _attribute(node, "axis", 1)
        size = source.shape[axis]
        if isinstance(size, int) and size != len(values):
            yield f"found {len(values)} scales for {size} channels on axis {axis}"


def _zero(node: ir.Node) -> Iterator[str]:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    source = node.inputs[0]
    if zero is None:
        if node.op_type == "QuantizeLinear" and not _attribute(node, "output_dtype", 0):
            yield "found no zero point, which means uint8; needed an int8 zero point of 0"
        elif source is not None and source.dtype == ir.DataType.UINT8:
            yield "found unsigned codes; TensorRT knows signed ones only"
        return
    if zero.const_value is None:
        yield f"found a zero point {zero.name} that is computed; needed a constant 0"
        return
    values = zero.const_value.numpy()
    if zero.dtype not in (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN):
        yield (
            f"found a zero point of type {zero.dtype}; TensorRT imports it as INT8 without a "
            "word: needed int8"
        )
    elif values.astype(np.float32).any():
        yield "found a zero point that is not 0; TensorRT quantizes symmetrically"


def _weight(node: ir.Node) -> Iterator[str]:
    """Rules of TensorRT for one weight, and for what it is multiplied with."""
    if len(node.inputs) < 2:
        return
    chain, transposed = weight_dequantizer(node.inputs[1])
    if chain is None:
        return
    codes, scale = chain.inputs[:2]
    if codes is None or codes.const_value is None or scale is None or scale.const_value is None:
        return
    shape = scale.const_value.shape.numpy()
    rank = len(codes.shape or ())
    block = _attribute(chain, "block_size", 0)
    operand, _ = weight_dequantizer(node.inputs[0])
    quantized = operand is not None
    four = codes.dtype in (ir.DataType.INT4, ir.DataType.UINT4)
    if four and int(np.prod(codes.const_value.shape.numpy())) % 2:
        yield f"found an odd number of INT4 codes in {codes.name}; TensorRT needs an even one"
    if four and node.op_type == "Conv" and quantized:
        yield (
            "found INT4 weights and quantized activations; TensorRT fails to build such a "
            "convolution: store the codes as INT8"
        )
    if block and quantized:
        yield (
            "found one scale per block and quantized activations; TensorRT multiplies the wrong "
            "sums by such scales: use one scale per output channel"
        )
    if four and quantized and not shape:
        yield (
            "found INT4 weights with one scale and quantized activations; TensorRT needs one scale "
            "per output channel there"
        )
    if len(shape) == 1 and not block:
        axis = _attribute(chain, "axis", 1) % max(rank, 1)
        axis = rank - 1 - axis if transposed else axis
        wanted = channel_axis(node, rank)
        if axis != wanted:
            yield (
                f"found scales of {codes.name} along axis {axis}; TensorRT runs this layer in "
                f"float unless they lie along axis {wanted}, the output channels"
            )


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value
