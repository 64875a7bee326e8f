"""Merging a pair the size of ResNet-50, beside brute force on the same draws.

    python benchmarks/merge_speed.py --results benchmarks/results

Brute force scores each candidate as the paper writes it: whole dequantized tensors, two
norms and a dot product for every parent. ``reference draws`` also draws both parents' errors
anew for each, as the reference does. Times are of the codes alone; ``bundle`` is the whole
command on bundles on disk, in a process of its own, with its peak memory. Its bundles hold drawn
statistics of the rank that a calibration keeps, in the same room as the codes; ``--only bundles``
measures the whole merges alone and leaves the other figures as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.records import write_record

from hdrq_deploy.merging import rounding
from hdrq_deploy.merging.bundles import in_parallel
from hdrq_deploy.numerics.spec import QuantSpec

CANDIDATES = 100
SPEC = QuantSpec.weight(8)
# Convolutions of ResNet-50 by shape and number, and its linear: 25.5 million weights.
SHAPES = [
    ((64, 3, 7, 7), 1), ((64, 64, 1, 1), 1), ((64, 64, 3, 3), 3), ((256, 64, 1, 1), 4),
    ((64, 256, 1, 1), 2), ((128, 256, 1, 1), 1), ((128, 128, 3, 3), 4), ((512, 128, 1, 1), 4),
    ((512, 256, 1, 1), 1), ((128, 512, 1, 1), 3), ((256, 512, 1, 1), 1), ((256, 256, 3, 3), 6),
    ((1024, 256, 1, 1), 6), ((1024, 512, 1, 1), 1), ((256, 1024, 1, 1), 5),
    ((512, 1024, 1, 1), 1), ((512, 512, 3, 3), 3), ((2048, 512, 1, 1), 3),
    ((2048, 1024, 1, 1), 1), ((512, 2048, 1, 1), 2), ((1000, 2048), 1),
]  # fmt: skip


def pair(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """Codes and steps of two models that were adapted from one."""
    source = rng.normal(0, 35, shape)
    codes = [
        np.clip(np.rint(source + rng.normal(0, 6, shape)), -128, 127).astype(np.int8)
        for _ in range(2)
    ]
    return codes, [np.array(s, np.float32) for s in rng.uniform(0.9, 1.1, 2) * 1e-3]


def brute_force(codes: list[Any], scales: list[Any], redraw: bool) -> Any:
    """The filter as the paper writes it, one candidate at a time."""
    step = float(np.mean(scales))
    real = [float(s) * q.astype(np.float64) for s, q in zip(scales, codes, strict=True)]
    middle = (real[0] + real[1]) / 2
    scaled = middle / step
    mask = rounding.ambiguous(codes, [0.5, 0.5])
    floor = np.floor(scaled[mask])
    widths = [0.5 * float(s) / step for s in scales]
    shares = rounding.round_up_share(scaled[mask] - floor, widths)
    chances = np.rint(shares * 65536).clip(0, 65535).astype(np.uint16)
    stream, rng = np.random.Generator(np.random.SFC64(0)), np.random.default_rng(0)
    aims = [(middle - r).ravel() for r in real]
    best, highest = None, [0.0, 0.0]
    draw = np.rint(scaled)
    for _ in range(CANDIDATES):
        if redraw:
            errors = sum(0.5 * s * rng.uniform(-0.5, 0.5, len(floor)) for s in scales)
            draw[mask] = np.rint((middle[mask] - errors) / step)
        else:
            draw[mask] = floor + rounding.toss(stream, chances, 1)[0]
        candidate = np.clip(draw, -128, 127) * step
        found = []
        for r, aim in zip(real, aims, strict=True):
            away = (candidate - r).ravel()
            norms = np.linalg.norm(away) * np.linalg.norm(aim)
            found.append(abs(float(away @ aim)) / float(norms))
        if found[0] > highest[0] and found[1] > highest[1]:
            best, highest = draw.astype(np.int8), found
    return best


def timed(call: Any) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def codes_only(repeats: int) -> list[dict[str, Any]]:
    """Ours and brute force in turn on three sizes of layers."""
    rng, rows = np.random.default_rng(0), []
    for shape in ((256, 256, 1, 1), (256, 256, 3, 3), (512, 512, 3, 3)):
        codes, scales = pair(shape, rng)
        scale = np.mean(scales, 0).astype(np.float32)
        times = []
        for _ in range(repeats):
            times.append(
                {
                    "ours": timed(
                        lambda c=codes, s=scales, m=scale: rounding.merge_codes(
                            c, s, m, [0.5, 0.5], SPEC, "advanced", CANDIDATES
                        )
                    ),
                    "brute force": timed(lambda c=codes, s=scales: brute_force(c, s, False)),
                    "reference draws": timed(lambda c=codes, s=scales: brute_force(c, s, True)),
                }
            )
        ratio = {
            way: statistics.median(t[way] / t["ours"] for t in times)
            for way in ("brute force", "reference draws")
        }
        rows.append({"weights": codes[0].size, "seconds": times, "ratio": ratio})
        print(rows[-1], flush=True)
    return rows


def whole_pair() -> dict[str, Any]:
    """All layers of the pair: ours, two at a time as the command does, and brute force."""
    rng = np.random.default_rng(0)
    layers = [pair(shape, rng) for shape, count in SHAPES for _ in range(count)]

    def one(layer: tuple[list[Any], list[Any]]) -> None:
        codes, scales = layer
        scale = np.mean(scales, 0).astype(np.float32)
        rounding.merge_codes(codes, scales, scale, [0.5, 0.5], SPEC, "advanced", CANDIDATES)

    def ours() -> None:
        in_parallel(one, layers)

    own = [timed(ours)]
    others = {
        "brute force": timed(lambda: [brute_force(c, s, False) for c, s in layers]),
        "reference draws": timed(lambda: [brute_force(c, s, True) for c, s in layers]),
    }
    own += [timed(ours), timed(ours)]
    ratio = {way: seconds / statistics.median(own) for way, seconds in others.items()}
    seconds = {"ours": own, **others}
    row = {"weights": sum(c[0].size for c, _ in layers), "seconds": seconds, "ratio": ratio}
    print(row, flush=True)
    return row


def peak_bytes() -> int:
    """Largest resident size of this process so far (ru_maxrss would count its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return 1024 * int(found)


def write_pair(folder: Path) -> None:
    """Two bundles whose graph does nothing but hold the weights."""
    import onnx

    from hdrq_deploy.formats.bundle import WEIGHTS, Bundle
    from hdrq_deploy.formats.bundle_manifest import Manifest, Tensor
    from hdrq_deploy.formats.records import Scheme
    from hdrq_deploy.formats.safetensors_layout import layout

    shapes = [shape for shape, count in SHAPES for _ in range(count)]
    seen = drawn_statistics(shapes)
    entries = {}
    for i, shape in enumerate(shapes):
        entries[f"w{i}_codes"] = Tensor(
            role="codes", dtype="int8", shape=shape, bits=8, lo=-128, hi=127, scale=f"w{i}_scale"
        )
        entries[f"w{i}_scale"] = Tensor(role="scale", dtype="float32", shape=())
    for k, domain in enumerate(("night", "day")):
        rng = np.random.default_rng(0)
        tensors = {}
        for i, shape in enumerate(shapes):
            codes, scales = pair(shape, rng)
            tensors[f"w{i}_codes"], tensors[f"w{i}_scale"] = codes[k], scales[k]
        spans = layout(tensors, entries, folder)
        initializers = []
        for name, entry in entries.items():
            kind = onnx.TensorProto.INT8 if entry.role == "codes" else onnx.TensorProto.FLOAT
            item = onnx.TensorProto(name=name, data_type=kind, dims=entry.shape)
            item.data_location = onnx.TensorProto.EXTERNAL
            span = spans[name]
            for key, value in (
                ("location", WEIGHTS), ("offset", span.offset), ("length", span.length),
            ):  # fmt: skip
                item.external_data.add(key=key, value=str(value))
            initializers.append(item)
        ports = [
            onnx.helper.make_tensor_value_info(port, onnx.TensorProto.FLOAT, ["batch", 3, 224, 224])
            for port in ("input", "output")
        ]
        node = onnx.helper.make_node("Identity", ["input"], ["output"], name="identity")
        graph = onnx.helper.make_graph([node], "weights", ports[:1], ports[1:], initializers)
        opset = onnx.helper.make_opsetid("", 21)
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
        manifest = Manifest(
            model="benchmark:resnet50", method="rtn", domains={domain: 1.0},
            scheme=Scheme(grid="int8", wbits=8, abits=8, per_channel=False, fold="weights"),
            layers=(), activations=(), tensors=entries, source_sha256="0", adapted_sha256={},
            data_sha256={}, options={}, seed=0, input_shape=(3, 224, 224), preprocessing=None,
            classes=None,
        )  # fmt: skip
        Bundle.write(
            folder / f"{domain}.hdrq", manifest, tensors,
            model.SerializeToString(), statistics=seen,
        )  # fmt: skip


def drawn_statistics(shapes: list[tuple[int, ...]]) -> Any:
    """Statistics of every layer, of a rank whose factors take as many bytes as the codes."""
    from hdrq_deploy.formats.statistics import Layout, Statistics
    from hdrq_deploy.numerics.layer_statistics import InputStatistics

    rng, layers = np.random.default_rng(1), dict[str, InputStatistics]()
    layouts: dict[str, tuple[str | None, Layout]] = {}
    for i, shape in enumerate(shapes):
        features = int(np.prod(shape[1:]))
        rank = min(features, shape[0])
        factor = rng.standard_normal((1, rank, features), np.float32) / np.float32(rank**0.5)
        half = np.full((1, features), 0.5, np.float32)
        layers[f"w{i}_codes"] = InputStatistics(1e4, half, half / np.float32(2), factor)
        layouts[f"w{i}_codes"] = (None, "conv" if len(shape) == 4 else "linear")
    return Statistics("auto", layouts, layers, {})


# Method, rounding and weight bits of whole merges.
WAYS: dict[str, dict[str, Any]] = {
    "nearest": {"method": "mean", "rounding": "nearest"},
    "noise": {"method": "mean", "rounding": "noise"},
    "advanced": {"method": "mean", "rounding": "advanced"},
    "mean, compensated": {"method": "mean", "rounding": "compensated"},
    "regression, compensated": {"method": "regression", "rounding": "compensated"},
    "regression, compensated, W4": {
        "method": "regression", "rounding": "compensated", "wbits": 4,
    },
}  # fmt: skip


def one_merge(folder: Path, how: str) -> dict[str, Any]:
    """Time and peak memory of one merge; run in a process of its own."""
    from hdrq_deploy import Bundle, merge

    paths = [folder / f"{domain}.hdrq" for domain in ("night", "day")]
    before, cpu = peak_bytes(), time.process_time()
    seconds = timed(
        lambda: merge(paths, folder / "merged.hdrq", candidates=CANDIDATES, **WAYS[how])
    )
    after, cpu = peak_bytes(), time.process_time() - cpu
    opened = [Bundle.open(p, check=False) for p in paths]
    size = sum(bundle.size_bytes for bundle in opened)
    kept = [bundle.manifest.statistics for bundle in opened]
    return {
        "rounding": how, "seconds": seconds, "processor_seconds": cpu, "inputs_mb": size / 1e6,
        "statistics_mb": sum(record.file.bytes for record in kept if record) / 1e6,
        "peak_mb": after / 1e6, "peak_above_imports_mb": (after - before) / 1e6,
        "peak_above_imports_over_inputs": (after - before) / size,
    }  # fmt: skip


def bundles(repeats: int) -> list[dict[str, Any]]:
    """Whole merges of bundles on disk."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        write_pair(Path(scratch))
        for how in WAYS:
            for _ in range(repeats):
                command = [sys.executable, __file__, "--one", scratch, how]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("bundles",), help="leave the other figures")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one_merge(Path(args.one[0]), args.one[1])))
        return 0
    from measured import current_environment, row_with_environment

    target, found = args.results / "merge_speed.json", current_environment()
    if args.only:
        record = json.loads(target.read_text())
        rows = [row_with_environment(record, row, found)[1] for row in bundles(args.repeats)]
        record = {**record, "bundles": rows}
    else:
        record = {
            "schema_version": 1,
            "candidates": CANDIDATES,
            "environment": found,
            "codes": codes_only(args.repeats),
            "whole_pair": whole_pair(),
            "bundles": bundles(args.repeats),
        }
    args.results.mkdir(parents=True, exist_ok=True)
    write_record(target, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
