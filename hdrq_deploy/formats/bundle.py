"""The bundle: a folder of few files that carries a model between all stations.

``weights.safetensors`` holds every number that a merge changes, ``model.onnx`` the graph,
whose initializers point into it (ONNX external data), ``manifest.json`` all the rest.
A merge therefore writes a new weights file of the same layout and copies the graph.
``golden.safetensors``, where there is one, holds a few inputs and, of a calibrated bundle,
what the graph made of them: enough to check a machine without any data set.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import safetensors.numpy

from ..errors import BundleError
from ..numerics.int4 import pack_int4, unpack_int4
from . import onnx_file
from .atomic_files import check_output, new_directory, sha256_bytes, sha256_file, write_bytes
from .bundle_manifest import FileRecord, Manifest, Tensor
from .file_kinds import BUNDLE

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "GOLDEN",
    "GRAPH",
    "MANIFEST",
    "WEIGHTS",
    "Bundle",
    "Span",
    "read_golden",
    "read_header",
]

GRAPH = "model.onnx"
WEIGHTS = "weights.safetensors"
MANIFEST = "manifest.json"
GOLDEN = "golden.safetensors"
GOLDEN_IMAGES = 2

_STORED = {"float32": "F32", "int8": "I8", "int4": "U8", "int64": "I64", "bool": "BOOL"}
_ONNX = {
    "float32": onnx.TensorProto.FLOAT,
    "int8": onnx.TensorProto.INT8,
    "int4": onnx.TensorProto.INT4,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}

Array = npt.NDArray[Any]


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
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=_each_once)
        if not isinstance(header, dict):
            raise ValueError("a header that is no object")
        _check_metadata(header.pop("__metadata__", {}))
        spans = {name: _span(name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
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


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different, and can be written down."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that is there twice")
    "".join(found).encode()
    return found


def _check_metadata(found: Any) -> None:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("metadata that are no texts")


def _span(name: str, entry: Any, start: int) -> Span:
    """One entry of a header; ``start`` is the first byte of the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} without dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = all(
        isinstance(part, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in part)
        for part in (shape, offsets)
    )
    if not whole or len(offsets) != 2 or str(dtype) not in _SIZES:
        raise ValueError(
            f"{name!r} of dtype {str(dtype)[:40]!r}, or a shape or offsets that are none"
        )
    length = offsets[1] - offsets[0]
    if length != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{name!r} of {length} bytes for {dtype} {tuple(shape)}")
    return Span(dtype, tuple(shape), start + offsets[0], length)


