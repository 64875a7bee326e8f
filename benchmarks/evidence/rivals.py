"""Merging first and quantizing then."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.records import GROUPS, NAMES, load, not_run, table, with_spread


def merge_rivals(record: Mapping[str, Any]) -> str:
    """The section on merging in float first, beside merges of bundles."""
    bundles = load("merge_statistics") or {"rows": []}
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
                label = f"**{method} bundles, regression, compensated**"
                lines.append([bits.upper(), label, *_by_group(found, groups), ""])
    heads = ["+".join(NAMES[name] for name in group) for group in groups]
    heads.insert(-1, "mean of pairs")
    return "\n".join(
        [
            "## Merged in float first, quantized then",
            "",
            "`benchmarks/merge_rivals.py`: the digits' float checkpoints are merged, and the merge "
            "is quantized with the images of all its domains, anew for every group of domains "
            f"({record['iterations_per_block']} iterations a block where a method learns, one "
            "scale per tensor). The rows with experts' outputs follow E-PMQ (arXiv "
            "2605.16882), of which only the abstract was at hand: errors are compensated as in "
            "`gptq`, every layer is fitted to what the domain's own float model puts out there, "
            "and it is anchored to the merged weights. What the targets are and the anchor's "
            f"strength ({record['experts']['anchor']:g}) are our assumptions, the best of "
            f"{len(record['experts_tried']) - 2} by how little W4A4 differs from the float models "
            "on calibration images. Merges of bundles of the same seeds stand beside them; they "
            "see no image and no float model. Harmonic means in % on test images, mean and "
            "standard deviation over calibration seeds of what draws.",
            "",
            table(["bits", "way", *heads, "CPU seconds a merge"], lines),
            "",
            _rivals_read(record),
        ]
    )


_RIVALS = {
    "gptq": "`gptq`",
    "qdrop": "`qdrop`",
    "experts": "`gptq` with the experts' outputs as targets",
}


def _rivals_read(record: Mapping[str, Any]) -> str:
    """What the table says, and what it lacks."""
    return (
        "With the experts' float models and the images of all domains in one place, merging in "
        "float and quantizing towards the experts' outputs is the best of these ways at every "
        "bit-width, on the mean of pairs and on the triple, whether the float merge is the mean or "
        "a regression. Merging in float and quantizing without their outputs is behind the merge "
        "of bundles; on the pairs at W3A3 regression with `qdrop` after it is level with it. "
        + not_run([name.removeprefix("digits-") for name in record["missing"]])
    )


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
