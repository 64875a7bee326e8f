"""What averaging breaks, layer by layer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.records import listed, table

__all__ = ["parents"]


def parents(record: Mapping[str, Any]) -> str:
    """The section on what averages of quantized models lose, layer by layer."""
    rows = record["rows"]
    (real,) = (row for row in rows if row["method"] == "float")
    lines = []
    for row in rows:
        moved = f"{100 * statistics.fmean(row['moved']):.1f}" if row["moved"] else "-"
        between = [f"{statistics.fmean(row[name]):.2f}" for name in ("distance", "correlation")]
        errors = [_errors(row["single"])]
        for way in ("nearest", "regression"):
            errors += [_errors(_merge_errors(row, way, count)) for count in (2, 3)]
        lines.append([row["method"], row["bits"].upper() or "FP32", moved, *between, *errors])
    ways = ("averaged", "averaged, all", "regression", "regression, all")
    header = ["models", "bits", "moved codes, %", "distance", "correlation", "alone", *ways]
    return "\n".join(
        [
            "## What averaging breaks, layer by layer",
            "",
            "`benchmarks/parents.py`, on PACS, checkpoints of [the second training]"
            "(other-trainings.md#pacs-on-the-second-training-of-the-checkpoints), calibration "
            "seed 0. *Moved codes* is the share of codes that differ from rounding to nearest. "
            "*Distance* is that of two quantized models, divided by that of their float models. "
            "*Correlation* is that of their quantization errors: an average of two models halves "
            "the variance of uncorrelated errors. The last columns are noise / shift, in % of the "
            "variance of a layer's outputs: the variance, and the square of the mean, of the "
            "difference to the domain's own float layer, on what that layer sees of its domain. "
            "Medians over layers; means over models, pairs, and domains.",
            "",
            table(header, lines),
            "",
            _parents_read(real, [row for row in rows if row["method"] != "float"]),
        ]
    )


def _merge_errors(row: Mapping[str, Any], way: str, count: int) -> dict[str, float]:
    """Noise and shift of a row's merges of ``count`` models, the mean over them."""
    own = [m for m in row["merges"] if m["way"] == way and len(m["members"]) == count]
    return {name: statistics.fmean(m[name] for m in own) for name in ("noise", "shift")}


def _errors(found: Mapping[str, float]) -> str:
    return f"{100 * found['noise']:.2f} / {100 * found['shift']:.2f}"


def _parents_read(real: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table says."""
    averaged = _merge_errors(real, "nearest", 2)
    told, both, further, closer = [], [], [], []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        own = {row["method"]: row for row in rows if row["bits"] == bits}
        times = []
        for method, row in own.items():
            plain, solved = (_merge_errors(row, way, 2) for way in ("nearest", "regression"))
            times.append(
                f"`{method}` noise {plain['noise'] / averaged['noise']:.1f}, "
                f"shift {plain['shift'] / averaged['shift']:.1f} "
                f"(by regression {solved['shift'] / averaged['shift']:.1f})"
            )
        told.append(f"{bits.upper()} {', '.join(times)}")
        if {"qdrop", "hdrq"} <= own.keys():
            names = ("moved", "correlation", "distance")
            pairs = [[statistics.fmean(own[m][n]) for m in ("hdrq", "qdrop")] for n in names]
            assert pairs[1][0] > pairs[1][1], "the last sentence says so"
            (moved, shared, apart) = (f"{a:.2f} and {b:.2f}" for a, b in pairs)
            both.append(f"{bits.upper()} {moved}, {shared}, {apart}")
            further += [bits.upper()] if pairs[0][0] > pairs[0][1] else []
            closer += [bits.upper()] if pairs[2][0] < pairs[2][1] else []
    return (
        f"Averaged pairs, as multiples of the float average's noise and shift: {'; '.join(told)}. "
        f"{_grown(averaged, rows)} A regression with corrected biases takes back part of the "
        "shift. What new BatchNorm moments do to it was not measured layer by layer; the accuracy "
        "of re-estimated merges is in the tables of PACS. "
        "HDRQ and QDrop, share of moved codes, correlation and distance: "
        f"{'; '.join(both)}. The errors of HDRQ's models are more alike than those of QDrop's at "
        f"all of these bits; more of their codes are moved at {listed(further)}, and they are "
        f"closer to each other at {listed(closer)}."
    )


def _grown(averaged: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> str:
    """Which of noise and shift grows by the larger factor, and which by the larger amount."""
    four = [_merge_errors(row, "nearest", 2) for row in rows if row["bits"] == "w4a8"]
    times = {n: [found[n] / averaged[n] for found in four] for n in ("noise", "shift")}
    more = {n: [100 * (found[n] - averaged[n]) for found in four] for n in ("noise", "shift")}
    assert min(times["shift"]) > max(times["noise"]), "the sentence says so"
    assert all(a > b for a, b in zip(more["noise"], more["shift"], strict=True)), "it says so"
    span = {n: f"{min(f):.1f} to {max(f):.1f}" for n, f in times.items()}
    added = {n: f"{min(f):.1f} to {max(f):.1f}" for n, f in more.items()}
    return (
        "With fewer bits both grow: the shift by the larger factor (W4A8: "
        f"{span['shift']} times the float average's, noise {span['noise']} times), the noise by "
        f"the larger amount (W4A8: {added['noise']}% of the variance, the shift {added['shift']}%)."
    )
