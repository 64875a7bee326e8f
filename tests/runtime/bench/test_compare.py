"""Verdicts on two benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.cli import compare as command
from hdrq_deploy.errors import DataError
from hdrq_deploy.runtime.bench import Accuracy, BenchResult, Latency
from hdrq_deploy.runtime.bench.compare import compare


def result(samples: Any, accuracy: float = 0.9, images: int = 500, size: int = 1000) -> BenchResult:
    values = np.asarray(samples, float)
    return BenchResult(
        created="2026-01-01T00:00:00+00:00",
        engine="ort",
        path="engine",
        model="m",
        method="hdrq",
        domains={"night": 1.0},
        wbits=8,
        abits=8,
        size_bytes=size,
        precision="1/1 Conv INT8",
        accuracy=Accuracy(
            domains={"night": accuracy}, harmonic_mean=accuracy, images={"night": images}
        ),
        latency_ms=Latency(
            p50=float(np.median(values)),
            p90=float(np.percentile(values, 90)),
            p99=float(np.percentile(values, 99)),
            mean=float(values.mean()),
            batch=1,
            warmup=1,
            iterations=len(values),
            samples=tuple(values),
        ),
        throughput_images_per_s=1.0,
        threads=1,
        cpu_per_wall=1.0,
        environment={},
    )


def noise(seed: int, factor: float = 1.0, count: int = 400) -> Any:
    """Latencies with slow stretches: neighbours resemble each other."""
    rng = np.random.default_rng(seed)
    slow = np.repeat(rng.random(count // 20) < 0.1, 20)
    return factor * (5 + 0.2 * rng.standard_normal(count) + 2 * slow)


def verdicts(base: BenchResult, new: BenchResult, **options: Any) -> dict[str, str]:
    return {c.metric: c.verdict for c in compare(base, new, **options)}


def test_a_clear_change_is_seen_and_noise_is_not() -> None:
    base = result(noise(0))
    slower = compare(base, result(noise(1, 1.2)))
    by_metric = {change.metric: change for change in slower}
    p50 = by_metric["latency_ms p50"]
    assert p50.verdict == "worse" and p50.regression and 0.15 < p50.low < p50.high < 0.25
    assert by_metric["accuracy night"].verdict == "no difference shown"
    assert verdicts(base, result(noise(1, 0.8)))["latency_ms p50"] == "better"


def test_equal_runs_are_told_apart_no_more_often_than_the_confidence_says() -> None:
    wrong = sum(
        verdicts(result(noise(2 * i)), result(noise(2 * i + 1)), resamples=300)["latency_ms p50"]
        != "no difference shown"
        for i in range(60)
    )
    assert wrong <= 9  # 5% of 60 are 3; the bootstrap is a little narrow


def test_accuracy_needs_images_to_differ() -> None:
    few = verdicts(result(noise(0), 0.9, 50), result(noise(0), 0.86, 50))
    many = verdicts(result(noise(0), 0.9, 5000), result(noise(0), 0.86, 5000))
    assert few["accuracy night"] == "no difference shown" and many["accuracy night"] == "worse"
    with pytest.raises(DataError, match="0 to 1"):
        compare(result(noise(0)), result(noise(0)), confidence=2)


def test_the_command_exits_with_3_on_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {}
    for name, run in {
        "base": result(noise(0)),
        "same": result(noise(1)),
        "slow": result(noise(2, 1.3), size=1500),
    }.items():
        paths[name] = str(tmp_path / f"{name}.json")
        Path(paths[name]).write_text(run.model_dump_json())
    out = tmp_path / "out.json"
    assert command.main([paths["base"], paths["same"]]) == 0
    assert command.main([paths["base"], paths["slow"], "--json", str(out)]) == 3
    assert "metrics worse than the tolerance" in capsys.readouterr().err
    record = json.loads(out.read_text())
    assert [c["regression"] for c in record["changes"]].count(True) >= 3
    assert command.main([paths["base"], paths["slow"], "--tolerance", "0.9"]) == 0
    Path(paths["base"]).write_text("{}")
    assert command.main([paths["base"], paths["slow"]]) == 2
    assert command.main([str(tmp_path / "none.json"), paths["slow"]]) == 2
