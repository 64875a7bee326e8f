"""Biases that fit int32 and are whole numbers, and linear layers that stay INT8."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hdrq_deploy import merge
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.errors import CheckFailed, ExportError
from hdrq_deploy.exporters import export, lowering_ort, precision
from hdrq_deploy.exporters.export import lowered
from hdrq_deploy.exporters.options import GraphOptions
from hdrq_deploy.exporters.precision_reasons import explain
from hdrq_deploy.formats.bundle import GRAPH, Bundle
from hdrq_deploy.formats.bundle_manifest import Layer
from hdrq_deploy.graph import reference_session
from hdrq_deploy.graph.biases import LARGEST, bias_sites, fitted, shifts, smallest_scale, whole_bias
from hdrq_deploy.merging.re_estimate import re_estimate
from hdrq_deploy.mixing import DomainMixer

Make = Callable[..., Bundle]


class Dead(nn.Module):
    """Channels that BatchNorm or their own weights switch off, with biases that are not small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.group = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.bn.running_mean.uniform_(-0.3, 0.3)
            self.bn.running_var.uniform_(0.05, 0.2)
            self.bn.weight[:3] = torch.tensor([0.0, 1e-5, 1e-9])
            self.bn.bias[:3] = torch.tensor([1.0, 0.7, -0.4])
            self.depth.weight[2] *= 1e-9
            self.depth.bias[2] = 0.9
            self.group.weight[5] = 0.0
            self.group.bias[5] = 1.3
            self.fc.weight[3] *= 1e-7
            self.fc.bias[3] = 1.5
            self.head.weight[1] *= 1e-9
            self.head.bias[1] = -2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.group(F.relu(self.depth(x))))
        return self.head(F.relu(self.fc(x.mean((2, 3)))))


class Line(nn.Module):
    """The same in one or three dimensions."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 3: nn.Conv3d}[rank]
        self.first, self.second = kind(2, 6, 3), kind(6, 6, 3)
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            self.second.weight[4] *= 1e-8
            self.second.bias[4] = 1.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).flatten(2).mean(2))


class Weak(nn.Module):
    """A layer all of whose weights are tiny: one scale can rise for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weak, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.weak.weight *= 1e-8
            self.weak.bias.uniform_(0.2, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.weak(F.relu(self.first(x)))))


