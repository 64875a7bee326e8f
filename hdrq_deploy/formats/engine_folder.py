"""The engine folder: what an export writes, and a runtime or a verification reads.

``manifest.json`` says how the engine was made and what it reads and writes. ``model.onnx`` is
the lowered graph, whose larger tensors lie in ``model.onnx.data``; TensorRT runs the plan
``model.plan`` that was built from it. ``precision.json`` says in what precision each layer
runs, and ``golden.safetensors`` holds a few inputs with what the bundle made of them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from ..errors import EngineError
from . import onnx_file
from .atomic_files import read_json, sha256_file, write_bytes
from .file_kinds import ENGINE
from .golden_inputs import GOLDEN
from .records import (
    GRAPH,
    MANIFEST,
    MOST_ELEMENTS,
    SCHEMA,
    FileRecord,
    Files,
    Frozen,
    Preprocessing,
    Scheme,
    Share,
    Tolerances,
)

__all__ = [
    "DATA",
    "GOLDEN",
    "GRAPH",
    "KINDS",
    "MANIFEST",
    "PLAN",
    "PRECISION",
    "EngineKind",
    "EngineManifest",
    "LayerPrecision",
    "Port",
    "PrecisionReport",
    "altered_file",
    "is_engine",
    "read_manifest",
    "write_manifest",
]

DATA, PLAN, PRECISION = "model.onnx.data", "model.plan", "precision.json"


@dataclass(frozen=True)
class EngineKind:
    """A kind of engine, as the folder knows it.

    Attributes:
        name: Value of ``engine`` in the manifest and of ``--engine``.
        runs: The file that is run: the graph or the plan.
        built: An export builds it for a library and knows what it executes. A portable graph is
            for any runtime.
        code_ties: Share of an activation's codes that may fall to the other side of a tie, each
            layer computed from the same codes and equal values of a channel counted once; None
            where codes are not to be seen. It is ten times the largest share, each code counted,
            that ``benchmarks/same_codes.py`` found.
    """

    name: str
    runs: str
    built: bool = True
    code_ties: float | None = None


KINDS: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        EngineKind("ort", GRAPH, code_ties=0.005),
        EngineKind("onnx", GRAPH, built=False),
        EngineKind("trt", PLAN),
        EngineKind("trt-rtx", PLAN),
        EngineKind("openvino", GRAPH, code_ties=0.011),
    )
}


class Port(Frozen):
    """An input or output of an engine; a str dimension is free."""

    name: str
    shape: Annotated[tuple[Annotated[int, Field(ge=1)] | str, ...], Field(min_length=1)]
    dtype: str
    layout: str = ""

    @model_validator(mode="after")
    def _check(self) -> Port:
        if math.prod(side for side in self.shape if isinstance(side, int)) > MOST_ELEMENTS:
            raise ValueError(f"found a port of shape {self.shape}")
        return self


class LayerPrecision(Frozen):
    """What was asked of one layer and what the engine executes.

    ``executed`` is None where nothing was built that could execute it (portable ONNX), else
    ``int8``, ``int4`` (real activations, 4-bit weights), a float type, or ``unknown``.
    ``evidence`` names the engine's own node or layer. ``weight_bytes`` is the weight's size
    in the lowered graph.
    """

    node: str
    op: str
    module: str
    weight_bits: int | None
    requested: str
    executed: str | None
    evidence: str
    reason: str = ""
    weight_bytes: int = 0


class PrecisionReport(Frozen):
    """``precision.json`` of an engine folder."""

    schema_version: Literal[1] = 1
    engine: str
    source: str
    summary: str
    layers: tuple[LayerPrecision, ...]

    @classmethod
    def read(cls, folder: Path) -> PrecisionReport:
        """What the export wrote into an engine folder.

        Raises:
            EngineError: The file is missing, or does not fit the schema.
        """
        file = folder / PRECISION
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            text = " ".join(str(error).split())[:200]
            raise EngineError(
                f"{file}: not what an export says of its layers ({text}); export the bundle again "
                "with `force`"
            ) from error

    def write(self, folder: Path) -> None:
        """Write ``precision.json`` into a new engine folder."""
        write_bytes(folder / PRECISION, _text(self))

    @property
    def lost(self) -> tuple[LayerPrecision, ...]:
        """Layers asked for in INT8 or INT4 that the engine runs otherwise."""
        return tuple(
            layer
            for layer in self.layers
            if layer.requested != "float32" and layer.executed not in {None, layer.requested}
        )


class EngineManifest(Frozen):
    """``manifest.json`` of an engine folder: what a runtime needs beside the engine.

    ``options`` is everything the engine depends on, ``build`` what its building took.
    ``code_ties`` is that of its kind (:class:`EngineKind`) when it was built.
    """

    schema_version: Literal[1] = SCHEMA
    kind: Literal["hdrq-engine"] = "hdrq-engine"
    engine: str
    model: str
    method: str
    domains: dict[str, float]
    scheme: Scheme
    bundle_sha256: str
    inputs: Annotated[tuple[Port, ...], Field(min_length=1)]
    outputs: Annotated[tuple[Port, ...], Field(min_length=1)]
    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None
    precision: str
    postprocess: Literal["none", "softmax", "argmax"] = "none"
    options: dict[str, Any] = Field(default_factory=dict)
    build: dict[str, Any] = Field(default_factory=dict)
    tolerances: Tolerances = Tolerances()
    code_ties: Share | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    files: Files = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> EngineManifest:
        for name in ("graph", "build"):
            if not isinstance(self.options.get(name, {}), dict):
                raise ValueError(f"found options {name} that are no object")
        batches = self.options.get("build", {}).get("batches")
        whole = isinstance(batches, list | tuple) and all(type(each) is int for each in batches)
        if batches is not None and not (whole and len(batches) == 3):
            raise ValueError("found batches that are not three whole numbers")
        return self

    @property
    def runs(self) -> str | None:
        """The file that is run; None for a kind of engine that this version does not know."""
        return KINDS[self.engine].runs if self.engine in KINDS else None

    @property
    def built(self) -> bool:
        """Whether the engine was built for a library; a portable graph was not."""
        return self.engine not in KINDS or KINDS[self.engine].built


def is_engine(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an engine folder, perhaps a damaged one, and not a bundle."""
    record = read_json(Path(path) / MANIFEST)
    if isinstance(record, dict):
        return bool(record.get("kind") == ENGINE.kind)
    return (Path(path) / PRECISION).is_file()


