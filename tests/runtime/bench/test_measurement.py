"""Figures people can trust: scenarios, phases, accuracy, marks, reports."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from scipy import stats

from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.calibration_data.readers.street_scenes import IGNORE
from hdrq_deploy.cli import bench as command
from hdrq_deploy.errors import DataError, EngineError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.formats.bench_result import BenchResult
from hdrq_deploy.runtime import Engine, benchmark, load_engine
from hdrq_deploy.runtime.bench import BenchPlan, benchmark_all
from hdrq_deploy.runtime.bench.accuracy import accuracy, confusion
from hdrq_deploy.runtime.bench.environment import Watch, environment, read
from hdrq_deploy.runtime.bench.timing import measure, speedup

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def engines(make: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    made = {
        name: export(make(domain="night", method=method, **options), folder / name)
        for name, method, options in (("float", "float", {}), ("int8", "rtn", {"wbits": 8}))
    }
    fixed = GraphOptions(batch=4)
    made["fixed"] = export(make(domain="night", wbits=8), folder / "fixed", options=fixed)
    return made


def test_the_published_schema_is_that_of_the_results(
    engines: dict[str, Path], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--schema"]) == 0
    text = capsys.readouterr().out
    assert text == (ROOT / "docs" / "hdrq-bench.schema.json").read_text()
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    out = tmp_path / "o.json"
    flags = ["--data", f"d={work}/data.npz", "--iterations", "10", "--percentiles", "99.9"]
    assert command.main([str(engines["int8"]), *flags, "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    jsonschema.validate(record, schema)
    assert BenchResult.model_validate(record).schema_version == 2
    assert record["latency_ms"]["percentiles"].keys() == {"99.9"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**record, "latency_ms": None}, schema)


def test_several_engines_take_turns_and_are_compared(
    engines: dict[str, Path], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(engines["int8"]), str(engines["float"])]
    out = tmp_path / "o.json", tmp_path / "o.csv", tmp_path / "o.html"
    flags = ["--data", f"d={work}/data.npz", "--iterations", "25", "--threads", "1"]
    flags += ["--json", str(out[0]), "--csv", str(out[1]), "--html", str(out[2])]
    assert command.main([*paths, *flags, "--reference", paths[1]]) == 0
    quantized, base = map(BenchResult.model_validate, json.loads(out[0].read_text()))
    assert base.speedup is None  # the float engine is what others are compared with
    gain = quantized.speedup
    assert gain is not None and gain.against == paths[1] and gain.rounds == 10
    assert gain.low < gain.ratio < gain.high
    assert quantized.latency_ms.iterations == 30  # 10 rounds of 3
    assert quantized.accuracy and base.accuracy
    assert base.accuracy.decision_flips == {"d": 0.0}
    shown = capsys.readouterr().out
    assert "int8: quantization " in shown and "times smaller" in shown
    rows = list(csv.DictReader(io.StringIO(out[1].read_text())))
    assert [row["name"] for row in rows] == ["int8", "float"]
    assert float(rows[0]["p50_ms"]) == quantized.latency_ms.p50
    assert float(rows[0]["accuracy_d"]) == quantized.accuracy.domains["d"]
    text = out[2].read_text()
    assert "Did quantization pay?" in text and text.count('<svg class="chart wide"') == 3


def test_phases_are_parts_of_the_whole(engines: dict[str, Path]) -> None:
    result = benchmark(engines["int8"], iterations=20, threads=1)
    # Calibrated from .npz: there are no frames to prepare.
    assert result.phases.keys() == {"compute", "postprocess", "end_to_end"}
    whole = np.array(result.phases["end_to_end"].samples)
    parts = np.array(result.phases["compute"].samples)
    assert (parts < whole).all() and "array in, answer out" in result.phases["end_to_end"].what
    # Clock and loop without the network: more than nothing, much less than a call with it.
    assert result.overhead_us is not None
    assert 0.05 < result.overhead_us < 0.5 * 1000 * np.median(parts)


@pytest.mark.parametrize(
    ("plan", "engine", "batch", "samples", "what"),
    [
        (BenchPlan(iterations=7, warmup=0), "int8", 1, 7, "one call"),
        (BenchPlan("multistream", 0, 5, streams=6), "int8", 6, 5, "6 images in 1 call"),
        (BenchPlan("multistream", 0, 5, streams=6), "fixed", 8, 5, "8 images in 2 call"),
        (BenchPlan("offline", 0, 4), "int8", 32, 4, "2 in flight"),
        (BenchPlan("offline", 0, 4, batch=3), "int8", 3, 4, "2 in flight"),
        (BenchPlan(iterations=3), "fixed", 4, 3, "one call"),
    ],
)
def test_scenarios(
    engines: dict[str, Path], plan: BenchPlan, engine: str, batch: int, samples: int, what: str
) -> None:
    (result,) = benchmark_all([engines[engine]], plan=plan, threads=1)
    assert result.scenario == plan.scenario and what in result.latency_ms.what
    assert (result.latency_ms.batch, result.latency_ms.iterations) == (batch, samples)
    total = sum(result.latency_ms.samples) / 1000
    if plan.scenario == "offline":  # two at a time: less than one after the other
        assert result.throughput_images_per_s >= 0.99 * batch * samples / total
    else:
        assert math.isclose(result.throughput_images_per_s, batch * samples / total)


def test_a_duration_is_a_minimum() -> None:
    now = [0]

    def clock() -> int:
        return now[0]

    def call() -> None:
        now[0] += 10_000_000  # 10 ms

    assert len(measure(call, 3, clock, duration=0.1)) == 10
    assert len(measure(call, 30, clock, duration=0.1)) == 30
    assert measure(call, 1, clock) == (10.0,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup": -1}, "found `warmup` -1; needed 0 or more"),
        ({"iterations": 0}, "found `iterations` 0; needed 1 or more"),
        ({"batch": 0}, "found `batch` 0; needed 1 or more"),
        ({"streams": 0}, "found `streams` 0; needed 1 or more"),
        ({"duration": -1.0}, "found `duration` -1.0; needed seconds, 0 or more"),
        ({"duration": math.inf}, "found `duration` inf; needed seconds, 0 or more"),
        ({"percentiles": (101.0,)}, "found a percentile of 101; needed 0 to 100"),
    ],
)
def test_plans_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        BenchPlan(**wrong)


def test_the_old_name_of_a_plan_works_and_warns() -> None:
    from hdrq_deploy.runtime import bench

    with pytest.warns(DeprecationWarning, match="bench.Plan is now BenchPlan"):
        assert bench.Plan is BenchPlan


def test_a_batch_the_engine_does_not_take(engines: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="found `batch` 3; the engine takes 4 only"):
        benchmark(engines["fixed"], batch=3)
    assert command.main([]) == 2
    assert command.main([str(engines["int8"]), "--device", "cuda"]) == 2


def test_the_interval_is_students() -> None:
    rng = np.random.default_rng(0)
    theirs = 10 * np.exp(0.05 * rng.standard_normal(10))
    ours = 5 * np.exp(0.05 * rng.standard_normal(10))
    found = speedup(list(ours), list(theirs), "base")
    logs = np.log(theirs / ours)
    low, high = stats.t.interval(0.95, 9, logs.mean(), stats.sem(logs))
    assert found.low == pytest.approx(np.exp(low), rel=1e-3)
    assert found.high == pytest.approx(np.exp(high), rel=1e-3)
    assert found.verdict == "faster"
    assert speedup(list(theirs), list(ours), "base").verdict == "slower"
    # The same distribution: about 5% of the intervals miss 1.
    missed = sum(
        speedup(list(a), list(b), "x").verdict != "no difference shown"
        for a, b in np.exp(0.05 * rng.standard_normal((400, 2, 10)))
    )
    assert missed < 40
    assert found.against == "base" and found.ratio == pytest.approx(np.exp(logs.mean()))


class Answers(Engine):
    """An engine that says what it was told to say."""

    def __init__(self, engine: Engine, outputs: Any) -> None:
        super().__init__(engine.path, engine.manifest, 1, "cpu")
        self._rows = {row.tobytes(): out for row, out in zip(*outputs, strict=True)}

    def _execute(self, feeds: Any) -> dict[str, Any]:
        (x,) = feeds.values()
        return {self.outputs[0].name: np.stack([self._rows[row.tobytes()] for row in x])}

    def _release(self) -> None:
        self._rows.clear()


def test_shares_of_a_classifier(engines: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((150, 3, 16, 16), dtype=np.float32)
    scores = rng.standard_normal((150, 8)).astype(np.float32)
    labels = rng.integers(0, 7, 150)  # class 7 never occurs
    other = scores + 0.3 * rng.standard_normal(scores.shape).astype(np.float32)
    with load_engine(engines["int8"]) as engine:
        sets = {"d": ImageSet(x, labels, None, None)}
        found = accuracy(
            Answers(engine, (x, scores)),
            sets,
            Answers(engine, (x, other)),
        )
    best = scores.argmax(1)
    assert found.metric == "top1" and found.domains["d"] == pytest.approx((best == labels).mean())
    ranks = (scores > scores[np.arange(150), labels][:, None]).sum(1)
    assert found.top5 == {"d": pytest.approx((ranks < 5).mean())}
    for c in range(7):
        share = (best[labels == c] == c).mean()
        assert found.per_class["d"][str(c)] == pytest.approx(share)
    assert found.per_class["d"]["7"] is None
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (shares.max(1) > low) & (shares.max(1) <= low + 1 / 15)
        if inside.any():
            gap = (best == labels)[inside].mean() - shares.max(1)[inside].mean()
            error += inside.mean() * abs(gap)
    assert found.calibration_error == {"d": pytest.approx(error, abs=1e-6)}
    assert found.decision_flips == {"d": pytest.approx((other.argmax(1) != best).mean())}


@pytest.mark.parametrize("smaller", [False, True])
def test_mean_intersection_over_union(engines: dict[str, Path], smaller: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.random((5, 3, 16, 16), dtype=np.float32)
    side = 8 if smaller else 16
    scores = rng.standard_normal((5, 4, side, side)).astype(np.float32)
    labels = rng.integers(0, 3, (5, 16, 16))
    labels[0, :3] = IGNORE
    with load_engine(engines["int8"]) as engine:
        fake = Answers(engine, (x, scores))
        found = accuracy(fake, {"d": ImageSet(x, labels, None, None)})
        with pytest.raises(DataError, match="labels 0 to 9; the model has 4 classes .and 255"):
            accuracy(fake, {"d": ImageSet(x, np.where(labels == 2, 9, labels), None, None)})
        with pytest.raises(DataError, match="found outputs of shape"):
            accuracy(fake, {"d": ImageSet(x, labels[:, 0, 0], None, None)})
    if smaller:
        import torch

        scores = torch.nn.functional.interpolate(
            torch.from_numpy(scores), (16, 16), mode="bilinear", align_corners=False
        ).numpy()
    best, known = scores.argmax(1), labels != IGNORE
    expected = []
    for c in range(4):
        both = ((best == c) & (labels == c) & known).sum()
        either = (((best == c) | (labels == c)) & known).sum()
        expected.append(both / either)
    assert found.metric == "miou" and found.domains["d"] == pytest.approx(np.mean(expected))
    assert list(found.per_class["d"].values()) == pytest.approx(expected)
    assert found.pixel_accuracy == {"d": pytest.approx((best == labels)[known].mean())}
    assert found.top5 is None and found.calibration_error is None


def test_confusion_counts_by_hand() -> None:
    labels, found = np.array([0, 0, 1, 2, IGNORE]), np.array([0, 1, 1, 0, 2])
    counts = [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal(confusion(labels[None, None], found[None, None], 3), counts)
    # What no class has is found, and never right.
    np.testing.assert_array_equal(confusion(labels[:1], np.array([9]), 3)[0], [0, 0, 0, 1])
    # Images may well be of class 255.
    many = confusion(np.array([255, 255]), np.array([255, 7]), 300)
    assert many[255, 255] == 1 and many[255, 7] == 1


def test_queries_of_several_calls_are_compared_by_image(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 images in one call, and in two calls of 4: the same time a query is the same speed."""
    plan = BenchPlan("multistream", 0, 20, streams=8)
    monkeypatch.setattr(
        "hdrq_deploy.runtime.bench.measurement.measure",
        lambda call, times, **_: (8.0,) * max(times, 1),
    )
    first, second = benchmark_all([engines["int8"], engines["fixed"]], plan=plan, threads=1)
    assert first.latency_ms.batch == second.latency_ms.batch == 8
    assert second.speedup is not None and second.speedup.ratio == pytest.approx(1)