class Uneven(nn.Module):
    """One channel's bias is a billion products high; the others need their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.head.bias[2] = 3e6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.first(x)))


SHAPES = {"Line1": (2, 24), "Line3": (2, 8, 8, 8), "Weak": (12,), "Uneven": (12,)}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Dead": Dead,
    "Line1": lambda: Line(1),
    "Line3": lambda: Line(3),
    "Weak": Weak,
    "Uneven": Uneven,
}


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def images(name: str, count: int = 32) -> Any:
    shape = (count, *SHAPES.get(name, (3, 12, 12)))
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def truth(name: str, x: Any, seed: int = 0) -> Any:
    with torch.no_grad():
        return network(name, seed)(torch.from_numpy(x)).numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """``made(name, seed=..., wbits=..., ...)`` calibrates a network by rounding to nearest."""
    module = types.ModuleType("bias_models")
    sys.modules[module.__name__] = module
    folder, kept = tmp_path_factory.mktemp("biases"), {}

    def make(name: str, seed: int = 0, **options: Any) -> Bundle:
        key = (name, seed, *sorted(options.items()))
        if key not in kept:
            model = network(name, seed)
            setattr(module, name, lambda: model)
            data = folder / f"{name}.npz"
            np.savez(data, x=images(name), y=np.zeros(32, np.int64))
            kept[key] = calibrate(
                f"bias_models:{name}",
                data,
                f"seed{seed}",
                folder / f"{len(kept)}.hdrq",
                base=_source(folder, name),
                method="rtn",
                **options,
            )
        return kept[key]

    yield make
    del sys.modules[module.__name__]


def _source(folder: Path, name: str) -> Path:
    """One source checkpoint, so that bundles of two seeds may be merged."""
    path = folder / f"{name}.pt"
    if not path.exists():
        torch.save(network(name).state_dict(), path)
    return path


def session(graph: Path | bytes, fused: bool = True) -> onnxruntime.InferenceSession:
    if not fused:
        return reference_session.unfused_session(graph, threads=1)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(graph if isinstance(graph, bytes) else str(graph), options)


def outputs(graph: Path | bytes, x: Any, fused: bool = True) -> Any:
    runner = session(graph, fused)
    return runner.run(None, {runner.get_inputs()[0].name: x})[0]


def decibels(expected: Any, got: Any) -> float:
    noise = float(((got.astype(np.float64) - expected) ** 2).sum())
    return 10 * float(np.log10((expected.astype(np.float64) ** 2).sum() / max(noise, 1e-30)))


def largest_code(tensors: Any, bundle: Bundle) -> float:
    """Of all biases of a bundle, in units of s_x * s_w as its lowered codes are stored."""
    shift = shifts(bundle.manifest.tensors)
    return max(
        float(np.abs(tensors[s.bias] / (tensors[s.operand] * unit)).max())
        for s in bias_sites(ir.load(bundle.path / GRAPH))
        for unit in [tensors[s.scale].astype(np.float64) / 2 ** shift[s.codes]]
    )


FITTING = [
    ("Dead", {"per_channel": True}),
    ("Dead", {"fold": "steps"}),
    ("Dead", {"per_channel": True, "wbits": 4}),
    ("Dead", {}),
    ("Line1", {"per_channel": True}),
    ("Line3", {"per_channel": True}),
    ("Weak", {}),
    ("Weak", {"per_channel": True}),
]


@pytest.mark.parametrize(("name", "options"), FITTING, ids=lambda value: str(value))
def test_a_channel_that_is_switched_off_keeps_its_bias(
    made: Make, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    bundle = made(name, **options)
    x = images(name)
    expected = truth(name, x)
    own = decibels(expected, outputs(bundle.path / GRAPH, x, fused=False))
    engine = export(bundle, tmp_path / "engine", "ort") / "model.onnx"
    got = decibels(expected, outputs(engine, x))
    assert own > (25 if options.get("wbits") == 4 else 35)
    assert got > min(own, 60) - 1, f"the bundle {own:.1f} dB, the engine {got:.1f} dB"
    assert largest_code(bundle.tensors(), bundle) <= LARGEST * 1.01


def unfitted(bundle: Bundle, path: Path, name: str, channel: int) -> Bundle:
    """The bundle as an earlier version made it: a scale that is far too small for its bias."""
    tensors = bundle.tensors()
    scale = tensors[f"{name}_scale"].copy()
    scale[channel] = 1e-13
    codes = tensors[f"{name}_codes"].copy()
    codes[channel] = np.random.default_rng(0).integers(-7, 8, codes[channel].shape)
    tensors |= {f"{name}_scale": scale, f"{name}_codes": codes}
    graph = (bundle.path / GRAPH).read_bytes()
    return Bundle.write(path, bundle.manifest, tensors, graph, {})


@pytest.mark.parametrize("wbits", [8, 4])
@pytest.mark.parametrize("name", ["conv.weight", "fc.weight", "head.weight"])
def test_bundles_of_earlier_versions_are_mended_by_the_export(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wbits: int
) -> None:
    channel = {"conv.weight": 1, "fc.weight": 3, "head.weight": 1}[name]
    old = unfitted(
        made("Dead", per_channel=True, wbits=wbits), tmp_path / "old.hdrq", name, channel
    )
    assert largest_code(old.tensors(), old) > 2**31
    x = images("Dead")
    expected = outputs(old.path / GRAPH, x, fused=False)
    for engine in ("ort", "onnx"):
        graph = export(old, tmp_path / engine, engine) / "model.onnx"
        assert decibels(expected, outputs(graph, x, fused=engine == "ort")) > 45
    # Without the guard the bias wraps in ONNX Runtime, or is refused.
    monkeypatch.setattr(lowering_ort, "fit_biases", lambda *_: None)
    if name == "conv.weight":
        with pytest.raises(CheckFailed, match="codes of relu that differ"):
            export(old, tmp_path / "wrapped", "ort")
    else:
        with pytest.raises(ExportError, match="needed one that fits int32"):
            export(old, tmp_path / "refused", "ort")


def test_a_bias_that_is_not_finite_is_refused(made: Make, tmp_path: Path) -> None:
    bundle = made("Weak")
    tensors = bundle.tensors()
    tensors["weak.bias"] = np.full_like(tensors["weak.bias"], np.nan)
    with pytest.raises(ExportError, match=r"weak\.bias that is not finite"):
        lowered(bundle, "ort", GraphOptions(), tensors)


def test_one_scale_does_not_rise_for_one_channel_at_the_cost_of_others(
    made: Make, tmp_path: Path
) -> None:
    """Its kernel gives every channel a scale of its own; the bundle stays as it is."""
    bundle = made("Uneven")
    assert largest_code(bundle.tensors(), bundle) > 2**31
    x = images("Uneven")
    others = [0, 1, 3]
    expected = truth("Uneven", x)
    got = outputs(export(bundle, tmp_path / "engine", "ort") / "model.onnx", x)
    own = outputs(bundle.path / GRAPH, x, fused=False)
    np.testing.assert_allclose(got[:, 2], expected[:, 2], rtol=1e-6)
    floor = decibels(expected[:, others], own[:, others])
    assert floor > 35 and decibels(expected[:, others], got[:, others]) > floor - 1


def test_merges_mixers_and_new_moments_fit_too(made: Make, tmp_path: Path) -> None:
    x = images("Dead")
    for fold, options in (("weights", {"per_channel": True}), ("steps", {})):
        parents = [made("Dead", seed, fold=fold, **options) for seed in (0, 1)]
        folder = tmp_path / fold
        merged = merge(parents, folder / "merged.hdrq", method="mean", rounding="nearest")
        assert largest_code(merged.tensors(), merged) <= LARGEST * 1.01
        expected = outputs(merged.path / GRAPH, x, fused=False)
        engine = export(merged, folder / "engine", "ort") / "model.onnx"
        assert decibels(expected, outputs(engine, x)) > 45
        with DomainMixer(parents, threads=1) as mixer:
            assert decibels(expected, mixer(x)) > 45
    again = re_estimate(merged, {"all": x}, tmp_path / "again.hdrq")
    assert largest_code(again.tensors(), again) <= LARGEST * 1.01
    expected = outputs(again.path / GRAPH, x, fused=False)
    engine = export(again, tmp_path / "again", "ort") / "model.onnx"
    assert decibels(expected, outputs(engine, x)) > 45


def test_the_fold_in_the_steps_keeps_what_a_merge_averages(made: Make) -> None:
    """A channel that one domain switches off has its raw weight still."""
    bundle = made("Dead", fold="steps")
    fold = bundle.manifest.folds["conv.weight_codes"]
    assert np.abs(bundle.tensor("conv.weight_codes")[:3]).max() > 100
    gain = bundle.tensor(fold.scale) / bundle.tensor(fold.raw_scale)
    assert (gain[:2] > 1e-8).all() and (gain[:2] < 1e-2).all()


def test_a_scale_is_the_smallest_with_which_the_bias_fits() -> None:
    rng = np.random.default_rng(0)
    bias, operand = rng.normal(size=50), np.array(0.013, np.float32)
    for shift in (0, 3, 6):
        scale = smallest_scale(bias, operand, shift)
        codes = np.abs(bias) / (float(operand) * scale / 2**shift)
        np.testing.assert_allclose(codes, LARGEST, rtol=1e-9)


def test_whole_biases_turn_no_code_that_the_exact_bias_does_not(made: Make) -> None:
    """Against sums in Python integers, for every sum there is."""
    rng = np.random.default_rng(1)
    unit, step, spacing = 3e-5, 7e-3, 32
    bias = rng.normal(size=40)
    got = whole_bias(bias, np.array(unit), spacing, step, -4, 3)
    away = np.abs(got - bias) / unit
    assert (away <= 2.5).all() and (away > 0.5).any()
    for value in got:
        code = round(float(value) / unit)
        assert abs(float(value) - code * unit) < 1e-6 * max(abs(value), unit)
        for n in range(-400, 400):
            place = (code + spacing * n) * unit / step
            if -4 <= place <= 3:
                assert abs(place - np.floor(place) - 0.5) > 1e-6


def coded_outputs(graph: Path, x: Any, fused: bool) -> list[Any]:
    """What the quantizers of a lowered graph write."""
    model = onnx.load(str(graph))
    names = [n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"]
    made_ = {o for n in model.graph.node for o in n.output}
    coded = [name for name in dict.fromkeys(names) if name in made_ and "weight" not in name]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in coded)
    runner = session(model.SerializeToString(), fused)
    return runner.run(coded, {runner.get_inputs()[0].name: x})


@pytest.mark.parametrize(("wbits", "abits"), [(3, 3), (2, 2), (4, 8)])
def test_the_engine_computes_the_codes_of_its_graph(
    make: Any, inputs: Any, tmp_path: Path, wbits: int, abits: int
) -> None:
    bundle = make("Tiny", wbits=wbits, abits=abits, per_channel=True)
    graph = export(bundle, tmp_path / "engine", "ort") / "model.onnx"
    mine, theirs = (coded_outputs(graph, inputs, fused) for fused in (False, True))
    assert len(mine) > 5
    off = [float((a != b).mean()) for a, b in zip(mine, theirs, strict=True)]
    assert max(off) <= 1e-4, off


def test_half_a_unit_of_bias_turns_codes(make: Any, inputs: Any, tmp_path: Path) -> None:
    """What the test above would miss if biases were not whole."""
    bundle = make("Tiny", wbits=3, abits=3, per_channel=True)
    tensors = bundle.tensors()
    for site in bias_sites(ir.load(bundle.path / GRAPH)):
        if site.whole:
            unit = tensors[site.operand] * tensors[site.scale] / 2**5
            tensors[site.bias] = (tensors[site.bias] + 0.49 * unit).astype(np.float32)
    assert fitted(
        tensors, bias_sites(ir.load(bundle.path / GRAPH)), shifts(bundle.manifest.tensors)
    )
    old = Bundle.write(
        tmp_path / "old.hdrq", bundle.manifest, tensors, (bundle.path / GRAPH).read_bytes(), {}
    )
    graph = export(old, tmp_path / "engine", "ort") / "model.onnx"
    mine, theirs = (coded_outputs(graph, inputs, fused) for fused in (False, True))
    assert max(float((a != b).mean()) for a, b in zip(mine, theirs, strict=True)) > 1e-4


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "clamp_min": lambda x: x.clamp(min=0.1),
    "sigmoid": torch.sigmoid,
    "leaky": F.leaky_relu,
    "none": lambda x: x,
}
FORMS = ("linear", "no bias", "matmul")


class Siblings(nn.Module):
    """A linear layer of every form before every activation, each into a sum and into a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 8)
        pairs = list(itertools.product(ACTIVATIONS, FORMS))
        self.layers = nn.ModuleDict(
            {f"{act}-{form}": nn.Linear(8, 8, bias=form == "linear") for act, form in pairs}
        )
        self.free = nn.ParameterDict({act: torch.randn(8, 8) * 0.3 for act in ACTIVATIONS})
        self.shift = nn.ParameterDict({act: torch.randn(8) * 0.3 for act in ACTIVATIONS})
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.stem(x))
        total = y
        for (act, function), form in itertools.product(ACTIVATIONS.items(), FORMS):
            product = (
                y @ self.free[act] + self.shift[act]
                if form == "matmul"
                else self.layers[f"{act}-{form}"](y)
            )
            total = total + function(product)
            y = function(product) if form == "linear" else y
        z = self.conv(total[:, None]).clamp(min=0.1).mean(1)
        return self.head(z)


