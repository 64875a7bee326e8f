"""Photographs: ImageNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence.records import listed, table

__all__ = ["real_weights"]


def real_weights(record: Mapping[str, Any]) -> str:
    """EfficientNet-Lite0 with its ImageNet weights."""
    images, learned = record["images"], record["methods"].get("hdrq", {})
    order = [*dict.fromkeys(row["scheme"] for row in record["rows"])]
    methods = [
        "float",
        "rtn",
        "rtn-corrected",
        "hdrq",
        "quantize_static defaults",
        "quantize_static best",
    ]
    weather = [name for name in record["rows"][0]["domains"] if name != "clean"]
    lines = []
    for row in sorted(
        record["rows"],
        key=lambda row: (
            order.index(row["scheme"]),
            methods.index(row["method"]) if row["method"] in methods else len(methods),
        ),
    ):
        clean = row["domains"]["clean"]
        low, high = clean["interval"]
        lines.append(
            [
                row["method"],
                row["scheme"],
                row["engine"],
                f"{clean['top1']:.1f} ({low:.1f} to {high:.1f})",
                *(f"{row['domains'][name]['top1']:.1f}" for name in weather),
                *(f"{row['domains'][name]['changed']:.1f}" for name in ("clean", *weather)),
            ]
        )
    return "\n".join(
        [
            "## Real weights: EfficientNet-Lite0 on ImageNet",
            "",
            f"`benchmarks/real_weights.py`: calibrated on {images['calibration']} images, tested "
            f"on {images['test']} others, as they are and in {listed(weather)} of ImageNet-C "
            "(severity 3). The weights were trained on all of them, so that top-1 is higher than "
            "on new images; what counts is the difference to FP32. Changed decisions are those "
            "that the float model does not make, in %. Intervals are of the test images (95%, "
            "Wilson); "
            f"`hdrq` learns {learned.get('iters', 0)} iterations of {learned.get('batch', 0)} "
            "images a block, with the published distance, at the rate that the search on PACS "
            "chose; nothing was tuned here. With one scale per tensor at W8A8 rounding to nearest "
            "loses most; BatchNorm in the scales, or learning, avoids it. 4-bit weights with float "
            "activations have no row: engines take them for linear layers only, and this network "
            "has one.",
            "",
            table(
                [
                    "method",
                    "scheme",
                    "engine",
                    "top-1",
                    *weather,
                    "changed",
                    *(f"in {name}" for name in weather),
                ],
                lines,
            ),
        ]
    )