CPU = "sys/devices/system/cpu/cpu0/"
QUIET = {
    f"{CPU}cpufreq/scaling_cur_freq": "1500000",
    f"{CPU}cpufreq/scaling_governor": "performance",
    f"{CPU}thermal_throttle/core_throttle_count": "5",
    "sys/class/thermal/thermal_zone0/temp": "61500",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "3",
    "sys/class/thermal/cooling_device1/type": "cpufreq-cpu0",
    "sys/class/thermal/cooling_device1/cur_state": "0",
    "proc/stat": "cpu  100 0 50 1000 0 0 0 0 0 0\ncpu0 1 1 1 1",
    "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
}


def test_a_recorded_board(tmp_path: Path, tree: Any) -> None:
    root = tree(tmp_path, QUIET)
    reading = read(root)
    assert (reading.clock_mhz, reading.temperature_c) == (1500, 61.5)
    assert (reading.throttled, reading.cooling, reading.busy_s) == (5, 0, 1.5)
    facts = environment(root)
    assert facts["governor"] == "performance" and facts["power_mode"] == "pmode:0002 fmode:quiet"
    empty = read(tmp_path / "nothing")
    assert empty.clock_mhz is None and empty.throttled is None and empty.busy_s is None


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        ({}, None),
        ({f"{CPU}cpufreq/scaling_cur_freq": "1200000"}, "clock change: 1500 and 1200 MHz"),
        ({f"{CPU}cpufreq/scaling_cur_freq": "1450000"}, None),
        ({f"{CPU}thermal_throttle/core_throttle_count": "9"}, "throttling: 4 event"),
        ({"sys/class/thermal/cooling_device1/cur_state": "2"}, "cooling step 2"),
        ({"sys/class/thermal/cooling_device0/cur_state": "9"}, None),  # a fan
        ({"proc/stat": "cpu  900 0 50 1000 0 0 0 0 0 0"}, "other processes used"),
        ({"proc/stat": "cpu  100 0 50 1000 0 0 0 300 0 0"}, "hypervisor took"),
    ],
)
def test_what_disturbs_a_run_is_marked(
    tmp_path: Path,
    tree: Any,
    change: dict[str, str],
    mark: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tree(tmp_path, QUIET)
    times = iter((0.0, 1.0))
    monkeypatch.setattr("hdrq_deploy.runtime.bench.environment.time.monotonic", lambda: next(times))
    monkeypatch.setattr("hdrq_deploy.runtime.bench.environment.time.process_time", lambda: 0.0)
    watch = Watch(root)
    with watch:
        tree(root, change)
    marks = watch.marks()
    assert (mark is None and marks == []) or (mark is not None and mark in marks[0]), marks


class Gpu:
    """NVML of a GPU that gets hot."""

    NVML_CLOCK_SM = 1
    NVMLError = RuntimeError

    def __init__(self) -> None:
        self.clock, self.reasons = 1980, 0

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return self.clock

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self.reasons


def test_a_gpu_that_slows_down_is_marked(tmp_path: Path, tree: Any) -> None:
    gpu = Gpu()
    watch = Watch(tree(tmp_path, QUIET), gpu)
    with watch:
        gpu.clock, gpu.reasons = 1200, 0x40 | 0x01  # 1: idle, which is no throttling
    assert watch.marks() == [
        "GPU clock change: 1980 and 1200 MHz",
        "GPU throttling: hardware thermal slowdown",
    ]
    assert watch.facts()["gpu_clock_mhz"] == [1980, 1200]


def test_strict_refuses_a_disturbed_run(
    engines: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "o.json"
    flags = [str(engines["int8"]), "--iterations", "5", "--json", str(out)]
    monkeypatch.setattr(Watch, "marks", lambda self: ["thermal throttling: 4 event(s)"])
    assert command.main([*flags, "--strict"]) == 3
    assert "int8: thermal throttling" in capsys.readouterr().err and not out.exists()
    assert command.main(flags) == 0
    assert json.loads(out.read_text())["marks"] == ["thermal throttling: 4 event(s)"]
    assert "doubtful" in capsys.readouterr().out
    monkeypatch.setattr(Watch, "marks", lambda self: [])
    assert command.main([*flags, "--strict"]) == 0


def test_a_broken_engine_stops_before_any_timing(engines: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no manifest.json"):
        benchmark_all([engines["int8"], tmp_path])
