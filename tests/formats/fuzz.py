"""Damaged and hostile files: mutations by number, and what the commands make of them.

Run by ``test_fuzz.py`` in a process of its own, which has a limit of address space and may be
killed by native code: ``python fuzz.py FOLDER SEED FIRST COUNT`` prints one JSON line for every
mutation. The same number and seed give the same mutation.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor as Field

# Of processor time, and of the clock for what waits: a busy machine must not count as a hang.
SECONDS, CLOCK = 20, 100
MEMORY = 3 << 30

Rng = random.Random


class Hang(BaseException):
    """A mutation that takes longer than it may."""


# ---------------------------------------------------------------- bytes


def damaged(data: bytes, rng: Rng) -> bytes:
    """Flipped, cut, spliced, repeated, overwritten, or something else altogether."""
    kind = rng.choice(("flip", "flip", "cut", "splice", "repeat", "zero", "insert", "other"))
    if not data or kind == "other":
        return rng.choice(
            (b"", b"{}", b"\0" * 64, b"\x80\x04.", b"PK\x05\x06" + b"\0" * 18, b"[" * 9)
        )
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 4, 32))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return data[:a] if rng.random() < 0.7 else data[:a] + data[b:]
    if kind == "splice":
        at = rng.randrange(len(data))
        return data[:at] + data[a:b] + data[at + (b - a) :]
    if kind == "repeat":
        return data[:b] + data[a:b] * rng.choice((1, 2, 7)) + data[b:]
    if kind == "zero":
        return data[:a] + rng.choice((b"\0", b"\xff")) * (b - a) + data[b:]
    return data[:a] + rng.randbytes(rng.choice((1, 8, 100))) + data[a:]


# ---------------------------------------------------------------- JSON

_DEEP = "@@deep@@"


def hostile_value(rng: Rng) -> Any:
    """What a field does not expect."""
    return rng.choice(
        (
            *(None, True, False, -1, 0, 1, 2, 7, 255, 2**31, 2**63, -(2**63), 10**30, 10**400),
            *(0.5, -0.5, 1e-30, 1e308, math.nan, math.inf, -math.inf),
            *("", "x", "x" * 5000, "../../secret.txt", "/dev/zero", "/etc/passwd", "a\nb\x1b[31m"),
            *("\ud800", "float32", "int4", "codes", "weights.safetensors", "model.onnx", "."),
            *([], {}, [[]], [0], [-1], [10**30], {"a": 1}, {"": None}, [[1, 2], [3]], _DEEP),
        )
    )


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        keys: Any = node if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], (dict, list)):
                todo.append(node[key])
    return found


def hostile_json(text: bytes, rng: Rng) -> bytes:
    """One to three fields changed in type or size, removed, added, doubled or exchanged."""
    tree = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(tree)
        if not found:
            break
        # Fields near the root are few; take them as often as all others.
        top = [place for place in found if place[0] is tree]
        node, key = rng.choice(top if rng.random() < 0.3 else found)
        kind = rng.choice(("value", "value", "value", "remove", "add", "swap", "near", "rename"))
        if kind == "value":
            node[key] = hostile_value(rng)
        elif kind == "remove":
            del node[key]
        elif kind == "add" and isinstance(node, dict):
            node[rng.choice(("extra", "", "__metadata__", "../x"))] = hostile_value(rng)
        elif kind == "add":
            node.extend(node[:1] * rng.choice((1, 100)))
        elif kind == "swap":
            other, place = rng.choice(found)
            with contextlib.suppress(KeyError, IndexError):
                node[key] = json.loads(json.dumps(other[place]))
        elif kind == "rename" and isinstance(node, dict):
            node[str(key) + "x"] = node.pop(key)
        elif isinstance(node[key], (int, float)):
            node[key] += rng.choice((-1, 1, 7, 1000))
        elif isinstance(node[key], str):
            node[key] = node[key][:-1]
        if not isinstance(tree, (dict, list)):
            break
    made = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    depth = rng.choice((30, 300, 100_000))
    deep = b"[" * depth + b"]" * depth
    if rng.random() < 0.3:
        deep = b'{"a":' * depth + b"1" + b"}" * depth
    made = made.replace(json.dumps(_DEEP).encode(), deep)
    if rng.random() < 0.05:
        made = rng.choice((deep, b"[" + made + b"]", b"\xef\xbb\xbf" + made, made + made, b"null"))
    return made


# ---------------------------------------------------------------- safetensors


def hostile_safetensors(data: bytes, rng: Rng) -> bytes:
    """The header's fields, its length, its offsets, dtypes and shapes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    kind = rng.choice(
        ("json", "json", "length", "overlap", "dtype", "shape", "move", "name", "body")
    )
    a, b = rng.choice(names), rng.choice(names)
    if kind == "length":
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + data[8:]
    if kind == "overlap":
        header[a]["data_offsets"] = header[b]["data_offsets"]
    elif kind == "dtype":
        kinds = ("F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "I64", "F8_E4M3", "F4", "", "X")
        header[a]["dtype"] = rng.choice(kinds)
    elif kind == "shape":
        shape = header[a]["shape"]
        count = math.prod(shape)
        header[a]["shape"] = rng.choice(
            ([*shape, 1], shape[::-1], [count], [], [0], [1, count], [-1, -count], [2**40, 2**40])
        )
    elif kind == "move":
        low, high = header[a]["data_offsets"]
        by = rng.choice((-1, 1, 4, -(10**9), 10**9, 2**62))
        header[a]["data_offsets"] = rng.choice(
            ([low + by, high + by], [high, low], [low, high + by])
        )
    elif kind == "name":
        header[rng.choice((a + "x", "", "../x", "\ud800"))] = header.pop(a)
    elif kind == "body":
        body = damaged(body, rng)
    text = json.dumps(header).encode()
    if kind == "json":
        text = hostile_json(text, rng)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


# ---------------------------------------------------------------- ONNX


def messages(root: Any, limit: int = 4000) -> list[Any]:
    """All messages inside one, itself too."""
    found = [root]
    for message in found:
        for field, value in message.ListFields():
            if field.type == Field.TYPE_MESSAGE and len(found) < limit:
                found.extend(value if _many(field) else [value])
    return found


def _many(field: Any) -> bool:
    repeated = getattr(field, "is_repeated", None)
    return bool(field.label == Field.LABEL_REPEATED if repeated is None else repeated)


def hostile_onnx(data: bytes, rng: Rng) -> bytes:
    """A field of some message, external data, edges of the graph, or attributes."""
    model = onnx.load_from_string(data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choice(("field", "field", "external", "edge", "attribute", "tensor", "double"))
        with contextlib.suppress(IndexError, TypeError, ValueError, UnicodeError):
            _ONNX[kind](model, rng)
    return bytes(model.SerializeToString())


def _change_field(model: Any, rng: Rng) -> None:
    message = rng.choice(messages(model))
    field, value = rng.choice(message.ListFields())
    if _many(field):
        action = rng.choice(("remove", "double", "clear", "swap"))
        if action == "remove":
            del value[rng.randrange(len(value))]
        elif action == "double" and field.type == Field.TYPE_MESSAGE:
            value.add().CopyFrom(rng.choice(list(value)))
        elif action == "clear":
            message.ClearField(field.name)
        elif field.type == Field.TYPE_MESSAGE:
            items = list(value)
            rng.shuffle(items)
            copies = [type(item)() for item in items]
            for copy, item in zip(copies, items, strict=True):
                copy.CopyFrom(item)
            message.ClearField(field.name)
            getattr(message, field.name).extend(copies)
        else:
            value[rng.randrange(len(value))] = _scalar(field, rng)
    elif field.type == Field.TYPE_MESSAGE or rng.random() < 0.3:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, rng))


