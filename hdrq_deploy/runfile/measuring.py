"""The stages that measure bundles: export, accuracy per domain, latency and the results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from ..exporters import export
from ..exporters.export import engine_change
from ..formats.atomic_files import Kind, read_json, sha256_file, write_bytes
from ..formats.bench_result import Accuracy, BenchResult, harmonic_mean
from ..formats.bundle import Bundle
from ..formats.engine_folder import EngineManifest, read_manifest
from ..formats.file_kinds import ENGINE, RUN_ACCURACY, RUN_HTML, RUN_RESULTS
from ..formats.findings import Findings
from ..formats.staleness import code_of, stamp, versions_of
from ..reports.bench_page import Details, page
from ..runtime.bench.accuracy import accuracy, classes_of
from ..runtime.bench.findings import Decided
from ..runtime.bench.measurement import benchmark_all, labelled, size_bytes
from ..runtime.bench.timing import BenchPlan
from ..runtime.loading import open_engine
from .schema import Bench
from .stage import RecordedStage, Stage

__all__ = ["AccuracyStage", "BenchStage", "ExportStage", "Row", "left_out", "rows_of"]


@dataclass(frozen=True)
class ExportStage(Stage):
    """A bundle becomes an engine folder."""

    kind: ClassVar[str] = "export"
    bundle: Path
    engine: str

    def change(self) -> str:
        """See :meth:`Stage.change`."""
        return engine_change(Bundle.open(self.bundle), self.output, self.engine)

    def make(self) -> None:
        """See :meth:`Stage.make`."""
        export(self.bundle, self.output, self.engine)

    def outputs(self) -> list[tuple[Path, Kind]]:
        """See :meth:`Stage.outputs`."""
        return [(self.output, ENGINE)]


def _not_run(manifest: EngineManifest) -> str:
    """Why the machine that built an engine could not run it; "" where it could."""
    checked = manifest.build.get("checked")
    return str(checked.get("engine_not_run", "")) if isinstance(checked, dict) else ""


def _engine_sha256(folder: Path) -> dict[str, str]:
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
            "engine": _engine_sha256(self.engine),
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
        reason, measured, found = _not_run(manifest), None, None
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


@dataclass(frozen=True)
class Row:
    """A line of the table of results.

    Attributes:
        label: What it is called.
        engines: Its engine folders: one, or one for each domain.
        accuracies: Files of their accuracies.
    """

    label: str
    engines: tuple[Path, ...]
    accuracies: tuple[Path, ...]


@dataclass(frozen=True)
class BenchStage(RecordedStage):
    """Latency of all engines in turn; the results and the report.

    Attributes:
        rows: Lines of the table.
        images: Images that are timed.
        bench: How it is measured.
        resolved: The run file, which the results hold.
        title: Title of the report.
    """

    kind: ClassVar[str] = "bench"
    rows: tuple[Row, ...]
    images: str
    bench: Bench
    resolved: Mapping[str, Any]
    title: str

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.output.with_name("report.html")

    def ingredients(self) -> dict[str, Any]:
        """See :meth:`RecordedStage.ingredients`."""
        return {
            "data": stamp(self.images),
            "engines": {
                f"{row.label} {engine.name}": _engine_sha256(engine)
                for row in self.rows
                for engine in row.engines
            },
            "accuracy": {
                file.name: sha256_file(file) for row in self.rows for file in row.accuracies
            },
            "versions": versions_of("numpy", "onnxruntime"),
            "code": code_of("runtime", "reports"),
            "bench": self.bench.model_dump(mode="json"),
            "run_file": dict(self.resolved),
        }

    def is_whole(self, path: Path) -> bool:
        """See :meth:`RecordedStage.is_whole`."""
        try:
            rows = rows_of(path)
        except (ValidationError, TypeError, KeyError, AttributeError):
            return False
        return not rows or not RUN_HTML.stranger(self.report)

    def write(self) -> None:
        """See :meth:`RecordedStage.write`."""
        first = {row.label: row.engines[0] for row in self.rows}
        manifests = {label: read_manifest(path) for label, path in first.items()}
        reasons = {label: _not_run(manifest) for label, manifest in manifests.items()}
        timed = [row for row in self.rows if not reasons[row.label]]
        bench = self.bench
        plan = BenchPlan(warmup=bench.warmup, iterations=bench.iterations, batch=bench.batch)
        paths = [first[row.label] for row in timed]
        results = (
            benchmark_all(paths, None, plan, bench.threads, timed_with=self.images) if paths else []
        )
        rows = [
            (row.label, _joined(row, result)) for row, result in zip(timed, results, strict=True)
        ]
        missing = {label: reason for label, reason in reasons.items() if reason}
        record = {
            "schema_version": 1,
            "kind": RUN_RESULTS.kind,
            "run_file": dict(self.resolved),
            "rows": [{"model": n, "result": r.model_dump(mode="json")} for n, r in rows],
            "not_run": missing,
        }
        if rows:
            note = "; ".join(f"{label}: not measured, {why}" for label, why in missing.items())
            details = {row.label: _details(row) for row in timed}
            text = page(self.title, rows, details, note, "hdrq run")
            write_bytes(self.report, text.encode(), RUN_HTML)
        write_bytes(self.output, (json.dumps(record, indent=1) + "\n").encode(), RUN_RESULTS)

    def outputs(self) -> list[tuple[Path, Kind]]:
        """See :meth:`Stage.outputs`."""
        return [*self.recorded(RUN_RESULTS), (self.report, RUN_HTML)]


def _details(row: Row) -> Details:
    """What the report shows of a line; of one engine for each domain the layers are alike."""
    found = [part for file in row.accuracies if (part := findings_in(file)) is not None]
    domains = {name: domain for part in found for name, domain in part.domains.items()}
    whole = Findings(classes=found[0].classes, domains=domains) if found else None
    return Details.of(row.engines[0], whole)


def _joined(row: Row, result: BenchResult) -> BenchResult:
    """The result of an engine, with accuracies.

    Of one engine for each domain the first was timed: it stays the path that others are compared
    with, and the size is that of all.
    """
    parts = [part for file in row.accuracies if (part := accuracy_in(file)) is not None]
    update: dict[str, Any] = {}
    if parts:
        update["accuracy"] = _all_domains(parts)
    if len(row.engines) > 1:
        manifests = [read_manifest(path, check=False) for path in row.engines]
        update["size_bytes"] = sum(size_bytes(manifest) for manifest in manifests)
        update["domains"] = {}
    return result.model_copy(update=update)


def _all_domains(parts: list[Accuracy]) -> Accuracy:
    """Accuracies of engines that answer for a domain each, as one."""
    if len(parts) == 1:
        return parts[0]
    values: dict[str, Any] = {}
    for name in ("domains", "images", "per_class", "top5", "pixel_accuracy", "calibration_error"):
        found = [getattr(part, name) for part in parts]
        complete = all(value is not None for value in found)
        values[name] = {k: v for value in found for k, v in value.items()} if complete else None
    mean = harmonic_mean(list(values["domains"].values()))
    return Accuracy(metric=parts[0].metric, harmonic_mean=mean, **values)


def rows_of(path: Path) -> list[tuple[str, BenchResult]]:
    """Name and result of every line that a :class:`BenchStage` wrote.

    Raises:
        ValidationError, TypeError, KeyError: The file is not whole.
    """
    return [
        (row["model"], BenchResult.model_validate(row["result"])) for row in read_json(path)["rows"]
    ]


def left_out(path: Path) -> dict[str, str]:
    """Lines that a :class:`BenchStage` could not measure on this machine, and why."""
    missing: dict[str, str] = read_json(path)["not_run"]
    return missing
