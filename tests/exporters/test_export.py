from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from hdrq_deploy.cli import export as export_command
from hdrq_deploy.errors import CheckFailed, ExportError
from hdrq_deploy.exporters import export, precision
from hdrq_deploy.exporters.lowering_openvino import lower_openvino
from hdrq_deploy.exporters.lowering_ort import lower_ort
from hdrq_deploy.formats.bundle_manifest import Layer
from hdrq_deploy.graph import model_files, reference_session

MODELS = ("Tiny", "Net", "Attention")
BITS = [(8, 8), (4, 8), (3, 3), (6, 7)]


def run(path: Path, x: Any, fused: bool) -> Any:
    if not fused:
        return reference_session.unfused_session(path).run(None, {"input": x})[0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options).run(None, {"input": x})[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("wbits", "abits"), BITS)
@pytest.mark.parametrize("engine", ["ort", "onnx"])
def test_lowering_does_not_change_the_numbers(
    make: Any, inputs: Any, tmp_path: Path, name: str, wbits: int, abits: int, engine: str
) -> None:
    bundle = make(name, wbits=wbits, abits=abits)
    path = export(bundle, tmp_path / "engine", engine) / "model.onnx"
    expected = run(bundle.path / "model.onnx", inputs, fused=False)
    got = run(path, inputs, fused=False)
    # Only the int32 bias of Gemm and the order of ConvInteger's products differ.
    assert reference_session.compare(expected, got)["relative_rms"] < 2e-3


@pytest.mark.parametrize("name", ["Tiny", "Net"])
@pytest.mark.parametrize(("wbits", "abits"), BITS)
def test_onnx_runtime_runs_every_layer_in_int8(
    make: Any, inputs: Any, tmp_path: Path, name: str, wbits: int, abits: int
) -> None:
    bundle = make(name, wbits=wbits, abits=abits)
    path = export(bundle, tmp_path / "engine", "ort")
    report = json.loads((path / "precision.json").read_text())
    asked = [layer for layer in report["layers"] if layer["requested"] == "int8"]
    assert asked and all(layer["executed"] == "int8" for layer in asked)
    expected = run(bundle.path / "model.onnx", inputs, fused=False)
    got = run(path / "model.onnx", inputs, fused=True)
    # Fused kernels round once where the graph rounds twice; with 3 bits a step is large.
    assert reference_session.compare(expected, got)["relative_rms"] < (0.2 if abits == 3 else 0.05)


def test_a_convolution_that_writes_codes_is_one_kernel(make: Any, tmp_path: Path) -> None:
    """ReLU6 behind it is absorbed; a ConvInteger in its place is many times slower."""
    path = export(make("Tiny", wbits=8), tmp_path / "engine", "ort")
    report = json.loads((path / "precision.json").read_text())
    kernels = {row["module"]: row["evidence"].split()[0] for row in report["layers"]}
    assert kernels == dict.fromkeys(("stem", "conv1", "conv2"), "QLinearConv") | {"fc": "QGemm"}


@pytest.mark.parametrize("lower", [lower_ort, lower_openvino])
def test_codes_that_reach_beyond_a_clamp_take_it_in(
    make: Any, inputs: Any, tmp_path: Path, lower: Any
) -> None:
    """Left in front of codes to 255, ReLU6 makes ONNX Runtime compute the layer in float."""
    bundle = make("Tiny", grid="paper")
    tensors = dict(bundle.tensors())
    (scale,) = (name for name in tensors if name.startswith("act.") and name.endswith("scale"))
    tensors[scale] = np.full_like(tensors[scale], 0.05)
    tensors["conv1.weight_scale"] = 60 * tensors["conv1.weight_scale"]
    whole, lowered = tmp_path / "whole.onnx", tmp_path / "lowered.onnx"
    model_files.save(model_files.load(bundle, tensors), whole)
    model_files.save(lower(model_files.load(bundle, tensors)), lowered)
    expected, got = (run(path, inputs, fused=False) for path in (whole, lowered))
    assert reference_session.compare(expected, got)["relative_rms"] < 1e-3
    if lower is lower_ort:
        layers = precision.from_ort(lowered, bundle.manifest.layers).layers
        assert {row.executed for row in layers if row.requested == "int8"} == {"int8"}


def test_the_grid_of_the_paper_goes_to_onnx_runtime_only(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    bundle = make(grid="paper")
    path = export(bundle, tmp_path / "ort", "ort")
    expected = run(bundle.path / "model.onnx", inputs, fused=False)
    got = run(path / "model.onnx", inputs, fused=True)
    assert reference_session.compare(expected, got)["relative_rms"] < 0.02
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ExportError, match="TensorRT executes signed int8 only"):
        export(bundle, tmp_path / "rtx", "trt-rtx")
    assert not (tmp_path / "rtx").exists()


