"""One HTML file with tables and plots; works offline, in print and on a phone."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.bench_result import BenchResult
from ..formats.engine_folder import LayerPrecision, PrecisionReport
from ..formats.findings import Findings
from . import charts, decisions, precision_strip
from .charts import Point, boxes, dots, trade
from .decisions import confusion, samples
from .html import document, table_of
from .precision_strip import strips
from .verdict import Rows, did_it_pay, headline, verdict

__all__ = ["Details", "accuracy_table", "csv_text", "page", "phase_table", "table"]

_STYLE = f"""
.scroll.facts td{{white-space:normal}}.verdict{{font-size:1.15rem;line-height:1.4}}
.mark{{background:var(--mark);border-left:4px solid var(--edge);padding:.4rem .7rem;margin:.5rem 0}}
{charts.STYLE}{decisions.STYLE}{precision_strip.STYLE}
@media print{{body{{margin:0;max-width:none;font-size:11px}}.scroll{{overflow:visible}}
th,td{{white-space:normal}}h2{{break-after:avoid}}svg,table,figure{{break-inside:avoid}}}}
"""


# Doubts about measurements that are shown unfolded.
_SHOWN_MARKS = 2


@dataclass(frozen=True)
class Details:
    """What a page shows of an engine beside its result.

    Attributes:
        layers: What its layers execute.
        findings: What it decided of labelled images; None where nothing was.
    """

    layers: tuple[LayerPrecision, ...]
    findings: Findings | None = None

    @classmethod
    def of(cls, engine: Path, findings: Findings | None = None) -> Details:
        """Those of an engine folder.

        Raises:
            EngineError: Its ``precision.json`` is missing or damaged.
        """
        return cls(PrecisionReport.read(engine).layers, findings)


def _domains(rows: Rows) -> list[str]:
    return list(dict.fromkeys(d for _, r in rows if r.accuracy for d in r.accuracy.domains))


def table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracy per domain, harmonic mean, size, latency, precision."""
    domains = _domains(rows)
    header = ["model", *domains, "harmonic mean", "size KB", "median ms", "executed"]
    cells = []
    for name, result in rows:
        accuracy = result.accuracy
        shares = [
            f"{100 * accuracy.domains[d]:.1f}" if accuracy and d in accuracy.domains else "-"
            for d in domains
        ]
        mean = accuracy.harmonic_mean if accuracy else None
        cells.append(
            [
                name,
                *shares,
                "-" if mean is None else f"{100 * mean:.1f}",
                f"{result.size_bytes / 1000:.0f}",
                f"{result.latency_ms.p50:.2f}",
                result.precision,
            ]
        )
    return header, cells


def phase_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Median ms of every phase, of the call and of the harness itself."""
    phases = list(dict.fromkeys(p for _, r in rows for p in r.phases))
    percentiles = list(dict.fromkeys(p for _, r in rows for p in r.latency_ms.percentiles))
    header = [
        "model",
        *(p.replace("_", " ") for p in phases),
        "call p50",
        "p90",
        "p99",
        *(f"p{p}" for p in percentiles),
        "images/s",
        "threads used",
        "harness us",
    ]
    cells = []
    for name, r in rows:
        times = r.latency_ms
        cells.append(
            [
                name,
                *(f"{r.phases[p].p50:.3f}" if p in r.phases else "-" for p in phases),
                *(f"{v:.3f}" for v in (times.p50, times.p90, times.p99)),
                *(
                    f"{times.percentiles[p]:.3f}" if p in times.percentiles else "-"
                    for p in percentiles
                ),
                f"{r.throughput_images_per_s:.0f}",
                f"{r.cpu_per_wall:.2f}",
                "-" if r.overhead_us is None else f"{r.overhead_us:.1f}",
            ]
        )
    return header, cells


def accuracy_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What lies behind the accuracy of every domain."""
    header = ["model", "domain", "images", "metric", "value", "top-5", "pixels", "worst class"]
    header += ["calibration error", "decisions changed"]
    cells = []

    def shown(values: dict[str, float] | None, domain: str) -> str:
        return "-" if values is None else f"{100 * values[domain]:.1f}"

    for name, result in rows:
        accuracy = result.accuracy
        for domain in accuracy.domains if accuracy else ():
            assert accuracy is not None
            classes = {k: v for k, v in accuracy.per_class.get(domain, {}).items() if v is not None}
            worst = min(classes, key=lambda k: classes[k]) if classes else None
            cells.append(
                [
                    name,
                    domain,
                    str(accuracy.images[domain]),
                    {"top1": "top-1", "miou": "mIoU"}[accuracy.metric],
                    shown(accuracy.domains, domain),
                    shown(accuracy.top5, domain),
                    shown(accuracy.pixel_accuracy, domain),
                    "-" if worst is None else f"{worst} {100 * classes[worst]:.1f}",
                    shown(accuracy.calibration_error, domain),
                    shown(accuracy.decision_flips, domain),
                ]
            )
    return header, cells


