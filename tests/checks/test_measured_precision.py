"""`--measure`: INT8 is kept where it pays, and what it makes slower is left in float."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hdrq_deploy.checks import export_fastest, export_measured, measured_precision, verify
from hdrq_deploy.checks.measured_precision import Stopwatch
from hdrq_deploy.cli import export as export_command
from hdrq_deploy.errors import CheckFailed
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.formats.engine_folder import PrecisionReport, read_manifest
from hdrq_deploy.runtime.bench.layer_times import layer_times, owners

LAYERS = ("stem", "conv1", "conv2", "fc")


def floats(folder: Path) -> tuple[str, ...]:
    rows = PrecisionReport.read(folder).layers
    return tuple(row.module for row in rows if row.executed == "float32")


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_manifest(folder).build["left_in_float"]
    return found


def clock(
    engines: Mapping[tuple[str, ...], float],
    layers: Mapping[str, tuple[float, float]],
    spread: float = 0.0,
) -> Stopwatch:
    """Engines take so many ms by the layers that they have in float, layers so in INT8 and float.

    Rounds are ``spread`` longer and shorter in turn, those of the INT8 engine the other way round.
    """

    def rounds(paths: Mapping[str, Path]) -> dict[str, Sequence[float]]:
        found = {}
        for name, path in paths.items():
            sign = -1 if floats(path) == () else 1
            ms = engines.get(floats(path), 9.0)
            found[name] = [ms * (1 + sign * spread * (-1) ** i) for i in range(10)]
        return found

    def times(path: Path) -> dict[str, float]:
        kept = floats(path)
        rows = PrecisionReport.read(path).layers
        return {r.node: layers[r.module][r.module in kept] for r in rows if r.module in layers}

    return Stopwatch(rounds, times)


def measured(
    bundle: Any, out: Path, watch: Stopwatch, engine: str = "ort", **more: Any
) -> tuple[str, dict[str, Any]]:
    """What was said, and the figures of the manifest."""
    said: list[str] = []
    export_measured(bundle, out, engine, threads=1, say=said.append, stopwatch=watch, **more)
    (line,) = said
    assert "\n" not in line
    return line, figures(out)


SLOW_STEM = {"stem": (3.0, 1.0), "conv1": (1.0, 2.0), "conv2": (1.0, 2.0), "fc": (1.0, 1.0)}
NOTHING_SLOW = dict.fromkeys(LAYERS, (1.0, 2.0))


def test_int8_is_kept_where_it_is_faster(make: Any, tmp_path: Path) -> None:
    bundle, out = make("Tiny", wbits=8), tmp_path / "engine"
    line, record = measured(bundle, out, clock({(): 1.0, LAYERS: 2.5}, NOTHING_SLOW))
    assert line.startswith(
        f"{out}: kept in INT8 because it takes 1 ms against 2.5 ms of its float twin (2.5 times"
    )
    assert line.endswith("no layer was found to take longer in INT8")
    assert record["modules"] == [] and record["tried"] == {} and floats(out) == ()
    assert record["median_ms"] == {"int8": 1.0, "float": 2.5} and record["guard"] == 1.02
    assert record["layers_ms"]["stem"] == {"int8": 1.0, "float": 2.0}
    # It is the engine of a plain export, and was measured of the same.
    assert measured(bundle, out, clock({}, {}))[0] == f"{out}: up to date"
    said: list[str] = []
    export(bundle, out, say=said.append)
    assert said == [f"{out}: up to date"]


def test_a_layer_that_int8_makes_slower_is_left_in_float(make: Any, tmp_path: Path) -> None:
    bundle, out = make("Tiny", wbits=8), tmp_path / "engine"
    times = {(): 2.0, ("stem",): 1.6, LAYERS: 3.0}
    line, record = measured(bundle, out, clock(times, SLOW_STEM))
    why = "so the engine is 1.25 times as fast (1.6 ms against 2 ms in INT8)"
    assert line == f"{out}: left in float: stem because {why}"
    assert record["modules"] == ["stem"] == list(floats(out))
    assert record["tried"] == {"layers slower in INT8": ["stem"]}
    report = {row.module: row for row in PrecisionReport.read(out).layers}
    assert report["stem"].requested == "float32"
    assert report["stem"].reason == f"left in float: {why}"
    assert all(row.requested == "int8" for name, row in report.items() if name != "stem")
    # The graph in float is what was asked for: checked as such, and built so by name.
    verify(bundle.path, out, torch=False).check()
    assert read_manifest(out).options["graph"]["keep_float"] == ["stem"]
    assert measured(bundle, out, clock({}, {}))[0] == f"{out}: up to date"
    # With other threads it is another question, and --force asks again.
    kept = clock({(): 1.0, LAYERS: 2.5}, NOTHING_SLOW)
    assert "kept in INT8" in measured(bundle, out, kept, force=True)[0]
    assert floats(out) == ()


@pytest.mark.parametrize(
    ("ms", "spread", "told"),
    [
        (1 / 1.03, 0.0, "left in float: all 4 layers because so the engine is 1.03 times as fast"),
        (1 / 1.015, 0.0, "with all layers in float it would be 1.01 times as fast, and more than"),
        (1 / 1.03, 0.2, "with all layers in float it would be 1.03 times as fast (0.7"),
    ],
    ids=["beyond the guard", "within the guard", "by chance"],
)
def test_the_guard(make: Any, tmp_path: Path, ms: float, spread: float, told: str) -> None:
    out = tmp_path / "engine"
    watch = clock({(): 1.0, LAYERS: ms}, dict.fromkeys(LAYERS, (1.0, 0.9)), spread)
    line, record = measured(make("Tiny", wbits=8), out, watch)
    assert told in line
    left = told.startswith("left")
    assert list(floats(out)) == record["modules"] == (list(LAYERS) if left else [])


def test_the_whole_engine_decides_and_not_the_layers(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    line, record = measured(
        make("Tiny", wbits=8), out, clock({(): 1.0, ("stem",): 0.99, LAYERS: 2.0}, SLOW_STEM)
    )
    assert "kept in INT8" in line and floats(out) == ()
    assert "with 1 layers slower in INT8 in float it would be 1.01 times as fast" in line
    assert record["times_as_fast"]["layers slower in INT8"][0] == pytest.approx(1 / 0.99)


def test_sets_that_are_tried() -> None:
    modules = ("a", "b", "c", "d", "e")
    in_int8 = {"a": 5.0, "b": 1.0, "c": 2.0, "d": 1.0, "e": 1.5}
    in_float = {"a": 1.0, "b": 1.5, "c": 1.0, "d": 9.0, "e": 1.0}
    assert measured_precision._candidates(in_int8, in_float, modules) == {
        "layers slower in INT8": ["a", "c", "e"],
        "half of these layers": ["a", "c"],
        "neighbouring layers": ["a", "b", "c"],
    }
    # An engine that tells of no layer leaves the twin alone to be tried.
    assert measured_precision._candidates({}, {}, modules) == {}
    rng = np.random.default_rng(0)
    for _ in range(20):  # against all runs
        gain = dict(zip("abcdefgh", rng.normal(size=8), strict=True))
        names = list(gain)
        runs = [names[i:j] for i in range(9) for j in range(i, 9)]
        best = max(runs, key=lambda run: sum(gain[n] for n in run))
        assert measured_precision._best_run(names, gain) == best


def test_a_set_that_the_engine_refuses_is_left_out(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Path] = export

    def refuse(*args: Any, options: GraphOptions, **more: Any) -> Path:
        if options.keep_float == ("stem",):
            raise CheckFailed("found a layer that lost its kernel")
        return real(*args, options=options, **more)

    monkeypatch.setattr(measured_precision, "export", refuse)
    out = tmp_path / "engine"
    watch = clock({(): 2.0, ("stem",): 1.0, LAYERS: 1.5}, SLOW_STEM)
    line, record = measured(make("Tiny", wbits=8), out, watch)
    assert "left in float: all 4 layers" in line
    assert record["refused"] == {"layers slower in INT8": "found a layer that lost its kernel"}


def test_what_the_user_keeps_in_float_is_no_question(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    options = GraphOptions(keep_float=("fc",))
    times = {("fc",): 2.0, ("stem", "fc"): 1.0}
    _, record = measured(make("Tiny", wbits=8), out, clock(times, SLOW_STEM), options=options)
    assert record["modules"] == ["stem"] and floats(out) == ("stem", "fc")
    reasons = {row.module: row.reason for row in PrecisionReport.read(out).layers}
    assert reasons["fc"] == "kept in float by --keep-float"


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_with_the_clock_of_this_machine(make: Any, tmp_path: Path, engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    bundle, out = make("Tiny", wbits=8), tmp_path / "engine"
    said: list[str] = []
    export_measured(bundle, out, engine, threads=1, say=said.append)
    record = figures(out)
    assert record["verdict"] in said[-1] and list(floats(out)) == record["modules"]
    left = record["verdict"].startswith("left in float")
    assert bool(record["modules"]) == left
    ratio, low, _ = max(record["times_as_fast"].values())
    assert left == (ratio > 1.02 and low > 1)
    assert set(record["median_ms"]) >= {"int8", "float"} and min(record["median_ms"].values()) > 0
    assert set(record["layers_ms"]) == set(LAYERS)
    verify(bundle.path, out, torch=False).check()


@pytest.mark.parametrize("keep_float", [(), LAYERS], ids=["int8", "float"])
@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_every_kernel_is_counted_for_the_layer_that_its_values_come_from(
    make: Any, tmp_path: Path, engine: str, keep_float: tuple[str, ...]
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    options = GraphOptions(keep_float=keep_float)
    folder = export(make("Tiny", wbits=8), tmp_path / "engine", engine=engine, options=options)
    graph = onnx.load(str(folder / "model.onnx")).graph
    layers = [row.node for row in PrecisionReport.read(folder).layers]
    known = owners(graph, layers)
    # By reaching back from each node, which is another way to find the last layer.
    makers = {name: node for node in graph.node for name in node.output}
    order = {node.name: i for i, node in enumerate(graph.node)}
    for node in graph.node:
        waiting, seen = [node], {node.name}
        while waiting:
            for name in waiting.pop().input:
                if name in makers and makers[name].name not in seen:
                    seen.add(makers[name].name)
                    waiting.append(makers[name])
        behind = max(seen & set(layers), key=order.__getitem__, default=None)
        assert behind is None or known[node.name] == behind
    times = layer_times(folder, np.zeros((1, 3, 16, 16), np.float32), 1, calls=30)
    # Of a layer this small OpenVINO may tell 0: it counts in whole µs.
    assert set(times) == set(layers) and all(0 <= ms < 1000 for ms in times.values())
    assert engine == "openvino" or min(times.values()) > 0


def test_names_of_kernels() -> None:
    known = {"relu": "a", "relu_1": "b", "conv1/Conv": "c", "QuantizeLinear/1": "d"}
    from hdrq_deploy.runtime.bench.layer_times import _by_layer

    kernels = [
        (["Transpose"], 1.0),  # before anything is known: the first layer's
        (["relu_nchwc"], 2.0),
        (["Reorder_token_3"], 4.0),  # put in behind it
        (["relu_1_nchwc"], 8.0),
        (["fused conv1/Conv"], 16.0),
        (["QuantizeLinear/19_abcd"], 32.0),  # 19 is not 1
        (["QuantizeLinear/1/range"], 64.0),
        (["Multiply_7", "relu/div", "relu_1"], 128.0),  # its own name is not of the graph
    ]
    assert _by_layer(kernels, known) == {"a": 135.0, "b": 8.0, "c": 48.0, "d": 64.0}
    # A layer whose kernel is too short for the runtime's clock is a layer.
    assert _by_layer([(["relu"], 1.0), (["conv1/Conv"], 0.0)], known) == {"a": 1.0, "c": 0.0}


def test_what_cannot_be_measured_is_refused_in_one_line(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdrq_deploy.checks.chosen_engine.has_driver", lambda: False)
    out = tmp_path / "engine"
    quantized, real = make("Tiny", wbits=8), make("Tiny", method="float")
    for bundle, flags, message in (
        (quantized, ["--engine", "onnx"], "the portable graph is for no runtime of its own"),
        (quantized, ["--engine", "trt-rtx"], "this machine has no NVIDIA driver"),
        (quantized, ["--no-build"], "found --measure and --no-build"),
        (quantized, ["--threads", "-1"], "found --threads -1"),
        (real, [], "found no layer that is asked for in INT8"),
        (quantized, ["--keep-float", "*"], "found no layer that is asked for in INT8"),
    ):
        assert export_command.main([str(bundle.path), "--measure", *flags, "-o", str(out)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and not out.exists()


def test_auto_measures_each_engine(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    watch = clock({(): 2.0, ("stem",): 1.0}, SLOW_STEM)
    monkeypatch.setattr(Stopwatch, "of", classmethod(lambda *_: watch))
    said: list[str] = []
    out = tmp_path / "engine"
    export_fastest(make("Tiny", wbits=8), out, threads=1, say=said.append, measure=True)
    assert floats(out) == ("stem",) and figures(out)["modules"] == ["stem"]
    assert any(line.startswith("ort: left in float: stem because") for line in said)
    assert any(line.startswith("openvino: left in float: stem because") for line in said)
    assert set(
        json.loads((out / "manifest.json").read_text())["build"]["measured"]["median_ms"]
    ) == {
        "ort",
        "openvino",
    }
