"""The paper's table: methods and bit-widths, single and merged, published figures beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.bundle import Bundle
from ..numerics.intervals import Bootstrap, Difference, Sample
from ..typing import Array
from .decisions import unpacked
from .grid import Grid, Merge, Run, bundle_path, read_row, search_name

__all__ = ["cells", "header", "markdown", "network", "notes", "rows"]


@dataclass(frozen=True)
class _Found:
    """The cells of one row: figures, and decisions where all of its cells keep them.

    ``run`` is the first whose single cells have figures.
    """

    run: Run
    singles: list[list[dict[str, float]]]
    merged: list[list[dict[str, float]]]
    single: Sample | None
    sample: Sample | None
    tests: Any
    images: dict[str, int]


def rows(grid: Grid, out: Path) -> list[dict[str, Any]]:
    """A record for every setting, method, bit-width and way to merge that has figures.

    Single is the harmonic mean of every domain's own bundle on its own domain; ``images`` are the
    test images of each domain (empty where cells of an earlier version do not say). Means and
    standard deviations are over calibration seeds and, of merges, rounding seeds. Where all cells
    of a row keep their decisions, harmonic means have an interval (see :mod:`.intervals`), and
    ``against`` compares the row with earlier methods of the same setting, bits and way. ``wins`` is
    true of the one row of all quantized ones of the same bits and members that is better than every
    other one outside its interval, if there is one.
    """
    boot, result = Bootstrap(), []
    by_kind: dict[tuple[str, str, str], list[Run]] = {}
    for run in grid.runs():
        by_kind.setdefault((run.setting, run.method, run.bits), []).append(run)
    for (setting, method, bits), runs in by_kind.items():
        every = [m for run in runs for m in grid.merges(run)]
        for members, way in dict.fromkeys((m.members, m.way) for m in every):
            merges = [m for m in every if (m.members, m.way) == (members, way)]
            found = _found(out, runs, merges, boot)
            if found is None:
                continue
            published = grid.task.published.get(f"{method}-{bits}", {})
            # The paper rounds ties by its filter, where a merge has any.
            own = way == grid.every_way(runs[0], members)[-1]
            known = setting == "paper" and own and members == grid.domains
            row = {
                "setting": setting,
                "method": method,
                "bits": bits,
                "members": members,
                "way": way,
                "images": found.images,
                "single": _summary(found.singles, found.single, boot),
                "merged": _summary(found.merged, found.sample, boot),
                "options": _options(bundle_path(out, found.run.single(members[0]))),
                "published": published if known else {},
            }
            result.append((row, found))
    _compare(result, boot)
    return [row for row, _ in result]


def _found(
    out: Path, runs: Sequence[Run], merges: Sequence[Merge], boot: Bootstrap
) -> _Found | None:
    members = merges[0].members
    alone: dict[int, list[list[dict[str, Any]]]] = {}
    for run in runs:
        cells = [read_row(out, run.single(m), (m,)) for m in members]
        if all(cells):
            alone[run.seed] = [[cell for cell in cells if cell]]
    together: dict[int, list[list[dict[str, Any]]]] = {}
    for merge in merges:
        drawn = [read_row(out, merge.cell(draw), members) for draw in range(merge.draws)]
        if any(drawn):
            together[merge.run.seed] = [[cell] for cell in drawn if cell]
    if not alone or not together:
        return None
    (first,) = next(iter(together.values()))[0]
    return _Found(
        next(run for run in runs if run.seed in alone),
        _figures(alone, members),
        _figures(together, members),
        _sample(alone, boot),
        _sample(together, boot),
        first.get("tests"),
        first.get("images", {}),
    )


def _figures(
    drawn: Mapping[int, list[list[dict[str, Any]]]], members: Sequence[str]
) -> list[list[dict[str, float]]]:
    """Figures by domain, by calibration seed and, of merges, rounding seed."""
    found = []
    for runs in drawn.values():
        joined = [{k: v for cell in cells for k, v in cell["domains"].items()} for cells in runs]
        found.append([{member: row[member] for member in members} for row in joined])
    return found


def _sample(drawn: Mapping[int, list[list[dict[str, Any]]]], boot: Bootstrap) -> Sample | None:
    """The decisions of all cells, resampled; None where one keeps none."""
    measured: dict[int, list[dict[str, Array]]] = {}
    for seed, runs in drawn.items():
        for cells in runs:
            parts = [unpacked(cell.get("decisions")) for cell in cells]
            if not all(parts):
                return None
            joined = {name: values for part in parts if part for name, values in part.items()}
            measured.setdefault(seed, []).append(joined)
    return boot.sample(measured)


def _compare(result: Sequence[tuple[dict[str, Any], _Found]], boot: Bootstrap) -> None:
    """Add ``against`` and ``wins`` to the rows."""
    groups: dict[Any, list[tuple[dict[str, Any], _Found]]] = {}
    for row, found in result:
        row |= {"against": [], "wins": False}
        if row["method"] != "float":
            groups.setdefault((row["bits"], row["members"]), []).append((row, found))
    for group in groups.values():
        for i, (row, found) in enumerate(group):
            for other, before in group[:i]:
                equal = all(row[key] == other[key] for key in ("setting", "way"))
                if equal and found.sample and before.sample and found.tests == before.tests:
                    gap = boot.difference(found.sample, before.sample)
                    row["against"].append({"method": other["method"], **_difference(gap)})
        samples = [found.sample for _, found in group if found.sample]
        same = all(found.tests == group[0][1].tests for _, found in group)
        best = boot.winner(samples) if same and len(samples) == len(group) else None
        if best is not None:
            group[best][0]["wins"] = True


def _difference(gap: Difference) -> dict[str, Any]:
    figures = {"difference": gap.value, "low": gap.low, "high": gap.high}
    shown = {name: round(100 * value, 3) for name, value in figures.items()}
    return {**shown, "p": gap.p, "of_one_run_each": gap.is_exact, "calibrations": gap.calibrations}


def _options(path: Path) -> dict[str, Any]:
    """Options of a cell's calibration, from its own manifest; none where the bundle is gone."""
    if not path.exists():
        return {}
    options = Bundle.open(path).manifest.options
    names = (
        "images",
        "iters",
        "batch",
        "lr",
        "scale_rates",
        "distance",
        "distance_form",
        "threads",
    )
    return {key: options[key] for key in names if key in options}


