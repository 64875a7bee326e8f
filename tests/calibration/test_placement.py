"""Where quantizers go: last layers, the network's input, and the placement of the paper."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdrq_deploy.calibration import calibrate, fake_quantized, preparation
from hdrq_deploy.calibration.capture import Capture, capture
from hdrq_deploy.calibration.nodes import module_path
from hdrq_deploy.calibration.placement import EARLIER, Plan, last_layers, plan_quantizers
from hdrq_deploy.calibration.recipe import Recipe
from hdrq_deploy.calibration.request import CalibrationRequest, Quantization
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.errors import HdrqError, SpecError
from hdrq_deploy.exporters import export
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.graph import reference_session
from hdrq_deploy.merging import merge

SIDE = 16


class Heads(nn.Module):
    """A stem, two convolutions and two classifiers; ``join`` says what becomes of them."""

    def __init__(self, join: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.mix, self.up = nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, torch.relu(self.body(torch.relu(self.stem(x)))))


def graph_of(join: Callable[[Any, Tensor], Tensor]) -> Capture:
    torch.manual_seed(0)
    return capture(Heads(join).eval(), torch.rand(2, 3, SIDE, SIDE))


def attended(m: Any, f: Tensor) -> Tensor:
    """As HRDA has it: scores at two scales, weighed by an attention that is a classifier too."""
    share = torch.sigmoid(m.two(f))
    return F.interpolate(share * m.one(f) + (1 - share) * m.one(f * 2), scale_factor=2.0)


def product(m: Any, f: Tensor) -> Tensor:
    """Scores as a product of two activations, as in a mask classifier."""
    return m.one(f).flatten(2) @ m.two(f).flatten(2).transpose(1, 2)


JOINS: dict[str, tuple[Callable[[Any, Tensor], Any], set[str]]] = {
    "one head": (lambda m, f: m.one(f), {"one"}),
    "two heads": (lambda m, f: m.one(f) + m.two(f), {"one", "two"}),
    "attention": (attended, {"one", "two"}),
    "a shared classifier": (lambda m, f: m.one(f) - m.one(f.flip(3)), {"one"}),
    "an auxiliary output": (lambda m, f: (m.one(f), m.two(f)), {"one"}),
    "softmax and resizing": (
        lambda m, f: F.interpolate(m.one(f).softmax(1), scale_factor=2.0, mode="bilinear"),
        {"one"},
    ),
    "a head behind a head": (lambda m, f: m.mix(m.one(f)) * m.two(f).sigmoid(), {"mix", "two"}),
    "scores that are refined": (lambda m, f: m.one(f) + m.mix(m.one(f).relu()), {"one", "mix"}),
    "the widest class": (lambda m, f: torch.stack([m.one(f), m.two(f)]).amax(0), {"one", "two"}),
    "a transposed convolution": (lambda m, f: m.up(m.one(f)), {"one", "up"}),
    "a product": (product, {"one", "two", "matmul"}),
    "features without a head": (lambda m, f: f + m.mix(m.one(f)).mean(), {"body", "mix"}),
}


@pytest.mark.parametrize("name", JOINS)
def test_every_layer_that_reaches_the_output_alone_is_a_last_one(name: str) -> None:
    join, expected = JOINS[name]
    found = graph_of(join)
    assert {module_path(node) for node in last_layers(found.graph)} == expected
    plan = plan_quantizers(found, Quantization(4, 4))
    wide = {site.module for site in plan.layers if site.spec and site.spec.bits == 8}
    assert wide == (expected | {"stem"}) - {"up", "matmul"}
    widths = {site.module: set(site.activation_bits) for site in plan.layers}
    assert all(widths[module] == {8} for module in expected - {"up"})
    assert widths["body"] == ({8} if "body" in expected else {4})


def test_one_last_layer_is_what_it_was() -> None:
    """The rule before: of all layers with a weight the last in the graph."""
    for name in ("one head", "an auxiliary output", "softmax and resizing"):
        found = graph_of(JOINS[name][0])
        weighted = [n for n in found.graph.nodes if str(n.target).startswith("aten.conv2d")]
        assert last_layers(found.graph) == {weighted[-1]}


def bits_of(plan: Plan) -> dict[str, int]:
    return {site.module: site.spec.bits for site in plan.activations}


def test_what_is_computed_from_the_images_alone_is_the_network_s_input() -> None:
    class Crops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.join = nn.Conv2d(3, 8, 3), nn.Conv2d(11, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            whole = F.interpolate(x, scale_factor=0.5)
            seen = torch.stack([whole, x[:, :, :8, :8]], 1).flatten(0, 1)
            f = torch.relu(self.conv(seen - 0.5))
            return torch.relu(self.join(torch.cat([f, seen[:, :, 1:7, 1:7]], 1))).mean((2, 3))

    torch.manual_seed(0)
    found = capture(Crops(), torch.rand(2, 3, SIDE, SIDE))
    first = next(site for site in plan_quantizers(found, Quantization(4, 4)).layers)
    assert first.activation_bits == (8,)
    paper = plan_quantizers(found, Quantization(4, 4), "paper")
    first, second = paper.layers
    assert first.activation_bits == () and "network's input" in first.reason
    # Of what is joined, the cut from the images stays real.
    assert second.activation_bits == (8,) and "joins" in second.reason
    assert len(paper.activations) == 1


class Levels(nn.Module):
    """Two levels of unlike range are joined; a residual add; two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.small, self.large = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fuse, self.head, self.share = (
            nn.Conv2d(n, m, 1) for n, m in ((16, 8), (8, 4), (8, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        small = torch.relu(self.small(x))
        large = 20 * torch.sigmoid(self.large(x) + small)
        f = torch.relu(self.fuse(torch.cat([small, large], 1)))
        return self.head(f) * torch.sigmoid(self.share(f))


def levels() -> Levels:
    torch.manual_seed(0)
    return Levels()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("placement")
    x = np.random.default_rng(0).standard_normal((16, 3, SIDE, SIDE)).astype(np.float32)
    sys.modules["placed_levels"] = sys.modules[__name__]
    images = ImageSet(x, None, None, None)
    return {
        placement: calibrate(
            "placed_levels:levels", images, "d", folder / f"{placement}.hdrq",
            method="rtn", wbits=4, abits=4, placement=placement,
        )
        for placement in ("engine", "paper")
    }  # fmt: skip


def test_the_paper_places_no_quantizers_that_only_engines_need(bundles: dict[str, Bundle]) -> None:
    sites = {name: [a.module for a in b.manifest.activations] for name, b in bundles.items()}
    assert sites["engine"] == ["input", "relu", "relu_1", "large", "cat", "relu_2"]
    scales = {a.scale: a.bits for a in bundles["paper"].manifest.activations}
    assert list(scales.values()) == [4, 4, 4, 8]  # stem, small, large, fuse
    # In the graph: a pair of Q and DQ on every branch of Concat, none between it and its reader.
    graph = onnx.load(str(bundles["paper"].path / "model.onnx"), load_external_data=False).graph
    made = {out: node for node in graph.node for out in node.output}
    (join,) = (node for node in graph.node if node.op_type == "Concat")
    branches = [made[name] for name in join.input]
    assert [node.op_type for node in branches] == ["DequantizeLinear"] * 2
    assert len({node.input[1] for node in branches}) == 2
    reader = next(node for node in graph.node if join.output[0] in node.input)
    assert reader.name == "fuse/Conv"
    layers = {layer.module: layer for layer in bundles["paper"].manifest.layers}
    asked = {name: layer.requested for name, layer in layers.items()}
    assert {name for name, kind in asked.items() if kind == "float32"} == {"stem", "fuse"}
    assert layers["stem"].activation_bits == () and layers["fuse"].activation_bits == (4,)
    assert layers["stem"].weight_bits == layers["head"].weight_bits == 8
    assert layers["share"].weight_bits == 8 and layers["share"].activation_bits == (8,)


def by_hand(bundle: Bundle, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The paper's network written by hand, from the bundle's tensors."""
    manifest, tensors = bundle.manifest, dict(bundle.tensors())

    def conv(y: Tensor, name: str, padding: int = 0) -> Tensor:
        entry = manifest.tensors[f"{name}.weight_codes"]
        weight = torch.tensor(tensors[f"{name}.weight_codes"].astype(np.float32))
        weight = weight * float(tensors[str(entry.scale)])
        return F.conv2d(y, weight, torch.tensor(tensors[f"{name}.bias"]), padding=padding)

    grids = iter(manifest.activations)

    def rounded(y: Tensor) -> Tensor:
        a = next(grids)
        scale = float(tensors[a.scale])
        return (y / scale).round().clamp(a.lo, a.hi) * scale

    y = rounded(conv(torch.tensor(x), "stem", 1).relu())
    small = rounded(conv(y, "small", 1).relu())
    large = rounded(20 * torch.sigmoid(conv(y, "large", 1) + small))
    f = rounded(conv(torch.cat([small, large], 1), "fuse").relu())
    return (conv(f, "head") * conv(f, "share").sigmoid()).numpy()


@pytest.mark.parametrize("engine", ["ort", "onnx", "trt-rtx"])
def test_exports_of_the_paper_s_placement_are_right_and_say_what_runs_in_float(
    bundles: dict[str, Bundle], engine: str, tmp_path: Path
) -> None:
    if engine == "trt-rtx":
        pytest.importorskip("tensorrt_rtx")
    folder = export(bundles["paper"], tmp_path / "engine", engine)
    report = json.loads((folder / "precision.json").read_text())
    rows = {row["module"]: row for row in report["layers"]}
    real = {name for name, row in rows.items() if row["requested"] == "float32"}
    assert real == {"stem", "fuse"}
    assert "network's input" in rows["stem"]["reason"]
    assert "a scale each" in rows["fuse"]["reason"]
    if engine != "onnx":
        # The residual sum behind `large` is fused by TensorRT, which reads its other branch.
        executed = {name: row["executed"] for name, row in rows.items()}
        assert {name for name, kind in executed.items() if kind == "int8"} == set(rows) - real
        assert executed["fuse"].startswith("float")
        assert report["summary"] == "4/6 Conv INT8"
    if engine != "trt-rtx":
        x = np.random.default_rng(1).standard_normal((5, 3, SIDE, SIDE)).astype(np.float32)
        session = reference_session.unfused_session(folder / "model.onnx")
        got = session.run(None, {session.get_inputs()[0].name: x})[0]
        expected = by_hand(bundles["paper"], x)
        assert reference_session.compare(expected, got)["relative_rms"] < 1e-3
        # Layers in float compute from real weights, not from codes at every run.
        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
        constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for name in real:
            weight = next(n for n in graph.node if n.name == f"{name}/Conv").input[1]
            assert constants[weight] == onnx.TensorProto.FLOAT
    if engine == "ort":
        # ONNX Runtime 1.23 has no ConvInteger for weights of int8.
        kinds = constants | {
            n.output[0]: n.attribute[0].i for n in graph.node if n.op_type == "Cast"
        }
        integer = [n.input[1] for n in graph.node if n.op_type == "ConvInteger"]
        assert {kinds[weight] for weight in integer} == {onnx.TensorProto.UINT8}


def test_placements_are_recorded_and_do_not_merge(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    assert "placement" not in bundles["engine"].manifest.options  # bundles before had no choice
    assert bundles["paper"].manifest.options["placement"] == "paper"
    assert "blocks" not in bundles["paper"].manifest.options
    with pytest.raises(HdrqError):
        merge([bundles["engine"], bundles["paper"]], tmp_path / "merged.hdrq")
    copy = shutil.copytree(bundles["paper"].path, tmp_path / "copy.hdrq")
    whole = merge([bundles["paper"], copy], tmp_path / "own.hdrq")
    assert [layer.requested for layer in whole.manifest.layers].count("float32") == 2


def test_unknown_placements_and_blocks_are_refused(tmp_path: Path) -> None:
    for name in ("placement", "blocks"):
        with pytest.raises(SpecError, match=f"found {name} 'other'; choose one of"):
            CalibrationRequest("m:f", "x", "d", tmp_path, method="rtn", **{name: "other"})
        recipe = tmp_path / f"{name}.json"
        recipe.write_text(json.dumps({name: "other"}))
        with pytest.raises(SpecError, match=f"found {name}: 'other'"):
            Recipe.read(recipe)


def two_heads() -> Heads:
    torch.manual_seed(0)
    return Heads(attended)


def built_again(bundle: Bundle) -> None:
    """A bundle's model in torch computes what its graph does."""
    x = np.random.default_rng(1).standard_normal((4, 3, SIDE, SIDE)).astype(np.float32)
    module = fake_quantized(bundle, torch.from_numpy(x[:2]))
    session = reference_session.unfused_session(bundle.path / "model.onnx")
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    got = session.run(None, {"input": x})[0]
    assert reference_session.compare(expected, got)["relative_rms"] < 1e-3


@pytest.mark.parametrize("placement", ["engine", "paper"])
def test_bundles_of_both_placements_are_built_again_in_torch(
    bundles: dict[str, Bundle], placement: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundles[placement].path, tmp_path / "copy.hdrq")
    for bundle in (bundles[placement], merge([bundles[placement], copy], tmp_path / "m.hdrq")):
        built_again(bundle)


def test_a_bundle_of_version_0_1_with_two_heads_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "placed_levels", sys.modules[__name__])
    earlier = functools.partial(plan_quantizers, placement=EARLIER)
    monkeypatch.setattr(preparation, "plan_quantizers", lambda *a: earlier(*a[:2]))
    x = np.random.default_rng(0).standard_normal((4, 3, SIDE, SIDE)).astype(np.float32)
    bundle = calibrate(
        "placed_levels:two_heads", ImageSet(x, None, None, None), "d", tmp_path / "a.hdrq",
        method="rtn", wbits=4, abits=4,
    )  # fmt: skip
    # Of both heads it held one, of the outputs of both the codes.
    wide = {layer.module for layer in bundle.manifest.layers if layer.weight_bits == 8}
    assert wide == {"stem", "one"}
    assert {"one", "two"} <= {a.module for a in bundle.manifest.activations}
    built_again(bundle)
