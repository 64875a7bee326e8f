"""Merging first and quantizing then."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.merging import digits_means
from evidence.protocol import groups_of, protocol_rows, with_interval
from evidence.records import GROUPS, NAMES, needed, not_run, table, with_spread


def merge_rivals(record: Mapping[str, Any]) -> str:
    """The section on merging in float first, beside merges of bundles."""
    bundles = needed("merge_statistics")
    rows = [row for row in record["rows"] if row["task"] == "digits"]
    groups = sorted(
        {tuple(row["members"]) for row in rows}, key=lambda g: (len(g), GROUPS.index(g))
    )
    seeds, lines = {row["seed"] for row in rows}, []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        own = [row for row in rows if row["bits"] == bits]
        for way, method in dict.fromkeys((row["way"], row["parents"]) for row in own):
            found = [r for r in own if (r["way"], r["parents"]) == (way, method)]
            label = f"{way.removesuffix('-first')} in float, then {_RIVALS[method]}"
            seconds = statistics.fmean(row["cpu_seconds"] for row in found)
            lines.append([bits.upper(), label, *_by_group(found, groups), f"{seconds:.0f}"])
        for method in ("hdrq", "qdrop"):
            found = [
                row
                for row in bundles["rows"]
                if (row["task"], row["parents"], row["bits"]) == ("digits", method, bits)
                and (row["fold"], row["way"]) == ("weights", "regression-compensated")
                and row["seed"] in seeds
            ]
            if found:
                label = f"`{method}` bundles, regression, compensated"
                lines.append([bits.upper(), label, *_by_group(found, groups), ""])
    heads = ["+".join(NAMES[name] for name in group) for group in groups]
    heads.insert(-1, "mean of pairs")
    return "\n".join(
        [
            "## Merged in float first, quantized then",
            "",
            "`benchmarks/merge_rivals.py`: the digits' float checkpoints are merged by the mean "
            "or, with BatchNorm in their weights as in the bundles, by regression, and the merge "
            "is quantized with the images of all its domains, anew for every group of domains "
            f"({record['iterations_per_block']} iterations a block where a method learns, one "
            "scale per tensor). The rows with experts' outputs follow E-PMQ (arXiv "
            "2605.16882), of which only the abstract was at hand: errors are compensated as in "
            "`gptq`, every layer is fitted to what the domain's own float model puts out there, "
            "and it is anchored to the merged weights. We had to assume the targets and the "
            f"anchor's strength: {len(record['experts_tried']) - 2} combinations were tried, and "
            "the one is taken whose W4A4 merge was nearest to the float models on calibration "
            f"images (strength {record['experts']['anchor']:g}). The other ways had no such search "
            "here. Merges of bundles of the same seeds stand beside them; they "
            "see no image and no float model. Harmonic means in % on test images, mean and "
            "standard deviation over calibration seeds for methods with random draws. Rows that "
            "start from a regression were made beside other work, which lengthens their seconds.",
            "",
            table(["bits", "way", *heads, "CPU seconds a merge"], lines),
            "",
            _rivals_read(rows, bundles["rows"]),
            "",
            _rivals_missing(record["missing"]),
        ]
    )


def pacs_rivals(record: Mapping[str, Any]) -> str:
    """The same on PACS, beside merges of bundles."""
    groups = groups_of(row["members"] for row in record["rows"])
    first: dict[str, dict[tuple[str, ...], Mapping[str, float]]] = {}
    seconds: dict[str, list[float]] = {}
    for row in record["rows"]:
        way = f"{row['merge']} in float, then {_RIVALS[row['method']]}"
        figure = {"mean": row["harmonic_mean"], "low": row["low"], "high": row["high"]}
        first.setdefault(way, {})[tuple(row["members"])] = figure
        seconds.setdefault(way, []).append(row["cpu_seconds"])
    bundles: dict[str, dict[tuple[str, ...], Mapping[str, float]]] = {}
    for row in protocol_rows(needed("pacs")):
        how = _MERGED_AFTER.get((row["bits"], row["way"]))
        if how is not None:
            parents = f"`{row['method']}` bundles" if row["bits"] else "float"
            bundles.setdefault(f"{parents}, {how}", {})[tuple(row["members"])] = row["figure"]
    lines = []
    for way, figures in {**first, **bundles}.items():
        spent = f"{statistics.fmean(seconds[way]):.0f}" if way in seconds else ""
        lines.append([way, *_cells(figures, groups), spent])
    heads = [", ".join(group) for group in groups]
    heads.insert(-1, "mean of pairs")
    learned = {row["method"] for row in record["rows"]}
    return "\n".join(
        [
            "## Merged in float first, on PACS",
            "",
            "`benchmarks/pacs_rivals.py`: the merges of float models of [PACS in our setting]"
            "(pacs.md#pacs-in-our-setting) are quantized at W4A8, one scale per channel, with "
            "256 images of every domain; targets and anchor of the experts are those that were "
            "best on the digits"
            + f", the rate of `qdrop` ({record['rates']['qdrop']:.3g}) is that of its bundles"
            * ("qdrop" in learned)
            + ". Re-estimated merges of bundles see 64 images a domain, fitted "
            "ones 256, and no float model but for those that are fitted to them. Harmonic means of "
            "top-1 accuracies in % on the test images, with half of the 95% interval over them "
            "(and over calibration seeds, where there are several)."
            + ("" if "qdrop" in learned else " `qdrop` after a float merge was not run."),
            "",
            table(["way", *heads, "CPU seconds a merge"], lines),
            "",
            "Merged first and quantized then, less merges of bundles, in points (mean of pairs, "
            "all domains):",
            "",
            table(
                ["way", *(f"less {name}" for name in _BESIDE)],
                [
                    [way, *(_less(figures, bundles[name], groups) for name in _BESIDE)]
                    for way, figures in first.items()
                ],
            ),
        ]
    )


# Merges of the grid that stand beside merging first, by bits and way.
_MERGED_AFTER = {
    ("", "renewed"): "re-estimated, not quantized",
    ("", "fitted"): "fitted, not quantized",
    ("w4a8", "renewed"): "re-estimated",
    ("w4a8", "fitted"): "fitted",
    ("w4a8", "guided"): "fitted to the float models",
    ("w8a8", "fitted-w4"): "8 bits to 4, fitted",
}
_BESIDE = (
    "`qdrop` bundles, fitted",
    "`hdrq` bundles, fitted",
    "`rtn-corrected` bundles, 8 bits to 4, fitted",
    "`qdrop` bundles, fitted to the float models",
)


def _less(
    figures: Mapping[tuple[str, ...], Mapping[str, float]],
    other: Mapping[tuple[str, ...], Mapping[str, float]],
    groups: Sequence[tuple[str, ...]],
) -> str:
    """The difference of the mean of pairs and of all domains; a dash where one was not run."""
    away = [
        figures[group]["mean"] - other[group]["mean"] if group in figures else None
        for group in groups
    ]
    pairs = [value for value in away[:-1] if value is not None]
    both = [statistics.fmean(pairs) if len(pairs) == len(away) - 1 else None, away[-1]]
    return ", ".join("-" if value is None else f"{value:+.1f}" for value in both)


def _cells(
    figures: Mapping[tuple[str, ...], Mapping[str, float]], groups: Sequence[tuple[str, ...]]
) -> list[str]:
    """Figures of every group, the mean of pairs before the last; a dash where one was not run."""
    cells = [with_interval(figures[group]) if group in figures else "-" for group in groups]
    pairs = [figures[group]["mean"] for group in groups[:-1] if group in figures]
    whole = len(pairs) == len(groups) - 1
    cells.insert(-1, f"{statistics.fmean(pairs):.1f}" if whole else "-")
    return cells


_RIVALS = {
    "gptq": "`gptq`",
    "qdrop": "`qdrop`",
    "experts": "`gptq` with the experts' outputs as targets",
}


def _rivals_read(rows: Sequence[Mapping[str, Any]], merged: Sequence[Mapping[str, Any]]) -> str:
    """What the table says: ways that start from a float regression, less merges of bundles."""

    def means(
        some: Sequence[Mapping[str, Any]], way: str, method: str, bits: str
    ) -> tuple[float, float]:
        both = digits_means(some, way, method, bits)
        assert both is not None
        return both

    told = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        found = {
            (row["parents"], row["way"]): means(rows, row["way"], row["parents"], bits)
            for row in rows
            if row["bits"] == bits
        }
        best = max(found, key=lambda key: sum(found[key]))
        assert best[0] == "experts", "the sentence says so"
        bundles = means(merged, "regression-compensated", "hdrq", bits)
        away = ", ".join(
            f"`{m}` {found[m, 'regression-first'][0] - bundles[0]:+.1f} and "
            f"{found[m, 'regression-first'][1] - bundles[1]:+.1f}"
            for m in ("gptq", "qdrop", "experts")
            if (m, "regression-first") in found
        )
        told.append(f"{bits.upper()} {away}")
    return (
        "With the experts' float models and the images of all domains in one place, merging in "
        "float and quantizing towards the experts' outputs is the best of these ways at every "
        "bit-width, by the sum of the mean of pairs and the figure of all domains; its targets and "
        "anchor were chosen, as told above. Merged by regression in float and then quantized, less "
        f"HDRQ's bundles, in points (mean of pairs and all domains): {'; '.join(told)}."
    )


def _rivals_missing(names: Sequence[str]) -> str:
    """Ways whose rows of some seeds are missing; names are those of ``Rival.name``."""
    seeds: dict[str, set[str]] = {}
    for name in names:
        _, _, start, method, *_, seed = name.split("-")
        seeds.setdefault(f"{start} in float, then {_RIVALS[method]}", set()).add(seed[1:])
    told = [f"{way} (seeds {', '.join(sorted(own))})" for way, own in seeds.items()]
    return f"Not run yet: {'; '.join(told)}." if told else not_run([])


def _by_group(rows: Sequence[Mapping[str, Any]], groups: Sequence[tuple[str, ...]]) -> list[str]:
    """Harmonic means of every pair, their mean, and of all domains; a dash where none ran."""
    found = [
        [x for r in rows if tuple(r["members"]) == group for x in r["harmonic_means"]]
        for group in groups
    ]
    pairs = [statistics.fmean(values) for values in found[:-1] if values]
    cells = [with_spread(values) or "-" for values in found]
    cells.insert(-1, f"{statistics.fmean(pairs):.1f}" if pairs else "-")
    return cells
