"""Time and memory of the tool itself."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from evidence.records import table


def calibration_speed(record: Mapping[str, Any]) -> str:
    """The section on what calibration costs."""
    parts = ["## What calibration costs", ""]
    if "noise" in record:
        rows = [
            [
                f"{r['elements']:,}",
                f"{r['plain_ns']:.0f}",
                f"{r['ours_ns']:.1f}",
                f"{r['ratio']:.1f}",
            ]
            for r in record["noise"]
        ]
        header = ["elements", "256-bin draw, ns each", "ours, ns each", "ratio"]
        parts += ["One draw of noise:", "", table(header, rows), ""]
    if "speed" in record:
        rows = [
            [
                s["model"],
                f"{s['images']} of {s['side']}x{s['side']}",
                str(s["iterations"]),
                f"{s['ratio']['iteration_ms']:.1f}",
                f"{s['ratio']['whole_s']:.1f}",
            ]
            for s in record["speed"]
        ]
        header = ["model", "images", "iterations a block", "faster per iteration", "faster in all"]
        parts += [
            "Whole calibrations beside our own transcription of the published procedure (not the "
            "authors' code), run in turn (medians of ratios):",
            "",
            table(header, rows),
            "",
        ]
    if "scaling" in record:
        rows = [
            [name, f"{p['depth']}, {p['images']}, {p['iterations']}", f"{p['seconds']:.1f}",
             f"{p['peak_above_start_mb']:.0f}"]
            for name, points in record["scaling"].items()
            for p in points
        ]  # fmt: skip
        header = ["against", "depth, images, iterations", "seconds", "peak MB above start"]
        parts += ["A chain of residual convolutions:", "", table(header, rows), ""]
    if "memory" in record:
        rows = [
            [f"{m['cache_gb']:g}", f"{m['spilled_gb']:.1f}", f"{m['peak_gb']:.2f}"]
            for m in record["memory"]
        ]
        header = ["--cache-gb", "spilled to mapped files, GB", "peak resident, GB"]
        parts += ["ResNet-50, 256 images of 224x224, batch 32:", "", table(header, rows), ""]
    return "\n".join(parts).rstrip()


def merge_speed(record: Mapping[str, Any]) -> str:
    """The section on what merging costs."""
    whole = record["whole_pair"]
    own = statistics.median(whole["seconds"]["ours"])
    rows = []
    for how in dict.fromkeys(run["rounding"] for run in record["bundles"]):
        runs = [r for r in record["bundles"] if r["rounding"] == how]
        middle = {
            key: statistics.median(r[key] for r in runs) for key in runs[0] if key != "rounding"
        }
        rows.append(
            [
                how,
                f"{middle['seconds']:.1f}",
                f"{middle['processor_seconds']:.1f}",
                f"{middle['peak_mb']:.0f}",
            ]
        )
    header = ["method and rounding", "seconds", "processor seconds", "peak memory, MB"]
    sizes = record["bundles"][0]
    return "\n".join(
        [
            "## What merging costs",
            "",
            f"A pair the size of ResNet-50 ({whole['weights'] / 1e6:.1f} million weights), "
            f"{record['candidates']} candidates, 2 cores (`benchmarks/merge_speed.py`). Scoring "
            f"all candidates takes {own:.1f} s; brute force on the same draws "
            f"{whole['seconds']['brute force']:.0f} s ({whole['ratio']['brute force']:.1f} times "
            "as long), with both parents' errors drawn anew for each candidate as in the "
            f"reference {whole['seconds']['reference draws']:.0f} s "
            f"({whole['ratio']['reference draws']:.1f} times).",
            "",
            f"Whole merges of the two bundles on disk ({sizes['inputs_mb']:.0f} MB, and "
            f"{sizes['statistics_mb']:.0f} MB of statistics in as much room as the codes), each in "
            "a process of its own. Where parents hold statistics those of the merge are written "
            "with it, whatever the rounding.",
            "",
            table(header, rows),
        ]
    )


def harness(record: Mapping[str, Any]) -> str:
    """The section on what measuring costs."""
    rows = [
        [
            row["model"].rpartition(":")[2],
            "x".join(map(str, row["input"])),
            f"{row['bare_ms']:.3f}",
            f"{row['bench_adds_us']:.1f}",
            f"{row['application_adds_us']:.1f}",
        ]
        for row in record["rows"]
    ]
    return "\n".join(
        [
            "## What measuring costs",
            "",
            "One ONNX Runtime session on one thread, called in turn by its own `run`, as "
            "`hdrq-bench` calls it, and as an application does, whose inputs are checked at every "
            "call (`benchmarks/harness.py`):",
            "",
            table(
                ["model", "input", "bare call, ms", "hdrq-bench adds, µs", "`engine(x)` adds, µs"],
                rows,
            ),
        ]
    )


def weight_search(record: Mapping[str, Any]) -> str:
    """The section on the search of merge weights."""
    lines = []
    for row in record["rows"]:
        grid, found = row["grid"], row["search"]
        middle = {
            key: statistics.median(search[key] for search in found)
            for key in ("images_run", "seconds", "cpu_seconds")
        }
        worst = max(search["worse_by_nats"] for search in found)
        lines.append(
            [
                row["case"],
                row["criterion"],
                f"{grid['mixes']}",
                f"{grid['images_run']:,}",
                f"{grid['seconds']:.0f} / {grid['cpu_seconds']:.0f}",
                f"{middle['images_run']:,.0f}",
                f"{middle['seconds']:.1f} / {middle['cpu_seconds']:.1f}",
                f"{sum(search['same'] for search in found)} of {len(found)}",
                f"{worst:.4f}",
            ]
        )
    count = max(len(row["search"]) for row in record["rows"])
    orders = "of one order" if count == 1 else f"medians over {count} orders"
    header = [
        "bundles", "criterion", "mixes", "grid: images run", "grid: seconds / of CPU",
        "search: images run", "search: seconds / of CPU", "same choice", "worst, nats behind",
    ]  # fmt: skip
    return "\n".join(
        [
            "## What a search of merge weights costs",
            "",
            "`benchmarks/weight_search.py`: `--weights auto` on three bundles (a grid of 66 mixes) "
            f"and {record['images']} images a domain, beside the whole grid. Figures of the "
            f"search are {orders} of the images. PACS is an EfficientNet-Lite0 cut at 0.7 million "
            "weights, at 96 x 96, on three domains of real images; digits are ResNet-14. Images "
            "run are forward passes of one image by one mix; with new BatchNorm, the passes "
            "that measure it are not among them; it was measured on the first 64 images of each "
            "folder then, which are of few classes. The last column is the largest loss in the "
            "criterion against the grid's choice. Two cores, shared with other "
            "work: the CPU "
            "seconds are the steadier figure.",
            "",
            table(header, lines),
        ]
    )