def csv_text(rows: Rows) -> str:
    """One line an engine; times in ms, shares 0 to 1."""
    domains = _domains(rows)
    text = io.StringIO()
    columns = ["name", "path", "engine", "device", "scenario", "batch", "threads", "wbits", "abits"]
    columns += ["size_bytes", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "images_per_s"]
    phases = list(dict.fromkeys(p for _, r in rows for p in r.phases))
    columns += [f"{p}_p50_ms" for p in phases]
    columns += ["metric", *(f"accuracy_{d}" for d in domains), "harmonic_mean"]
    columns += ["speedup", "speedup_low", "speedup_high", "joules_per_call", "precision", "marks"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for name, r in rows:
        times, accuracy, gain = r.latency_ms, r.accuracy, r.speedup
        line: list[Any] = [name, r.path, r.engine, r.device, r.scenario, times.batch, r.threads]
        line += [r.wbits, r.abits, r.size_bytes, times.p50, times.p90, times.p99, times.mean]
        line += [r.throughput_images_per_s]
        line += [r.phases[p].p50 if p in r.phases else None for p in phases]
        line += [accuracy.metric if accuracy else None]
        line += [accuracy.domains.get(d) if accuracy else None for d in domains]
        line += [accuracy.harmonic_mean if accuracy else None]
        line += [gain.ratio, gain.low, gain.high] if gain else [None] * 3
        line += [None if isinstance(r.energy, str) else r.energy.joules_per_inference]
        writer.writerow([*line, r.precision, "; ".join(r.marks)])
    return text.getvalue()


def page(
    title: str,
    rows: Rows,
    details: Mapping[str, Details] | None = None,
    note: str = "",
    command: str = "hdrq-bench",
    facts: Sequence[str] = (),
) -> str:
    """The report of a command as one HTML text.

    Args:
        title: What was measured.
        rows: Name and result of every engine.
        details: What more is known of them, by name.
        note: Shown below the verdict.
        command: The command that makes the page.
        facts: Further sentences, such as what a verification found.
    """
    details = details or {}
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="verdict">{html.escape(verdict(rows))}</p>',
        f"<p>{html.escape(note)}</p>" if note else "",
        *_doubts(rows),
        *_pictures(rows, details),
        *_compared(rows),
        *_confusion(rows, details),
        *(["<h2>Verified</h2>", _list(facts)] if facts else []),
        *_layers(rows, details),
        *_accuracies(rows),
        *_latencies(rows),
        *_environment(rows[0][1]),
    ]
    return document(title, body, command, _STYLE)


def _doubts(rows: Rows) -> Iterator[str]:
    """What makes measurements doubtful; folded where it would push the page's beginning away."""
    marks = [html.escape(f"{name}: {mark}") for name, result in rows for mark in result.marks]
    if len(marks) <= _SHOWN_MARKS:
        yield from (f"<p class=mark>{mark}</p>" for mark in marks)
        return
    doubtful = sum(bool(result.marks) for _, result in rows)
    listed = "".join(f"<li>{mark}</li>" for mark in marks)
    yield (
        f"<details class=mark><summary>{doubtful} of {len(rows)} measurements are doubtful, such "
        f"as {marks[0]}</summary><ul>{listed}</ul></details>"
    )


