"""The checks fail: each kind of wrong engine, graph and model is found, and right ones pass."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from hdrq_deploy import Bundle, merge
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.parity_check import torch_stage
from hdrq_deploy.checks.stages import compare_engine, compare_stages
from hdrq_deploy.cli import export as export_command
from hdrq_deploy.cli import verify
from hdrq_deploy.comparison import golden
from hdrq_deploy.comparison.differences import (
    EXACT,
    UNBROKEN,
    Stage,
    Stepwise,
    allowed,
    check,
    difference,
)
from hdrq_deploy.comparison.taps import GraphTap, Ran, Shows, outside
from hdrq_deploy.errors import CheckFailed, DataError, ExportError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.exporters import first_run as apart
from hdrq_deploy.formats.atomic_files import sha256_file
from hdrq_deploy.formats.records import Tolerances
from hdrq_deploy.graph import model_files, reference_session
from hdrq_deploy.mixing import DomainMixer
from hdrq_deploy.runtime import load_engine, once

BITS = ((8, 8), (3, 3))
HEADS = '''
import torch
from torch import nn


class _Body(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, out, 1)

    def body(self, x):
        return torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))


class Mask(_Body):
    """(N, 1, H, W): a mask or depth."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x):
        return self.last(self.body(x))


class Segments(_Body):
    """(N, C, H, W)."""

    def __init__(self):
        super().__init__(4)

    def forward(self, x):
        return self.last(self.body(x))


class Scalar(Mask):
    """(N,)."""

    def forward(self, x):
        return super().forward(x).mean((1, 2, 3))


class Column(Mask):
    """(N, 1)."""

    def forward(self, x):
        return super().forward(x).mean((2, 3))


class Box(Segments):
    """(N, 4): a regression, or the scores of four classes."""

    def forward(self, x):
        return super().forward(x).mean((2, 3))


class Tokens(Segments):
    """(N, L, C)."""

    def forward(self, x):
        return super().forward(x).flatten(2).transpose(1, 2)


class Nothing(Segments):
    """Scores that are equal for all classes."""

    def forward(self, x):
        return super().forward(x).mean((2, 3)) * 0