def read_manifest(path: str | os.PathLike[str], check: bool = True) -> EngineManifest:
    """The manifest of an engine folder and, unless ``check`` is False, its files checked.

    Raises:
        EngineError: No engine there, or a file is missing or altered.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        lone = f"a plan without its {MANIFEST}" if folder.suffix == ".plan" else f"no {MANIFEST}"
        raise EngineError(f"{folder}: found {lone}; needed an engine folder from hdrq-export")
    try:
        manifest = EngineManifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise EngineError(f"{file}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise EngineError(
            f"{file}: not the manifest of an engine ({error.errors()[0]['msg'].lower()}); "
            "a bundle becomes an engine with hdrq-export"
        ) from error
    if check:
        name, state = altered_file(folder, manifest)
        if name:
            raise EngineError(f"{folder / name}: {state}; the engine is damaged, export it again")
        _check_graph(folder, manifest)
    return manifest


def altered_file(folder: Path, manifest: EngineManifest) -> tuple[str, str]:
    """Name of the first file that the manifest is not of, and ``missing`` or ``altered``.

    Both are empty where every file is as it was written.
    """
    for name, record in manifest.files.items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != record.sha256:
            return name, "altered" if file.is_file() else "missing"
    return "", ""


def _check_graph(folder: Path, manifest: EngineManifest) -> None:
    """The graph is that of the manifest, and names no files but its own."""
    file = folder / GRAPH
    try:
        if GRAPH not in manifest.files:
            if manifest.runs == PLAN:
                return
            raise ValueError("the manifest names no such file")
        model = onnx_file.checked(file, set(manifest.files) & {DATA})
        given = [onnx_file.port(value) for value in (*model.graph.input, *model.graph.output)]
        ports = [
            (p.name, p.dtype, tuple(d if isinstance(d, int) else None for d in p.shape))
            for p in (*manifest.inputs, *manifest.outputs)
        ]
        if given != ports:
            raise ValueError(f"it reads and writes {given}, the manifest names {ports}")
    except ValueError as error:
        raise EngineError(f"{file}: {error}; the engine is damaged, export it again") from error


def write_manifest(folder: Path, manifest: EngineManifest) -> EngineManifest:
    """Write the manifest of a new engine folder; its ``files`` are all that lie there by now."""
    parts = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    files = {f.name: FileRecord(bytes=f.stat().st_size, sha256=sha256_file(f)) for f in parts}
    manifest = manifest.model_copy(update={"files": files})
    write_bytes(folder / MANIFEST, _text(manifest))
    return manifest


def _text(record: BaseModel) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()