def test_every_linear_layer_stays_int8_whatever_reads_it(tmp_path: Path, made: Make) -> None:
    MODELS["Siblings"], SHAPES["Siblings"] = Siblings, (12,)
    bundle = made("Siblings", per_channel=True)
    engine = export(bundle, tmp_path / "engine", "ort") / "model.onnx"
    x = images("Siblings")
    assert decibels(truth("Siblings", x), outputs(engine, x)) > 25
    graph = outputs(bundle.path / GRAPH, x, fused=False)
    assert decibels(graph, outputs(engine, x)) > 45


def test_the_report_says_what_a_layer_was_fused_to() -> None:
    layer = Layer(
        node="fc/Gemm",
        op="Gemm",
        module="fc",
        weight=None,
        weight_bits=8,
        activation_bits=(8,),
        requested="int8",
    )
    node = onnx.helper.make_node("FusedGemm", ["x", "w"], ["y"], "fused fc/Gemm")
    assert precision._find_ort(layer, [node]) is node
    row = precision._row(layer, "float32", "FusedGemm fused fc/Gemm")
    report = precision._report("ort", "a dump", [row])
    gemm = ir.node("Gemm", [ir.val("x"), ir.val("w")], name="fc/Gemm")
    graph = ir.Graph([], gemm.outputs, nodes=[gemm], opset_imports={"": 21})
    (found,) = explain(report, ir.Model(graph, ir_version=10)).layers
    assert "fused it with what reads its output (FusedGemm)" in found.reason


class Twice(nn.Module):
    """One layer applied to two tensors of different range, and a convolution likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.shared, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.stem(x))
        y = F.relu(self.conv(F.relu(self.conv(y)) * 3)).mean((2, 3))
        return self.head(F.relu(self.shared(F.relu(self.shared(y)) * 5)))


@pytest.mark.parametrize("wbits", [8, 5, 4])
def test_a_layer_that_is_applied_twice_is_lowered_once(
    made: Make, tmp_path: Path, wbits: int
) -> None:
    MODELS["Twice"] = Twice
    bundle = made("Twice", wbits=wbits, per_channel=True)
    engine = export(bundle, tmp_path / "engine", "ort") / "model.onnx"
    x = images("Twice")
    graph = outputs(bundle.path / GRAPH, x, fused=False)
    assert decibels(truth("Twice", x), graph) > (25 if wbits == 8 else 5)
    assert decibels(graph, outputs(engine, x)) > 45
