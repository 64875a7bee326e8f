"""Our INT8 engines on a CPU beside the best that each runtime's own tool makes at the same bits.

    python benchmarks/peers.py --results benchmarks/results

Weights are random (no downloads), images are photographs. For each model: our W8A8 engines of ONNX
Runtime and OpenVINO (one weight scale a channel, opened by ``load_engine``),
``onnxruntime.quantization.quantize_static`` at its best (unsigned activations, a weight scale a
channel), NNCF's post-training quantization at its best on OpenVINO, and FP32 of both runtimes; at
1 and 2 threads, batch 1 and 16. Calls are interleaved round by round in one process, with one
engine alive at a time where there are two threads, because idle threads of others would spin.
Ratios are medians over rounds. The roofline is the rate of ONNX Runtime's product
of two 8-bit matrices of 1,024 rows and columns on as many threads; the share
reached counts the model's multiplications as :mod:`torch.utils.flop_counter` does. Milliseconds of
each kind of kernel, ours and of ``quantize_static``, are medians of ONNX Runtime's profiles at one
thread and batch 16; they tell what bounds a ratio. Models that are in the result are not measured
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import engines
import numpy as np
import onnxruntime
import openvino
import torch
from architectures import photographs
from evidence.records import write_record
from measured import current_environment, row_with_environment
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from hdrq_deploy.calibration.loading import load_model
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.runtime import load_engine

Array = np.ndarray[Any, Any]
Call = Callable[[Array], object]

# Side of the images.
MODELS = {
    "timm:resnet50": 224,
    "timm:mobilenetv2_100": 224,
    "timm:efficientnet_lite0": 224,
    "timm:vit_small_patch16_224": 224,
    "transformers:segformer": 224,
    "hdrq_deploy.calibration_data.models:streetnet": 192,
}
TRANSFORMERS = ("timm:vit", "transformers:")
THREADS, BATCHES = (1, 2), (1, 16)
# Rounds, and calls of one contender in a round, by batch.
ROUNDS, CALLS = {1: 9, 16: 5}, {1: 5, 16: 1}
_SIDE = 1024


@dataclass(frozen=True)
class Contender:
    """An engine that is timed.

    Attributes:
        name: Of the result's rows.
        load: Opens it for a number of threads.
        close: Ends what ``load`` gave.
    """

    name: str
    load: Callable[[int], Any]
    close: Callable[[Any], None] = lambda engine: None


def in_onnx_runtime(path: Path, threads: int) -> Call:
    """A plain session."""
    session = engines.session(path, threads)
    port = session.get_inputs()[0].name
    return lambda x: session.run(None, {port: x})


def in_openvino(model: Any, threads: int) -> Call:
    """A model of OpenVINO, compiled for latency."""
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    return lambda x: request.infer([x])


def of_nncf(graph: Path, x: Array, transformer: bool) -> Any:
    """The model of NNCF's post-training quantization, with accurate bias correction."""
    import nncf

    kind = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    return nncf.quantize(
        openvino.Core().read_model(str(graph)),
        nncf.Dataset([row[None] for row in x]),
        subset_size=len(x),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=False,
        **kind,
    )


def contenders(model: str, folder: Path) -> tuple[list[Contender], dict[str, Any]]:
    """All engines of a model, and what each of ours executes; failures have a line."""
    engines.MODELS.setdefault(model, MODELS[model])
    bundle = engines.bundle(model, folder, 8)
    plain = export(engines.bundle(model, folder, 8, "float"), folder / "float", "onnx")
    graph = plain / "model.onnx"
    x = photographs(engines.IMAGES, MODELS[model], 1)
    found = [
        Contender("FP32 ort", partial(in_onnx_runtime, graph)),
        Contender("FP32 openvino", partial(in_openvino, openvino.Core().read_model(str(graph)))),
    ]
    facts: dict[str, Any] = {"executed": {}, "failed": {}}
    ours = {
        "ours ort": ("ort", GraphOptions()),
        "ours ort, codes to 255": ("ort", GraphOptions(exact=False)),
        "ours openvino": ("openvino", GraphOptions()),
    }
    for name, (engine, options) in ours.items():
        path = export(bundle, folder / name.replace(" ", "-"), engine, options=options)
        facts["executed"][name] = json.loads((path / "precision.json").read_text())["summary"]
        load = partial(_ours, path)
        found.append(Contender(name, load, lambda engine: engine.close()))
    profiled = {"ours ort": folder / "ours-ort" / "model.onnx"}

    def quantize_static() -> Contender:
        name = "quantize_static best"
        profiled[name] = engines.peers(folder, graph, x)[name]
        return Contender(name, partial(in_onnx_runtime, profiled[name]))

    makers: dict[str, Callable[[], Contender]] = {
        "quantize_static best": quantize_static,
        "NNCF best": lambda: Contender(
            "NNCF best", partial(in_openvino, of_nncf(graph, x, model.startswith(TRANSFORMERS)))
        ),
    }
    for name, make in makers.items():
        try:
            found.append(make())
        except Exception as error:  # a peer that refuses a model is a row of its own
            facts["failed"][name] = " ".join(str(error).split())[:300]
    facts["kernels"] = kernels(profiled, photographs(max(BATCHES), MODELS[model], 3), folder)
    return found, facts


