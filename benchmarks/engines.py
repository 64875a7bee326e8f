"""Engines of four models: what runs in INT8, how large, how fast, against what else there is.

    python benchmarks/engines.py --results benchmarks/results

Weights are random (no downloads). For each model: TensorRT-RTX builds (time, memory, size,
layers in INT8); ONNX Runtime at batch 1 against FP32 and against
``onnxruntime.quantization.quantize_static`` with its defaults and with its best setting
(unsigned activations, one weight scale a channel), on one thread interleaved call by call, on
two threads one session at a time. All ratios are of one run. Finished models are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from architectures import photographs
from evidence.records import write_record
from measured import current_environment, row_with_environment
from merge_quality import DOMAINS, Cell, Setting, split
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.checks.stages import compare_stages
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.merging import merge

# Side of the images.
MODELS = {
    "timm:resnet50": 224,
    "timm:mobilenetv2_100": 224,
    "timm:vit_small_patch16_224": 224,
    "transformers:segformer": 224,
}
# Merged bundles of the digits benchmark: bits and steps.
DIGITS = ((8, 8, "channel"), (8, 8, "fold"), (4, 8, "channel"), (4, 8, "fold"))
IMAGES, ROUNDS, CALLS, WARMUP = 8, 15, 4, 3
TWO_THREADS = 2

Array = np.ndarray[Any, Any]


def bundle(model: str, folder: Path, wbits: int, method: str = "rtn") -> Bundle:
    """A bundle of random weights, calibrated on photographs."""
    x = photographs(IMAGES, MODELS[model], 0)
    return calibrate(
        model,
        ImageSet(x, None, None, None),
        "photographs",
        folder / f"{method}-w{wbits}.hdrq",
        method=method,
        wbits=wbits,
        per_channel=True,
        options=Options.of(method, **({} if method == "float" else {"batch": 4})),
    )


def tensorrt_rtx(bundles: Mapping[int, Bundle], folder: Path) -> Iterator[dict[str, Any]]:
    """One row an engine."""
    cases: list[tuple[str, int, GraphOptions]] = [
        ("W8A8 fp16", 8, GraphOptions()),
        ("W8A8 fp32", 8, GraphOptions(compute="fp32")),
        ("W4A8 fp16", 4, GraphOptions()),
    ]
    linear = [x for x in bundles[4].manifest.layers if x.op != "Conv" and x.weight_bits == 4]
    if linear:
        cases.append(("W4A8 fp16, INT4 linears packed", 4, GraphOptions(pack_int4=True)))
        cases.append(("W4 linears in blocks, fp16", 4, GraphOptions(weights_only=("*",))))
    for label, bits, options in cases:
        # Layers that lose INT4 are counted here, not refused.
        allowed = ["*"] if options.weights_only else []
        path = export(
            bundles[bits],
            folder / "rtx",
            "trt-rtx",
            allow_float=allowed,
            options=options,
            force=True,
        )
        manifest = json.loads((path / "manifest.json").read_text())
        report = json.loads((path / "precision.json").read_text())
        asked = [row for row in report["layers"] if row["requested"] != "float32"]
        yield {
            "engine": label,
            "build_s": manifest["build"]["seconds"],
            "peak_mb": round(manifest["build"]["peak_bytes"] / 1e6),
            "plan_mb": round((path / "model.plan").stat().st_size / 1e6, 1),
            "onnx_mb": round(onnx_bytes(path) / 1e6, 1),
            "executed": report["summary"],
            "as_requested": sum(row["executed"] == row["requested"] for row in asked),
            "requested": len(asked),
            "not_requested": [
                f"{row['module']}: {row['reason']}"
                for row in report["layers"]
                if row["requested"] == "float32"
            ],
        }


def onnx_bytes(folder: Path) -> int:
    """Graph and weights."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("model.onnx"))


class Images(CalibrationDataReader):  # type: ignore[misc]
    """What quantize_static calibrates on: the same images."""

    def __init__(self, x: Array) -> None:
        self._rows = iter(np.split(x, len(x)))

    def get_next(self) -> dict[str, Array] | None:
        """One image."""
        row = next(self._rows, None)
        return None if row is None else {"input": row}


