"""The user's own module is the reference: capture, names, signs, blocks, and what is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hdrq_deploy.calibration import calibrate, preparation
from hdrq_deploy.calibration.blocks import find_blocks
from hdrq_deploy.calibration.capture import Capture, capture, single_output
from hdrq_deploy.calibration.fold_batch_norm import folded
from hdrq_deploy.calibration.loading import load_model, load_state
from hdrq_deploy.calibration.placement import nonnegative_nodes, plan_quantizers
from hdrq_deploy.calibration.request import Quantization
from hdrq_deploy.calibration.tensors import attribute, free_name
from hdrq_deploy.cli import calibrate as command
from hdrq_deploy.errors import CheckFailed, ModelError
from hdrq_deploy.graph import reference_session
from hdrq_deploy.graph.edits import constant, distinct_names

MODULES = '''
import torch
from torch import nn
from torch.nn import functional as F


class Gate(nn.Module):
    """A layer whose weight, and not whose output, is the conv's: names of ours beside them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)
        self.weight_scale = nn.Parameter(torch.rand(8) + 0.5)
        self.weight_codes = nn.Parameter(torch.rand(8) + 0.5)
        self.bias = nn.Parameter(torch.randn(8))
        self.act_scale = nn.Parameter(torch.tensor(1.5))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.bn(F.conv2d(x, self.weight, padding=1)) + self.bias.view(-1, 1, 1)
        y = F.relu(y * self.weight_scale.view(-1, 1, 1) - self.weight_codes.view(-1, 1, 1))
        return F.relu(y) * self.act_scale


class Names(nn.Module):
    """Tensors called like the tensors, nodes and ports that calibration makes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.folded_0 = nn.Parameter(torch.tensor(0.5))
        self.relu = nn.Parameter(torch.tensor(1.25))
        self.input = nn.Parameter(torch.rand(8))
        self.output = nn.Parameter(torch.rand(4))
        self.conv2d = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = Gate()
        self.weight = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.bias = nn.Parameter(torch.randn(8))
        self.bn = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.conv2d(x - self.mean)) * torch.exp(self.folded_0) * self.relu
        x = (self.gate(x) * self.folded_0).mean((2, 3)) + self.input
        x = F.relu(self.bn(F.linear(x, self.weight)) + self.bias)
        return self.fc(x) + self.output


class Wrapped(nn.Module):
    """The commonest names of an inner network."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.module = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.modelnet = nn.Linear(8, 4)

    def forward(self, x):
        return self.modelnet(self.module(self.model(x)).mean((2, 3)))


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.b.bias = self.a.bias
        self.n, self.m, self.fc = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(F.relu(self.m(self.b(F.relu(self.n(self.a(x)))))).mean((2, 3)))


class Twice(nn.Module):
    """One linear layer for two inputs, and one convolution that is first and inner layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 8)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        a = F.relu(self.conv(F.relu(self.conv(x)))).mean((2, 3))
        b = F.relu(self.conv(x.flip(3) * 0.5)).mean((2, 3))
        return self.head(torch.cat([F.relu(self.fc(a)), F.relu(self.fc(b))], 1))


class Left(nn.Module):
    """Constants on the left of products, as graph networks have them."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.rand(16, 16) / 16)
        self.register_buffer("b", torch.rand(5, 16) / 16)
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.matmul(self.a, F.relu(self.conv(x)))
        x = torch.einsum("vw,nchw->nchv", self.b, F.relu(x))
        return self.fc(x.mean((2, 3)))


