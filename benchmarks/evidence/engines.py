"""What engines execute, and how fast."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.records import table


def architectures(record: Mapping[str, Any]) -> str:
    """The section on architectures."""
    rows = []
    for row in record["rows"].values():
        heavy = ", ".join(f"{n} {op}" for op, n in row["heavy"].items())
        reasons = {layer["reason"] for layer in row["float_layers"]}
        left = f"{len(row['float_layers'])}: {'; '.join(sorted(reasons))}" if reasons else "none"
        per_block = " ".join(f"{n}x{size}" for size, n in row["heavy_per_block"].items())
        rows.append(
            [
                row["model"],
                f"{row['fold_relative_error']:.0e}",
                f"{row['blocks']} ({per_block})",
                heavy,
                left,
                f"{row['w8a8_sqnr_db_tensor']:.1f} / {row['w8a8_sqnr_db_channel']:.1f}",
                f"{row['hdrq_blocks_lowered']}, x{row['hdrq_error_ratio_median']:.2f}",
            ]
        )
    header = [
        "model", "folded graph, rel. error", "blocks (number x heavy operators)",
        "heavy operators", "left in float", "W8A8 SQNR dB, per tensor / channel",
        "blocks lowered by HDRQ W4A8, median error",
    ]  # fmt: skip
    return "\n".join(
        [
            "## Any architecture",
            "",
            "Random weights, images cropped from two photographs (`benchmarks/architectures.py`). "
            "The HDRQ runs are short (30 to 100 iterations a block); errors are relative to RTN "
            "on the same inputs. Blocks without a weight (products of activations) learn only "
            "steps and are not counted where nothing was learned. MobileNetV2 and EfficientNet "
            "stay under 25 dB, and ConvNeXt per tensor is the worst of the others; why was not "
            "measured.",
            "",
            table(header, rows),
        ]
    )


def engines(record: Mapping[str, Any]) -> str:
    """The section on what engines execute."""
    built = [
        [
            row["model"],
            case["engine"],
            f"{case['build_s']:.1f}",
            str(case["peak_mb"]),
            f"{case['plan_mb']:.1f}",
            f"{case['as_requested']} of {case['requested']}",
            case["executed"],
        ]
        for row in record["rows"]
        for case in row["tensorrt_rtx"]
    ]
    timed, kernels, apart = [], [], []
    for row in record["rows"]:
        ort = row["onnx_runtime"]
        one, two = ort["latency"]["1"], ort["latency"]["2"]
        for name, found in one.items():
            timed.append(
                [
                    row["model"],
                    name,
                    f"{found['p50_ms']:.1f}",
                    f"{found['times_fp32']:.2f} / {two[name]['times_fp32']:.2f}",
                    " / ".join(f"{t[name].get('times_best_peer', 0):.2f}" for t in (one, two)),
                    f"{ort['size_of_fp32'][name]:.3f}" if name in ort["size_of_fp32"] else "",
                ]
            )
            counts = ", ".join(f"{n} {op}" for op, n in ort["operators"][name].items())
            kernels.append([row["model"], name, counts])
        for stage in ort["stages"]:
            kind = "exact" if stage["exact"] else "codes to 255"
            apart.append(
                [
                    row["model"],
                    kind,
                    stage["stage"],
                    f"{stage['flips']} of {stage['decisions']}",
                    f"{stage['output_rms']:.1g}",
                    str(stage["max_steps"]),
                ]
            )
    return "\n".join(
        [
            "## What engines execute",
            "",
            "Random weights, one weight scale a channel (`benchmarks/engines.py`; all ratios of a "
            f"row's model from one run; {record['environment']['cpu']}, ONNX Runtime "
            f"{record['environment']['onnxruntime']}, TensorRT-RTX "
            f"{record['environment']['tensorrt-rtx']}).",
            "",
            "TensorRT-RTX, built without a GPU; layers as the builder's dump reports them:",
            "",
            table(
                ["model", "engine", "build s", "peak MB", "plan MB", "as requested", "executed"],
                built,
            ),
            "",
            "ONNX Runtime, batch 1. Ratios are for 1 / 2 threads; the best peer is "
            "`quantize_static` with unsigned activations and a weight scale a channel:",
            "",
            table(
                ["model", "graph", "p50 ms, 1 thread", "times as fast as FP32",
                 "as fast as the best peer", "size / FP32"],
                timed,
            ),
            "",
            "Operators of the optimized graphs:",
            "",
            table(["model", "graph", "kernels, and what is left of Q and DQ"], kernels),
            "",
            "Neighbouring stages on the same photographs (`hdrq-verify`). With codes to 255 "
            "(`--no-exact`) a graph differs from the bundle where the bundle saturates:",
            "",
            table(
                ["model", "graph", "stages", "decision flips", "output RMS", "largest steps"],
                apart,
            ),
            *(_digits(record["digits"]) if "digits" in record else []),
        ]
    )  # fmt: skip


def _kernels(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The kinds of kernels that take most of the time, side by side, and where two graphs part."""
    if len(found) < 2:
        return []
    (own, mine), (other, theirs) = found.items()
    kinds = list(dict.fromkeys([*mine, *theirs]))
    total = sum(theirs.values())
    most = [k for k in kinds if max(mine.get(k, 0), theirs.get(k, 0)) >= 0.01 * total]
    rows = [
        [name, *(f"{kernels.get(k, 0):.1f}" for k in most), f"{sum(kernels.values()):.1f}"]
        for name, kernels in found.items()
    ]
    more = [*(mine.get(k, 0) - theirs.get(k, 0) for k in most), sum(mine.values()) - total]
    rows.append([f"{own} less {other}", *(f"{ms:+.1f}" for ms in more)])
    return [
        "Kernels of ONNX Runtime, ms at 1 thread and batch 16:",
        "",
        table(["engine", *most, "all"], rows),
        "",
    ]


