"""The stages that export a bundle and measure its accuracy on each domain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from ..checks.fastest_engine import AUTO, export_fastest, fastest_change
from ..exporters import export
from ..exporters.export import engine_change
from ..formats.atomic_files import Kind, read_json, write_bytes
from ..formats.bench_result import Accuracy
from ..formats.bundle import Bundle
from ..formats.engine_folder import EngineManifest, read_manifest
from ..formats.file_kinds import ENGINE, RUN_ACCURACY
from ..formats.findings import Findings
from ..formats.staleness import code_of, stamp, versions_of
from ..runtime.bench.accuracy import accuracy, classes_of
from ..runtime.bench.findings import Decided
from ..runtime.bench.measurement import labelled
from ..runtime.loading import open_engine
from .schema import Bench
from .stage import RecordedStage, Stage

__all__ = [
    "AccuracyStage",
    "ExportStage",
    "accuracy_in",
    "engine_sha256",
    "findings_in",
    "not_run",
]


@dataclass(frozen=True)
class ExportStage(Stage):
    """A bundle becomes an engine folder.

    Attributes:
        bundle: The bundle.
        engine: Name of the engine; ``auto`` for the fastest that runs here.
        engine_threads: Threads that ``auto`` measures with.
    """

    kind: ClassVar[str] = "export"
    bundle: Path
    engine: str
    engine_threads: int

    def change(self) -> str:
        """See :meth:`Stage.change`."""
        if self.engine == AUTO:
            return fastest_change(Bundle.open(self.bundle), self.output, self.engine_threads)
        return engine_change(Bundle.open(self.bundle), self.output, self.engine)

    def make(self) -> None:
        """See :meth:`Stage.make`."""
        if self.engine == AUTO:
            export_fastest(self.bundle, self.output, threads=self.engine_threads)
        else:
            export(self.bundle, self.output, self.engine)

    def outputs(self) -> list[tuple[Path, Kind]]:
        """See :meth:`Stage.outputs`."""
        return [(self.output, ENGINE)]


def not_run(manifest: EngineManifest) -> str:
    """Why the machine that built an engine could not run it; "" where it could."""
    checked = manifest.build.get("checked")
    return str(checked.get("engine_not_run", "")) if isinstance(checked, dict) else ""


def engine_sha256(folder: Path) -> dict[str, str]:
    """What an engine is: the hashes of its files."""
    return {
        name: record.sha256 for name, record in read_manifest(folder, check=False).files.items()
    }


@dataclass(frozen=True)
class AccuracyStage(RecordedStage):
    """An engine's accuracy on the test images of its domains.

    Attributes:
        engine: Engine folder.
        tests: Labelled images of each domain.
        bench: How street scenes are read.
    """

    kind: ClassVar[str] = "accuracy"
    engine: Path
    tests: Mapping[str, str]
    bench: Bench

    def ingredients(self) -> dict[str, Any]:
        """See :meth:`RecordedStage.ingredients`."""
        return {
            "tests": {name: stamp(path) for name, path in self.tests.items()},
            "engine": engine_sha256(self.engine),
            "versions": versions_of("numpy", "onnx", "onnxruntime", "pillow"),
            "code": code_of("runtime"),
            "split": self.bench.split,
            "image_size": self.bench.image_size,
        }

    def is_whole(self, path: Path) -> bool:
        """See :meth:`RecordedStage.is_whole`."""
        measured = accuracy_in(path) is not None and findings_in(path) is not None
        return measured or bool((read_json(path) or {}).get("not_run"))

    def write(self) -> None:
        """See :meth:`RecordedStage.write`."""
        manifest = read_manifest(self.engine)
        reason, measured, found = not_run(manifest), None, None
        if not reason:
            size = self.bench.image_size
            count = classes_of(self.engine, manifest)
            sets = {
                name: labelled(
                    manifest,
                    name,
                    path,
                    split=self.bench.split,
                    image_size=(size[0], size[1]) if size else None,
                    count=count,
                )
                for name, path in self.tests.items()
            }
            decided = Decided(manifest, sets)
            with open_engine(self.engine, manifest, threads=self.threads) as engine:
                result = accuracy(engine, sets, draw=decided.draw, seen=decided.seen)
            measured = result.model_dump(mode="json")
            found = decided.findings().model_dump(mode="json")
        record = {
            "kind": RUN_ACCURACY.kind,
            "not_run": reason,
            "accuracy": measured,
            "findings": found,
        }
        write_bytes(self.output, (json.dumps(record, indent=1) + "\n").encode(), RUN_ACCURACY)

    def outputs(self) -> list[tuple[Path, Kind]]:
        """See :meth:`Stage.outputs`."""
        return self.recorded(RUN_ACCURACY)


def accuracy_in(path: Path) -> Accuracy | None:
    """What an :class:`AccuracyStage` measured; None where there is nothing whole."""
    record = read_json(path)
    try:
        return Accuracy.model_validate(record["accuracy"])
    except (ValidationError, TypeError, KeyError):
        return None


def findings_in(path: Path) -> Findings | None:
    """What an :class:`AccuracyStage` saw decided; None where there is nothing whole."""
    record = read_json(path)
    try:
        return Findings.model_validate(record["findings"])
    except (ValidationError, TypeError, KeyError):
        return None
