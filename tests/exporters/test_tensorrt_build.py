"""Lint, builders, engine cache: everything between a lowered graph and a plan."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hdrq_deploy.cli import export as export_command
from hdrq_deploy.errors import CheckFailed, ExportError
from hdrq_deploy.exporters import (
    BuildOptions,
    GraphOptions,
    export,
    parse_shapes,
    precision,
    target_tensorrt,
    tensorrt_build,
)
from hdrq_deploy.exporters import tensorrt_build as trt
from hdrq_deploy.exporters.lint import lint
from hdrq_deploy.exporters.options import profile
from hdrq_deploy.exporters.trtexec import trtexec
from hdrq_deploy.formats.bundle_manifest import Layer

PORTS = {"x": ("batch", 4, 8, 8)}


def convolution(**change: Any) -> onnx.ModelProto:
    """Q, DQ, Conv with dequantized weight; ``change`` replaces initializers by name."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
        "w": rng.integers(-8, 8, (6, 4, 3, 3)).astype(np.int8),
        "w_scale": np.full(6, 0.01, np.float32),
    }
    axis = change.pop("axis", 0)
    arrays |= change
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"], "weight", axis=axis),
        helper.make_node("Conv", ["d", "wd"], ["y"], "conv", pads=[1, 1, 1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6, 8, 8])],
        [
            value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
            for name, value in arrays.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path


def renamed(index: int, name: str) -> onnx.ModelProto:
    model = convolution()
    model.graph.node[index].name = name
    return model


def computed_step() -> onnx.ModelProto:
    model = convolution()
    peak = helper.make_node("ReduceMax", ["x"], ["peak"], "peak_of_x", keepdims=0)
    model.graph.node.insert(0, peak)
    model.graph.node[1].input[1] = model.graph.node[2].input[1] = "peak"
    return model


def four_bit() -> onnx.ModelProto:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 4, 3, 3))
    return convolution(w=helper.make_tensor("w", TensorProto.INT4, codes.shape, codes.ravel()))


def without_zero_point() -> onnx.ModelProto:
    model = convolution()
    model.graph.node[0].input.pop()
    model.graph.node[1].input.pop()
    return model


WRONG: list[tuple[str, Callable[[], onnx.ModelProto], str]] = [
    ("zero point", lambda: convolution(zero=np.array(3, np.int8)), "zero point that is not 0"),
    ("unsigned", lambda: convolution(zero=np.array(0, np.uint8)), "imports it as INT8"),
    ("no zero point", without_zero_point, "no zero point, which means uint8"),
    ("step 0", lambda: convolution(scale=np.array(0, np.float32)), "found a scale of 0"),
    ("negative", lambda: convolution(scale=np.array(-1, np.float32)), "found a scale of -1"),
    ("NaN", lambda: convolution(scale=np.array(np.nan, np.float32)), "found a scale of nan"),
    ("infinite", lambda: convolution(scale=np.array(np.inf, np.float32)), "found a scale of inf"),
    (
        "subnormal",
        lambda: convolution(scale=np.array(1e-40, np.float32)),
        r"found a scale of \S+e-41; needed finite scales of 1.17549e-38",
    ),
    ("length", lambda: convolution(w_scale=np.full(5, 0.1, np.float32)), "5 scales for 6 channels"),
    (
        "axis",
        lambda: convolution(w_scale=np.full(4, 0.1, np.float32), axis=1),
        "in float unless they lie along axis 0",
    ),
    (
        "rank",
        lambda: convolution(w_scale=np.full((6, 1, 1, 1), 0.1, np.float32)),
        "found scales of",
    ),
    ("computed", computed_step, "scale peak that is computed"),
    ("four bits", four_bit, "INT4 weights and quantized activations"),
    ("no name", lambda: renamed(3, ""), "without a name"),
    ("twice", lambda: renamed(3, "weight"), "2 nodes named weight"),
    ("bracket", lambda: renamed(3, "conv[0]"), "in the node name conv"),
    ("clash", lambda: renamed(3, "w"), "a node and a tensor named w"),
]


@pytest.mark.parametrize(("make_model", "text"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_lint_names_what_a_builder_would_crash_on_or_misread(
    tmp_path: Path, make_model: Callable[[], onnx.ModelProto], text: str
) -> None:
    with pytest.raises(ExportError, match=text):
        lint(saved(make_model(), tmp_path))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "without nodes"),
        (b"garbage", "not an ONNX model|without nodes"),
        (None, "no file"),
    ],
)
def test_lint_reads_the_file_itself(tmp_path: Path, data: bytes | None, text: str) -> None:
    path = tmp_path / "model.onnx"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ExportError, match=text):
        lint(path)


