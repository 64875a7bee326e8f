"""What HDRQ's parts add to QDrop, one after the other, on PACS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from evidence.protocol import (
    BITS,
    WAY_LABELS,
    difference_told,
    learned_options,
    protocol_means,
    protocol_rates,
    protocol_rows,
    reproduce_command,
    way_in_full,
)
from evidence.records import listed, needed, table

__all__ = ["pacs_parts"]

# From QDrop to HDRQ, a part at a time, and what each one adds.
_PARTS = {
    "qdrop": "",
    "latent": "learned weights and scales",
    "latent-noise": "noise",
    "hdrq": "distance",
}
_RATES = " --rates benchmarks/results/pacs_parts_tuning.json"
_SEARCHED_ON = (
    "the checkpoints of this section for `latent` and `latent-noise`, for the others on "
    "checkpoints that the same command had trained before on another machine"
)


def pacs_parts(record: Mapping[str, Any]) -> str:
    """The section on HDRQ without its distance, and without its noise."""
    rows = protocol_rows(record)
    assert record["checkpoints_sha256"] == needed("pacs")["checkpoints_sha256"], "one training"
    own = [row for row in record["rows"] if row["bits"]]
    ways = list(dict.fromkeys(row["way"] for row in own))
    options = learned_options(own)
    return "\n".join(
        [
            "## HDRQ's parts on PACS",
            "",
            f"`{reproduce_command('pacs --data PACS --pairs', own, rates=_RATES)} "
            f"--ways {' '.join(ways)}`: the checkpoints and images of "
            "[our setting](#pacs-in-our-setting), one calibration seed. `qdrop` learns to round "
            "every weight up or down. `latent` learns the weights and their scales instead, "
            "`latent-noise` does so with rounding noise, and `hdrq` also with the distance to the "
            f"source (λ = {options['distance']:g}, chosen among three). Harmonic means of "
            "accuracies in %, mean of pairs / all domains:",
            "",
            _figures(rows),
            "",
            f"{_read(rows)} Differences on all domains in points, with 95% intervals over test "
            "images; another calibration seed can move them by more:",
            "",
            _steps_table(rows),
            "",
            protocol_rates(needed("pacs_parts_tuning"), _SEARCHED_ON),
        ]
    )


def _kinds(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Bits and ways that some method of the parts was merged in."""
    there = {(row["bits"], row["way"]) for row in rows if row["method"] in _PARTS}
    return ((bits, way) for bits in BITS for way in WAY_LABELS if (bits, way) in there)


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for bits, way in _kinds(rows):
        found = [protocol_means(rows, method, bits, way) for method in _PARTS]
        cells = [f"{cell[0]:.1f} / {cell[1]:.1f}" if cell else "-" for cell in found]
        lines.append([bits.upper(), way_in_full(way), *cells])
    return table(["bits", "merge", *(f"`{method}`" for method in _PARTS)], lines)


def _steps(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """What every part adds to merges of all domains, by the part, bits and way."""
    every = max(len(row["members"]) for row in rows)
    steps = {after: before for before, after in pairwise(_PARTS)}
    return {
        (row["method"], row["bits"], row["way"]): other
        for row in rows
        for other in row["against"]
        if len(row["members"]) == every and steps.get(row["method"]) == other["method"]
    }


def _steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    found, parts = _steps(rows), [part for part in _PARTS if _PARTS[part]]
    lines = []
    for bits, way in _kinds(rows):
        cells = [found.get((part, bits, way)) for part in parts]
        if any(cells):
            told = (difference_told(cell) if cell else "-" for cell in cells)
            lines.append([bits.upper(), way_in_full(way), *told])
    return table(["bits", "merge", *(_PARTS[part] for part in parts)], lines)


def _read(rows: Sequence[Mapping[str, Any]]) -> str:
    """How often each part helps, and how often it costs."""
    told = []
    for part, adds in _PARTS.items():
        found = [other for (method, *_), other in _steps(rows).items() if method == part]
        if found:
            above = sum(other["low"] > 0 for other in found)
            below = sum(other["high"] < 0 for other in found)
            told.append(f"of {adds} in {above} and {below} of {len(found)} merges")
    return f"The interval of what a part adds is above and below zero {listed(told)}."