class Coarse(nn.Module):
    """(N, 4), whose last bias is few of the steps that kernels round it to."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(1000 * torch.relu(self.first(x)).mean((2, 3)))
'''
NAMES = ("Mask", "Segments", "Scalar", "Column", "Box", "Tokens")


@pytest.fixture(scope="module")
def heads(work: Path) -> Callable[..., Bundle]:
    """``heads(name, wbits, abits)``: bundles of one body and all kinds of outputs."""
    (work / "output_heads.py").write_text(HEADS)
    import output_heads

    made: dict[Any, Bundle] = {}

    def of(name: str, wbits: int = 8, abits: int = 8) -> Bundle:
        key = name, wbits, abits
        if key not in made:
            torch.manual_seed(0)
            weights = work / f"head-{name}.safetensors"
            save_file(getattr(output_heads, name)().state_dict(), weights)
            made[key] = calibrate(
                f"output_heads:{name}", work / "data.npz", "night",
                work / f"head-{name}-{wbits}{abits}.hdrq", weights,
                method="rtn", wbits=wbits, abits=abits,
            )  # fmt: skip
        return made[key]

    yield of
    sys.modules.pop("output_heads", None)


@pytest.fixture(scope="module")
def learned(inputs: Any) -> Callable[[Bundle], Shows]:
    """The torch model of a bundle, each built once."""
    return cache(lambda bundle: torch_stage(bundle, inputs[:2]))


def initializer(model: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    (found,) = [i for i in model.graph.initializer if i.name == name]
    found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found).copy()), name))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def codes_name(model: onnx.ModelProto, module: str) -> str:
    return next(
        i.name for i in model.graph.initializer if i.name.startswith(f"{module}.weight_codes")
        and i.data_type in {onnx.TensorProto.INT8, onnx.TensorProto.INT4}
    )  # fmt: skip


def one_code(model: onnx.ModelProto) -> None:
    """One step of one weight of the last hidden layer, in its unwidened codes."""

    def change(codes: Any) -> Any:
        step = np.gcd.reduce(np.abs(codes[codes != 0].astype(int)).ravel())
        codes.flat[7] += step if codes.flat[7] <= 0 else -step
        return codes

    initializer(model, codes_name(model, "third"), change)


def scale(factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        weight = codes_name(model, "third")
        reader = next(
            n for n in model.graph.node
            if n.op_type == "DequantizeLinear" and n.input[0].startswith(weight)
        )  # fmt: skip
        initializer(model, reader.input[1], lambda s: (s * factor).astype(np.float32))

    return change


def channels(model: onnx.ModelProto) -> None:
    """Two output channels of a late layer change places."""

    def change(codes: Any) -> Any:
        codes[[2, 5]] = codes[[5, 2]]
        return codes

    initializer(model, codes_name(model, "third"), change)


def pads(model: onnx.ModelProto) -> None:
    (found,) = [a for a in node(model, "third/Conv").attribute if a.name == "pads"]
    found.ints[:] = [0, 0, 2, 2]


def stride(model: onnx.ModelProto) -> None:
    (found,) = [a for a in node(model, "third/Conv").attribute if a.name == "strides"]
    found.ints[:] = [2, 2]


def bias(model: onnx.ModelProto) -> None:
    def change(values: Any) -> Any:
        values[3] += 0.05
        return values

    initializer(model, "third.bias", change)


def no_relu(model: onnx.ModelProto) -> None:
    """The last ReLU passes its input on."""
    relu = [n for n in model.graph.node if n.op_type == "Relu"][-1]
    relu.op_type = "Identity"


def activation_step(model: onnx.ModelProto) -> None:
    """The quantizer in front of the last layer divides by another step than is multiplied by."""
    quantize = [n for n in model.graph.node if n.op_type == "QuantizeLinear"][-1]
    (found,) = [i for i in model.graph.initializer if i.name == quantize.input[1]]
    values = numpy_helper.to_array(found) * np.float32(1.01)
    model.graph.initializer.append(numpy_helper.from_array(values, "another_step"))
    dequantize = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    for reader in dequantize:
        if reader.input[1] == quantize.input[1]:
            reader.input[1] = "another_step"


def other_codes(model: onnx.ModelProto) -> None:
    """The last layer reads the codes of the first quantizer of its shape."""
    last = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    reads = [n for n in last if any(n.input[0] in q.output for q in model.graph.node)]
    reads[-1].input[0] = reads[-2].input[0]


FAULTS = {
    "one code": one_code,
    "scale by 1%": scale(1.01),
    "scale by 0.5%": scale(1.005),
    "swapped channels": channels,
    "pads": pads,
    "stride": stride,
    "bias": bias,
    "no relu": no_relu,
    "activation step": activation_step,
    "other codes": other_codes,
}


def tamper(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change an engine's graph, and let its manifest take it for its own."""
    model = onnx.load(str(folder / "model.onnx"))
    change(model)
    (folder / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, str(folder / "model.onnx"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].pop("model.onnx.data", None)
    manifest["files"]["model.onnx"]["sha256"] = sha256_file(folder / "model.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def many(inputs: Any, count: int) -> Any:
    return np.resize(inputs, (count, *inputs.shape[1:])) * np.float32(0.99)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("wbits", "abits"), BITS)
def test_a_wrong_lowered_graph_is_found(
    heads: Any, inputs: Any, tmp_path: Path, fault: str, wbits: int, abits: int
) -> None:
    """On two images and on 200: of a mask, whose argmax is always 0."""
    bundle = heads("Mask", wbits, abits)
    path = export(bundle, tmp_path / "e", "onnx")
    assert all(s.failure is None for s in compare_stages(bundle, path, None, False))
    tamper(path, FAULTS[fault])
    for x in (None, many(inputs, 200)):
        with pytest.raises(CheckFailed, match=r"bundle to lowered graph|lowered graph does not"):
            check(compare_stages(bundle, path, x, False), bundle.manifest.tolerances)


# Codes that end at 0 need no ReLU in front: without it the bundle's graph computes the same.
@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"no relu"}))
@pytest.mark.parametrize(("wbits", "abits"), BITS)
def test_a_wrong_bundle_graph_is_found_against_torch(
    heads: Any, learned: Any, inputs: Any, fault: str, wbits: int, abits: int
) -> None:
    """The written graph is tampered with, the learned model is right."""
    bundle = heads("Mask", wbits, abits)
    nodes = [layer.node for layer in bundle.manifest.layers]
    how = Stepwise.of_bundle(bundle)
    model = onnx.load(str(bundle.path / "model.onnx"))
    right = GraphTap(onnx.load(str(bundle.path / "model.onnx")), {}, "bundle", nodes)
    FAULTS[fault](model)
    wrong = GraphTap(model, {}, "bundle", nodes)
    for x in (inputs[:2], many(inputs, 200)):
        rows = [x[i : i + 32] for i in range(0, len(x), 32)]

        def batches(rows: Any = rows) -> Any:
            return zip(rows, rows, strict=True)

        check([difference(learned(bundle), right, batches, how)], Tolerances())
        with pytest.raises(CheckFailed):
            check([difference(learned(bundle), wrong, batches, how)], Tolerances())


