"""What HDRQ's parts add to QDrop, one after the other, on PACS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evidence.protocol import (
    BITS,
    WAY_LABELS,
    difference_told,
    learned_options,
    led,
    protocol_means,
    protocol_rates,
    protocol_rows,
    reproduce_command,
    way_in_full,
)
from evidence.records import needed, table

__all__ = ["added", "pacs_parts"]

# From QDrop to HDRQ, a part at a time.
_METHODS = ("qdrop", "latent", "latent-noise", "hdrq")
# What the second method of each has more than the first.
_PARTS = {
    ("qdrop", "latent"): "learned weights and scales",
    ("latent", "latent-noise"): "noise",
    ("latent-noise", "hdrq"): "distance",
    ("latent", "hdrq"): "noise and distance",
}
_RATES = " --rates benchmarks/results/pacs_parts_tuning.json"
_SEARCHED_ON = (
    "the checkpoints of this section for `latent` and `latent-noise`, for the others on "
    "checkpoints that the same command had trained before on another machine"
)


def pacs_parts(record: Mapping[str, Any]) -> str:
    """The section on HDRQ without its distance, and without its noise."""
    rows, tuning = protocol_rows(record), needed("pacs_parts_tuning")
    own = [row for row in record["rows"] if row["bits"]]
    ways, options = list(dict.fromkeys(row["way"] for row in own)), learned_options(own)
    assert _seeds(rows) == {1}, "the section says one"
    assert record["checkpoints_sha256"] == needed("pacs")["checkpoints_sha256"], "one training"
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
            _alone(rows),
            "",
            "What a part adds to merges of all domains, in points, with 95% intervals over test "
            f"images; other calibration seeds can differ by more. {_read(rows)}",
            "",
            _added_table(rows),
            "",
            *_more_seeds(record),
            protocol_rates(tuning, _SEARCHED_ON),
        ]
    )


def _alone(rows: Sequence[Mapping[str, Any]]) -> str:
    """How near single models are to those in float."""
    real = protocol_means(protocol_rows(needed("pacs")), "float", "", "single")
    both = [other for (part, *_), other in added(rows).items() if part == "noise and distance"]
    assert not any(other["low"] > 0 for other in both), "the sentence says so"
    assert real is not None
    told = []
    for bits in dict.fromkeys(bits for bits, _ in _kinds(rows)):
        found = {m: protocol_means(rows, m, bits, "single") for m in _METHODS}
        away = {m: figures[1] - real[1] for m, figures in found.items() if figures}
        assert max(away, key=lambda method: away[method]) == "latent", "the sentence says so"
        told.append(f"{bits.upper()} " + ", ".join(f"`{m}` {v:+.1f}" for m, v in away.items()))
    return (
        "Single models of `latent` are the nearest to float at both widths; less the float ones, "
        f"in points: {'; '.join(told)}. Noise and distance, which are there for the merge, cost "
        "single models accuracy, and no merge of all domains gains from them beyond its interval "
        "on this seed."
    )


def _more_seeds(first: Mapping[str, Any]) -> list[str]:
    """The same of more calibration seeds, for the methods that have them."""
    record = needed("pacs_latent")
    assert record["checkpoints_sha256"] == first["checkpoints_sha256"], "one training"
    rows = protocol_rows(record)
    (seeds,) = _seeds(rows)
    return [
        f"Over {seeds} calibration seeds, without `latent-noise`:",
        "",
        _figures(rows),
        "",
        f"With 95% intervals over test images and calibration seeds. {_read(rows)}",
        "",
        _added_table(rows),
        "",
    ]


def _seeds(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """Calibration seeds of the methods of a table."""
    return {row["figure"]["calibrations"] for row in rows if row["method"] in _METHODS}


def _kinds(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Bits and ways that some method of the parts was merged in."""
    there = {(row["bits"], row["way"]) for row in rows if row["method"] in _METHODS}
    return ((bits, way) for bits in BITS for way in WAY_LABELS if (bits, way) in there)


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    methods, lines = [m for m in _METHODS if any(m == row["method"] for row in rows)], []
    for bits, way in _kinds(rows):
        found = [protocol_means(rows, method, bits, way) for method in methods]
        cells = [f"{cell[0]:.1f} / {cell[1]:.1f}" if cell else "-" for cell in found]
        lines.append([bits.upper(), way_in_full(way), *cells])
    return table(["bits", "merge", *(f"`{method}`" for method in methods)], lines)


def added(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """What every part adds to merges of all domains, by the part, bits and way."""
    every = max(len(row["members"]) for row in rows)
    return {
        (_PARTS[other["method"], row["method"]], row["bits"], row["way"]): other
        for row in rows
        for other in row["against"]
        if len(row["members"]) == every and (other["method"], row["method"]) in _PARTS
    }


def _added_table(rows: Sequence[Mapping[str, Any]]) -> str:
    found, lines = added(rows), []
    parts = [adds for adds in _PARTS.values() if any(part == adds for part, *_ in found)]
    for bits, way in _kinds(rows):
        cells = [found.get((part, bits, way)) for part in parts]
        if any(cells):
            told = (difference_told(cell) if cell else "-" for cell in cells)
            lines.append([bits.upper(), way_in_full(way), *told])
    return table(["bits", "merge", *parts], lines)


def _read(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many merges each part raises and lowers."""
    every, told = added(rows), []
    for adds in _PARTS.values():
        found = [other for (part, *_), other in every.items() if part == adds]
        above, below = led(found)
        if found:
            told.append(f"{adds} {above} and {below} of {len(found)}")
    return f"Beyond its interval each raises and lowers so many merges: {'; '.join(told)}."