def test_lint_misses_no_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        convolution(), str(path), save_as_external_data=True, location="data.bin", size_threshold=64
    )
    lint(path)
    data = tmp_path / "data.bin"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ExportError, match=r"data of w lie in data.bin up to byte 216, found 100"):
        lint(path)
    data.unlink()
    with pytest.raises(ExportError, match="found no file; keep both files together"):
        lint(path)


def test_shapes_are_trtexecs() -> None:
    shapes = parse_shapes(["x:1x3x32x32"], ["x:4x3x64x64"], ["x:8x3x128x128"])
    build = BuildOptions(shapes=shapes)
    assert profile("x", ("batch", 3, "height", "width"), build) == shapes["x"]
    assert profile("x", ("batch", 3, 8, 8), BuildOptions(batches=(1, 2, 4))).largest == (4, 3, 8, 8)
    assert profile("x", (1, 3, 8, 8), BuildOptions()) is None
    with pytest.raises(ExportError, match="the graph takes batchx4x32x32"):
        profile("x", ("batch", 4, 32, 32), build)
    with pytest.raises(ExportError, match="has a free size"):
        profile("x", ("batch", 3, "height", "width"), BuildOptions())
    with pytest.raises(ExportError, match="min <= opt <= max"):
        BuildOptions(shapes=parse_shapes(["x:4x3"], ["x:2x3"], []))
    with pytest.raises(ExportError, match="needed NAME:1x3x224x224"):
        parse_shapes(["x=1x3"], [], [])
    with pytest.raises(ExportError, match="found `opt_level` 9; needed 0 to 5"):
        BuildOptions(opt_level=9)


def test_the_trtexec_command_says_what_the_builder_is_told() -> None:
    build = BuildOptions(
        batches=(1, 4, 8),
        workspace=512,
        opt_level=4,
        timing_cache="t.cache",
        refit=True,
        strip_weights=True,
        hardware_compatibility="ampere+",
        dla_core=1,
    )
    words = shlex.split(trtexec("trt", Path("e/model.onnx"), Path("e/model.plan"), build, PORTS))
    assert words == [
        "trtexec",
        "--onnx=e/model.onnx",
        "--saveEngine=e/model.plan",
        "--stronglyTyped",
        "--profilingVerbosity=detailed",
        "--minShapes=x:1x4x8x8",
        "--optShapes=x:4x4x8x8",
        "--maxShapes=x:8x4x8x8",
        "--memPoolSize=workspace:512M",
        "--builderOptimizationLevel=4",
        "--timingCacheFile=t.cache",
        "--refit",
        "--stripWeights",
        "--hardwareCompatibilityLevel=ampere+",
        "--useDLACore=1",
        "--allowGPUFallback",
    ]