def test_float_layers_may_add_up_what_those_behind_codes_may_not(make: Any, inputs: Any) -> None:
    """Without quantizers the differences of one layer go on to the next."""
    bundle = make(method="float")
    nodes = [layer.node for layer in bundle.manifest.layers]
    right = GraphTap(onnx.load(str(bundle.path / "model.onnx")), {}, "bundle", nodes)
    how, x = Stepwise.of_bundle(bundle), inputs[:8]
    assert not bundle.manifest.activations and how.fidelity == UNBROKEN
    for factor, passes in ((1.0002, True), (1.01, False)):
        other = onnx.load(str(bundle.path / "model.onnx"))
        first = next(node for node in other.graph.node if node.op_type == "Conv")
        initializer(other, first.input[1], lambda w, by=factor: (w * by).astype(w.dtype))
        near = GraphTap(other, {}, "bundle", nodes)
        stages = [
            difference(right, near, lambda: zip([x], [x], strict=True), h)
            for h in (how, replace(how, fidelity=EXACT))
        ]
        assert [not stage.failure for stage in stages] == [passes, False]


@pytest.mark.parametrize("fault", ["swapped channels", "scale by 1%", "bias", "pads"])
@pytest.mark.parametrize("name", ["Mask", "Segments"])
@pytest.mark.parametrize(("wbits", "abits"), BITS)
def test_an_engine_that_is_not_its_graph_is_found(
    heads: Any,
    inputs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    name: str,
    wbits: int,
    abits: int,
) -> None:
    """Integer kernels that compute something else: their sessions are opened on other bytes."""
    bundle = heads(name, wbits, abits)
    path = export(bundle, tmp_path / "e")
    right = [s for s in compare_stages(bundle, path, None, False) if "engine" in s.name]
    check(right, bundle.manifest.tolerances)
    real = reference_session.open_session

    def other(model: Any, options: Any, data: Any = None) -> Any:
        parsed = onnx.load_model_from_string(model)
        for tensor in parsed.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {item.key: item.value for item in tensor.external_data}
                start = int(place.get("offset", 0))
                tensor.raw_data = data[place["location"]][start : start + int(place["length"])]
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        FAULTS[fault](parsed)
        return real(parsed.SerializeToString(), options)

    unfused = reference_session.unfused_session
    monkeypatch.setattr(reference_session, "unfused_session", lambda *a, **k: unfused(*a, **k))
    fused = golden.file_tap

    def tampered(file: Path, called: str, nodes: Any, fused_too: bool = False, **k: Any) -> Any:
        if not fused_too and not k.get("fused"):
            return fused(file, called, nodes)
        with monkeypatch.context() as patched:
            patched.setattr(reference_session, "open_session", other)
            return fused(file, called, nodes, fused=True)

    monkeypatch.setattr(golden, "file_tap", tampered)
    for x in (None, many(inputs, 200)):
        with pytest.raises(CheckFailed, match="lowered graph to engine"):
            check(compare_stages(bundle, path, x, False), bundle.manifest.tolerances)