def _scalar(field: Any, rng: Rng) -> Any:
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return rng.choice((math.nan, math.inf, -1.0, 0.0, 1e30))
    if field.type == Field.TYPE_STRING:
        return rng.choice(
            ("", "x", "../../secret.txt", "If", "Loop", "com.evil", "x" * 2000, "input")
        )
    if field.type == Field.TYPE_BYTES:
        return rng.choice((b"", b"\0", rng.randbytes(64)))
    small = field.type in (Field.TYPE_INT32, Field.TYPE_ENUM)
    values = (-1, 0, 1, 2, 6, 7, 16, 22, 99, 2**31 - 1, *(() if small else (2**62, -(2**63))))
    return rng.choice(values)


def _change_external(model: Any, rng: Rng) -> None:
    outside = [t for t in model.graph.initializer if t.external_data] or list(
        model.graph.initializer
    )
    tensor = rng.choice(outside)
    kind = rng.choice(("location", "location", "offset", "length", "twice", "inside", "constant"))
    if kind == "inside":
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = b"\0" * rng.choice((0, 4, 100))
        return
    if kind == "constant":  # a pointer where nobody looks for one
        node = model.graph.node.add(op_type="Constant", output=["extra"], name="extra")
        value = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        value.external_data.add(key="location", value="../secret.txt")
        node.attribute.append(onnx.AttributeProto(name="value", type=4, t=value))
        return
    paths = (
        "../secret.txt",
        "../../../etc/passwd",
        "/etc/passwd",
        "",
        ".",
        "absent.bin",
        "/dev/zero",
    )
    numbers = ("-1", "abc", str(10**30), str(2**63), "", "1.5", "0", "7")
    if kind == "twice":
        tensor.external_data.add(key="location", value=rng.choice(paths))
        return
    found = [e for e in tensor.external_data if e.key == kind]
    entry = found[0] if found else tensor.external_data.add(key=kind)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry.value = rng.choice(paths if kind == "location" else numbers)