def test_a_second_export_is_left_alone_and_a_stale_one_says_why(make: Any, tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "engine"

    def again(bundle: Any, **options: Any) -> int:
        said.clear()
        export(bundle, folder, "ort", say=said.append, **options)
        return (folder / "model.onnx").stat().st_mtime_ns

    first = again(make())
    assert said == []
    assert again(make()) == first and "up to date" in said[0]
    second = again(make(), options=GraphOptions(exact=False))
    assert second != first and "option graph exact: true, now false" in said[0]
    assert again(make(domain="day"), options=GraphOptions(exact=False)) != second
    assert "the bundle changed" in said[0]
    (folder / "precision.json").write_text("{}")
    assert again(make(domain="day"), options=GraphOptions(exact=False)) and "altered" in said[0]
    there = (folder / "model.onnx").stat().st_mtime_ns
    assert again(make(domain="day"), options=GraphOptions(exact=True), force=True) != there


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


@pytest.mark.usefixtures("rtx")
def test_the_builder_reports_steps_time_and_memory(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    built = trt.build(
        "trt-rtx",
        saved(convolution(), tmp_path),
        tmp_path / "x.plan",
        BuildOptions(),
        PORTS,
        lambda *step: seen.append(step),
    )
    assert built.seconds > 0 and built.peak_bytes > 1 << 20
    assert seen and all(0 <= done <= total for done, total, _ in seen)
    assert "Int8" in built.dump


@pytest.mark.usefixtures("rtx")
def test_what_the_parser_refuses_is_one_line_with_node_and_operator(tmp_path: Path) -> None:
    model = convolution()
    model.graph.node[3].op_type, model.graph.node[3].domain = "Mystery", "example"
    model.opset_import.append(helper.make_opsetid("example", 1))
    with pytest.raises(ExportError, match="refuses the graph: Mystery conv: .*Plugin not found"):
        trt.build("trt-rtx", saved(model, tmp_path), tmp_path / "x.plan", BuildOptions(), PORTS)


@pytest.mark.usefixtures("rtx")
def test_a_crash_of_the_builder_leaves_us_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "lint", lambda path: None)  # which would have refused it
    with pytest.raises(ExportError, match="was killed by SIGSEGV while (parsing|building)"):
        trt.build(
            "trt-rtx", saved(computed_step(), tmp_path), tmp_path / "x.plan", BuildOptions(), PORTS
        )


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("compute", ["fp16", "fp32"])
def test_the_rest_of_the_network_computes_as_asked(make: Any, tmp_path: Path, compute: str) -> None:
    options = GraphOptions(compute=compute)  # type: ignore[arg-type]
    path = export(make("Net"), tmp_path / "rtx", "trt-rtx", options=options)
    report = json.loads((path / "precision.json").read_text())
    executed = {layer["executed"] for layer in report["layers"]}
    assert executed == {"int8", "float16" if compute == "fp16" else "float32"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["inputs"][0]["dtype"] == "float"
    assert manifest["build"]["seconds"] > 0
    assert manifest["options"]["device"].startswith("compute capability 8.0")


def test_a_timing_cache_is_refused_where_it_has_no_effect(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out = tmp_path / "t.cache", tmp_path / "engine"
    arguments = [str(make().path), "--engine", "trt-rtx", "--timing-cache", str(cache)]
    assert export_command.main([*arguments, "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert "found --timing-cache; TensorRT-RTX times nothing" in error and error.count("\n") == 1
    assert "--runtime-cache of hdrq-bench" in error
    assert not out.exists() and not cache.exists()


def test_refit_on_a_version_that_loses_biases_needs_the_golden_check(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is built, and cannot be run: on 11.3 it is refused, and on 11.4 taken."""
    version, driver = ["11.3.0.1"], [False]
    monkeypatch.setattr(tensorrt_build, "library_version", lambda engine: version[0])
    monkeypatch.setattr(target_tensorrt, "has_driver", lambda: driver[0])
    monkeypatch.setattr(target_tensorrt, "run_apart", lambda *_: (None, "the GPU is busy"))
    built: list[str] = []

    def realize(self: Any, folder: Path, model: Any, layers: Any, *_: Any) -> Any:
        built.append(version[0])
        (folder / "model.plan").write_bytes(b"plan")
        return precision.requested_only("trt", layers), {}

    monkeypatch.setattr(target_tensorrt.TensorRtTarget, "realize", realize)
    refit = BuildOptions(refit=True)
    message = r"found `refit` and TensorRT 11.3.0.1, .*there is none \({}\): build on the device"
    with pytest.raises(ExportError, match=message.format("this machine has no NVIDIA driver")):
        export(make(), tmp_path / "e", "trt", build=refit)
    assert built == []  # before long work
    driver[0] = True
    with pytest.raises(ExportError, match=message.format("the GPU is busy")):
        export(make(), tmp_path / "e", "trt", build=refit)
    assert built == ["11.3.0.1"] and not (tmp_path / "e").exists()
    export(make(), tmp_path / "plain", "trt")
    version[0] = "11.4.0"
    export(make(), tmp_path / "e", "trt", build=refit)
    assert built == ["11.3.0.1", "11.3.0.1", "11.4.0"]


@pytest.mark.parametrize("kind", ["LayerType", "Layer Type", "layer_type", "Type"])
@pytest.mark.parametrize("types", ["Datatype", "DataType", "Data Type", "Format/Datatype"])
def test_the_inspectors_keys_are_read_however_they_are_spelled(kind: str, types: str) -> None:
    layer = Layer(
        node="a/Conv",
        op="Conv",
        module="a",
        weight="a.weight_codes",
        weight_bits=8,
        activation_bits=(8,),
        requested="int8",
    )
    entry = {
        kind: "correlation",
        "Name": "c_myl0_1",
        "Metadata": "[ONNX Layer: a/Conv]",
        "Inputs": [{types: "Int8"}],
        "Constants": [{types: "Int8"}],
    }
    report = precision.from_trt_inspector("trt", json.dumps({"Layers": [entry]}), [layer])
    assert report.layers[0].executed == "int8"
    entry["Constants"] = [{types: "Half"}]
    report = precision.from_trt_inspector("trt", json.dumps({"Layers": [entry]}), [layer])
    assert report.layers[0].executed != "int8"


@pytest.mark.parametrize("text", ["", "no JSON", "{}", '{"Layers": []}', "[]", "null", "3"])
def test_an_inspector_that_tells_nothing_is_a_failure(text: str) -> None:
    with pytest.raises(CheckFailed, match="the engine inspector tells of no layer"):
        precision.from_trt_inspector("trt", text, [])
