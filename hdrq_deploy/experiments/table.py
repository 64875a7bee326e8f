"""The paper's table: methods and bit-widths, single and merged, published figures beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..formats.bundle import Bundle
from .grid import Grid, Merge, Run, bundle_path, read_row

__all__ = ["cells", "header", "markdown", "network", "notes", "rows"]


def rows(grid: Grid, out: Path) -> list[dict[str, Any]]:
    """A record for every setting, method, bit-width and way to merge that has figures.

    Single is the harmonic mean of every domain's own bundle on its own domain. Means and standard
    deviations are over calibration seeds and, of merges, rounding seeds.
    """
    result = []
    by_kind: dict[tuple[str, str, str], list[Run]] = {}
    for run in grid.runs():
        by_kind.setdefault((run.setting, run.method, run.bits), []).append(run)
    for (setting, method, bits), runs in by_kind.items():
        every = [m for run in runs for m in grid.merges(run)]
        for members, way in dict.fromkeys((m.members, m.way) for m in every):
            merges = [m for m in every if (m.members, m.way) == (members, way)]
            row = _row(grid, out, runs, merges)
            if row is not None:
                published = grid.task.published.get(f"{method}-{bits}", {})
                # The paper rounds ties by its filter, where a merge has any.
                own = way == grid.ways(runs[0], members)[-1]
                known = setting == "paper" and own and members == grid.domains
                result.append(
                    {
                        "setting": setting,
                        "method": method,
                        "bits": bits,
                        "members": members,
                        "way": way,
                        **row,
                        "published": published if known else {},
                    }
                )
    return result


def _row(
    grid: Grid, out: Path, runs: Sequence[Run], merges: Sequence[Merge]
) -> dict[str, Any] | None:
    members = merges[0].members
    singles: list[dict[str, float]] = []
    for run in runs:
        cells = {m: read_row(out, run.single(m)) for m in members}
        if all(cells.values()):
            singles.append({m: cell["domains"][m] for m, cell in cells.items() if cell})
    merged = [read_row(out, merge.cell(draw)) for merge in merges for draw in range(merge.draws)]
    together = [cell["domains"] for cell in merged if cell]
    if not singles or not together:
        return None
    return {
        "single": _summary(singles),
        "merged": _summary(together),
        "options": _options(bundle_path(out, runs[0].single(members[0]))),
    }


def _options(path: Path) -> dict[str, Any]:
    """Options of a cell's calibration, from its own manifest."""
    options = Bundle.open(path).manifest.options
    names = ("images", "iters", "batch", "lr", "scale_rates", "threads")
    return {key: options[key] for key in names if key in options}


def _summary(figures: list[dict[str, float]]) -> dict[str, Any]:
    """Mean, standard deviation and count of every domain and the harmonic mean, in %."""
    from ..formats.bench_result import harmonic_mean

    columns = {name: [100 * row[name] for row in figures] for name in figures[0]}
    columns["harmonic mean"] = [100 * harmonic_mean(list(row.values())) for row in figures]
    return {
        name: {
            "mean": round(statistics.fmean(values), 3),
            "std": round(statistics.stdev(values), 3) if len(values) > 1 else 0.0,
            "count": len(values),
        }
        for name, values in columns.items()
    }


def header(grid: Grid) -> list[str]:
    """Column titles of :func:`cells`."""
    return ["setting", "method", "bits", "single", "merge", *grid.domains, "merged", "published"]


def cells(grid: Grid, record: dict[str, Any]) -> list[str]:
    """One line of the table."""
    merged = record["merged"]
    text = [record["setting"], record["method"], record["bits"].upper() or "FP32"]
    text.append(_figure(record["single"]["harmonic mean"]))
    text.append(
        "mean" if (record["method"], record["way"]) == ("float", "nearest") else record["way"]
    )
    text += [f"{merged[d]['mean']:.1f}" if d in merged else "" for d in grid.domains]
    text.append(_figure(merged["harmonic mean"]))
    text.append(f"{record['published']['merged']:.2f}" if record["published"] else "")
    return text


def _figure(summary: dict[str, float]) -> str:
    if summary["count"] == 1:
        return f"{summary['mean']:.1f}"
    return f"{summary['mean']:.1f} ± {summary['std']:.1f}"


def markdown(grid: Grid, records: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, and below it the name of the network.

    The header line comes first: it tells the file from one of the user's own.
    """
    lines = [header(grid), ["---"] * len(header(grid)), *(cells(grid, r) for r in records)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return "\n".join([table, network(grid), *notes(grid)]) + "\n"


def notes(grid: Grid) -> list[str]:
    """What is to be known of the table beside the network's name, a line each."""
    if not grid.rates:
        return []
    return ["Learning rates: one search for all methods on calibration images, in tuning.json."]


def network(grid: Grid) -> str:
    """What was run: the model's name, and which form of it where there are several."""
    task = grid.task
    return f"{task.model} ({task.form})" if task.form else task.model
