"""The bundle: a folder of few files that carries a model between all stations.

``weights.safetensors`` holds every number that a merge changes, ``model.onnx`` the graph,
whose initializers point into it (ONNX external data), ``manifest.json`` all the rest.
A merge therefore writes a new weights file of the same layout and copies the graph.
``golden.safetensors``, where there is one, holds a few inputs and, of a calibrated bundle,
what the graph made of them: enough to check a machine without any data set.
``statistics.safetensors``, where there is one, holds what a merge may use (:mod:`.statistics`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import safetensors.numpy

from ..errors import BundleError
from ..numerics import e4m3
from ..numerics.int4 import unpack_int4
from ..typing import Array
from . import onnx_file
from .atomic_files import (
    check_output,
    explained,
    new_directory,
    sha256_bytes,
    sha256_file,
    write_bytes,
)
from .bundle_manifest import Manifest
from .file_kinds import BUNDLE
from .golden_inputs import GOLDEN, read_golden
from .records import GRAPH, MANIFEST, FileRecord
from .safetensors_layout import Span, read_header, serialize, stored
from .statistics import STATISTICS, Statistics, StatisticsFile

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["GOLDEN", "GRAPH", "MANIFEST", "WEIGHTS", "Bundle"]

WEIGHTS = "weights.safetensors"

_STORED = {
    "float32": "F32",
    "int8": "I8",
    "int4": "U8",
    e4m3.NAME: "U8",
    "int64": "I64",
    "bool": "BOOL",
}
_ONNX = {
    "float32": onnx.TensorProto.FLOAT,
    "int8": onnx.TensorProto.INT8,
    "int4": onnx.TensorProto.INT4,
    e4m3.NAME: onnx.TensorProto.FLOAT8E4M3FN,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}


class Bundle:
    """A bundle on disk, read on demand.

    >>> Bundle.open("night.hdrq").manifest.domains  # doctest: +SKIP
    {'night': 1.0}
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._held: dict[str, Array] | None = None

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
            state = "a file" if folder.is_file() else "nothing" if not folder.exists() else "no"
            raise BundleError(
                f"{folder}: found {state} {MANIFEST if state == 'no' else 'there'}; needed a "
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
        check: Callable[[Bundle], None] = lambda bundle: None,
        statistics: Statistics | None = None,
    ) -> Bundle:
        """Write a whole bundle or nothing.

        Args:
            path: Folder to make; an earlier bundle there is replaced.
            manifest: The manifest; its ``files`` and ``statistics`` are filled in here.
            tensors: Unpacked codes, scales and floats, one for each manifest tensor.
            graph: ``model.onnx`` whose external data fits the layout of ``tensors``.
            golden: ``input`` (N, ...) and, where it is known, ``output``.
            check: See :meth:`write_like`.
            statistics: What calibration saw of the layers' inputs.
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
                },
                "statistics": None,
            }
        )
        if statistics is not None:
            contents[STATISTICS] = statistics.serialize()
            record = statistics.record(contents[STATISTICS])
            manifest = manifest.model_copy(update={"statistics": record})
        with new_directory(target, BUNDLE) as folder:
            for name, data in contents.items():
                write_bytes(folder / name, data)
            write_bytes(folder / MANIFEST, manifest.to_json())
            bundle = cls(folder, manifest)
            bundle.validate()
            check(bundle)
        return cls(target, manifest)

    @classmethod
    def write_like(
        cls,
        path: str | os.PathLike[str],
        like: Bundle,
        fill: Callable[[Callable[[str, Array], None]], Manifest],
        golden: Mapping[str, Array] | None = None,
        check: Callable[[Bundle], None] = lambda bundle: None,
        statistics: Callable[[], Statistics | None] = lambda: None,
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
            statistics: Called after ``fill``; what it gives is written beside the weights.
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
                    data = stored(value, entries[name]).tobytes()
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
            manifest = manifest.model_copy(update={"files": files, "statistics": None})
            if (merged := statistics()) is not None:
                data = merged.serialize()
                write_bytes(folder / STATISTICS, data)
                manifest = manifest.model_copy(update={"statistics": merged.record(data)})
            write_bytes(folder / MANIFEST, manifest.to_json())
            bundle = cls(folder, manifest)
            bundle._check_graph(spans)
            bundle._check_scales()
            check(bundle)
        return cls(target, manifest)

    def strip(self, output: str | os.PathLike[str] | None = None) -> int:
        """Remove the statistics; the bundle stays the same bundle (:attr:`manifest_sha256`).

        In place the manifest goes first: whatever interrupts this leaves a whole bundle. A file of
        statistics that the manifest does not name is removed too.

        Args:
            output: Folder of a copy without statistics; by default they are removed in place.

        Returns:
            Bytes that the bundle is smaller by.

        Raises:
            BundleError: What is left is damaged.
            HdrqError: The place cannot be written to, or is taken by something else.
        """
        file = self.path / STATISTICS
        size = file.stat().st_size if file.is_file() else 0
        manifest = self.manifest.model_copy(update={"statistics": None})
        if output is not None:
            target = check_output(output, BUNDLE, [self.path])
            with new_directory(target, BUNDLE) as folder:
                for name in self.manifest.files:
                    shutil.copyfile(self.path / name, folder / name)
                write_bytes(folder / MANIFEST, manifest.to_json())
                type(self)(folder, manifest).validate()
            return size
        type(self)(self.path, manifest).validate()
        if self.manifest.statistics is not None:
            write_bytes(self.path / MANIFEST, manifest.to_json())
            self.manifest = manifest
        with explained(file):
            file.unlink(missing_ok=True)
        return size

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
        """Hash that names the whole bundle but for its statistics: it covers those of its files."""
        return sha256_bytes(self.manifest.identity())

    @property
    def graph_sha256(self) -> str:
        """Hash of ``model.onnx``: equal for two bundles of one architecture and scheme."""
        return self.manifest.files[GRAPH].sha256

    def tensor(self, name: str) -> Array:
        """One tensor, codes unpacked."""
        if self._held is not None and name in self._held:
            return self._held[name]
        with self._opened() as file:
            value = self._unpack(name, file.get_tensor(name))
        if self._held is not None:
            value.setflags(write=False)  # Other callers are given the same array.
            self._held[name] = value
        return value

    def in_memory(self) -> Bundle:
        """The same bundle, whose :meth:`tensor` reads every tensor once and gives it again.

        For many merges of the same bundles, where opening the file takes longer than merging.
        """
        bundle = Bundle(self.path, self.manifest)
        bundle._held = {}
        return bundle

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

    def statistics(self) -> StatisticsFile | None:
        """What calibration saw of the layers' inputs; None where the bundle does not hold it.

        Raises:
            BundleError: The file is not there, or holds other tensors than the manifest says.
        """
        record = self.manifest.statistics
        return None if record is None else StatisticsFile(self.path / STATISTICS, record)

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
            self._check_file(name, self.manifest.files.get(name))
        if self.manifest.statistics is not None:
            self._check_file(STATISTICS, self.manifest.statistics.file)
            self.statistics()
        spans = read_header(self.path / WEIGHTS)
        self._check_same(set(spans), set(self.manifest.tensors), WEIGHTS)
        for name, entry in self.manifest.tensors.items():
            shape = ((int(np.prod(entry.shape)) + 1) // 2,) if entry.packed else entry.shape
            given = (spans[name].dtype, spans[name].shape)
            if given != (_STORED.get(entry.dtype), shape):
                raise self._error(
                    WEIGHTS, f"{name} is {given[0]} {given[1]}, manifest {entry.dtype} {shape}"
                )
        self._check_graph(spans)
        self._check_scales()

    def _unpack(self, name: str, value: Array) -> Array:
        entry = self.manifest.tensors[name]
        if entry.dtype == e4m3.NAME:
            return value.view(e4m3.DTYPE)
        return unpack_int4(value, entry.shape) if entry.packed else value

    def _error(self, file: str, problem: str) -> BundleError:
        return BundleError(
            f"{self.path / file}: {problem}; the bundle is damaged, copy or make it again"
        )

    def _check_same(self, given: set[str], needed: set[str], file: str) -> None:
        if given != needed:
            missing, extra = sorted(needed - given)[:1], sorted(given - needed)[:1]
            raise self._error(file, f"tensors missing {missing or 'none'}, extra {extra or 'none'}")

    def _check_file(self, name: str, record: FileRecord | None) -> None:
        if record is None:
            raise self._error(MANIFEST, f"no hash of {name}")
        file = self.path / name
        if not file.is_file():
            raise self._error(name, "missing")
        if file.stat().st_size != record.bytes:
            raise self._error(
                name, f"found {file.stat().st_size} bytes, manifest says {record.bytes}"
            )
        digest = sha256_file(file)
        if digest != record.sha256:
            raise self._error(
                name, f"found sha256 {digest[:12]}, manifest says {record.sha256[:12]}"
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
        target = (
            place.get("location"),
            onnx_file.number(place.get("offset", ""), 0),
            onnx_file.number(place.get("length", ""), -1),
            initializer.data_type,
            tuple(initializer.dims),
        )
        needed = (WEIGHTS, span.offset, span.length, _ONNX[entry.dtype], entry.shape)
        if target != needed:
            raise ValueError(f"{name} points to {target}, weights have {needed}")

    def _check_scales(self) -> None:
        for name, entry in self.manifest.tensors.items():
            if "scale" in entry.role:
                scale = self.tensor(name)
                if not (np.isfinite(scale).all() and (scale > 0).all()):
                    raise self._error(WEIGHTS, f"{name} holds a scale that is not > 0")
            elif entry.role == "codes" and entry.scale not in self.manifest.tensors:
                raise self._error(MANIFEST, f"{name} names no scale tensor")


def _check_quantizers(model: onnx.ModelProto) -> None:
    """Activations are quantized as a calibration writes it: with scale and zero point, then Clip.

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
            what = "bounds" if narrows else "scale and zero point"
            raise ValueError(f"{node.name} has no {what}")
        if quantizes:
            quantized.add(node.output[0])