def _pictures(rows: Rows, details: Mapping[str, Details]) -> Iterator[str]:
    """Images of each domain with what the headline's engine makes of them."""
    name, result = headline(rows)
    found = details[name].findings if name in details else None
    shots = samples(found, result.accuracy.domains if result.accuracy else {}) if found else ""
    if shots:
        yield (
            f"<h2>What {html.escape(name)} sees</h2><p>Test images of each domain, chosen by their "
            "labels alone, and what the engine takes them for.</p>"
        )
        yield shots


def _confusion(rows: Rows, details: Mapping[str, Details]) -> Iterator[str]:
    """Labels against predictions of the headline's engine."""
    name, _ = headline(rows)
    found = details[name].findings if name in details else None
    if found is not None:
        yield (
            f"<h2>Confusion per domain</h2><p>{html.escape(name)}: a row is a label, a column what "
            "the engine takes it for; colours are shares of the row.</p>"
        )
        yield confusion(found)


def _compared(rows: Rows) -> Iterator[str]:
    """The table of all engines, and accuracy against latency."""
    first = rows[0][1]
    times = first.latency_ms
    metric = "mIoU" if first.accuracy and first.accuracy.metric == "miou" else "top-1 accuracy"
    yield "<h2>All engines</h2>"
    points = [
        Point(
            name,
            r.latency_ms.p50,
            100 * r.accuracy.harmonic_mean,
            *(float(v) for v in np.percentile(r.latency_ms.samples, [25, 75])),
        )
        for name, r in rows
        if r.accuracy and r.accuracy.harmonic_mean is not None
    ]
    if points:
        yield (
            "<p>Accuracy (harmonic mean of the domains) against latency. Engines on the dashed "
            "line are beaten by no other one in both; thin lines are quartiles of the latency.</p>"
        )
        yield trade(points)
    yield table_of(*table(rows))
    yield (
        f"<p><small>{metric} in %. Latency: {html.escape(times.what)}; batch {times.batch}, "
        f"scenario {first.scenario}, {html.escape(first.device)}, {first.threads} thread(s), "
        f"{times.warmup} warm-up and {times.iterations} timed.</small></p>"
    )
    answers = did_it_pay(rows)
    if answers:
        yield "<h2>Did quantization pay?</h2>" + _list(answers)


def _layers(rows: Rows, details: Mapping[str, Details]) -> Iterator[str]:
    yield "<h2>Precision of every layer</h2>"
    known = [(name, details[name].layers) for name, _ in rows if name in details]
    if known:
        yield (
            "<p>From input to output, what the engine executes; higher bars are wider numbers.</p>"
        )
        yield strips(known)
    yield table_of(
        ["model", "engine", "what its layers execute"],
        [[name, r.engine, r.precision] for name, r in rows],
    )


def _accuracies(rows: Rows) -> Iterator[str]:
    yield "<h2>Accuracy per domain</h2>"
    domains = _domains(rows)
    if not domains:
        yield "<p>No accuracy was measured.</p>"
        return
    marks = [
        (name, [_percent(r.accuracy.domains.get(d)) for d in domains],
         _percent(r.accuracy.harmonic_mean))
        for name, r in rows
        if r.accuracy
    ]  # fmt: skip
    yield dots(marks, domains, "accuracy, %")
    yield table_of(*_filled(*accuracy_table(rows)))


def _filled(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that hold nothing."""
    kept = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _latencies(rows: Rows) -> Iterator[str]:
    yield (
        "<h2>Latency</h2><p>Box: quartiles and median, thin line: 5 to 95% of the calls; at the "
        "right the median.</p>"
    )
    yield boxes([(name, r.latency_ms.samples) for name, r in rows], "latency, ms")
    yield (
        "<h2>Phases</h2><p>Median ms of each part, measured in calls of their own; the harness "
        "itself takes the last column.</p>"
    )
    yield table_of(*phase_table(rows))


def _environment(first: BenchResult) -> Iterator[str]:
    known = [[k.replace("_", " "), str(v)] for k, v in first.environment.items() if v is not None]
    yield "<h2>Environment</h2>"
    yield table_of(
        ["item", "value"],
        [
            ["measured", first.created],
            ["threads used (CPU time / wall time)", f"{first.cpu_per_wall:.2f}"],
            ["CUDA graph", first.cuda_graph or "no GPU"],
            *known,
        ],
        "facts",
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