def test_portable_graphs_are_standard_onnx(make: Any, tmp_path: Path) -> None:
    path = export(make(), tmp_path / "portable", "onnx")
    model = onnx.load(str(path / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} <= {""}
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert kinds[node.input[2]] == onnx.TensorProto.INT8


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_implementation_of_onnx_computes_the_same(
    make: Any, inputs: Any, tmp_path: Path, name: str
) -> None:
    path = export(make(name, wbits=4, abits=5), tmp_path / "portable", "onnx") / "model.onnx"
    got = ReferenceEvaluator(str(path)).run(None, {"input": inputs[:4]})[0]
    expected = run(path, inputs[:4], fused=False)
    assert reference_session.compare(expected, got)["relative_rms"] < 2e-2


def test_four_bit_weights_take_half_a_byte_in_the_engine(make: Any, tmp_path: Path) -> None:
    sizes = {}
    for bits in (4, 8):
        engine = export(make("Attention", wbits=bits), tmp_path / str(bits), "ort")
        model = onnx.load(str(engine / "model.onnx"), load_external_data=False)
        large = {i.name: i for i in model.graph.initializer if i.external_data}
        kinds = {name: tensor.data_type for name, tensor in large.items()}
        eight = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}  # by the processor
        allowed = {"patch.weight_codes": eight}  # the first layer keeps 8 bits
        allowed["qkv.weight_codes"] = {onnx.TensorProto.INT4} if bits == 4 else eight
        assert kinds.keys() == allowed.keys()
        assert all(kind in allowed[name] for name, kind in kinds.items())
        sizes[bits] = (engine / "model.onnx.data").stat().st_size
        expected = math.prod(large["patch.weight_codes"].dims)
        expected += math.prod(large["qkv.weight_codes"].dims) * bits // 8
        assert expected <= sizes[bits] < expected + 64  # the start of a tensor may be aligned
    assert 32 * 96 // 2 - 64 < sizes[8] - sizes[4] < 32 * 96 // 2 + 64


def test_a_layer_that_runs_in_float_fails_the_export() -> None:
    layer = Layer(
        node="a/Conv",
        op="Conv",
        module="a",
        weight="a.weight_codes",
        weight_bits=8,
        activation_bits=(8,),
        requested="int8",
    )
    dump = (
        "Layers:\nName: c_myl0_1, LayerType: correlation, Inputs: [ { Name: x, Datatype: {0}, "
        "Format: N/A }], Constants: [ { Name: w, Datatype: {0} } ], Outputs: [ { Name: y, "
        "Datatype: Float } ], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: a/Conv]\n\n"
    )
    good = precision.from_trt_log("trt-rtx", dump.replace("{0}", "Int8"), [layer])
    precision.check(good, ())
    assert good.summary == "1/1 Conv INT8"
    # A residual sum that was fused into the layer is its second input, before the weight.
    both = dump.replace("N/A }]", "N/A }, { Name: skip, Datatype: Half } ]").replace("{0}", "Int8")
    summed = precision.from_trt_log("trt-rtx", both, [layer])
    assert summed.summary == "1/1 Conv INT8" and "Int8 x Int8" in summed.layers[0].evidence
    entry = {
        "LayerType": "correlation",
        "Metadata": "[ONNX Layer: a/Conv]",
        "Inputs": [{"Datatype": "Int8"}, {"Datatype": "Half"}],
        "Constants": [{"Datatype": "Int8"}],
    }
    for weight, summary in (("Int8", "1/1 Conv INT8"), ("Half", "0/1 Conv INT8")):
        entry["Constants"] = [{"Datatype": weight}]
        text = json.dumps({"Layers": [entry]})
        found = precision.from_trt_inspector("trt", text, [layer])
        assert found.summary == summary
    bad = precision.from_trt_log("trt-rtx", dump.replace("{0}", "Float"), [layer])
    with pytest.raises(CheckFailed, match=r"first: a, Conv, asked int8, runs float32"):
        precision.check(bad, ())
    precision.check(bad, ("a*",))


def test_tensorrt_without_its_library_says_what_to_install(make: Any, tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("tensorrt"):
        pytest.skip("tensorrt is installed here")
    with pytest.raises(ExportError, match=r"hdrq-deploy\[trt\]"):
        export(make(), tmp_path / "trt", "trt")
    assert not (tmp_path / "trt").exists()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("wbits", "abits"), [(8, 8), (4, 4)])
def test_tensorrt_rtx_runs_every_layer_in_int8(
    make: Any, tmp_path: Path, name: str, wbits: int, abits: int
) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = export(make(name, wbits=wbits, abits=abits), tmp_path / "rtx", "trt-rtx")
    assert (path / "model.plan").stat().st_size > 0
    report = json.loads((path / "precision.json").read_text())
    asked = [layer for layer in report["layers"] if layer["requested"] == "int8"]
    assert asked and all(layer["executed"] == "int8" for layer in asked)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--allow-float", "conv"], "'conv' names (--allow-float); near it are conv1, conv2, "),
        (["--allow-float", "*", "--keep-float", "covn1"], "(--keep-float); near it are conv1"),
        (["--keep-float", "zzz"], "'zzz' names (--keep-float); 'hdrq inspect' lists"),
        (["--weights-only", "conv*"], "no linear layer with weights of 4 bits or fewer that"),
    ],
)
def test_patterns_that_name_nothing_show_what_is_near(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "engine"
    assert export_command.main([str(make().path), *flags, "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not out.exists()