def kernels(graphs: Mapping[str, Path], x: Array, folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of a call by kind of kernel, one thread, for each graph; largest first."""
    sessions = {
        name: engines.session(path, 1, profile=folder / "profile") for name, path in graphs.items()
    }
    for _ in range(2 * ROUNDS[len(x)]):
        for session in sessions.values():
            session.run(None, {session.get_inputs()[0].name: x})
    found = {}
    for name, session in sessions.items():
        spent: dict[tuple[str, str], list[int]] = {}
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event["name"].endswith("_kernel_time"):
                kind = event["args"]["op_name"]
                spent.setdefault((kind, event["name"]), []).append(event["dur"])
        by_kind: dict[str, float] = {}
        for (kind, _), durations in spent.items():
            by_kind[kind] = by_kind.get(kind, 0.0) + statistics.median(durations) / 1e3
        ordered = sorted(by_kind.items(), key=lambda item: -item[1])
        found[name] = {kind: round(ms, 2) for kind, ms in ordered if ms >= 0.01}
    return found


def _ours(path: Path, threads: int) -> Any:
    return load_engine(path, threads=threads)


def timed(all_of: Sequence[Contender], x: Array, threads: int) -> dict[str, list[float]]:
    """Medians of every round in ms, by name."""
    rounds, calls = ROUNDS[len(x)], CALLS[len(x)]
    medians: dict[str, list[float]] = {c.name: [] for c in all_of}
    alive = {c.name: c.load(threads) for c in all_of} if threads == 1 else {}
    for _ in range(rounds):
        for contender in all_of:
            call = alive.get(contender.name) or contender.load(threads)
            call(x)
            spent = []
            for _ in range(calls):
                start = time.perf_counter_ns()
                call(x)
                spent.append((time.perf_counter_ns() - start) / 1e6)
            medians[contender.name].append(statistics.median(spent))
            if not alive:
                contender.close(call)
            del call
    for contender in all_of:
        if alive:
            contender.close(alive[contender.name])
    return medians


def ratio(medians: Mapping[str, list[float]], base: str, name: str) -> float | None:
    """How many times as fast ``name`` is as ``base``: the median over rounds."""
    if base not in medians:
        return None
    pairs = zip(medians[base], medians[name], strict=True)
    return round(statistics.median(b / n for b, n in pairs), 3)


def multiplications(model: str, x: Array) -> int:
    """Multiplications of one image."""
    network = load_model(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.from_numpy(x[:1]))
    return int(counter.get_total_flops()) // 2


def peak(threads: int) -> float:
    """Multiplications of 8-bit numbers in a second that a large product reaches, in 1e9."""
    rng = np.random.default_rng(0)
    right = rng.integers(-127, 128, (_SIDE, _SIDE)).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [_SIDE, _SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [_SIDE, _SIDE])],
        [numpy_helper.from_array(right, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    run = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    left = rng.integers(0, 256, (_SIDE, _SIDE)).astype(np.uint8)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        run.run(None, {"x": left})
        best = min(best, time.perf_counter() - start)
    return round(_SIDE**3 / best / 1e9, 1)


def one(model: str) -> dict[str, Any]:
    """All rows of a model."""
    with tempfile.TemporaryDirectory() as scratch:
        all_of, facts = contenders(model, Path(scratch))
        macs = multiplications(model, photographs(1, MODELS[model], 2))
        rows, peaks = [], {}
        for threads in THREADS:
            fastest = peaks[str(threads)] = peak(threads)
            for batch in BATCHES:
                x = photographs(batch, MODELS[model], 3)
                medians = timed(all_of, x, threads)
                for name, values in medians.items():
                    ms = statistics.median(values)
                    rows.append(
                        {
                            "threads": threads,
                            "batch": batch,
                            "engine": name,
                            "ms": round(ms, 3),
                            "round_ms": [round(value, 3) for value in values],
                            "times_fp32_ort": ratio(medians, "FP32 ort", name),
                            "times_quantize_static": ratio(medians, "quantize_static best", name),
                            "times_nncf": ratio(medians, "NNCF best", name),
                            "share_of_peak": round(macs * batch / ms / 1e6 / fastest, 3),
                        }
                    )
                print(model, threads, batch, {r["engine"]: r["ms"] for r in rows[-len(medians) :]})
        return {
            "model": model,
            "side": MODELS[model],
            "multiplications": macs,
            "peak": peaks,
            **facts,
            "rows": rows,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the models that are missing, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args(argv)
    target = args.results / "peers.json"
    record = json.loads(target.read_text()) if target.is_file() else {"models": []}
    for model in args.models:
        if any(row["model"] == model for row in record["models"]):
            print(f"{model}: measured already")
            continue
        packages = ("torch", "timm", "transformers", "onnxruntime", "openvino", "nncf")
        found = current_environment(packages)
        row = {**one(model), "load_1min": found["load_1min"]}
        of_record, row = row_with_environment(record, row, found)
        record = {
            "schema_version": 1,
            "environment": of_record,
            "peak": record.get("peak", row["peak"]),
            "models": [*record["models"], row],
        }
        args.results.mkdir(parents=True, exist_ok=True)
        write_record(target, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