def _summary(
    figures: list[list[dict[str, float]]], sample: Sample | None, boot: Bootstrap
) -> dict[str, Any]:
    """Mean, standard deviation and count of every domain and the harmonic mean, in %.

    A mean is that over calibration seeds of the mean of each, as those of a sample are: a seed with
    fewer rounding seeds counts as much as any other. The harmonic mean of a sample also has its
    interval and what each source of spread adds.
    """
    from ..formats.bench_result import harmonic_mean

    first = figures[0][0]
    columns = {name: [[100 * row[name] for row in seed] for seed in figures] for name in first}
    columns["harmonic mean"] = [
        [100 * harmonic_mean(list(row.values())) for row in seed] for seed in figures
    ]
    result: dict[str, Any] = {}
    for name, by_seed in columns.items():
        values = [value for seed in by_seed for value in seed]
        result[name] = {
            "mean": round(statistics.fmean(map(statistics.fmean, by_seed)), 3),
            "std": round(statistics.stdev(values), 3) if len(values) > 1 else 0.0,
            "count": len(values),
        }
    if sample is not None:
        found = boot.interval(sample)
        result["harmonic mean"] |= {
            "low": round(100 * found.low, 3),
            "high": round(100 * found.high, 3),
            "spread": {name: round(100 * value, 3) for name, value in found.spread.items()},
            "calibrations": found.calibrations,
        }
    return result


def header(grid: Grid) -> list[str]:
    """Column titles of :func:`cells`."""
    return ["setting", "method", "bits", "single", "merge", *grid.domains, "merged", "published"]


def cells(grid: Grid, record: dict[str, Any]) -> list[str]:
    """One line of the table."""
    merged = record["merged"]
    text = [record["setting"], record["method"], record["bits"].upper() or "FP32"]
    text.append(_figure(record["single"]["harmonic mean"]))
    text.append(_way(record))
    text += [f"{merged[d]['mean']:.1f}" if d in merged else "" for d in grid.domains]
    figure = _figure(merged["harmonic mean"])
    text.append(f"**{figure}**" if record.get("wins") else figure)
    text.append(f"{record['published']['merged']:.2f}" if record["published"] else "")
    return text


def _way(record: Mapping[str, Any]) -> str:
    """How models were merged; float ones are not rounded."""
    way = str(record["way"])
    if record["method"] == "float":
        way = "mean" if way == "nearest" else way
        return f"{way} of folded weights" if record["setting"] == "float" else way
    return way


def _figure(summary: dict[str, Any]) -> str:
    """The mean, and half of its interval where there is one."""
    if "low" not in summary:
        return f"{summary['mean']:.1f}"
    return f"{summary['mean']:.1f} ± {(summary['high'] - summary['low']) / 2:.1f}"


def markdown(grid: Grid, records: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, and below it the name of the network.

    The header line comes first: it tells the file from one of the user's own.
    """
    lines = [header(grid), ["---"] * len(header(grid)), *(cells(grid, r) for r in records)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return "\n".join([table, network(grid), *notes(grid, records)]) + "\n"


def notes(grid: Grid, records: Sequence[dict[str, Any]] = ()) -> list[str]:
    """What is to be known of the table beside the network's name, a line each."""
    lines = []
    if any("low" in record["merged"]["harmonic mean"] for record in records):
        lines.append(
            "±: half of the 95% interval over calibration seeds, rounding seeds and test images "
            "(of one calibration seed without the spread of calibrations). Bold: better than every "
            "other quantized row of its bits and domains outside the interval of the difference, "
            "over two calibration seeds or more."
        )
    if grid.rates:
        task = grid.task
        own = (search_name(task.name), search_name(task.name, task.model))
        other = grid.searched_on not in ("", *own)
        of = f" of {grid.searched_on}" if other else ""
        lines.append(
            f"Learning rates: one search for all methods on calibration images{of}, in tuning.json."
        )
    return lines


def network(grid: Grid) -> str:
    """What was run: the model's name, which form of it, and what its checkpoints are."""
    task = grid.task
    made = f"from {task.source_domain}, {task.adaptation}" if task.adaptation else ""
    told = "; ".join(part for part in (task.form, made) if part)
    return f"{task.model} ({told})" if told else task.model