def _change_edge(model: Any, rng: Rng) -> None:
    nodes = model.graph.node
    node, other = rng.choice(nodes), rng.choice(nodes)
    kind = rng.choice(("cycle", "self", "any", "dangling", "output", "drop", "empty"))
    place = rng.randrange(len(node.input))
    if kind == "cycle":
        other.input[rng.randrange(len(other.input))] = node.output[0]
        node.input[place] = other.output[0]
    elif kind == "self":
        node.input[place] = node.output[0]
    elif kind == "any":
        node.input[place] = rng.choice([t.name for t in model.graph.initializer] + ["input"])
    elif kind == "dangling":
        node.input[place] = "nowhere"
    elif kind == "output":
        node.output[0] = other.output[0]
    elif kind == "drop":
        del node.input[place:]
    else:
        node.input[place] = ""


def _change_attribute(model: Any, rng: Rng) -> None:
    node = rng.choice([n for n in model.graph.node if n.attribute])
    attribute = rng.choice(node.attribute)
    kind = rng.choice(("number", "type", "remove", "name", "big"))
    if kind == "remove":
        node.attribute.remove(attribute)
    elif kind == "name":
        attribute.name += "x"
    elif kind == "type":
        attribute.type = rng.choice((1, 2, 3, 4, 5, 6, 7))
    else:
        big = (
            rng.choice((-1, 0, 2**31, 2**62, 10**6)) if kind == "big" else rng.choice((0, 1, 3, 99))
        )
        if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = big
        else:
            attribute.i = big


def _change_tensor(model: Any, rng: Rng) -> None:
    constants = [a.t for n in model.graph.node for a in n.attribute if a.HasField("t")]
    tensor = rng.choice([*model.graph.initializer, *constants])
    kind = rng.choice(("dims", "type", "raw", "name", "float"))
    if kind == "dims":
        dims = list(tensor.dims)
        new = rng.choice(([*dims, 1], dims[::-1], [], [0], [-1], [2**40, 2**20], [10**6, 10**4]))
        del tensor.dims[:]
        tensor.dims.extend(new)
    elif kind == "type":
        tensor.data_type = rng.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 16, 21, 22, 23, 99))
    elif kind == "raw":
        tensor.raw_data = damaged(tensor.raw_data or b"\0" * 8, rng)
    elif kind == "name":
        tensor.name = rng.choice(("", "x", "input"))
    else:
        tensor.float_data.append(1.0)


