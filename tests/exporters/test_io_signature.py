"""Engines as applications want them: types, blocks, frames in, labels out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration_data.readers import Wanted, read
from hdrq_deploy.errors import EngineError, ExportError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.exporters.export import lowered
from hdrq_deploy.exporters.half_precision import SMALLEST_SCALE, to_fp16
from hdrq_deploy.exporters.lint import lint
from hdrq_deploy.exporters.mixed_precision import weights_only
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.formats.preprocessing import feed
from hdrq_deploy.graph import model_files, reference_session
from hdrq_deploy.runtime import benchmark, load_engine


def run(path: Path, x: Any, fused: bool = False) -> Any:
    if not fused:
        session = reference_session.unfused_session(path)
    else:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("name", ["Tiny", "Net", "Attention"])
def test_half_precision_moves_the_output_by_half_precision(
    make: Any, inputs: Any, tmp_path: Path, name: str
) -> None:
    bundle = make(name, wbits=8)
    path = export(
        bundle, tmp_path / "e", "trt-rtx", options=GraphOptions(compute="fp16"), only_graph=True
    )
    graph = onnx.load(str(path / "model.onnx"))
    floats = [i.name for i in graph.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    assert floats == []
    expected = run(bundle.path / "model.onnx", inputs)
    got = run(path / "model.onnx", inputs)
    assert got.dtype == np.float32
    # A step of 11 bits, and codes that fall to the other side of a tie.
    assert reference_session.compare(expected, got)["relative_rms"] < 0.02


def test_small_steps_and_large_masks_stay_inside_half_precision(make: Any, tmp_path: Path) -> None:
    model, _ = lowered(make(), "onnx", GraphOptions())
    values = model.graph.initializers
    step = next(n for n in values if n.endswith("act_scale"))
    values[step].const_value = ir.tensor(np.array(1e-9, np.float32), name=step)
    bias = next(n for n in values if n.endswith("fc.bias"))
    shape = values[bias].const_value.numpy().shape
    values[bias].const_value = ir.tensor(np.full(shape, -1e9, np.float32), name=bias)
    to_fp16(model)
    assert float(values[step].const_value.numpy()) == SMALLEST_SCALE
    assert float(values[bias].const_value.numpy()[0]) == -65504
    model_files.save(model, tmp_path / "model.onnx")
    lint(tmp_path / "model.onnx")  # what was clamped is not refused


def test_four_bit_linears_with_real_activations(make: Any, inputs: Any, tmp_path: Path) -> None:
    bundle = make("Attention", wbits=4, per_channel=True)
    options = GraphOptions(weights_only=("qkv", "proj"))
    path = export(bundle, tmp_path / "e", "ort", options=options)
    report = json.loads((path / "precision.json").read_text())
    executed = {layer["module"]: layer["executed"] for layer in report["layers"]}
    assert executed["qkv"] == executed["proj"] == "int4" and executed["head"] == "int8"
    assert "2/5 MatMul INT4" in report["summary"] or "INT4" in report["summary"]
    # The same weights, activations in front of them real: NumPy has the last word on qkv.
    graph = onnx.load(str(path / "model.onnx"))
    arrays = {i.name: i for i in graph.graph.initializer}
    codes = onnx.numpy_helper.to_array(arrays["qkv.weight_codes_blocks"]).astype(np.float32)
    steps = onnx.numpy_helper.to_array(arrays["qkv.weight_codes_block_scale"])
    real = codes * np.repeat(steps, 16, axis=0)
    wanted = bundle.tensor("qkv.weight_codes") * bundle.tensor("qkv.weight_scale")[:, None]
    np.testing.assert_allclose(real.T, wanted, rtol=1e-6)
    unfused = run(path / "model.onnx", inputs)
    # ONNX Runtime's kernel quantizes the operand of a 4-bit product to 8 bits a block.
    assert (
        reference_session.compare(unfused, run(path / "model.onnx", inputs, True))["relative_rms"]
        < 0.05
    )
    with pytest.raises(ExportError, match="no linear layer with weights of 4 bits"):
        export(bundle, tmp_path / "f", "ort", options=GraphOptions(weights_only=("nothing",)))


def test_no_layer_that_weights_only_was_asked_for_is_left_out_in_silence(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        "hdrq_deploy.exporters.mixed_precision._log.info", lambda text, *a: lines.append(text % a)
    )
    bundle = make("Attention", wbits=4, per_channel=True)
    layers = list(bundle.manifest.layers)
    model = model_files.load(bundle)
    codes = model.graph.initializers["proj.weight_codes"]
    for use in codes.uses():  # scales along the input channels: no block has one
        use.node.attributes["axis"] = ir.AttrInt64("axis", 1)
    rows = {row.module: row for row in weights_only(model, layers, ("*",))}
    assert rows["qkv"].requested == "int4" and not rows["qkv"].reason
    assert rows["proj"].requested == "int8" and "one per output channel" in rows["proj"].reason
    assert len(lines) == 1 and lines[0].startswith("proj: activations stay quantized")
    model = model_files.load(bundle)
    monkeypatch.setattr("hdrq_deploy.exporters.mixed_precision.BLOCKS", (32, 24))
    with pytest.raises(ExportError, match="found 32 input channels; needed a multiple of 24, 48 o"):
        weights_only(model, layers, ("qkv",))


def test_exact_codes_end_where_they_were_calibrated(make: Any, inputs: Any, tmp_path: Path) -> None:
    origin = make()
    tensors = {  # small steps, so that a good part of every activation saturates
        name: value / 4 if name.endswith("act_scale") and name != "input.act_scale" else value
        for name, value in origin.tensors().items()
    }
    graph = (origin.path / "model.onnx").read_bytes()
    bundle = Bundle.write(tmp_path / "small.hdrq", origin.manifest, tensors, graph)
    expected = run(bundle.path / "model.onnx", inputs)
    exact = export(bundle, tmp_path / "x", "ort", options=GraphOptions(exact=True))
    wide = export(bundle, tmp_path / "w", "ort", options=GraphOptions(exact=False))
    got = run(exact / "model.onnx", inputs)
    assert reference_session.compare(expected, got)["relative_rms"] < 2e-3
    assert (
        reference_session.compare(expected, run(wide / "model.onnx", inputs))["relative_rms"] > 1e-2
    )
    clips = [
        [n.op_type for n in onnx.load(str(p / "model.onnx")).graph.node].count("Clip")
        for p in (exact, wide)
    ]
    assert clips[0] > clips[1]


@pytest.fixture(scope="module")
def normalised(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of images with its own mean and std."""
    return calibrate(
        "tiny_models:Tiny",
        work / "images",
        "night",
        tmp_path_factory.mktemp("normalised") / "b.hdrq",
        work / "Tiny-night.safetensors",
        method="rtn",
        wanted=Wanted(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
    )


@pytest.mark.parametrize("engine", ["ort", "onnx"])
def test_frames_in_labels_out(normalised: Bundle, work: Path, tmp_path: Path, engine: str) -> None:
    plain = export(normalised, tmp_path / "plain", engine)
    options = GraphOptions(
        fold_preprocess=True, postprocess="argmax", input_name="frames", output_name="labels"
    )
    folded = export(normalised, tmp_path / "folded", engine, options=options)
    manifest = json.loads((folded / "manifest.json").read_text())
    assert manifest["inputs"] == [
        {"name": "frames", "shape": ["batch", 16, 16, 3], "dtype": "uint8", "layout": "NHWC"}
    ]
    assert manifest["outputs"][0]["name"] == "labels" and manifest["postprocess"] == "argmax"
    assert normalised.manifest.preprocessing is not None
    images = read(work / "images", Wanted.like(normalised.manifest.preprocessing))
    files = sorted((work / "images").rglob("*.png"))
    frames = np.stack([np.asarray(Image.open(file)) for file in files])
    with load_engine(plain) as scores, load_engine(folded) as labels:
        expected = scores(images.x).argmax(1)
        np.testing.assert_array_equal(labels(frames), expected)
        np.testing.assert_array_equal(feed(images.x, labels.manifest), frames)
        with pytest.raises(EngineError, match="uint8"):
            labels(images.x)
    scores, alone = (
        benchmark(p, {"night": work / "images"}, 1, 3).accuracy for p in (plain, folded)
    )
    assert scores is not None and alone is not None
    assert (scores.domains, scores.per_class) == (alone.domains, alone.per_class)
    # Labels alone say nothing of confidence.
    assert scores.calibration_error is not None and alone.calibration_error is None


def test_frames_need_a_bundle_that_knows_its_preprocessing(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="`fold_preprocess` needs a bundle"):
        export(make(), tmp_path / "e", options=GraphOptions(fold_preprocess=True))
    with pytest.raises(ExportError, match="a name that the graph uses inside"):
        export(make(), tmp_path / "e", options=GraphOptions(input_name="fc.bias"))


def test_scores_become_probabilities(make: Any, inputs: Any, tmp_path: Path) -> None:
    path = export(make(), tmp_path / "e", options=GraphOptions(postprocess="softmax"))
    with load_engine(path) as engine:
        np.testing.assert_allclose(engine(inputs).sum(1), 1, rtol=1e-5)


def test_a_fixed_batch_and_a_free_size(make: Any, inputs: Any, tmp_path: Path) -> None:
    fixed = export(make(), tmp_path / "fixed", options=GraphOptions(batch=4))
    free = export(make(), tmp_path / "free", options=GraphOptions(dynamic_size=True))
    plain = export(make(), tmp_path / "plain")
    with load_engine(fixed) as engine:
        assert engine(inputs[:4]).shape == (4, 4)
        with pytest.raises(EngineError, match=r"needed \(4, 3, 16, 16\)"):
            engine(inputs[:5])
    with load_engine(free) as engine, load_engine(plain) as other:
        np.testing.assert_array_equal(engine(inputs), other(inputs))
        assert engine(np.zeros((2, 3, 24, 40), np.float32)).shape == (2, 4)
    with pytest.raises(ExportError, match="the graph fixes a size .*Reshape"):
        export(make("Attention"), tmp_path / "a", options=GraphOptions(dynamic_size=True))