class Pools(nn.Module):
    """Adaptive pooling without an ONNX form, and a bilinear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up, self.odd = nn.AdaptiveAvgPool2d((20, 3)), nn.AdaptiveAvgPool2d((3, 5))
        self.max = nn.AdaptiveMaxPool2d((4, 3))
        self.line, self.top = nn.AdaptiveAvgPool1d(5), nn.AdaptiveMaxPool1d(4)
        self.even = nn.AdaptiveMaxPool2d(7)
        self.bilinear, self.fc = nn.Bilinear(8, 8, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.clamp(self.conv(x), 0.05, 6)
        y = self.max(self.even(x)) + self.odd(x).mean((2, 3), True) + self.up(x).amax((2, 3), True)
        rows = self.top(self.line(x.flatten(2))).mean(2)
        return self.fc(self.bilinear(y.mean((2, 3)), rows))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv3d(1, 8, 3, padding=1, bias=False)
        self.b, self.fc = nn.Conv3d(8, 8, 3, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x.unsqueeze(1))))).mean((2, 3, 4)))


class TimeMajor(nn.Module):
    """Attention as nn.MultiheadAttention has it by default: the sequence first."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.attention = nn.MultiheadAttention(16, 2)
        self.mid, self.fc = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).permute(2, 0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.relu(self.mid(x))
        return self.fc(x.mean(0))


class Interleaved(nn.Module):
    """Two copies one behind the other on axis 0: a multiple of the batch, images apart."""

    def __init__(self):
        super().__init__()
        self.conv, self.mid = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.conv(torch.cat([x, x.flip(3)])))
        first, second = F.relu(self.mid(x)).mean((2, 3)).chunk(2)
        return self.fc(first - second)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x.sub_(0.5).mul_(4)
        return self.fc(F.relu_(self.conv(F.relu_(x))).mean((2, 3)))


class Branch(InPlace):
    def __init__(self):
        super().__init__()
        self.single = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3))
        return self.single(x) if x.shape[0] == 1 else self.fc(x)


class Squeeze(InPlace):
    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).squeeze())


class Dropout(InPlace):
    def forward(self, x):
        return self.fc(F.dropout(F.relu(self.conv(x)).mean((2, 3)), 0.5))


class Reads(InPlace):
    """A branch on the values of a tensor, which torch.export prints pages about."""

    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3))
        return self.fc(x if x.mean() > 0.1 else -x)


class Autocast(InPlace):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.fc(F.relu(self.conv(x)).mean((2, 3))).float()


class Counting(InPlace):
    """Writes a buffer that its output depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.ones(8))

    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3))
        self.average.mul_(0.5).add_(x.mean(0))
        return self.fc(x * self.average)


class Harmless(InPlace):
    """Writes a buffer that its output does not depend on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls.add_(1)
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.LazyConv2d(8, 3), nn.LazyLinear(4)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


class Stubborn(InPlace):
    def load_state_dict(self, *args, **kwargs):
        raise ValueError("version 2 checkpoints only\\nand more")