def peers(record: Mapping[str, Any]) -> str:
    """The section on our engines beside each runtime's own tool."""
    order = (
        ("ours ort", "times_quantize_static"),
        ("ours ort, codes to 255", "times_quantize_static"),
        ("ours openvino", "times_nncf"),
        ("ours openvino", "times_quantize_static"),
    )
    cells = [(threads, batch) for threads in (1, 2) for batch in (1, 16)]
    parts, ratios = [], defaultdict[tuple[str, str], list[float]](list)
    for model in record["models"]:
        found = {(r["threads"], r["batch"], r["engine"]): r for r in model["rows"]}
        names = list(dict.fromkeys(row["engine"] for row in model["rows"]))
        lines = []
        for name in names:
            rows = [found[(*cell, name)] for cell in cells]
            lines.append(
                [
                    name,
                    " / ".join(f"{row['ms']:.1f}" for row in rows),
                    " / ".join(f"{row['times_fp32_ort']:.2f}" for row in rows),
                    *(
                        " / ".join(f"{row[key]:.2f}" if row[key] else "-" for row in rows)
                        for key in ("times_quantize_static", "times_nncf")
                    ),
                    " / ".join(f"{100 * row['share_of_peak']:.0f}" for row in rows),
                    model["executed"].get(name, ""),
                ]
            )
            for key in (key for own, key in order if own == name):
                ratios[name, key] += [row[key] for row in rows if row[key]]
        parts += [
            f"`{model['model']}`, {model['multiplications'] / 1e9:.2f} G multiplications an image, "
            f"{model['side']}x{model['side']}:",
            "",
            table(
                [
                    "engine",
                    "ms",
                    "times FP32 of ONNX Runtime",
                    "times `quantize_static` best",
                    "times NNCF best",
                    "% of peak",
                    "executed",
                ],
                lines,
            ),
            *(f"\n{name} refuses it: {line}" for name, line in model["failed"].items()),
            "",
            *_kernels(model.get("kernels", {})),
        ]
    overall = [
        [
            name,
            {"times_quantize_static": "`quantize_static` best", "times_nncf": "NNCF best"}[key],
            f"{statistics.geometric_mean(ratios[name, key]):.2f}",
            f"{min(ratios[name, key]):.2f}",
            f"{sum(ratio >= 1 for ratio in ratios[name, key])} of {len(ratios[name, key])}",
        ]
        for name, key in order
    ]
    about = record["environment"]
    peak = " / ".join(f"{record['peak'][n] / 1000:.2f}" for n in ("1", "2"))
    return "\n".join(
        [
            "## Beside each runtime's own tool",
            "",
            "W8A8, random weights, one weight scale a channel (`benchmarks/peers.py`; "
            f"{about['cpu']}, {about['cores']} cores, ONNX Runtime {about['onnxruntime']}, "
            f"OpenVINO {about['openvino']}, NNCF {about['nncf']}). Calls are interleaved; ratios "
            "are medians over rounds, above 1 where the row's engine is faster. The four figures "
            "of a cell are 1 thread at batch 1 and 16, then 2 threads at batch 1 and 16. The peak "
            "is what ONNX "
            f"Runtime's product of two 8-bit matrices reaches: {peak} T multiplications a second "
            "with 1 / 2 threads.",
            "",
            table(["engine", "beside", "geometric mean", "least", "at least 1.0"], overall),
            "",
            "What bounds ours on ONNX Runtime, by the kernels below: convolutions are the same "
            "kernels in both graphs and take the same time, so that nothing is to be gained there. "
            "The integer Clip that keeps codes as they were calibrated comes on top; without it "
            "(codes to 255) the numbers are others than the bundle's. Sums of more than two terms "
            "stay real, for their partial sums have no scale (StreetNet), and so do concatenated "
            "outputs of linear layers (SegFormer). The kernels are of one thread; the slowest cell "
            "(StreetNet, 2 threads, batch 16) was not profiled.",
            "",
            *parts,
        ]
    )


