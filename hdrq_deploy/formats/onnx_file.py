"""ONNX files that somebody else may have written, looked at before any library computes with them.

A graph may name files anywhere on the machine as the place of its tensors, read values that only
come later, or write one value twice: what walks it would then read what is not its own, or
never end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "check_graph",
    "check_outside",
    "checked",
    "load_ir",
    "number",
    "parse",
    "pointer",
    "port",
    "tensors_of",
]

_TEXTS = (str, bytes)
_KEYS = {"location", "offset", "length", "checksum"}


def parse(path: Path) -> onnx.ModelProto:
    """The graph, the data outside of it not loaded.

    Raises:
        ValueError: It cannot be read, or is no ONNX model.
    """
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError("it cannot be parsed as ONNX") from error
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    if not model.graph.node or len(model.graph.input) != 1 or len(model.graph.output) != 1:
        ports = f"{len(model.graph.input)} inputs, {len(model.graph.output)} outputs"
        raise ValueError(f"it is no network of one input and one output ({ports})")
    return model


def checked(path: Path, files: Collection[str]) -> onnx.ModelProto:
    """The graph, whole and consistent, its data in ``files`` beside it.

    Args:
        path: ONNX file.
        files: Names of files in its folder that may hold data of tensors.

    Raises:
        ValueError: Says what is wrong with it.
    """
    model = parse(path)
    check_outside(model, path.parent, files)
    check_graph(model)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, RuntimeError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"it breaks a rule of ONNX ({text[0][:200]})") from error
    return model


def load_ir(path: Path) -> ir.Model:
    """The graph as onnx_ir has it; what lies outside is read when it is asked for.

    Raises:
        ValueError: onnx_ir cannot make anything of it.
    """
    import onnx_ir as ir  # an application that runs engines does without

    try:
        return ir.load(path)
    except Exception as error:  # onnx_ir wraps whatever a broken field raises
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"it cannot be parsed as ONNX ({text[:200]})") from error


def check_graph(model: onnx.ModelProto) -> None:
    """Every value is written once, and read only behind that.

    Raises:
        ValueError: Names the first node that breaks the rule.
    """
    names = [initializer.name for initializer in model.graph.initializer]
    if len(set(names)) < len(names):
        raise ValueError(f"{_twice(names)!r} is the name of two initializers")
    nodes = [node.name for node in model.graph.node]
    if len(set(nodes)) < len(nodes):
        raise ValueError(f"{_twice(nodes)!r} is the name of two nodes")
    _check_order(model.graph, {""})


def _twice(names: Collection[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _check_order(graph: onnx.GraphProto, outer: Collection[str]) -> None:
    initializers = {initializer.name for initializer in graph.initializer}
    known = {*outer, *(value.name for value in graph.input), *initializers}
    for node in graph.node:
        for name in node.input:
            if name not in known:
                raise ValueError(f"{node.name or node.op_type} reads {name!r} before it is there")
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _check_order(body, known)
        for name in node.output:
            if name in known and name:
                raise ValueError(f"{node.name or node.op_type} writes {name!r} a second time")
            known.add(name)
    for value in graph.output:
        if value.name not in known or not value.name:
            raise ValueError(f"the output {value.name!r} is written by no node")


def tensors_of(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor in a model, wherever it is: in attributes, inner graphs, functions."""
    return (part for part in _parts(message) if isinstance(part, onnx.TensorProto))


def _parts(message: Any) -> Iterator[Any]:
    """A message and all messages inside of it.

    Raises:
        ValueError: A text is no UTF-8, which readers take for different names.
    """
    yield message
    for field, value in message.ListFields():
        items = value if isinstance(value, Sequence) and not isinstance(value, _TEXTS) else (value,)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in items:
                yield from _parts(item)
        elif field.type == FieldDescriptor.TYPE_STRING:
            for item in items:
                if not isinstance(item, str):
                    raise ValueError(f"{field.name} {item[:80]!r} is no text")


def port(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | None, ...]]:
    """Name, dtype and shape of an input or output; None is a free dimension."""
    tensor = value.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    sides = tensor.shape.dim
    return value.name, kind, tuple(d.dim_value if d.HasField("dim_value") else None for d in sides)


def pointer(tensor: onnx.TensorProto) -> dict[str, str]:
    """Location, offset and length of a tensor's data, as written.

    Raises:
        ValueError: A key is there twice or unknown, so that readers may differ in what they take.
    """
    keys = [item.key for item in tensor.external_data]
    if len(set(keys)) < len(keys) or set(keys) - _KEYS:
        raise ValueError(f"the place of {tensor.name!r} is written in {', '.join(keys[:6])}")
    return {item.key: item.value for item in tensor.external_data}


def number(text: str, default: int) -> int:
    """An offset or length.

    Raises:
        ValueError: Not a whole number of 0 or more.
    """
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"{text[:40]!r} is no offset or length")
    return int(text)


def _check_inside(tensor: onnx.TensorProto) -> None:
    """Values inside of the graph are as many as the shape says, and of a type that there is."""
    try:
        onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the values of {tensor.name!r} are none of its type and shape ({text})"
        ) from error


def check_outside(model: onnx.ModelProto, folder: Path, files: Collection[str]) -> None:
    """Every tensor has its values: inside, or wholly in one of ``files``.

    Raises:
        ValueError: Names the first tensor whose data do not.
    """
    for tensor in tensors_of(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
            _check_inside(tensor)
            continue
        place = pointer(tensor)
        location = place.get("location", "")
        if location not in files or tensor.data_location != onnx.TensorProto.EXTERNAL:
            allowed = ", ".join(sorted(files)) or "no file"
            raise ValueError(
                f"{tensor.name!r} has its data in {location!r}; a graph may name {allowed}"
            )
        size = (folder / location).stat().st_size
        offset = number(place.get("offset", ""), 0)
        if offset + number(place.get("length", ""), 0) > size:
            raise ValueError(f"the data of {tensor.name!r} end beyond {location}")
