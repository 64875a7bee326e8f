"""The stage that ends a run: latency of all engines, the results and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from ..formats.atomic_files import Kind, read_json, sha256_file, write_bytes
from ..formats.bench_result import Accuracy, BenchResult, harmonic_mean
from ..formats.engine_folder import read_manifest
from ..formats.file_kinds import RUN_HTML, RUN_RESULTS
from ..formats.findings import Findings
from ..formats.staleness import code_of, stamp, versions_of
from ..reports.bench_page import Details, page
from ..runtime.bench.measurement import benchmark_all, size_bytes
from ..runtime.bench.timing import BenchPlan
from .measuring import accuracy_in, engine_sha256, findings_in, not_run
from .schema import Bench
from .stage import RecordedStage
from .verifying import told

__all__ = ["BenchStage", "Row", "left_out", "rows_of", "verified"]


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
        verified: Name and record of every engine that was verified.
    """

    kind: ClassVar[str] = "bench"
    rows: tuple[Row, ...]
    images: str
    bench: Bench
    resolved: Mapping[str, Any]
    title: str
    verified: tuple[tuple[str, Path], ...] = ()

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.output.with_name("report.html")

    def ingredients(self) -> dict[str, Any]:
        """See :meth:`RecordedStage.ingredients`."""
        return {
            "data": stamp(self.images),
            "engines": {
                f"{row.label} {engine.name}": engine_sha256(engine)
                for row in self.rows
                for engine in row.engines
            },
            "accuracy": {
                file.name: sha256_file(file) for row in self.rows for file in row.accuracies
            },
            "verified": {name: sha256_file(file) for name, file in self.verified},
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
        reasons = {label: not_run(manifest) for label, manifest in manifests.items()}
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
        missing = {
            label: f"built ({manifests[label].precision}), not measured: {reason}"
            for label, reason in reasons.items()
            if reason
        }
        facts = [f"{name}: {told(file)}" for name, file in self.verified]
        record = {
            "schema_version": 1,
            "kind": RUN_RESULTS.kind,
            "run_file": dict(self.resolved),
            "rows": [{"model": n, "result": r.model_dump(mode="json")} for n, r in rows],
            "not_run": missing,
            "verified": facts,
        }
        if rows:
            note = ". ".join(f"{label}: {why}" for label, why in missing.items())
            details = {row.label: _details(row) for row in timed}
            text = page(self.title, rows, details, note, "hdrq run", facts)
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


def verified(path: Path) -> list[str]:
    """What was found of every engine that was verified, in sentences."""
    facts: list[str] = read_json(path)["verified"]
    return facts


def left_out(path: Path) -> dict[str, str]:
    """Lines that a :class:`BenchStage` could not measure on this machine, and why."""
    missing: dict[str, str] = read_json(path)["not_run"]
    return missing