class Versioned(InPlace):
    """Like torchvision's MNASNet: reads a version from the state's metadata."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version") != 2:
            raise ValueError("no version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def half():
    return Harmless().half()


def double():
    return Harmless().double()


def parallel():
    return nn.DataParallel(Wrapped())


def scripted():
    return torch.jit.script(Wrapped())
'''
SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("capture")
    (path / "hard_models.py").write_text(MODULES)
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", x=rng.random((40, *SHAPE), dtype=np.float32), y=np.zeros(40, int))
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))


def trained(name: str) -> nn.Module:
    """A model of ``hard_models`` with BatchNorms that have seen something."""
    torch.manual_seed(0)
    model = load_model(f"hard_models:{name}")
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model


def decibels(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    assert expected.shape == got.shape
    noise = float(((got - expected) ** 2).sum())
    return 10 * np.log10(float((expected**2).sum()) / max(noise, 1e-30))


def graph_against_module(folder: Path, out: Path, name: str, **options: Any) -> float:
    """SQNR in dB of a bundle's graph against the user's module, over batches of 24, 3 and 1."""
    model = trained(name)
    torch.save(model.state_dict(), folder / f"{name}.pt")
    bundle = calibrate(
        f"hard_models:{name}", folder / "data.npz", "x", out / "b.hdrq", folder / f"{name}.pt",
        **options,
    )  # fmt: skip
    session = reference_session.unfused_session(bundle.path / "model.onnx")
    x = np.random.default_rng(1).random((24, *SHAPE), dtype=np.float32)
    figures = []
    for size in (24, 3, 1):
        with torch.no_grad():
            expected = model(torch.from_numpy(x[:size].copy())).numpy()
        figures.append(decibels(expected, session.run(None, {"input": x[:size]})[0]))
    return min(figures)


@pytest.mark.parametrize(
    "name",
    ["Names", "Wrapped", "SharedBias", "Twice", "Left", "Pools", "Volume", "TimeMajor", "InPlace"],
)
def test_bundles_compute_what_the_module_computes(folder: Path, tmp_path: Path, name: str) -> None:
    assert graph_against_module(folder, tmp_path, name, method="float") > 90
    # INT8 per channel: about 6 dB a bit, less what two to five layers lose.
    assert graph_against_module(folder, tmp_path, name, method="rtn", per_channel=True) > 28


@pytest.mark.parametrize("name", ["Names", "SharedBias", "Twice"])
def test_names_and_shared_weights_hold_with_batchnorm_in_the_scales(
    folder: Path, tmp_path: Path, name: str
) -> None:
    assert graph_against_module(folder, tmp_path, name, method="rtn", fold="steps") > 28
    options = {"method": "rtn", "per_channel": True, "wbits": 4}
    assert graph_against_module(folder, tmp_path, name, **options) > 10


def test_a_weight_that_is_first_and_inner_layer_keeps_eight_bits(folder: Path) -> None:
    found = folded(capture(trained("Twice"), torch.rand(2, *SHAPE)))
    plan = plan_quantizers(found, Quantization(4, 8, True))
    bits = {site.weight: set() for site in plan.layers}  # type: ignore[var-annotated]
    for site in plan.layers:
        assert site.spec is not None
        bits[site.weight].add(site.spec.bits)
    assert bits == {"conv.weight": {8}, "fc.weight": {4}, "head.weight": {8}}


def test_every_constant_operand_of_a_product_is_a_weight(folder: Path) -> None:
    found = folded(capture(trained("Left"), torch.rand(2, *SHAPE)))
    plan = plan_quantizers(found, Quantization(8, 8, True))
    assert len(plan.layers) == 4
    assert all(site.spec is not None for site in plan.layers)
    assert [site.spec.axis for site in plan.layers] == [0, 1, None, 0]  # type: ignore[union-attr]


def test_free_names_step_aside_for_everything_that_a_module_has() -> None:
    module = nn.Module()
    module.relu = nn.Parameter(torch.ones(1))
    module.conv = nn.Conv2d(1, 1, 1)
    assert free_name(module, "conv.weight_scale") == "conv.weight_scale"
    assert free_name(module, "conv.weight") == "conv.weight_2"
    assert free_name(module, "conv.weight", {"conv.weight_2"}) == "conv.weight_3"
    assert free_name(module, "relu.act_scale") == "relu_2.act_scale"
    assert free_name(module, "to.act_scale") == "to_2.act_scale"  # nn.Module.to
    assert free_name(module, "conv") == "conv_2"


def test_a_file_never_has_two_values_of_one_name() -> None:
    """A buffer ``mean`` beside a node that computes ``mean``, computed by onnx.reference."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10)
    buffer = constant(model, "mean", np.array([1.0, 2.0], np.float32))
    assert constant(model, "mean", np.zeros(2, np.float32)).name == "mean_2"
    nodes = [ir.node("Neg", [x])]
    nodes.append(ir.node("Add", [nodes[0].outputs[0], buffer]))
    nodes.append(ir.node("Mul", [nodes[1].outputs[0], nodes[0].outputs[0]]))
    for node, name in zip(nodes, ("mean", "mean", "y"), strict=True):
        node.outputs[0].name = name
        model.graph.append(node)
    y = nodes[-1].outputs[0]
    y.shape, y.type = ir.Shape([2]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(y)
    distinct_names(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    value = np.array([3.0, -5.0], np.float32)
    (got,) = ReferenceEvaluator(proto).run(None, {"x": value})
    np.testing.assert_array_equal(got, (-value + [1, 2]) * -value)


@pytest.mark.parametrize(
    ("name", "options"),
    [("half", {}), ("double", {}), ("parallel", {}), ("Lazy", {}), ("Versioned", {})],
)
def test_modules_as_users_have_them_are_taken(
    folder: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    module = sys.modules.get("hard_models") or __import__("hard_models")
    raw = getattr(module, name)()
    if name == "Lazy":
        raw(torch.rand(2, *SHAPE))
    weights = tmp_path / "w.pt"
    torch.save(raw.state_dict(), weights)  # DataParallel's keys begin with "module."
    bundle = calibrate(
        f"hard_models:{name}", folder / "data.npz", "x", tmp_path / "b", weights, method="float"
    )
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = raw.float().eval()(x.clone()).numpy()
    session = reference_session.unfused_session(bundle.path / "model.onnx")
    assert decibels(expected, session.run(None, {"input": x.numpy()})[0]) > 90


def test_the_prediction_among_several_outputs_is_the_one_that_is_named_so() -> None:
    import dataclasses

    a, b = torch.zeros(1), torch.ones(1)

    @dataclasses.dataclass
    class Out:
        features: torch.Tensor
        logits: torch.Tensor

    assert single_output(a) is a and single_output((None, a, b)) is a
    assert single_output({"loss": None, "features": a, "logits": b}) is b
    assert single_output({"aux": a, "out": b}) is b and single_output(Out(a, b)) is b
    assert single_output({"loss": None, "anything": b}) is b
    for several in ({"features": a, "embedding": b}, {"loss": None}):
        with pytest.raises(ModelError, match="nothing says which is the prediction"):
            single_output(several)
    with pytest.raises(ModelError, match="returns int"):
        single_output(3)


def test_a_wrapper_s_prefix_is_taken_off_or_put_on_where_only_that_fits(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    outer = nn.Module()
    outer.module = inner
    for saved, model in ((inner, outer), (outer, inner), (nn.DataParallel(outer), inner)):
        state = {k: torch.rand_like(v) for k, v in saved.state_dict().items()}
        torch.save(state, tmp_path / "w.pt")
        load_state(model, tmp_path / "w.pt", "adapted")
        for got, expected in zip(model.state_dict().values(), state.values(), strict=True):
            assert torch.equal(got, expected)
    torch.save({"module.0.weight": torch.ones(2, 2), "other": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"2 missing \(first: 0.weight\), 2 unexpected"):
        load_state(inner, tmp_path / "w.pt", "adapted")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("Branch", 3, r"batch 1, first in single;.*treat every batch size alike"),
        ("Squeeze", 3, r"gives shape \(1, 4\) where the model gives \(4,\) at batch 1"),
        ("Dropout", 3, r"own output changes from call to call.*self.training"),
        ("Counting", 3, r"own output changes from call to call.*write no buffers"),
        ("Reads", 2, r"depends on the values of a tensor: use torch.where"),
        ("Autocast", 2, r"computes in bfloat16 in .*; needed float32"),
        ("scripted", 2, r"gave a ScriptModule.*needed the torch module"),
        ("Stubborn", 2, r"load_state_dict failed \(ValueError: version 2 checkpoints only\)"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_learned(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    code: int,
    message: str,
) -> None:
    import re

    state = getattr(__import__("hard_models"), name)().state_dict()
    torch.save(state, tmp_path / "w.pt")
    flags = ["--data", str(folder / "data.npz"), "--domain", "x", "--method", "rtn"]
    flags += ["--weights", str(tmp_path / "w.pt"), "-o", str(tmp_path / "b.hdrq")]
    assert command.main(["--model", f"hard_models:{name}", *flags]) == code
    told = capsys.readouterr().err.strip()
    assert re.search(message, told) and "\n" not in told
    assert not (tmp_path / "b.hdrq").exists()


@pytest.mark.parametrize(
    "text", ["raise RuntimeError('no\\nGPU')", "import sys\nsys.exit(3)", "def f(:\n"]
)
def test_a_module_that_cannot_be_imported_says_so_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (folder / "raising_models.py").write_text(text)
    flags = ["--data", "none", "--domain", "x", "-o", str(folder / "none.hdrq"), "--distance", "0"]
    assert command.main(["--model", "raising_models:f", *flags]) == 2
    told = capsys.readouterr().err
    assert "importing raising_models failed" in told and told.count("\n") == 1


@pytest.mark.parametrize("change", ["weight", "pad", "swapped", "sign"])
def test_a_wrong_capture_is_found_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The check itself: what capture makes is changed behind its back."""

    def wrong(model: nn.Module, example: torch.Tensor) -> Capture:
        found = capture(model, example)
        found = Capture(copy.deepcopy(found.module), found.example)  # its tensors are the model's
        conv = next(n for n in found.graph.nodes if str(n.target).startswith("aten.conv2d"))
        weight = attribute(found.module, "module.0.weight")
        if change == "weight":
            weight[0] *= 1.1
        elif change == "swapped":
            weight[[0, 1]] = weight[[1, 0]].clone()
        elif change == "pad":
            conv.args = (*conv.args[:3], [1, 1], [1, 1])
        else:
            attribute(found.module, "model.1.weight").mul_(-1)
        found.module.recompile()
        return found

    monkeypatch.setattr(preparation, "capture", wrong)
    monkeypatch.setattr(Capture, "clone_with", lambda self, state: _copied(self))
    torch.manual_seed(3)
    with pytest.raises(CheckFailed, match=r"differs from the model|gives shape") as failure:
        calibrate(
            "hard_models:Wrapped", folder / "data.npz", "x", tmp_path / "b", method="rtn"
        )  # fmt: skip
    # A new BatchNorm changes nothing, so its output is still found: the convolution's.
    first = {"weight": "module.0", "swapped": "module.0", "pad": "model.0", "sign": "model.2"}
    assert f"first in {first[change]};" in str(failure.value)


def _copied(found: Capture) -> Capture:
    return Capture(copy.deepcopy(found.module), found.example)


def test_another_forward_of_the_same_name_and_layers_is_captured_anew(
    folder: Path, tmp_path: Path
) -> None:
    module = __import__("hard_models")
    for scale in (1.0, -3.0):
        torch.manual_seed(0)
        module.Harmless.forward = lambda self, x, by=scale: self.fc(  # type: ignore[misc]
            F.relu(self.conv(x * by)).mean((2, 3))
        )
        bundle = calibrate(
            "hard_models:Harmless", folder / "data.npz", "x", tmp_path / "b", method="float"
        )
        torch.manual_seed(0)
        x = torch.rand(3, *SHAPE)
        torch.manual_seed(0)
        with torch.no_grad():
            expected = load_model("hard_models:Harmless")
        values = dict(bundle.tensors())
        with torch.no_grad():
            y = F.relu(F.conv2d(x * scale, torch.tensor(values["conv.weight"]),
                                torch.tensor(values["conv.bias"]))).mean((2, 3))  # fmt: skip
            y = F.linear(y, torch.tensor(values["fc.weight"]), torch.tensor(values["fc.bias"]))
        session = reference_session.unfused_session(bundle.path / "model.onnx")
        assert decibels(y.numpy(), session.run(None, {"input": x.numpy()})[0]) > 90
        assert expected is not None


SIGNS = {
    "difference": lambda a, b: torch.add(a, b, alpha=-1),
    "half": lambda a, b: torch.add(a, b, alpha=0.5),
    "minus": lambda a, b: a - b,
    "negated": lambda a, b: -(a + b),
    "clamp above": lambda a, b: torch.clamp(a - 1, 0, -1),
    "clamp": lambda a, b: torch.clamp(a - b, 0.05, 6),
    "low clamp": lambda a, b: torch.clamp(a - b, -0.05, 6),
    "divisor": lambda a, b: F.avg_pool2d(a, 2, divisor_override=-4),
    "average": lambda a, b: F.avg_pool2d(a, 2, divisor_override=3),
    "leaky": lambda a, b: F.leaky_relu(a - b, 0.1),
    "elu": lambda a, b: F.elu(a - b),
    "hardtanh": lambda a, b: F.hardtanh(a - b),
    "hardtanh 0 1": lambda a, b: F.hardtanh(a - b, 0.0, 1.0),
    "product": lambda a, b: a * b,
    "product of a negative": lambda a, b: a * (b - 1),
    "maximum": lambda a, b: torch.maximum(a, b),
    "bicubic": lambda a, b: F.interpolate(a, scale_factor=2, mode="bicubic"),
    "bilinear": lambda a, b: F.interpolate(a, scale_factor=2, mode="bilinear"),
    "joined": lambda a, b: torch.cat([a, -b], 1),
    "joined plain": lambda a, b: torch.cat([a, b], 1),
    "padded": lambda a, b: F.pad(a, (1, 1, 1, 1), value=-1.0),
    "rsub": lambda a, b: 1 - a * 5,
    "div": lambda a, b: a / -2.0,
}
NONNEGATIVE = {
    "half", "clamp", "average", "hardtanh 0 1", "product", "maximum", "bilinear", "joined plain",
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNS)
def test_a_tensor_is_unsigned_only_where_it_can_never_be_negative(name: str) -> None:
    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return SIGNS[name](F.relu(y), F.relu(-y + 0.3))  # type: ignore[no-untyped-call]

    torch.manual_seed(0)
    found = capture(Signs(), torch.randn(2, *SHAPE))
    claimed = nonnegative_nodes(found.graph)
    output = next(n for n in found.graph.nodes if n.op == "output").args[0]
    output = output[0] if isinstance(output, (tuple, list)) else output
    assert (output in claimed) == (name in NONNEGATIVE)

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            assert n not in claimed or float(value.min()) >= 0, n
            return value

    Watch(found.module).run(torch.randn(4, *SHAPE) * 3)


@pytest.mark.parametrize("name", ["TimeMajor", "Interleaved", "Twice"])
def test_blocks_are_cut_only_where_images_are_rows(folder: Path, name: str) -> None:
    """Brute force: every tensor between blocks, of each image alone and of all together."""
    found = folded(capture(trained(name), torch.rand(2, *SHAPE)))
    blocks = find_blocks(found)
    kinds = ("conv2d", "linear", "matmul", "bmm", "mm")
    kinds = tuple(f"aten.{kind}." for kind in kinds)
    heavy = [n for n in found.graph.nodes if str(n.target).startswith(kinds)]
    assert [n for b in blocks for n in b.heavy] == heavy
    between = {n for block in blocks for n in (*block.inputs, *block.outputs)}
    images = torch.rand(3, *SHAPE)

    def values(x: torch.Tensor) -> dict[Any, torch.Tensor]:
        kept = {}

        class Keep(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                value = super().run_node(n)
                if n in between:
                    kept[n] = value
                return value

        Keep(found.module).run(x)
        return kept

    together = values(images)
    alone = [values(image[None]) for image in images]
    for node, rows in together.items():
        torch.testing.assert_close(rows, torch.cat([a[node] for a in alone]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [3, 33])
def test_learning_survives_a_batch_that_is_not_on_axis_0(
    folder: Path, tmp_path: Path, count: int
) -> None:
    from hdrq_deploy.calibration.recipe import Options

    model = trained("TimeMajor")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    x = np.random.default_rng(0).random((count, *SHAPE), dtype=np.float32)
    np.savez(tmp_path / "few.npz", x=x, y=np.zeros(count, int))
    bundle = calibrate(
        "hard_models:TimeMajor", tmp_path / "few.npz", "x", tmp_path / "b", tmp_path / "w.pt",
        tmp_path / "w.pt", method="hdrq", options=Options.of("hdrq", iters=5, batch=2),
    )  # fmt: skip
    session = reference_session.unfused_session(bundle.path / "model.onnx")
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    assert decibels(expected, session.run(None, {"input": x})[0]) > 20
