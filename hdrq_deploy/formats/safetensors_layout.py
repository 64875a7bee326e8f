"""Safetensors files: what their header says, read with care, and how our tensors lie in them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from ..errors import BundleError
from ..numerics import e4m3
from ..numerics.int4 import pack_int4
from ..typing import Array

if TYPE_CHECKING:
    from .bundle_manifest import Tensor

__all__ = ["Span", "layout", "read_header", "read_metadata", "serialize", "stored", "with_metadata"]


@dataclass(frozen=True, slots=True)
class Span:
    """Where one tensor lies in a safetensors file: dtype tag, shape, byte offset and length."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


# Bytes of one element; formats of less than a byte are not read here.
_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
# As in the reference implementation.
_LONGEST_HEADER = 100_000_000


def read_header(path: Path) -> dict[str, Span]:
    """Tensors of a safetensors file with offsets from the start of the file.

    Dtypes, shapes and offsets fit each other and the file: the tensors cover its data, each
    byte once.

    Raises:
        BundleError: The file is missing, truncated or not safetensors.

    Source:
        github.com/huggingface/safetensors, section Format
    """
    try:
        if not path.is_file():
            raise ValueError("no file")
        header, start, size = _header(path)
        _check_metadata(header.pop("__metadata__", {}))
        spans = {name: _span(name, entry, start) for name, entry in header.items()}
        end = start
        for name, span in sorted(spans.items(), key=lambda item: (item[1].offset, item[1].length)):
            if span.offset != end:
                raise ValueError(f"{name!r} at byte {span.offset}, the one before ends at {end}")
            end += span.length
        if end != size:
            raise ValueError(f"tensors that end at byte {end} of a file of {size}")
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise BundleError(
            f"{path}: cannot be read as safetensors ({error}); copy or make the file again"
        ) from error
    return spans


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON, the first byte behind it, and the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length), object_pairs_hook=_each_once)
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    return header, 8 + length, size


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different, and can be written down."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name that is there twice")
    "".join(entries).encode()
    return entries


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata that are no texts")


def _span(name: str, entry: Any, start: int) -> Span:
    """One entry of a header; ``start`` is the first byte of the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} without dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    are_counts = all(
        isinstance(part, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in part)
        for part in (shape, offsets)
    )
    if not are_counts or len(offsets) != 2 or str(dtype) not in _SIZES:
        raise ValueError(
            f"{name!r} of dtype {str(dtype)[:40]!r}, or a shape or offsets that are none"
        )
    length = offsets[1] - offsets[0]
    if length != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{name!r} of {length} bytes for {dtype} {tuple(shape)}")
    return Span(dtype, tuple(shape), start + offsets[0], length)


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a safetensors file; nothing where the file is of another format."""
    try:
        metadata = _header(path)[0].get("__metadata__")
    except (ValueError, RecursionError, struct.error):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def with_metadata(start: bytes, key: str, notes: dict[str, Any]) -> bytes:
    """Length and header of a safetensors file, with our notes in its metadata.

    Args:
        start: The first bytes of a file, up to its data.
        key: ``merged`` or ``adapted``; notes of the other kind are taken out.
        notes: Plain data for JSON; ``method`` is one of the keys.
    """
    header = json.loads(start[8:])
    old = header.pop("__metadata__", None) or {}
    others = {name: text for name, text in old.items() if name not in {"merged", "adapted"}}
    metadata = dict(sorted({**others, key: json.dumps(notes)}.items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def serialize(tensors: Mapping[str, Array], entries: Mapping[str, Tensor]) -> bytes:
    """The bytes of a bundle's weights; equal names, dtypes and shapes give an equal layout."""
    return safetensors.numpy.save({n: stored(tensors[n], entry) for n, entry in entries.items()})


def stored(value: Array, entry: Tensor) -> Array:
    """A tensor as it lies in a bundle's weights: of the entry's dtype, but for two.

    4-bit codes are packed, numbers of E4M3 are bytes.
    """
    array = np.ascontiguousarray(value).reshape(entry.shape)
    if entry.packed:
        return pack_int4(array)
    if entry.dtype == e4m3.NAME:
        return array.astype(e4m3.DTYPE, copy=False).view(np.uint8)
    return array.astype(entry.dtype, copy=False)


def layout(
    tensors: Mapping[str, Array], entries: Mapping[str, Tensor], folder: Path
) -> dict[str, Span]:
    """Where each tensor will lie in a bundle's weights; ``folder`` is for a scratch file."""
    path = folder / "layout.safetensors"
    path.write_bytes(serialize(tensors, entries))
    return read_header(path)
