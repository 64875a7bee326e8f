"""Photographs: ImageNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evidence.records import listed, needed, table

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
            f"{_brought_back(record['rows'], images['test'])} {_weights_alone(record['rows'])} "
            "`quantize_static` has 4-bit weights where our bundles have them (its first and last "
            "layer have 8); NNCF refuses them in convolutions.",
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
            "",
            *_mended(),
        ]
    )


def _mended() -> list[str]:
    """Where in the network HDRQ mends what one scale per tensor costs."""
    record = needed("mended_stages")
    rows, few = record["rows"], 2 * record["few"] + 1

    def cells(row: Mapping[str, Any], way: str) -> list[str]:
        return [f"{row[way][domain]['top1']:.1f}" for domain in ("clean", "frost")]

    lines = [
        [
            row["stage"],
            f"{row['channels_of_few_codes']} of {row['channels']}",
            f"{row['loss_after'] / row['loss_before']:.2f}",
            *cells(row, "alone"),
            *cells(row, "with_all_before"),
        ]
        for row in rows
    ]
    start = record["nearest"]
    first = rows[: [row["stage"] for row in rows].index("blocks.0") + 1]
    early, whole = (
        {d: row["with_all_before"][d]["top1"] - start[d]["top1"] for d in ("clean", "frost")}
        for row in (first[-1], rows[-1])
    )
    assert early["clean"] > whole["clean"] / 2 and early["frost"] < whole["frost"] / 3, (
        "the sentence says so"
    )
    channels, of_all = (sum(row["channels"] for row in some) for some in (first, rows))
    head = ["stage", f"channels of {few} levels at most", "loss of its blocks, times"]
    return [
        "Where HDRQ mends it (`benchmarks/mended_stages.py`): top-1 with HDRQ's codes, scales and "
        "biases in one stage, or in it and all before it, and rounding to nearest elsewhere "
        f"({start['clean']['top1']:.1f} everywhere, {start['frost']['top1']:.1f} in frost; the "
        "bundles' graph in ONNX Runtime). One scale leaves some channels few of 255 "
        "levels. The loss is what calibration learned to lower, on calibration images. "
        f"{channels} of {of_all:,} channels, those of the stem and of `blocks.0`, bring back "
        f"{early['clean']:.1f} of {whole['clean']:.1f} points, and {early['frost']:.1f} of "
        f"{whole['frost']:.1f} in frost, where later stages bring the rest.",
        "",
        table(
            [*head, "this stage alone", "in frost", "with all before", "in frost"],
            lines,
        ),
    ]


def _in_onnx_runtime(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Top-1 on clean images in ONNX Runtime, by method and scheme."""
    return {
        (row["method"], row["scheme"]): row["domains"]["clean"]["top1"]
        for row in rows
        if row["engine"] == "ort"
    }


def _weights_alone(rows: Sequence[Mapping[str, Any]]) -> str:
    """What 4-bit weights cost in ONNX Runtime without 8-bit activations."""
    top1 = _in_onnx_runtime(rows)
    both = [
        f"`{method}` {value:.1f} and {top1[method, 'W4A8 per channel']:.1f}"
        for (method, scheme), value in top1.items()
        if scheme == "W4 per channel, float activations"
    ]
    return (
        "Rows with float activations are W4A8 bundles exported with `--keep-float '*'`: weights "
        "keep the values of their codes, and are stored as floats. These bundles were calibrated "
        "again, on another machine. At 4 bits weights cost the most (ONNX Runtime, with float "
        f"activations and with 8-bit ones {listed(both)})."
    )


def _brought_back(rows: Sequence[Mapping[str, Any]], tests: int) -> str:
    """What one scale per tensor costs at W8A8 in ONNX Runtime, and what brings it back."""
    wide = "W8A8 per tensor"
    top1 = _in_onnx_runtime(rows)
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
