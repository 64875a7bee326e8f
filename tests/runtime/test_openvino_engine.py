"""Engines on OpenVINO as an application uses them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import merge
from hdrq_deploy.cli import bench as bench_command
from hdrq_deploy.errors import EngineError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.formats.bench_result import BenchResult
from hdrq_deploy.mixing import DomainMixer
from hdrq_deploy.runtime import load_engine

pytest.importorskip("openvino")


@pytest.fixture
def folder(make: Any, tmp_path: Path) -> Path:
    return export(make("Tiny", wbits=8), tmp_path / "engine", "openvino")


def test_calls_side_by_side_and_in_the_background(folder: Path, inputs: Any) -> None:
    with load_engine(folder, threads=1) as engine:
        expected = [engine(inputs[i : i + 1]) for i in range(4)]
        assert engine.device == "cpu" and expected[0].shape == (1, 4)
        x = inputs[:1].copy()
        pending = engine.run_async(x)
        x[:] = 0  # a camera's buffer is filled again
        np.testing.assert_array_equal(pending.wait(60), expected[0])
        np.testing.assert_array_equal(pending.wait(), expected[0])
        wrong: list[int] = []

        def call(i: int) -> None:
            for _ in range(20):
                if not np.array_equal(engine(inputs[i : i + 1]), expected[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong == []
        read_only = inputs[:1].copy()
        read_only.flags.writeable = False
        np.testing.assert_array_equal(engine(read_only), expected[0])
        last = engine.run_async(inputs[:1])
    np.testing.assert_array_equal(last.wait(60), expected[0])
    with pytest.raises(EngineError, match="closed"):
        engine(inputs)
    with pytest.raises(EngineError, match="closed"):
        engine.run_async(inputs)


def test_what_does_not_fit_is_an_error_of_one_line(folder: Path, inputs: Any) -> None:
    with pytest.raises(EngineError, match="found device 'cuda' for an OpenVINO engine"):
        load_engine(folder, "cuda")
    with load_engine(folder) as engine, pytest.raises(EngineError, match="found NaN"):
        engine.run_async(inputs * np.nan)
    graph = folder / "model.onnx"
    good = graph.read_bytes()
    graph.write_bytes(good[: len(good) // 2])
    with pytest.raises(EngineError, match="altered"):
        load_engine(folder)


def test_frames_to_labels(make: Any, inputs: Any, tmp_path: Path) -> None:
    options = GraphOptions(postprocess="argmax", batch=2)
    path = export(make("Net", wbits=8), tmp_path / "net", "openvino", options=options)
    with load_engine(path, threads=1) as engine:
        labels = engine(inputs[:2])
        assert labels.dtype == np.int64 and labels.shape == (2, 16, 16)
        assert engine.all_rows(inputs[:3]).shape == (3, 16, 16)


def test_what_is_compiled_is_kept_only_where_it_is_asked_for(
    make: Any, folder: Path, inputs: Any, tmp_path: Path
) -> None:
    before = sorted(file.name for file in folder.iterdir())
    with load_engine(folder, threads=1) as engine:
        expected = engine(inputs[:1])
    assert sorted(file.name for file in folder.iterdir()) == before
    for place in (tmp_path / "cache", folder / "cache"):
        for _ in range(2):
            with load_engine(folder, threads=1, cache=place) as engine:
                np.testing.assert_array_equal(engine(inputs[:1]), expected)
        assert list(place.glob("*.blob"))
    # A folder with a cache of its own is an engine still, and may be replaced.
    export(make("Tiny", wbits=8), folder, "openvino", force=True)
    assert sorted(file.name for file in folder.iterdir()) == before
    with pytest.raises(EngineError, match="found `cache` for an engine of the kind 'ort'"):
        load_engine(export(make(), tmp_path / "ort"), cache=tmp_path / "cache")


@pytest.mark.parametrize("scenario", ["singlestream", "multistream", "offline"])
def test_the_benchmark_measures_it(
    folder: Path, tmp_path: Path, scenario: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    flags = ["--scenario", scenario, "--iterations", "6", "--warmup", "2", "--threads", "1"]
    cache = ["--cache", str(tmp_path / "cache")]
    assert bench_command.main([str(folder), *flags, *cache, "--json", str(out)]) == 0
    capsys.readouterr()
    result = BenchResult.model_validate_json(out.read_text())
    assert result.engine == "openvino" and result.threads == 1
    assert result.environment["openvino"] and "INT8" in result.precision
    assert result.throughput_images_per_s > 0
    if scenario == "offline":
        assert "in flight" in result.latency_ms.what


def test_a_mixer_runs_it(make: Any, inputs: Any, tmp_path: Path) -> None:
    parents = [make(domain=name, fold="steps") for name in ("night", "day")]
    with DomainMixer(parents, "openvino", threads=1) as mixer:
        for weights in ((0.5, 0.5), (0.7, 0.3)):
            mixer.set(dict(zip(("night", "day"), weights, strict=True))).result(60)
            merged = merge(parents, tmp_path / "m.hdrq", weights, "nearest", method="mean")
            path = export(merged, tmp_path / "e", "openvino", force=True)
            with load_engine(path, threads=1) as engine:
                np.testing.assert_array_equal(mixer(inputs[:4]), engine(inputs[:4]))