def same_codes(record: Mapping[str, Any]) -> str:
    """The section on the integers of several runtimes."""
    rows = []
    for model in record["rows"]:
        for runtime in model["runtimes"]:
            tensors = runtime["tensors"]
            first = next((t["module"] for t in tensors if t["free_off"]), "nowhere")
            rows.append(
                [
                    model["name"],
                    runtime["name"],
                    f"{len(tensors)} of {model['activations']}",
                    f"{runtime['most_off']:.3%}",
                    sum(t["ties"] for t in tensors),
                    sum(t["wrong"] for t in tensors),
                    first,
                    f"{max((t['free_off'] for t in tensors), default=0):.2%}",
                    max((t["free_steps"] for t in tensors), default=0),
                    f"{runtime['output_rms']:.2g}",
                ]
            )
    header = [
        "bundle",
        "runtime",
        "activations shown",
        "most codes off in one",
        "at ties",
        "wrong",
        "parts first at",
        "free: most codes off",
        "by",
        "output, rel. RMS",
    ]
    return "\n".join(
        [
            "## The same integers everywhere",
            "",
            "Codes of every activation beside those of the bundle's graph computed as written, on "
            f"{record['rows'][0]['images']} images, random weights (`benchmarks/same_codes.py`). "
            "The first figures are computed from the same codes, so that each layer answers for "
            "itself: a code may be off by one at a tie, and anything else is wrong. *Free* is the "
            "whole network at once, where one tie changes what lies behind it. Activations that "
            "are not shown lie inside a kernel. `code_ties` of an engine's manifest is ten times "
            "the largest share that was found for its kind, rounded up.",
            "",
            table(header, rows),
        ]
    )


def arm_emulated(record: Mapping[str, Any]) -> str:
    """The section on emulated ARM processors."""
    rows = []
    for processor, found in record["processors"].items():
        for setting, of in found["settings"].items():
            codes = of["codes"].values()
            rows.append(
                [
                    processor,
                    setting,
                    f"{sum(c['differ'] for c in codes):,} of {sum(c['count'] for c in codes):,}",
                    f"{of['decisions_that_differ']} of {of['decisions']}",
                    "yes" if of["same_merge"] else "no",
                    of["summary"],
                ]
            )
    return "\n".join(
        [
            "## The same integers on ARM",
            "",
            "ResNet-14 on emulated processors: the base install merges, exports, verifies and "
            "runs there, and its codes are compared with those of the same engine on x86 "
            f"(`benchmarks/arm_emulated.py`; {record['emulator'].split(' (')[0]}, ONNX Runtime "
            f"{record['reference']['versions']['onnxruntime']}). An emulator says nothing of "
            "speed.",
            "",
            table(
                [
                    "processor",
                    "bits",
                    "codes that differ",
                    "decisions that differ",
                    "same merged bytes",
                    "executed",
                ],
                rows,
            ),
        ]
    )


def protocol_models(record: Mapping[str, Any]) -> str:
    """The section on the paper's networks."""
    cells = [
        [
            row["model"].rpartition(":")[2],
            "x".join(map(str, row["input"])),
            f"{row['parameters'] / 1e6:.1f}",
            row["blocks"],
            row["scheme"],
            row["ort"]["summary"],
            row["trt-rtx"]["summary"],
            f"{row['trt-rtx']['seconds']:.0f}",
        ]
        for row in record["rows"].values()
    ]
    return "\n".join(
        [
            "## The paper's networks",
            "",
            "Full depth, random weights, a few iterations of HDRQ a block, then both engines; no "
            "layer that was asked for INT8 runs in float (`benchmarks/protocol_models.py`):",
            "",
            table(
                [
                    "model",
                    "input",
                    "M parameters",
                    "blocks",
                    "bits",
                    "ONNX Runtime",
                    "TensorRT-RTX",
                    "RTX build, s",
                ],
                cells,
            ),
        ]
    )


def _digits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Merged digits engines."""
    cells = [
        [
            row["setting"],
            "exact" if row["exact"] else "codes to 255",
            f"{100 * row['accuracy']:.2f}",
            "; ".join(f"{s['stage']} {s['flips']}" for s in row["stages"]),
        ]
        for row in rows
    ]
    return [
        "",
        f"Merged engines of the digits benchmark, {rows[0]['images']} test images:",
        "",
        table(["bundles", "graph", "accuracy, %", "decision flips between stages"], cells),
    ]