def _double(model: Any, rng: Rng) -> None:
    graph = model.graph
    kind = rng.choice(("initializer", "node", "input", "output", "function", "if"))
    if kind == "function":
        made = onnx.helper.make_function("x", "f", ["a"], ["b"], [], [])
        model.functions.append(made)
    elif kind == "if":
        body = onnx.helper.make_graph([], "body", [], [])
        graph.node.append(onnx.helper.make_node("If", ["input"], ["c"], then_branch=body))
    else:
        items = getattr(graph, kind)
        items.add().CopyFrom(rng.choice(list(items)))


_ONNX: dict[str, Callable[[Any, Rng], None]] = {
    "field": _change_field,
    "external": _change_external,
    "edge": _change_edge,
    "attribute": _change_attribute,
    "tensor": _change_tensor,
    "double": _double,
}


# ---------------------------------------------------------------- zip files


def members(data: bytes) -> dict[str, bytes]:
    """Names and contents of a zip file."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(content: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of these."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as file:
        for name, data in content.items():
            file.writestr(name, data)
    return made.getvalue()


def npy(descr: str, shape: str, data: bytes, version: int = 1) -> bytes:
    """An array file with whatever header."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + size + text + data


def hostile_npz(data: bytes, rng: Rng) -> bytes:
    """Headers that promise too much, pickles, bombs, other dtypes and shapes."""
    content = members(data)
    name = rng.choice(list(content))
    zeros = b"\0" * 4096
    kind = rng.choice(("header", "header", "pickle", "bomb", "bytes", "remove", "extra", "values"))
    if kind == "header":
        descr = rng.choice(
            (
                "'<f4'",
                "'<f8'",
                "'<f2'",
                "'|O'",
                "'<U9'",
                "'<M8[s]'",
                "[('a', '<f4')]",
                "'<i8'",
                "''",
            )
        )
        shape = rng.choice(
            (
                *("(1000000000000,)", "(48, 3, 16, 16)", "(-1, 3, 16, 16)", "()", "(0, 3, 16, 16)"),
                *("(4, 0, 16, 16)", "(48,)", "(4, 3, 4000000000)", "(1.5,)", "None", "(" * 500),
                *("(4, 3, 16, 16)", "(1, 3, 16, 16)", "(" + "1," * 70 + ")", "(True, 3, 16, 16)"),
            )
        )
        body = rng.choice((zeros, b"", content[name][128:]))
        content[name] = npy(descr, shape, body, rng.choice((1, 1, 2, 9)))
    elif kind == "pickle":
        content[name] = npy("'|O'", "(2,)", _evil_pickle())
    elif kind == "bomb":
        size = rng.choice((10**7, 10**7, 10**7, 10**8))
        content[name] = npy(
            "'<f4'", f"({size // 768 // 4}, 3, 16, 16)", b"\0" * (size // 3072 * 3072)
        )
        return zipped(content, zipfile.ZIP_DEFLATED)
    elif kind == "bytes":
        content[name] = damaged(content[name], rng)
    elif kind == "remove":
        del content[name]
    elif kind == "extra":
        content["z.npy"] = npy("'|O'", "(2,)", _evil_pickle())
    else:
        array = np.load(io.BytesIO(content[name]))
        odd = rng.choice((np.nan, np.inf, -1, 10**6))
        with np.errstate(all="ignore"):
            changed = array.astype(rng.choice((np.float64, np.int64, np.float16, np.complex64)))
            changed.reshape(-1)[0] = odd if changed.dtype.kind != "i" else 10**6
        made = io.BytesIO()
        np.save(made, changed)
        content[name] = made.getvalue()
    return zipped(content, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


class _Evil:
    """Its pickle makes a file, where anyone restores it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def _evil_pickle() -> bytes:
    return pickle.dumps(_Evil(), protocol=2)


def hostile_pt(data: bytes, rng: Rng) -> bytes:
    """torch's zip file: its pickle, its storages, or a pickle that runs code."""
    content = members(data)
    pickled = next(name for name in content if name.endswith("data.pkl"))
    storages = [name for name in content if "/data/" in name]
    kind = rng.choice(
        ("pickle", "pickle", "code", "storage", "remove", "numbers", "deflate", "legacy")
    )
    if kind == "pickle":
        content[pickled] = damaged(content[pickled], rng)
    elif kind == "code":
        content[pickled] = _evil_pickle()
    elif kind == "storage":
        name = rng.choice(storages)
        content[name] = rng.choice((b"", content[name][:-1], content[name] * 3))
    elif kind == "remove":
        del content[rng.choice(list(content))]
    elif kind == "numbers":  # BININT1 and BININT: sizes, strides, offsets
        changed = bytearray(content[pickled])
        found = [i for i, byte in enumerate(changed[:-1]) if byte == 0x4B]
        for i in rng.sample(found, min(len(found), 3)):
            changed[i + 1] = rng.choice((0, 1, 255))
        if rng.random() < 0.5:
            place = rng.choice(found)
            big = b"\x8a\x08" + struct.pack("<q", rng.choice((2**40, -1, 2**62)))
            changed[place : place + 2] = big
        content[pickled] = bytes(changed)
    elif kind == "legacy":
        return _evil_pickle() if rng.random() < 0.5 else damaged(content[pickled], rng)
    how = zipfile.ZIP_DEFLATED if kind == "deflate" else zipfile.ZIP_STORED
    return zipped(content, how)


def hostile_png(data: bytes, rng: Rng) -> bytes:
    """A PNG whose header promises another size or kind, its checksum right."""
    width, height = rng.choice(
        ((1, 1), (0, 0), (10**5, 10**5), (2**31 - 1, 1), (17, 16), (3000, 3000))
    )
    head = struct.pack(
        ">IIBBBBB", width, height, rng.choice((1, 8, 16, 99)), rng.choice((0, 2, 3, 6, 9)), 0, 0, 0
    )
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return data[:16] + head + crc + data[33:]


# ---------------------------------------------------------------- readers


def rehash(folder: Path, name: str) -> None:
    """Let the manifest name the file as it is now: hostile, and consistent."""
    manifest = folder / "manifest.json"
    record = json.loads(manifest.read_text())
    data = (folder / name).read_bytes()
    found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if name == "statistics.safetensors":
        record["statistics"]["file"] = found
    else:
        record["files"][name] = found
    manifest.write_text(json.dumps(record))


def edit(path: Path, change: Callable[[bytes, Rng], bytes], rng: Rng) -> bool:
    """Change a file; returns whether its bytes are other ones."""
    before = path.read_bytes()
    after = change(before, rng)
    path.write_bytes(after)
    return after != before


class Trial:
    """One mutation: what it is made of, what it is, and which command meets it.

    Attributes:
        must_fail: The file differs from the hash in its manifest.
    """

    def __init__(self, base: Path, work: Path, rng: Rng) -> None:
        self.base, self.work, self.rng = base, work, rng
        self.must_fail = False
        self.label = ""

    def copy(self, name: str) -> Path:
        target = self.work / name
        if (self.base / name).is_dir():
            shutil.copytree(self.base / name, target)
        else:
            shutil.copy(self.base / name, target)
        return target

    def change(self, folder: Path, name: str, how: Callable[[bytes, Rng], bytes]) -> None:
        """Change a file of a folder with a manifest; mostly with its hash set right."""
        structural = self.rng.random() < 0.7
        changed = edit(folder / name, how if structural else damaged, self.rng)
        hashed = name != "manifest.json" and self.rng.random() < 0.8
        if hashed:
            rehash(folder, name)
        self.must_fail = changed and not hashed and name != "manifest.json"
        self.label = (
            f"{name} {'structure' if structural else 'bytes'}{' rehashed' if hashed else ''}"
        )


def bundle(trial: Trial) -> list[list[str]]:
    rng, path = trial.rng, trial.copy("a.hdrq")
    name, how = rng.choice(
        (
            ("manifest.json", hostile_json),
            ("manifest.json", hostile_json),
            ("weights.safetensors", hostile_safetensors),
            ("model.onnx", hostile_onnx),
            ("model.onnx", hostile_onnx),
            ("golden.safetensors", hostile_safetensors),
            ("statistics.safetensors", hostile_safetensors),
        )
    )
    trial.change(path, name, how)
    shown, out = str(path), str(trial.work / "out")
    other = str(trial.base / "b.hdrq")
    further = (
        ["hdrq-merge", shown, other, "-o", out],
        ["hdrq-merge", other, shown, "--rounding", "nearest", "-o", out],
        ["hdrq-export", shown, "--engine", "ort", "-o", out],
        ["hdrq-export", shown, "--engine", "ort", "--keep-float", "conv1", "-o", out],
        ["hdrq-export", shown, "--engine", "onnx", "-o", out],
        ["hdrq-export", shown, "--engine", "trt-rtx", "--no-build", "-o", out],
        ["hdrq-verify", shown, "--no-torch"],
        ["hdrq-verify", shown, "--torch"],
    )
    return [["hdrq inspect", shown], rng.choice(further)]


def engine(trial: Trial) -> list[list[str]]:
    rng = trial.rng
    path = trial.copy(rng.choice(("ort", "onnx")))
    name, how = rng.choice(
        (
            ("manifest.json", hostile_json),
            ("manifest.json", hostile_json),
            ("model.onnx", hostile_onnx),
            ("model.onnx", hostile_onnx),
            ("model.onnx.data", damaged),
            ("precision.json", hostile_json),
            ("golden.safetensors", hostile_safetensors),
        )
    )
    trial.change(path, name, how)
    # An export over what is there may take it for its own or build it again.
    source = str(trial.base / ("a.hdrq" if path.name == "ort" else "c.hdrq"))
    again = ["hdrq-export", source, "--engine", path.name, "-o", str(path)]
    bench = ["hdrq-bench", str(path), "--iterations", "2", "--warmup", "0", "--threads", "1"]
    if name == "precision.json" or rng.random() < 0.1:
        trial.must_fail = False
        return [again]
    chosen = rng.choice(
        (
            bench,
            [*bench, "--data", f"night={trial.base / 'data.npz'}"],
            ["hdrq-verify", str(path)],
            ["hdrq-verify", source, str(path), "--no-torch"],
            ["hdrq emit", "triton", str(path), "-o", str(trial.work / "out")],
        )
    )
    return [chosen]


def plan(trial: Trial) -> list[list[str]]:
    rng = trial.rng
    path = trial.copy(rng.choice(("trt", "trt-rtx")))
    trial.change(path, rng.choice(("model.plan", "model.plan", "manifest.json")), damaged)
    trial.must_fail = True  # there is no GPU, or the plan is of no library
    return [
        ["hdrq-bench", str(path), "--iterations", "1"]
        if rng.random() < 0.5
        else ["hdrq-verify", str(path)]
    ]


def checkpoint(trial: Trial) -> list[list[str]]:
    rng = trial.rng
    path = trial.copy(rng.choice(("a.safetensors", "a.safetensors", "a.pt")))
    how = hostile_safetensors if path.suffix == ".safetensors" else hostile_pt
    if rng.random() < 0.3:
        how = damaged
    edit(path, how, rng)
    out = str(trial.work / "out.safetensors")
    methods = (["mean"], ["ties", "--base", str(trial.base / "b.safetensors")])
    merge = [str(path), str(trial.base / "b.safetensors"), "--method", *rng.choice(methods)]
    trial.label = f"{path.name} {how.__name__}"
    return [rng.choice((["hdrq-merge", *merge, "-o", out], ["load", str(path)]))]


def numbers(trial: Trial) -> list[list[str]]:
    path = trial.copy("data.npz")
    how = hostile_npz if trial.rng.random() < 0.7 else damaged
    edit(path, how, trial.rng)
    trial.label = how.__name__
    bench = ["hdrq-bench", str(trial.base / "ort"), "--iterations", "1", "--warmup", "0"]
    return [[*bench, "--threads", "1", "--data", f"night={path}"]]


def pictures(trial: Trial) -> list[list[str]]:
    path = trial.copy("images")
    file = trial.rng.choice(sorted(f for f in path.rglob("*") if f.is_file()))
    how = hostile_png if file.suffix == ".png" and trial.rng.random() < 0.4 else damaged
    edit(file, how, trial.rng)
    trial.label = f"{file.suffix} {how.__name__}"
    bench = ["hdrq-bench", str(trial.base / "ort"), "--iterations", "1", "--warmup", "0"]
    return [[*bench, "--threads", "1", "--data", f"night={path}"]]


def recipe(trial: Trial) -> list[list[str]]:
    rng = trial.rng
    path = trial.copy(rng.choice(("recipe.json", "recipe.yaml")))
    how = hostile_json if rng.random() < 0.6 else damaged
    if how is hostile_json:  # JSON is YAML, too
        shutil.copy(trial.base / "recipe.json", path)
    edit(path, how, rng)
    if path.suffix == ".yaml" and rng.random() < 0.2:
        bomb = "a0: &a0 [x, x]\n" + "".join(
            f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)
        )
        path.write_text(
            rng.choice(
                (bomb, "iters: &a [*a]\n", "lr: !!python/object/apply:os.mkdir [executed]\n")
            )
        )
    trial.label = f"{path.suffix} {how.__name__}"
    rest = ["--model", "absent_module:Net", "--data", "x.npz", "--domain", "night", "-o", "out"]
    return [["hdrq-calibrate", "--recipe", str(path), "--base", "x", *rest]]


def result(trial: Trial) -> list[list[str]]:
    path = trial.copy("bench.json")
    how = hostile_json if trial.rng.random() < 0.8 else damaged
    edit(path, how, trial.rng)
    pair = [str(path), str(trial.base / "bench.json")]
    trial.rng.shuffle(pair)
    trial.label = how.__name__
    return [["hdrq compare", *pair, "--json", str(trial.work / "out.json")]]


READERS: dict[str, Callable[[Trial], list[list[str]]]] = {
    "bundle": bundle,
    "engine": engine,
    "plan": plan,
    "checkpoint": checkpoint,
    "npz": numbers,
    "images": pictures,
    "recipe": recipe,
    "bench JSON": result,
}
# Bundles and engines have the most to read.
ORDER = ("bundle",) * 6 + ("engine",) * 5 + ("checkpoint",) * 3 + ("npz", "npz", "images", "recipe")
ORDER += ("bench JSON", "plan")


# ---------------------------------------------------------------- running


def command(name: str) -> Callable[[list[str]], int]:
    """The entry point of a command."""
    if name == "load":
        return _load
    import importlib

    module = name.replace("hdrq-", "").replace("hdrq ", "")
    main: Callable[[list[str]], int] = importlib.import_module(f"hdrq_deploy.cli.{module}").main
    return main


def _load(argv: list[str]) -> int:
    """A checkpoint into the model that it is of, as a calibration loads it."""
    from tiny_models import Tiny  # type: ignore[import-not-found]

    from hdrq_deploy.calibration.loading import load_state
    from hdrq_deploy.cli.common import run

    def body() -> int:
        load_state(Tiny(), argv[0], "adapted")
        return 0

    return run("load", body)


@contextlib.contextmanager
def heard(path: Path) -> Iterator[None]:
    """Standard output and error, native code's too, go to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("wb") as file, Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


def listing(folder: Path) -> dict[str, Any]:
    """Files below a folder with size and time."""
    return {
        str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns)
        if f.is_file()
        else None
        for f in sorted(folder.rglob("*"))
    }


def judge(name: str, code: int, said: list[str], left: bool, must_fail: bool) -> str:
    """``accepted``, ``refused``, or what is wrong."""
    if code == 0:
        return (
            "SWALLOWED: an altered file was taken for what its manifest names"
            if must_fail
            else "accepted"
        )
    if code not in (2, 3):
        return f"WRONG CODE {code}"
    # That an engine is up to date is a note; its report is read afterwards.
    said = [line for line in said if not line.endswith(": up to date")]
    told = [line for line in said if line.startswith(f"{name}: ")]
    if len(told) != 1 or len(said) > 2:
        return f"NOT ONE LINE: {said[:4]}"
    if len(told[0]) > 1500:
        return f"LONG LINE: {len(told[0])} characters"
    if any(not c.isprintable() for c in told[0]):
        return "CONTROL CHARACTERS"
    return "LEFT BEHIND" if left else "refused"


def attempt(base: Path, seed: str, number: int) -> dict[str, Any]:
    """Make mutation ``number`` and run its commands."""
    rng = random.Random(f"{seed}:{number}")
    reader = ORDER[number % len(ORDER)]
    work = base / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    os.chdir(work)
    trial = Trial(base, work, rng)
    outcome, argv = "accepted", [""]
    said: list[str] = []
    began = time.monotonic()
    for argv in READERS[reader](trial):
        name, *flags = argv
        before = listing(work)
        code: Any = None
        trouble = ""
        log = base / "stderr.txt"
        with heard(log):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(CLOCK)
            try:
                code = command(name)(flags)
            except Hang:
                trouble = "HANG"
            except BaseException as error:
                import traceback

                trouble = _place(error, traceback.extract_tb(error.__traceback__))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
        said = log.read_text(errors="replace").splitlines()
        left = listing(work) != before
        if name == "hdrq compare" and code == 3:  # a regression; the comparison is written
            left = False
        outcome = trouble or judge(name, code, said, left, trial.must_fail)
        if (base / "work" / "executed").exists():
            outcome = "CODE WAS RUN"
        if outcome != "accepted":
            break
    return {
        "number": number,
        "reader": reader,
        "label": trial.label,
        "outcome": outcome,
        "command": " ".join(argv).replace(str(base), "")[:200],
        "said": said[-1][:300] if said else "",
        "seconds": round(time.monotonic() - began, 2),
    }


def _place(error: BaseException, frames: Any) -> str:
    """What was raised, and by which line of the project."""
    folders = ("hdrq_deploy", "exporters", "runtime", "calibration_data")
    ours = [f for f in frames if any(f"/{folder}/" in f.filename for folder in folders)]
    where = (ours or list(frames))[-1]
    text = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
    return f"TRACEBACK {text} {str(error)[:150]!r}"


def _alarm(*_: object) -> None:
    raise Hang


def limit_memory() -> None:
    """``MEMORY`` beyond what the libraries have mapped."""
    import onnxruntime  # noqa: F401
    import torch

    import hdrq_deploy.calibration  # noqa: F401

    torch.set_num_threads(1)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))


def main(argv: list[str]) -> int:
    """Print one line for every mutation."""
    folder, seed, first, count = argv
    base = Path(folder).resolve()
    sys.path.insert(0, str(base))
    for name in ("inspect", "merge", "export", "verify", "bench", "emit", "compare", "calibrate"):
        command(f"hdrq-{name}")
    limit_memory()
    signal.signal(signal.SIGALRM, _alarm)
    signal.signal(signal.SIGPROF, _alarm)
    for number in range(int(first), int(first) + int(count)):
        print(f"begin {number}", flush=True)
        print(json.dumps(attempt(base, seed, number)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
