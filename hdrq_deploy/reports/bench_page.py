"""One HTML file with tables and plots; works offline, in print and on a phone."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..formats.bench_result import BenchResult
from .html import document, svg, table_of

__all__ = ["csv_text", "did_it_pay", "page", "phase_table", "table"]

Rows = Sequence[tuple[str, BenchResult]]

_STYLE = """
.scroll.facts td{white-space:normal}.scroll svg{min-width:34rem}
.mark{background:#fdeceb;border-left:4px solid #c0392b;padding:.4rem .7rem;margin:.5rem 0}
@media print{body{margin:0;max-width:none;font-size:11px}.scroll{overflow:visible}
.scroll svg{min-width:0}th,td{white-space:normal}h2{break-after:avoid}svg,table{break-inside:avoid}}
"""


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


def did_it_pay(rows: Rows) -> list[str]:
    """One sentence an engine: is it faster than the base, how much smaller, what it cost."""
    by_path = {result.path: (name, result) for name, result in rows}
    sentences = []
    for name, result in rows:
        gain = result.speedup
        if gain is None:
            continue
        base_name, base = by_path.get(gain.against, (gain.against, None))
        if gain.verdict == "no difference shown":
            speed = (
                f"no difference in speed shown ({gain.low:.2f} to {gain.high:.2f} times as fast)"
            )
        else:
            speed = (
                f"{gain.ratio:.2f} times as fast as {base_name} "
                f"({gain.low:.2f} to {gain.high:.2f}, 95% over {gain.rounds} rounds)"
            )
        parts = [speed]
        if base is not None:
            parts.append(f"{base.size_bytes / result.size_bytes:.1f} times smaller")
            parts += _accuracy_change(base, result)
        verdict = ""
        if base is not None and base.wbits is None and result.wbits is not None:
            paid = gain.verdict == "faster"
            verdict = "quantization paid: " if paid else "quantization did not pay in speed: "
        sentences.append(f"{name}: {verdict}{', '.join(parts)}")
    return sentences


def _accuracy_change(base: BenchResult, result: BenchResult) -> Iterator[str]:
    first, second = base.accuracy, result.accuracy
    if first is None or second is None or first.domains.keys() != second.domains.keys():
        return
    if first.harmonic_mean is not None and second.harmonic_mean is not None:
        change = 100 * (second.harmonic_mean - first.harmonic_mean)
        worst = min(first.domains, key=lambda d: second.domains[d] - first.domains[d])
        loss = 100 * (second.domains[worst] - first.domains[worst])
        yield f"harmonic mean {change:+.1f} points (worst: {worst} {loss:+.1f})"


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
    header: Sequence[str] | None = None,
    cells: Sequence[Sequence[str]] | None = None,
    note: str = "",
    command: str = "hdrq-bench",
    opening: str = "",
) -> str:
    """The report of a command as one HTML text; ``opening`` is HTML behind its title."""
    if header is None or cells is None:
        header, cells = table(rows)
    first = rows[0][1]
    times = first.latency_ms
    answers = did_it_pay(rows)
    metric = "mIoU" if first.accuracy and first.accuracy.metric == "miou" else "top-1 accuracy"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        opening,
        f"<p>{html.escape(note)}</p>" if note else "",
        *(
            f"<p class=mark>{html.escape(name)}: {html.escape(mark)}</p>"
            for name, result in rows
            for mark in result.marks
        ),
        f"<p>{metric} in %. Latency: {html.escape(times.what)}; batch {times.batch}, scenario "
        f"{first.scenario}, {html.escape(first.device)}, {first.threads} thread(s), {times.warmup} "
        f"warm-up and {times.iterations} timed.</p>",
        table_of(header, cells),
        *(["<h2>Did quantization pay?</h2>", _list(answers)] if answers else []),
        "<h2>Accuracy per domain</h2>",
        _svg(_plot_accuracy, rows),
        table_of(*accuracy_table(rows)) if _domains(rows) else "",
        "<h2>Latency</h2>",
        _svg(_plot_latency, rows),
        _svg(_plot_distribution, rows),
        "<h2>Phases</h2><p>Median ms of each part, measured in calls of their own; the "
        "harness itself takes the last column.</p>",
        table_of(*phase_table(rows)),
        "<h2>Accuracy, latency and size</h2>",
        _svg(_plot_trade, rows),
        "<h2>Executed precision</h2>",
        table_of(
            ["model", "engine", "what its layers execute"],
            [[name, r.engine, r.precision] for name, r in rows],
        ),
        "<h2>Environment</h2>",
        table_of(
            ["item", "value"],
            [
                ["measured", first.created],
                ["threads used (CPU time / wall time)", f"{first.cpu_per_wall:.2f}"],
                ["CUDA graph", first.cuda_graph or "no GPU"],
                *[
                    [k.replace("_", " "), str(v)]
                    for k, v in first.environment.items()
                    if v is not None
                ],
            ],
            "facts",
        ),
    ]
    return document(title, body, command, _STYLE)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _svg(draw: Callable[[Any, Rows], bool], rows: Rows) -> str:
    """A plot of the rows, or a sentence where there is nothing to draw."""
    drawn = True

    def draw_all(figure: Any) -> None:
        nonlocal drawn
        figure.set_size_inches(9, 0.9 + 0.45 * max(len(rows), 5))
        drawn = draw(figure.subplots(), rows)

    text = svg(draw_all)
    if not drawn:
        return "<p>No accuracy was measured.</p>"
    return f'<div class="scroll">{text[text.index("<svg") :]}</div>'


def _plot_accuracy(axes: Any, rows: Rows) -> bool:
    domains = _domains(rows)
    if not domains:
        return False
    height = 0.8 / len(domains)
    for i, domain in enumerate(domains):
        values = [100 * r.accuracy.domains.get(domain, 0) if r.accuracy else 0 for _, r in rows]
        places = [y + (i - (len(domains) - 1) / 2) * height for y in range(len(rows))]
        axes.barh(places, values, height, label=domain)
    for y, (_, result) in enumerate(rows):
        if result.accuracy and result.accuracy.harmonic_mean is not None:
            mean = 100 * result.accuracy.harmonic_mean
            axes.plot([mean, mean], [y - 0.42, y + 0.42], color="black", lw=1.5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, % (black line: harmonic mean)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return True


def _plot_latency(axes: Any, rows: Rows) -> bool:
    samples = [result.latency_ms.samples for _, result in rows]
    places = list(range(len(rows)))
    axes.boxplot(
        samples, orientation="horizontal", positions=places, whis=(5, 95), showfliers=False
    )
    axes.set_yticks(places, [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("latency, ms (box: quartiles, whiskers: 5 to 95%)")
    return True


def _plot_distribution(axes: Any, rows: Rows) -> bool:
    for name, result in rows:
        samples = sorted(result.latency_ms.samples)
        shares = [(i + 1) / len(samples) for i in range(len(samples))]
        axes.step(samples, shares, where="post", label=name, lw=1.2)
    for share in (0.5, 0.9, 0.99):
        axes.axhline(share, color="0.85", lw=0.8, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 0.9, 0.99], ["0", "p50", "p90", "p99"])
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("share of calls below")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return True


def _plot_trade(axes: Any, rows: Rows) -> bool:
    shown = [(name, r, r.accuracy) for name, r in rows if r.accuracy]
    if not shown:
        return False
    largest = max(r.size_bytes for _, r, _ in shown)
    colours: dict[str, Any] = {}
    markers = dict(zip(_domains(rows), "osv^DPX*<>" * 10, strict=False))
    for name, result, accuracy in shown:
        area = 30 + 300 * result.size_bytes / largest
        for domain, value in accuracy.domains.items():
            dots = axes.scatter(
                result.latency_ms.p50,
                100 * value,
                s=area,
                alpha=0.6,
                marker=markers[domain],
                color=colours.get(name),
                label=name if name not in colours else None,
            )
            colours.setdefault(name, dots.get_facecolor()[0])
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel("accuracy of a domain, %")
    for domain, marker in markers.items():
        axes.scatter([], [], marker=marker, color="0.4", label=domain)
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="area: size on disk"
    )
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    axes.margins(0.15)
    return True