class Bundle:
    """A bundle on disk, read on demand.

    >>> Bundle.open("night.hdrq").manifest.domains  # doctest: +SKIP
    {'night': 1.0}
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], check: bool = True) -> Bundle:
        """Open a bundle and, unless ``check`` is False, validate all of it.

        Raises:
            BundleError: A file is missing, truncated or altered, the schema is another one,
                or graph, weights and manifest contradict each other.
        """
        folder = Path(path)
        file = folder / MANIFEST
        if not file.is_file():
            found = "a file" if folder.is_file() else "nothing" if not folder.exists() else "no"
            raise BundleError(
                f"{folder}: found {found} {MANIFEST if found == 'no' else 'there'}; needed a "
                "bundle folder as hdrq-calibrate or hdrq-merge writes it"
            )
        try:
            text = file.read_bytes()
        except OSError as error:
            raise BundleError(f"{file}: cannot be read ({error.strerror})") from error
        bundle = cls(folder, Manifest.from_json(text, str(file)))
        if check:
            bundle.validate()
        return bundle

    @classmethod
    def write(
        cls,
        path: str | os.PathLike[str],
        manifest: Manifest,
        tensors: Mapping[str, Array],
        graph: bytes,
        golden: Mapping[str, Array] | None = None,
        check: Callable[[Bundle], None] = lambda made: None,
    ) -> Bundle:
        """Write a whole bundle or nothing.

        Args:
            path: Folder to make; an earlier bundle there is replaced.
            manifest: Its ``files`` are filled in here.
            tensors: Unpacked codes, scales and floats, one for each manifest tensor.
            graph: ``model.onnx`` whose external data fits the layout of ``tensors``.
            golden: ``input`` (N, ...) and, where it is known, ``output``.
            check: See :meth:`write_like`.
        """
        target = Path(path).absolute()
        contents = {WEIGHTS: serialize(tensors, manifest.tensors), GRAPH: graph}
        if golden:
            contents[GOLDEN] = safetensors.numpy.save(dict(golden))
        manifest = manifest.model_copy(
            update={
                "files": {
                    name: FileRecord(bytes=len(data), sha256=sha256_bytes(data))
                    for name, data in contents.items()
                }
            }
        )
        with new_directory(target, BUNDLE) as folder:
            for name, data in contents.items():
                write_bytes(folder / name, data)
            write_bytes(folder / MANIFEST, manifest.to_json())
            made = cls(folder, manifest)
            made.validate()
            check(made)
        return cls(target, manifest)

    @classmethod
    def write_like(
        cls,
        path: str | os.PathLike[str],
        like: Bundle,
        fill: Callable[[Callable[[str, Array], None]], Manifest],
        golden: Mapping[str, Array] | None = None,
        check: Callable[[Bundle], None] = lambda made: None,
    ) -> Bundle:
        """Write a bundle with the layout and graph of another, tensor by tensor.

        Args:
            path: Folder to make; an earlier bundle there is replaced.
            like: Gives names, shapes, offsets and the graph.
            fill: Calls its argument with every tensor's name and value, unpacked, from any
                thread; returns the manifest, whose ``files`` are filled in here.
            golden: See :meth:`write`.
            check: Called with the bundle before it takes its place; nothing is written where
                it raises.
        """
        target = check_output(path, BUNDLE, [like.path])
        entries = like.manifest.tensors
        spans = read_header(like.path / WEIGHTS)
        header = min((span.offset for span in spans.values()), default=0)
        with new_directory(target, BUNDLE) as folder:
            with (folder / WEIGHTS).open("w+b") as file:
                with (like.path / WEIGHTS).open("rb") as origin:
                    file.write(origin.read(header))
                file.flush()
                file.truncate(like.manifest.files[WEIGHTS].bytes)

                def put(name: str, value: Array) -> None:
                    data = _stored(value, entries[name]).tobytes()
                    assert len(data) == spans[name].length
                    os.pwrite(file.fileno(), data, spans[name].offset)

                manifest = fill(put)
                os.fsync(file.fileno())
            shutil.copyfile(like.path / GRAPH, folder / GRAPH)
            if golden:
                (folder / GOLDEN).write_bytes(safetensors.numpy.save(dict(golden)))
            files = {
                file.name: FileRecord(bytes=file.stat().st_size, sha256=sha256_file(file))
                for file in sorted(folder.iterdir())
            }
            manifest = manifest.model_copy(update={"files": files})
            write_bytes(folder / MANIFEST, manifest.to_json())
            made = cls(folder, manifest)
            made._check_graph(spans)
            made._check_scales()
            check(made)
        return cls(target, manifest)

    @property
    def size_bytes(self) -> int:
        """Weights and graph together."""
        files = self.manifest.files
        return files[WEIGHTS].bytes + files[GRAPH].bytes

    @property
    def domain(self) -> str | None:
        """The one domain that the bundle was calibrated for; None for a merge of several."""
        (first, *others) = self.manifest.domains
        return None if others else first

    @property
    def manifest_sha256(self) -> str:
        """Hash that names the whole bundle: the manifest holds those of its files."""
        return sha256_bytes(self.manifest.to_json())

    @property
    def graph_sha256(self) -> str:
        """Hash of ``model.onnx``: equal for two bundles of one architecture and scheme."""
        return self.manifest.files[GRAPH].sha256

    def tensor(self, name: str) -> Array:
        """One tensor, codes unpacked."""
        with self._opened() as file:
            return self._unpack(name, file.get_tensor(name))

    def tensors(self) -> dict[str, Array]:
        """All tensors, codes unpacked."""
        with self._opened() as file:
            return {
                name: self._unpack(name, file.get_tensor(name)) for name in self.manifest.tensors
            }

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safetensors.safe_open(self.path / WEIGHTS, framework="numpy") as file:
                yield file
        except (OSError, safetensors.SafetensorError) as error:
            raise self._error(WEIGHTS, f"cannot be read ({error})") from error

    def golden(self) -> dict[str, Array]:
        """``input`` and perhaps ``output``; empty where the bundle holds none.

        Raises:
            BundleError: The file cannot be read, or its inputs are not the network's.
        """
        if GOLDEN not in self.manifest.files:
            return {}
        golden = read_golden(self.path / GOLDEN)
        shape = golden["input"].shape[1:]
        if shape != self.manifest.input_shape:
            raise self._error(
                GOLDEN, f"inputs of shape {shape}, the network reads {self.manifest.input_shape}"
            )
        return golden

    def graph(self) -> onnx.ModelProto:
        """The graph, its external data not loaded."""
        try:
            return onnx_file.parse(self.path / GRAPH)
        except ValueError as error:
            raise self._error(GRAPH, str(error)) from error

    def graph_ir(self) -> ir.Model:
        """The graph as onnx_ir has it, to be rewritten."""
        try:
            return onnx_file.load_ir(self.path / GRAPH)
        except ValueError as error:
            raise self._error(GRAPH, str(error)) from error

    def output_shape(self) -> tuple[int | str, ...]:
        """Shape of the network's output; a str dimension is free."""
        (output, *_) = self.graph().graph.output
        return tuple(d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim)

    def validate(self) -> None:
        """Check hashes, dtypes, shapes, scales and the graph's pointers into the weights.

        Raises:
            BundleError: Names the first contradiction.
        """
        for name in {WEIGHTS: None, GRAPH: None, **self.manifest.files}:
            self._check_file(name)
        spans = read_header(self.path / WEIGHTS)
        self._check_same(set(spans), set(self.manifest.tensors), WEIGHTS)
        for name, entry in self.manifest.tensors.items():
            stored = ((int(np.prod(entry.shape)) + 1) // 2,) if entry.packed else entry.shape
            found = (spans[name].dtype, spans[name].shape)
            if found != (_STORED.get(entry.dtype), stored):
                raise self._error(
                    WEIGHTS, f"{name} is {found[0]} {found[1]}, manifest {entry.dtype} {stored}"
                )
        self._check_graph(spans)
        self._check_scales()

    def _unpack(self, name: str, stored: Array) -> Array:
        entry = self.manifest.tensors[name]
        return unpack_int4(stored, entry.shape) if entry.packed else stored

    def _error(self, file: str, problem: str) -> BundleError:
        return BundleError(
            f"{self.path / file}: {problem}; the bundle is damaged, copy or make it again"
        )

    def _check_same(self, found: set[str], needed: set[str], file: str) -> None:
        if found != needed:
            missing, extra = sorted(needed - found)[:1], sorted(found - needed)[:1]
            raise self._error(file, f"tensors missing {missing or 'none'}, extra {extra or 'none'}")

    def _check_file(self, name: str) -> None:
        record = self.manifest.files.get(name)
        if record is None:
            raise self._error(MANIFEST, f"no hash of {name}")
        file = self.path / name
        if not file.is_file():
            raise self._error(name, "missing")
        if file.stat().st_size != record.bytes:
            raise self._error(
                name, f"found {file.stat().st_size} bytes, manifest says {record.bytes}"
            )
        found = sha256_file(file)
        if found != record.sha256:
            raise self._error(
                name, f"found sha256 {found[:12]}, manifest says {record.sha256[:12]}"
            )

    def _check_graph(self, spans: Mapping[str, Span]) -> None:
        try:
            model = onnx_file.checked(self.path / GRAPH, {WEIGHTS})
            _check_quantizers(model)
            external = {i.name: i for i in model.graph.initializer if i.external_data}
            self._check_same(set(external), self.manifest.graph_tensors, GRAPH)
            for name, initializer in external.items():
                self._check_pointer(name, initializer, spans[name])
        except ValueError as error:
            raise self._error(GRAPH, str(error)) from error
        nodes = {node.name for node in model.graph.node}
        for layer in self.manifest.layers:
            if layer.node not in nodes:
                raise self._error(MANIFEST, f"layer {layer.module} is no node of {GRAPH}")

    def _check_pointer(self, name: str, initializer: onnx.TensorProto, span: Span) -> None:
        entry, place = self.manifest.tensors[name], onnx_file.pointer(initializer)
        found = (
            place.get("location"),
            onnx_file.number(place.get("offset", ""), 0),
            onnx_file.number(place.get("length", ""), -1),
            initializer.data_type,
            tuple(initializer.dims),
        )
        needed = (WEIGHTS, span.offset, span.length, _ONNX[entry.dtype], entry.shape)
        if found != needed:
            raise ValueError(f"{name} points to {found}, weights have {needed}")

    def _check_scales(self) -> None:
        for name, entry in self.manifest.tensors.items():
            if "scale" in entry.role:
                scale = self.tensor(name)
                if not (np.isfinite(scale).all() and (scale > 0).all()):
                    raise self._error(WEIGHTS, f"{name} holds a step that is not > 0")
            elif entry.role == "codes" and entry.scale not in self.manifest.tensors:
                raise self._error(MANIFEST, f"{name} names no scale tensor")


def _check_quantizers(model: onnx.ModelProto) -> None:
    """Activations are quantized as a calibration writes it: step and zero point, then perhaps Clip.

    Raises:
        ValueError: Names the first node that is not.
    """
    weights = {initializer.name for initializer in model.graph.initializer}
    quantized: set[str] = set()
    for node in model.graph.node:
        quantizes = node.op_type == "QuantizeLinear"
        reads_codes = node.op_type == "DequantizeLinear" and node.input[0] not in weights
        narrows = node.op_type == "Clip" and node.input[0] in quantized
        if (quantizes or reads_codes or narrows) and not (len(node.input) == 3 and all(node.input)):
            what = "bounds" if narrows else "step and zero point"
            raise ValueError(f"{node.name} has no {what}")
        if quantizes:
            quantized.add(node.output[0])


def read_golden(path: Path) -> dict[str, Array]:
    """Golden inputs, and outputs where they are known.

    Raises:
        BundleError: The file cannot be read, or holds no inputs, or none for each output.
    """
    wrong = {
        name: span
        for name, span in read_header(path).items()
        if span.dtype not in {"F32", "I64", "I32"} or not span.shape or not math.prod(span.shape)
    }
    if wrong:
        name, span = next(iter(wrong.items()))
        raise BundleError(
            f"{path}: found {name} of {span.dtype} {span.shape}; needed float32 inputs and "
            "outputs: make the file again"
        )
    try:
        golden: dict[str, Array] = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy or make it again") from error
    counts = {len(values) for values in golden.values()}
    if "input" not in golden or len(counts) > 1 or golden["input"].dtype != np.float32:
        raise BundleError(
            f"{path}: found {', '.join(golden) or 'nothing'}; needed float32 input and as many "
            "outputs: make the file again"
        )
    if not all(np.isfinite(values).all() for values in golden.values()):
        raise BundleError(f"{path}: found NaN or infinity; needed finite values: make it again")
    return golden


def serialize(tensors: Mapping[str, Array], entries: Mapping[str, Tensor]) -> bytes:
    """The bytes of ``weights.safetensors``; same names, dtypes and shapes, same layout."""
    stored = {name: _stored(tensors[name], entry) for name, entry in entries.items()}
    return safetensors.numpy.save(stored)


def _stored(value: Array, entry: Tensor) -> Array:
    """A tensor as it lies in the weights file."""
    array = np.ascontiguousarray(value).reshape(entry.shape)
    if entry.packed:
        return pack_int4(array)
    return array.astype(entry.dtype, copy=False)


def layout(
    tensors: Mapping[str, Array], entries: Mapping[str, Tensor], folder: Path
) -> dict[str, Span]:
    """Where each tensor will lie in the weights file; ``folder`` is for scratch."""
    path = folder / WEIGHTS
    path.write_bytes(serialize(tensors, entries))
    return read_header(path)
