"""Regression in front of the BatchNorm behind a layer, and behind it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.protocol import way_in_full, way_label
from evidence.records import table

# Records whose regression was solved in front of BatchNorm.
IN_FRONT = (
    *("pacs_first", "pacs_earlier", "camvid"),
    *("weights_from_statistics", "weight_search"),
)
# Where the section below stands.
SOLVED = "other-trainings.md#regression-in-front-of-batchnorm-and-behind-it"


def in_front(page: str) -> str:
    """What the page of this name says of such a record."""
    target = SOLVED if page != "other-trainings" else SOLVED[SOLVED.index("#") :]
    return (
        "Where BatchNorm is kept apart, regression here was solved in front of it, as versions "
        "before this one did; what [solving behind it]"
        f"({target}) changes was measured apart."
    )


def regression_batchnorm(record: Mapping[str, Any]) -> str:
    """The section on what a regression minimises where BatchNorm is kept apart."""
    rows = record["rows"]
    lines = []
    for images, method, bits, way in dict.fromkeys(_kind_of(row) for row in rows):
        own = [r for r in rows if _kind_of(r) == (images, method, bits, way)]
        pairs = [r for r in own if len(r["members"]) == 2]
        rest = [r for r in own if len(r["members"]) > 2]
        label = way_label(method, way) if method == "float" else way_in_full(way)
        lines.append(
            [images, method, bits.upper() or "FP32", label, *(_change(g) for g in (pairs, rest))]
        )
    return "\n".join(
        [
            "## Regression in front of BatchNorm and behind it",
            "",
            "`benchmarks/regression_batchnorm.py BEFORE`: earlier versions solved a layer's "
            "regression for what enters the BatchNorm behind it, this one for what leaves it "
            "([how](../concepts/statistics-and-regression.md)). Both merged the same bundles, and "
            "were measured on the same images. Harmonic means in %, before and after; one "
            "calibration seed.",
            "",
            _read(rows),
            "",
            table(["images", "parents", "bits", "merge", "mean of pairs", "all domains"], lines),
        ]
    )


def _kind_of(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What rows of several domains have in common."""
    return row["images"], row["method"], row["bits"], row["way"]


def _change(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means before and after, and their difference."""
    if not rows:
        return "-"
    before, after = (statistics.fmean(row[name] for row in rows) for name in ("before", "after"))
    return f"{before:.1f}, {after:.1f} ({after - before:+.1f})"


def _read(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many merges gain, by images, by whether new moments follow, and by how many domains."""
    lines = []
    for images in dict.fromkeys(row["images"] for row in rows):
        own = [row for row in rows if row["images"] == images]
        for name, wanted in (("as solved", True), ("re-estimated", False)):
            same = [row for row in own if (row["way"] == "regression") == wanted]
            pairs = [row for row in same if len(row["members"]) == 2]
            rest = [row for row in same if len(row["members"]) > 2]
            lines.append([images, name, *(_gains(some) for some in (pairs, rest))])
    return "\n".join(
        [
            "Merges that are better behind BatchNorm, of how many, and by how many points (mean, "
            "least to most):",
            "",
            table(["images", "merge", "pairs", "all domains"], lines),
        ]
    )


def _gains(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many merges gain, and the mean and range of what they do."""
    moved = [row["after"] - row["before"] for row in rows]
    if not moved:
        return "-"
    return (
        f"{sum(m > 0 for m in moved)} of {len(moved)} ({statistics.fmean(moved):+.1f}, "
        f"{min(moved):+.1f} to {max(moved):+.1f})"
    )
