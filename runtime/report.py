"""One HTML file with table and plots; works offline, in print and on a phone."""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

from ..errors import EngineError
from .bench import BenchResult

__all__ = ["need_matplotlib", "page", "table"]

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;
color:#1c2430}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:.35rem .45rem;text-align:right;border-bottom:1px solid #d8dee6;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{background:#f2f5f9}
svg{max-width:100%;height:auto}small,footer{color:#5b6675}
@media print{body{margin:0}}
"""


def need_matplotlib() -> None:
    """Raise EngineError, before any measurement, where plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EngineError("--html draws with matplotlib: pip install 'hdrq-deploy[report]'")


def table(rows: Sequence[tuple[str, BenchResult]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracy per domain, harmonic mean, size, latency, precision."""
    domains = list(dict.fromkeys(d for _, r in rows if r.accuracy for d in r.accuracy.domains))
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


def page(
    title: str,
    rows: Sequence[tuple[str, BenchResult]],
    header: Sequence[str] | None = None,
    cells: Sequence[Sequence[str]] | None = None,
    note: str = "",
) -> str:
    """The report as one HTML text."""
    if header is None or cells is None:
        header, cells = table(rows)
    first = rows[0][1]
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(note)}</p>" if note else "",
        "<p>Accuracy in %. Latency: one call, array in, array out, batch "
        f"{first.latency_ms.batch}, {first.threads} thread(s), {first.latency_ms.warmup} warm-up "
        f"and {first.latency_ms.iterations} timed calls.</p>",
        _html_table(header, cells),
        "<h2>Accuracy per domain</h2>",
        _svg(_plot_accuracy, rows),
        "<h2>Latency</h2>",
        _svg(_plot_latency, rows),
        "<h2>Accuracy, latency and size</h2>",
        _svg(_plot_trade, rows),
        "<h2>Environment</h2>",
        _html_table(
            ["item", "value"],
            [
                ["measured", first.created],
                ["CPU time / wall time", f"{first.cpu_per_wall:.2f}"],
                *[[k, str(v)] for k, v in first.environment.items()],
            ],
        ),
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><body>"
        + "\n".join(part for part in body if part)
        + "</body></html>\n"
    )


def _html_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells
    )
    return f"<div class=scroll><table><tr>{head}</tr>{rows}</table></div>"


def _svg(draw: Any, rows: Sequence[tuple[str, BenchResult]]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.9 + 0.45 * max(len(rows), 5)), layout="constrained")
    FigureCanvasSVG(figure)
    if not draw(figure.subplots(), rows):
        return "<p>No accuracy was measured.</p>"
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _plot_accuracy(axes: Any, rows: Sequence[tuple[str, BenchResult]]) -> bool:
    domains = list(dict.fromkeys(d for _, r in rows if r.accuracy for d in r.accuracy.domains))
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
    axes.set_xlabel("top-1 accuracy, % (black line: harmonic mean)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return True


def _plot_latency(axes: Any, rows: Sequence[tuple[str, BenchResult]]) -> bool:
    samples = [result.latency_ms.samples for _, result in rows]
    places = list(range(len(rows)))
    axes.boxplot(
        samples, orientation="horizontal", positions=places, whis=(5, 95), showfliers=False
    )
    axes.set_yticks(places, [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("latency of one call, ms (box: quartiles, whiskers: 5 to 95%)")
    return True


def _plot_trade(axes: Any, rows: Sequence[tuple[str, BenchResult]]) -> bool:
    shown = [
        (name, r, 100 * r.accuracy.harmonic_mean)
        for name, r in rows
        if r.accuracy and r.accuracy.harmonic_mean is not None
    ]
    if not shown:
        return False
    largest = max(r.size_bytes for _, r, _ in shown)
    for name, result, mean in shown:
        area = 40 + 500 * result.size_bytes / largest
        axes.scatter(result.latency_ms.p50, mean, s=area, alpha=0.6, label=name)
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel("harmonic mean accuracy, %")
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="area: size on disk"
    )
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    axes.margins(0.15)
    return True