class Fixed:
    """A stage whose outputs are given."""

    def __init__(self, name: str, output: Any, scores: Any = None) -> None:
        self.name = name
        self._ran = Ran(output, output if scores is None else scores)

    def run(self, x: Any) -> Ran:
        return self._ran


def compared(expected: Any, got: Any, scores: Any = None) -> Stage:
    first = Fixed("lowered graph", expected, scores)
    x = np.zeros((len(expected), 1), np.float32)
    return difference(first, Fixed("engine", got), lambda: iter([(x, x)]), Stepwise({}, {}))


@pytest.mark.parametrize("count", [2, 12, 120, 1000])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 6, 6), (3, 6, 6), (7, 5), (2, 3, 4, 4)])
def test_more_images_do_not_make_the_check_weaker(count: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    right = rng.standard_normal((count, *shape)).astype(np.float32) + 1
    noise = rng.standard_normal(right.shape)
    noise *= np.sqrt((right**2).mean() / (noise**2).mean())
    check([compared(right, right + 0.001 * noise)], Tolerances())
    for much in (0.06, 0.67):
        stage = compared(right, right + much * noise)
        assert stage.output_rms == pytest.approx(much, rel=1e-3)
        with pytest.raises(CheckFailed, match="apart"):
            check([stage], Tolerances(decision_flips=1.0))
        with pytest.raises(CheckFailed, match="apart"):  # as manifests once allowed
            check([stage], Tolerances(decision_flips=1.0, output_rms=0.5))
    measured = Tolerances(decision_flips=1.0, output_rms=0.1, measured="kernel X, 64 images")
    check([compared(right, right + 0.06 * noise)], measured)


def test_a_doubled_mask_fails_though_its_argmax_is_the_same() -> None:
    right = np.random.default_rng(0).random((200, 1, 5, 5), np.float32)
    stage = compared(right, 2 * right)
    assert stage.decisions == 0 and stage.output_rms == pytest.approx(1)
    with pytest.raises(CheckFailed):
        check([stage], Tolerances())


def test_outputs_that_cannot_be_compared_fail_and_say_why() -> None:
    right = np.ones((3, 4), np.float32)
    cases = [
        (right, right[:, :3], r"shape \(3, 3\)"),
        (right[:, :0], right[:, :0], "empty output"),
        (right, np.where(right > 0, np.nan, right), "NaN or infinity in the output of the engine"),
        (right * np.inf, right, "NaN or infinity in the output of the lowered graph"),
    ]
    for expected, got, words in cases:
        with pytest.raises(CheckFailed, match=words):
            check([compared(expected, got)], Tolerances())


def test_scores_that_are_tied_have_no_decisions_to_lose() -> None:
    tied = np.zeros((300, 4), np.float32)
    check([compared(tied, tied)], Tolerances())
    level = tied + 1
    level[:, 2] += 1e-7  # the next float32
    check([compared(level, level[:, ::-1].copy())], Tolerances())
    with pytest.raises(CheckFailed):
        check([compared(tied, tied + 1e-3)], Tolerances())  # 0 has no RMS to be small against


def test_labels_count_by_the_score_they_lose() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((300, 5)).astype(np.float32)
    labels = scores.argmax(1)
    check([compared(labels, labels, scores)], Tolerances())
    wrong = np.where(np.arange(300) < 60, (labels + 1) % 5, labels)
    with pytest.raises(CheckFailed, match="apart"):
        check([compared(labels, wrong, scores)], Tolerances())
    with pytest.raises(CheckFailed, match="decisions changed"):
        check([compared(labels, wrong, scores)], Tolerances(), max_rms=10)
    with pytest.raises(CheckFailed, match="has 5 classes"):
        check([compared(labels, labels + 2, scores)], Tolerances())
    with pytest.raises(CheckFailed):
        check([compared(labels[:2], (labels[:2] + 1) % 5, scores[:2])], Tolerances())


@pytest.mark.parametrize("name", [*NAMES, "Nothing"])
@pytest.mark.parametrize(("wbits", "abits"), BITS)
def test_right_engines_of_every_kind_of_output_pass(
    heads: Any, inputs: Any, tmp_path: Path, name: str, wbits: int, abits: int
) -> None:
    bundle = heads(name, wbits, abits)
    path = export(bundle, tmp_path / "e")
    for x in (None, many(inputs, 130)):
        stages = compare_stages(bundle, path, x, torch=wbits == 3 and x is not None)
        check(stages, bundle.manifest.tolerances)
        assert [s.name for s in stages][-1] == "lowered graph to engine"
        assert stages[-1].layer_rms is not None and stages[-1].layer_rms < 1e-3
        classes = name in {"Segments", "Box", "Nothing"}
        assert all((s.decisions > 0) == classes for s in stages)
    stages, tolerances = compare_engine(path)
    check(stages, tolerances)


@pytest.mark.parametrize("name", ["Tiny", "Net", "Attention"])
@pytest.mark.parametrize(
    ("wbits", "abits", "per_channel"), [(8, 8, False), (3, 3, False), (3, 3, True), (2, 2, True)]
)
def test_right_engines_of_every_fixture_pass(
    make: Any, inputs: Any, tmp_path: Path, name: str, wbits: int, abits: int, per_channel: bool
) -> None:
    bundle = make(name, wbits=wbits, abits=abits, per_channel=per_channel)
    path = export(bundle, tmp_path / "e")
    stages = compare_stages(bundle, path, many(inputs, 200), torch=per_channel and wbits == 3)
    check(stages, bundle.manifest.tolerances)
    record = json.loads((path / "manifest.json").read_text())["build"]["checked"]
    assert record["inputs"] == "golden inputs" and record["images"] == 2
    assert [s["stages"] for s in record["stages"]] == [
        "bundle to lowered graph", "lowered graph to engine",
    ]  # fmt: skip


OPTIONS = {
    "free": {},
    "batch 1": {"batch": 1},
    "batch 3": {"batch": 3},
    "any size": {"dynamic_size": True},
    "labels": {"postprocess": "argmax"},
    "probabilities": {"postprocess": "softmax"},
    "to 255": {"exact": False},
    "named": {"input_name": "frames", "output_name": "answers"},
    "float layer": {"keep_float": ("*conv1*", "qkv", "mid")},
    "all float": {"keep_float": ("*",)},
    "blocks": {"weights_only": ("qkv", "proj")},
    "blocks and float": {"weights_only": ("qkv",), "keep_float": ("head",)},
    "labels in batches": {"postprocess": "argmax", "batch": 3, "exact": False},
}


@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("name", ["Tiny", "Net", "Attention"])
def test_every_export_passes_its_own_check(make: Any, tmp_path: Path, name: str, what: str) -> None:
    options = dict(OPTIONS[what])
    if "weights_only" in options and name != "Attention":
        pytest.skip("no linear layer of 4 bits in blocks")
    if what == "any size" and name == "Attention":
        pytest.skip("the model fixes its size")
    if what == "float layer":
        (first,) = [
            p
            for p in options["keep_float"]
            if p in {"Net": "mid", "Attention": "qkv"}.get(name, "*conv1*")
        ]
        options["keep_float"] = (first,)
    bundle = make(name, wbits=4, abits=4, per_channel=True)
    for engine, more in (("ort", {}), ("onnx", {}), ("trt-rtx", {"only_graph": True})):
        path = export(
            bundle, tmp_path / engine, engine, options=GraphOptions(**options),
            allow_float=("*",), **more,
        )  # fmt: skip
        record = json.loads((path / "manifest.json").read_text())["build"]["checked"]
        assert len(record["stages"]) == (2 if engine == "ort" else 1)
        assert ("engine_not_run" in record) == (engine != "ort")
        if engine == "ort":
            check(compare_stages(bundle, path, None, False), bundle.manifest.tolerances)
            stages, tolerances = compare_engine(path)
            check(stages, tolerances)


def test_an_output_without_classes_has_no_labels(heads: Any, tmp_path: Path) -> None:
    for what in ("argmax", "softmax"):
        with pytest.raises(ExportError, match=r"needed scores \(N, C, ...\)"):
            export(heads("Scalar"), tmp_path / "e", options=GraphOptions(postprocess=what))


def test_frames_are_compared_as_the_frames_they_are(make: Any, work: Path, tmp_path: Path) -> None:
    bundle = calibrate(
        "tiny_models:Tiny", work / "images", "night", tmp_path / "b.hdrq",
        work / "Tiny-night.safetensors", method="rtn",
    )  # fmt: skip
    x = bundle.golden()["input"]
    np.testing.assert_allclose(golden.from_pixels(x, bundle.manifest.preprocessing), x, atol=1e-6)
    for postprocess in ("none", "argmax"):
        path = export(
            bundle, tmp_path / "e", force=True,
            options=GraphOptions(fold_preprocess=True, postprocess=postprocess),
        )  # fmt: skip
        check(compare_stages(bundle, path, None, False), bundle.manifest.tolerances)
        stages, tolerances = compare_engine(path)
        check(stages, tolerances)
        # Values between two grey levels are rounded to one before anything is compared.
        between = np.random.default_rng(0).random((5, 3, 16, 16), np.float32)
        check(compare_stages(bundle, path, between, False), bundle.manifest.tolerances)


@pytest.mark.parametrize("fault", ["one code", "scale by 1%", "swapped channels", "pads", "bias"])
@pytest.mark.parametrize("engine", ["ort", "onnx", "trt-rtx"])
@pytest.mark.parametrize(("wbits", "abits"), BITS)
def test_an_export_that_went_wrong_is_not_written(
    heads: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    engine: str,
    wbits: int,
    abits: int,
) -> None:
    """The lowering is broken: what it saves is tampered with before anybody has read it."""
    saved = model_files.save

    def save(model: Any, path: Path) -> None:
        saved(model, path)
        proto = onnx.load(str(path))
        (path.parent / "model.onnx.data").unlink(missing_ok=True)
        FAULTS[fault](proto)
        onnx.save(proto, str(path))

    bundle = heads("Mask", wbits, abits)
    monkeypatch.setattr(model_files, "save", save)
    words = [str(bundle.path), "--engine", engine, "-o", str(tmp_path / "e"), "--compute", "fp32"]
    words += ["--no-build"] if engine == "trt-rtx" else []
    assert export_command.main(words) == 3
    text = capsys.readouterr().err
    assert "bundle to lowered graph" in text and len(text.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_went_wrong_is_not_written(
    heads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = heads("Segments", 8, 8)
    real = golden.ort_engine

    def other(path: Path) -> Any:
        engine = real(path)
        call = engine._call
        engine._call = lambda x: call(x)[:, ::-1]  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr(golden, "ort_engine", other)
    with pytest.raises(CheckFailed, match="lowered graph to engine"):
        export(bundle, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_golden_inputs_is_checked_on_drawn_ones(make: Any, tmp_path: Path) -> None:
    old = tmp_path / "old.hdrq"
    shutil.copytree(make().path, old)
    (old / "golden.safetensors").unlink()
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["files"]["golden.safetensors"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    path = export(old, tmp_path / "e")
    record = json.loads((path / "manifest.json").read_text())["build"]["checked"]
    assert record["inputs"] == "drawn inputs, for the bundle holds no golden ones"
    assert not (path / "golden.safetensors").exists()


def test_a_tensorrt_engine_is_run_apart_where_there_is_a_driver(
    make: Any, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(make(), tmp_path / "e")
    batches = [inputs[:2], inputs[2:3]]
    monkeypatch.setattr(apart, "_DRIVERS", ("no-such-library.so",))
    assert apart.run_apart(path, batches) == (None, "this machine has no NVIDIA driver")
    monkeypatch.setattr(apart, "has_driver", lambda: True)
    outputs, why = apart.run_apart(path, batches)
    assert outputs is not None and why == ""
    with load_engine(path) as engine:
        for rows, output in zip(batches, outputs, strict=True):
            np.testing.assert_allclose(output, engine(rows), rtol=1e-5, atol=1e-6)
    outputs, why = apart.run_apart(tmp_path / "nothing", batches)
    assert outputs is None and "it does not run here" in why
    assert once.main is not None


def test_a_merge_that_gives_no_numbers_is_not_written(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdrq_deploy.merging import Merger

    parents = [make(), make(domain="day")]
    real = Merger.floats

    def broken(self: Any, mix: Any) -> Any:
        found = dict(real(self, mix))
        found["fc.bias"] = found["fc.bias"] * np.float32(np.nan)
        return found

    monkeypatch.setattr(Merger, "floats", broken)
    with pytest.raises(CheckFailed, match="NaN or infinity in the output of the merge"):
        merge(parents, tmp_path / "m.hdrq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"postprocess": "argmax"}, {"exact": False}])
def test_a_mix_is_checked_and_a_wrong_one_is_never_run(
    make: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    import hdrq_deploy.mixing.ort_builder as module

    parents = [make(domain=name, fold="steps") for name in ("night", "day")]
    with DomainMixer(parents, options=GraphOptions(**options)) as mixer:
        before = mixer(inputs)
        real = module.OrtSession.__call__

        def wrong(self: Any, x: Any) -> Any:
            output = real(self, x)
            return (output + 1) % 4 if output.dtype.kind == "i" else 1.5 * output

        monkeypatch.setattr(module.OrtSession, "__call__", wrong)
        if options.get("exact", True):
            with pytest.raises(CheckFailed, match="bundle to engine"):
                mixer.set({"night": 0.9, "day": 0.1}).result(60)
        monkeypatch.undo()
        assert mixer.mix == {"night": 0.5, "day": 0.5}
        np.testing.assert_array_equal(mixer(inputs), before)
        mixer.set({"night": 0.9, "day": 0.1}).result(60)
        assert mixer.mix["night"] == 0.9


def test_ties_are_counted_and_spread(heads: Any, inputs: Any) -> None:
    """A graph of which one code in a thousand of the first tensor was moved over a tie passes;
    of which as many were moved elsewhere fails."""
    bundle = heads("Segments", 3, 3)
    nodes = [layer.node for layer in bundle.manifest.layers]
    how = Stepwise.of_bundle(bundle)
    model = bundle.graph()
    tap = GraphTap(model, outside(model, bundle.path), "bundle", nodes)
    first = next(name for name in how.modules if name in tap.sites)
    rows = inputs[:8]
    before = tap.replay(rows, {}, [first]).before[first]
    distance = np.abs(before - np.floor(before) - 0.5)
    for near, passes in ((distance < 5e-4, True), (distance > 0.3, False)):
        at = tuple(axis[:4] for axis in np.nonzero(near))
        assert len(at[0])
        codes = tap.run(rows).codes[first].copy()
        down = np.floor(before[at])
        codes[at] = np.where(codes[at] == down, down + 1, down)
        ran = tap.replay(rows, {first: codes})

        class Moved:
            name = "moved"

            def run(self, x: Any, ran: Ran = ran, codes: Any = codes) -> Ran:
                return Ran(ran.output, ran.scores, {**ran.codes, first: codes}, ran.layers)

        stage = difference(Moved(), tap, lambda: iter([(rows, rows)]), how)
        assert stage.max_steps == 1 and stage.tensors[0].share_off > 0
        if passes:
            assert stage.ties == len(at[0]) and stage.failure is None
            check([stage], Tolerances())
            continue
        with pytest.raises(CheckFailed, match="where no tie explains it"):
            check([stage], Tolerances())


def test_a_rounded_bias_is_no_fault_of_a_network_that_gives_little_else(
    heads: Any, inputs: Any, tmp_path: Path
) -> None:
    """Merges of networks that have little in common are so. A bias off by two steps is found."""
    bundle = heads("Coarse")
    path = export(bundle, tmp_path / "e")
    dark = inputs[:4] * np.float32(1e-6)
    stages = compare_stages(bundle, path, dark, False)
    check(stages, bundle.manifest.tolerances)
    lowered = next(s for s in stages if s.name == "bundle to lowered graph")
    assert lowered.layer_rms is not None and lowered.layer_rms > 1e-3

    def two_steps(codes: Any) -> Any:
        codes[1] += 2
        return codes

    tamper(path, lambda model: initializer(model, "last/Gemm/bias_codes", two_steps))
    with pytest.raises(CheckFailed, match="bundle to lowered graph"):
        check(compare_stages(bundle, path, dark, False), bundle.manifest.tolerances)


def test_a_spread_is_stated_and_bounds_what_is_judged() -> None:
    from hdrq_deploy.comparison.differences import Spread

    stage = Stage("lowered graph to engine", 200, 200, 30, 0.2, 1.0, 14.0, stepwise=True)
    with pytest.raises(CheckFailed):
        check([stage], Tolerances())
    stage.spread = Spread(output_rms=0.15, decision_flips=0.1)
    assert allowed(stage, Tolerances()) == (pytest.approx(0.3), pytest.approx(0.2))
    check([stage], Tolerances())
    for strict in ({"max_flips": 0.02}, {"max_rms": 0.05}):
        with pytest.raises(CheckFailed):
            check([stage], Tolerances(), **strict)
    unseen = Stage("record to engine", 200, 200, 0, 0.67, 1.0, 3.0, spread=Spread(0.9, 0.1))
    assert allowed(unseen, Tolerances())[0] == 0.5
    with pytest.raises(CheckFailed):
        check([unseen], Tolerances())


def test_manifests_without_the_new_fields_open(make: Any, tmp_path: Path) -> None:
    old = tmp_path / "old.hdrq"
    shutil.copytree(make().path, old)
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["tolerances"] = {"decision_flips": 0.02, "output_rms": 0.5}
    (old / "manifest.json").write_text(json.dumps(manifest))
    path = export(old, tmp_path / "e")
    stages, tolerances = compare_engine(path)
    assert tolerances.output_rms == 0.5
    assert allowed(stages[0], tolerances)[0] == 0.05


def test_images_of_another_size_are_refused_in_a_line(heads: Any) -> None:
    with pytest.raises(DataError, match=r"needed \(N, 3, 16, 16\)"):
        compare_stages(heads("Mask"), None, np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(DataError):
        compare_stages(heads("Mask"), None, np.zeros((0, 3, 16, 16), np.float32))


@pytest.mark.parametrize("count", ["2", "200"])
def test_the_command_fails_on_masks_and_names_the_layer(
    heads: Any,
    inputs: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    count: str,
) -> None:
    bundle = heads("Mask", 3, 3)
    path = export(bundle, tmp_path / "e")
    np.savez(tmp_path / "many.npz", x=many(inputs, 200), y=np.zeros(200, int))
    words = [str(bundle.path), str(path), "--data", f"night={tmp_path / 'many.npz'}"]
    words += ["--images", count, "--no-torch", "--json", str(tmp_path / "found.json")]
    assert verify.main(words) == 0
    capsys.readouterr()
    tamper(path, scale(1.01))
    assert verify.main(words) == 3
    text = capsys.readouterr().err
    assert "third" in text and len(text.strip().splitlines()) == 1
    json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    tamper(path, stride)
    assert verify.main(words) == 3
    json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)


def test_steps_too_small_for_half_precision_are_found(heads: Any, tmp_path: Path) -> None:
    """Values of 1e-6 on the way: a step is rounded to a multiple of 6e-8."""
    bundle = heads("Mask", 8, 8)
    small = tmp_path / "small.hdrq"
    tensors = dict(bundle.tensors())
    name = next(a.scale for a in bundle.manifest.activations if a.scale.startswith("relu."))
    factor = np.float32(2.3e-7) / tensors[name]
    tensors[name] = tensors[name] * factor
    for weight in ("first.weight_scale", "first.bias"):
        tensors[weight] = tensors[weight] * factor
    tensors["second.weight_scale"] = tensors["second.weight_scale"] / factor
    Bundle.write(
        small, bundle.manifest, tensors, (bundle.path / "model.onnx").read_bytes(), bundle.golden()
    )
    for compute in ("fp32", "fp16"):
        options = GraphOptions(compute=compute)
        if compute == "fp32":
            export(small, tmp_path / compute, "trt-rtx", options=options, only_graph=True)
            continue
        with pytest.raises(CheckFailed, match="export with `compute` fp32"):
            export(small, tmp_path / compute, "trt-rtx", options=options, only_graph=True)
