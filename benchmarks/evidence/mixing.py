"""Mixes that change while a camera runs, and adaptation without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence.records import environment_of, table


def mixing(record: Mapping[str, Any]) -> str:
    """The section on mixing while running."""
    speed = [
        [
            row.get("method", "mean"),
            row["rounding"],
            *(f"{row[key]:.1f}" if key in row else "" for key in ("first_s", "swap_cpu_s_median")),
            f"{row['swap_s_median']:.2f}",
            f"{row['swap_s_median_under_load']:.2f}",
            str(row["swaps_under_load"]),
            f"{row['frames']}, {row['frames_of_no_mix']}",
        ]
        for row in record["speed"]
    ]
    found = [
        [
            part["setting"],
            row["stream"],
            " / ".join(f"{share:.2f}" for share in row["mix"].values()),
            f"{100 * row['harmonic_mean']:.1f}",
            f"{100 * row['best_harmonic_mean']:.1f}",
            f"{100 * row['even_harmonic_mean']:.1f}",
        ]
        for part in record["adapt"]
        for row in part["streams"]
    ]
    behind = [
        f"{part['setting']}, {row['stream']}"
        for part in record["adapt"]
        for row in part["streams"]
        if row["harmonic_mean"] < row["even_harmonic_mean"]
    ]
    worse = ["", f"Worse than the even mix: {'; '.join(behind)}."] if behind else []
    domains = " / ".join(record["adapt"][0]["streams"][0]["mix"])
    return "\n".join(
        [
            "## Mixing while running",
            "",
            f"`DomainMixer`, two bundles of {record['model'].removeprefix('timm:')}, one thread an "
            "operator, 2 cores, a load average of "
            f"{environment_of(record, 'speed')['load_1min']:.1f} before it began "
            "(`benchmarks/mixing.py`). Under load a thread pulls frames all the time and compares "
            "each output with those of the mix it says it came from. The first mix is made with "
            "the mixer; regression prepares its systems for all later mixes then:",
            "",
            table(
                ["method", "rounding", "first mix, s", "swap, processor s",
                 "set to swapped, s", "under load, s", "swaps under load",
                 "frames, of no mix"],
                speed,
            ),
            "",
            "Compensated rounding starts from the merged weights, so that nothing of it can be "
            "prepared: it is made anew at every swap.",
            "",
            f"What `adapt` picks from {record['adapt'][0]['frames']} unlabelled frames of the "
            "digits benchmark, one stream after the other, against the best mix of the grid of 66, "
            "which knows the labels (test accuracy, harmonic mean over the stream's domains):",
            "",
            table(
                ["bundles", "stream", f"mix ({domains})", "picked, %", "best, %", "even, %"],
                found,
            ),
            *worse,
        ]
    )  # fmt: skip


def adaptation(record: Mapping[str, Any]) -> str:
    """The section on adapting without labels."""
    cells = []
    for row in record["rows"]:
        for domain, found in row["domains"].items():
            figures = [f"{100 * found[k]:.1f}" for k in ("source", "adapted")]
            cells.append([row["model"], domain, found["images"], *figures, found["seconds"]])
    means = (
        f"{row['model']} {100 * row['merged_harmonic_mean']:.1f}% merged in float, "
        f"{100 * row['separate_harmonic_mean']:.1f}% as separate adapted models"
        for row in record["rows"]
    )
    recipes = ", ".join(
        f"{row['model']} {row['epochs']} epochs at {row['lr']:g}" for row in record["rows"]
    )
    return "\n".join(
        [
            "## Adapting without labels",
            "",
            "`hdrq adapt` from the source checkpoint on the domain's training images, labels not "
            f"looked at: {recipes}; accuracy (resnet14) and mIoU (streetnet) on the test split, "
            "in %, one thread (`benchmarks/adaptation.py`):",
            "",
            table(
                ["model", "domain", "images", "source", "adapted", "seconds, with both tests"],
                cells,
            ),
            "",
            f"Harmonic means: {'; '.join(means)}. Models of photographs and drawings that were "
            "adapted in this way, and their merges, are on [another page]"
            "(other-trainings.md#pacs-adapted-without-labels).",
        ]
    )
