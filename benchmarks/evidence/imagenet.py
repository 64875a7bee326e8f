"""Photographs: ImageNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    weather = [name for name in record["domains"] if name != "clean"]
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
            "chose; nothing was tuned here. "
            f"{_brought_back(record['rows'], images['test'])} 4-bit weights with float activations "
            "have no row: engines take them for linear layers only, and this network has one.",
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


def _brought_back(rows: Sequence[Mapping[str, Any]], tests: int) -> str:
    """What one scale per tensor costs at W8A8 in ONNX Runtime, and what brings it back."""
    wide = "W8A8 per tensor"
    top1 = {
        (row["method"], row["scheme"]): row["domains"]["clean"]["top1"]
        for row in rows
        if row["engine"] == "ort"
    }
    rounded = top1["rtn", wide]
    corrected, learned = (top1[method, wide] - rounded for method in ("rtn-corrected", "hdrq"))
    scales = top1["rtn", f"{wide}, BatchNorm in the scales"] - rounded
    assert min(corrected, learned, scales) > 2, "the sentence says so"
    return (
        f"With one scale per tensor at W8A8 rounding to nearest loses "
        f"{top1['float', 'FP32'] - rounded:.1f} points (ONNX Runtime). Corrected biases bring back "
        f"{corrected:.1f} of them, HDRQ {learned:.1f} and BatchNorm in the scales {scales:.1f}; "
        f"a point is {tests / 100:.1f} images, and these three were not tested against each other."
    )