def peers(folder: Path, plain: Path, x: Array) -> dict[str, Path]:
    """The float graph quantized by ONNX Runtime's own tool."""
    whole, prepared = folder / "whole.onnx", folder / "prepared.onnx"
    onnx.save(onnx.load(str(plain)), str(whole))  # its tool does not find data in other files
    quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
    result = {}
    settings: dict[str, dict[str, Any]] = {
        "quantize_static defaults": {},
        "quantize_static best": {
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "per_channel": True,
        },
    }
    for name, options in settings.items():
        path = folder / f"{name.split()[1]}.onnx"
        quantize_static(str(prepared), str(path), Images(x), **options)
        result[name] = path
    return result


def session(
    path: Path, threads: int, dump: Path | None = None, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """ONNX Runtime with its defaults; ``dump`` gets its graph, ``profile`` begins its profile."""
    options = onnxruntime.SessionOptions()
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if dump:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(dump)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def operators(path: Path, folder: Path) -> dict[str, int]:
    """Integer and float kernels, and Q and DQ that are left."""
    dump = folder / "optimized.onnx"
    session(path, 1, dump)
    counts = Counter(n.op_type for n in onnx.load(str(dump), load_external_data=False).graph.node)
    wanted = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "MatMulNBits", "QuantizeLinear")
    also = {"DequantizeLinear", "Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "Add", "Clip"}
    return {
        name: count
        for name, count in sorted(counts.items())
        if name.startswith(wanted) or name in also
    }


def left_pairs(path: Path, folder: Path) -> dict[str, int]:
    """What the remaining DequantizeLinear read from and write to, counted."""
    dump = folder / "optimized.onnx"
    session(path, 1, dump)
    graph = onnx.load(str(dump), load_external_data=False).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            source = makers.get(node.input[0], "weights")
            after = sorted(set(readers.get(node.output[0], ["the network's output"])))
            found[f"{source} > {node.op_type} > {'+'.join(after)}"] += 1
    return dict(found.most_common())


def one_thread(paths: Mapping[str, Path], x: Array) -> dict[str, list[float]]:
    """Latencies in ms; a few calls of each in turn, so that all meet the same noise."""
    sessions = {name: session(path, 1) for name, path in paths.items()}
    samples: dict[str, list[float]] = {name: [] for name in paths}
    for run in sessions.values():
        for _ in range(WARMUP):
            run.run(None, {"input": x})
    for _ in range(ROUNDS):
        for name, run in sessions.items():
            samples[name] += timed(lambda run=run: run.run(None, {"input": x}))  # type: ignore[misc]
    return samples


def two_threads(paths: Mapping[str, Path], x: Array) -> dict[str, list[float]]:
    """The same, one session alive at a time: idle threads of others would spin."""
    samples: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(ROUNDS // 3):
        for name, path in paths.items():
            run = session(path, TWO_THREADS)
            for _ in range(WARMUP):
                run.run(None, {"input": x})
            samples[name] += timed(lambda run=run: run.run(None, {"input": x}))  # type: ignore[misc]
            del run
    return samples


def timed(call: Callable[[], object]) -> list[float]:
    """A few calls in ms."""
    found = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        call()
        found.append((time.perf_counter_ns() - start) / 1e6)
    return found


def ratio(samples: Mapping[str, list[float]], base: str, name: str) -> float:
    """Median over the rounds of base / name: how many times as fast."""
    rounds = [
        statistics.median(samples[base][i : i + CALLS])
        / statistics.median(samples[name][i : i + CALLS])
        for i in range(0, len(samples[name]), CALLS)
    ]
    return round(statistics.median(rounds), 3)


def onnx_runtime(bundles: Mapping[int, Bundle], plain: Bundle, folder: Path) -> dict[str, Any]:
    """Latency, operators, size and agreement of ONNX Runtime's engines."""
    model = bundles[8].manifest.model
    x = photographs(IMAGES, MODELS[model], 1)
    float_path = export(plain, folder / "float", "onnx") / "model.onnx"
    paths = {"FP32": float_path}
    made = {
        "hdrq W8A8": (8, GraphOptions()),
        "hdrq W8A8, codes to 255": (8, GraphOptions(exact=False)),
        "hdrq W4A8, codes to 255": (4, GraphOptions(exact=False)),
    }
    for name, (bits, options) in made.items():
        folder_of = export(
            bundles[bits], folder / name.replace(" ", "-").replace(",", ""), "ort", options=options
        )
        paths[name] = folder_of / "model.onnx"
    failed = {}
    try:
        paths |= peers(folder, float_path, x)
    except Exception as error:
        failed["quantize_static"] = " ".join(str(error).split())[:300]
    latencies = {}
    for threads, measure in ((1, one_thread), (TWO_THREADS, two_threads)):
        samples = measure(paths, x[:1])
        latencies[str(threads)] = {
            name: {
                "p50_ms": round(statistics.median(values), 2),
                "times_fp32": ratio(samples, "FP32", name),
                **(
                    {"times_best_peer": ratio(samples, "quantize_static best", name)}
                    if "quantize_static best" in samples
                    else {}
                ),
                "samples_ms": [round(v, 3) for v in values],
            }
            for name, values in samples.items()
        }
    size = onnx_bytes(float_path.parent)
    return {
        "latency": latencies,
        "failed": failed,
        "operators": {name: operators(path, folder) for name, path in paths.items()},
        "left": {
            name: left_pairs(paths[name], folder)
            for name in ("hdrq W8A8", "hdrq W8A8, codes to 255")
        },
        "size_of_fp32": {name: round(onnx_bytes(paths[name].parent) / size, 4) for name in made},
        "stages": [
            {
                "stage": stage.name,
                "exact": exact,
                "flips": stage.decision_flips,
                "decisions": stage.decisions,
                "output_rms": stage.output_rms,
                "max_steps": stage.max_steps,
            }
            for exact, name in ((True, "hdrq W8A8"), (False, "hdrq W8A8, codes to 255"))
            for stage in compare_stages(bundles[8], paths[name].parent, x, torch=True)
        ],
    }


def one(model: str) -> dict[str, Any]:
    """All rows of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundles = {bits: bundle(model, folder, bits) for bits in (8, 4)}
        plain = bundle(model, folder, 8, "float")
        return {
            "model": model,
            "side": MODELS[model],
            "tensorrt_rtx": list(tensorrt_rtx(bundles, folder)),
            "onnx_runtime": onnx_runtime(bundles, plain, folder),
        }


def digits(cells: Path) -> list[dict[str, Any]]:
    """Merged engines of the digits benchmark: accuracy by default and exact, stages apart.

    Args:
        cells: Bundles that ``merge_quality.py`` made.
    """
    x, y = (
        np.concatenate(parts) for parts in zip(*(split(d, "test") for d in DOMAINS), strict=True)
    )
    rows = []
    for setting in (Setting("hdrq", w, a, steps, (0,)) for w, a, steps in DIGITS):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            paths = [cells / Cell(setting, 0, (d,)).path for d in DOMAINS]
            merged = merge(paths, folder / "merged.hdrq")
            for exact in (False, True):
                path = export(merged, folder / f"{exact}", options=GraphOptions(exact=exact))
                run = session(path / "model.onnx", 1)
                scores = np.concatenate(
                    [run.run(None, {"input": part})[0] for part in np.split(x, 10)]
                )
                rows.append(
                    {
                        "setting": setting.name,
                        "exact": exact,
                        "accuracy": float((scores.argmax(1) == y).mean()),
                        "images": len(x),
                        "stages": [
                            {"stage": s.name, "flips": s.decision_flips, "max_steps": s.max_steps}
                            for s in compare_stages(merged, path, x, torch=True)
                        ],
                    }
                )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the models that are missing, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--cells", type=Path, help="of merge_quality.py, for the digits rows")
    args = parser.parse_args(argv)
    target = args.results / "engines.json"
    record = json.loads(target.read_text()) if target.is_file() else {"rows": []}
    for model in args.models:
        if any(row["model"] == model for row in record["rows"]):
            print(f"{model}: measured already")
            continue
        started = time.monotonic()
        found = current_environment(("torch", "timm", "transformers", "tensorrt-rtx"))
        of_record, row = row_with_environment(record, one(model), found)
        record = {
            **record,
            "schema_version": 1,
            "environment": of_record,
            "rows": [*record["rows"], row],
        }
        args.results.mkdir(parents=True, exist_ok=True)
        write_record(target, record)
        print(f"{model}: {time.monotonic() - started:.0f} s", flush=True)
    if args.cells:
        record["digits"] = digits(args.cells)
        write_record(target, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
