"""The paper's networks: public checkpoints by their keys, and what the networks compute."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.activation_cache import Caches
from hdrq_deploy.calibration.capture import capture
from hdrq_deploy.calibration.loading import load_model, load_state
from hdrq_deploy.calibration.placement import plan_quantizers
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration.request import PLACEMENTS, Quantization
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.errors import ModelError
from hdrq_deploy.experiments.tasks import HRDA
from hdrq_deploy.exporters import export

pytest.importorskip("torchvision")
pytest.importorskip("transformers")

from hdrq_deploy import models
from hdrq_deploy.models.hrda import FUSIONS, Hrda, Mit
from hdrq_deploy.models.shot import Shot

CLASSES = 7
SMALL = {"depths": (1, 1, 2, 1), "widths": (16, 32, 64, 64), "heads": (1, 2, 2, 4)}
B5 = {"depths": (3, 6, 40, 3), "widths": (64, 128, 320, 512)}


def small_hrda() -> Hrda:
    """HRDA over a MiT of five blocks, for calibration by name."""
    torch.manual_seed(0)
    return Hrda(Mit(**SMALL), CLASSES, 32)


def small_conv1x1() -> Hrda:
    """The same as HDRQ's authors fuse: another width, other channels, attention of its own."""
    torch.manual_seed(0)
    return Hrda(Mit(**SMALL), CLASSES, 24, 16, "conv1x1", 32)


def shaken(module: nn.Module) -> nn.Module:
    """Every parameter and statistic somewhere else than where it starts."""
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(0.5 + torch.rand_like(value) if value.ndim == 1 else value)
    return module.eval()


def public_shot(classes: int, backbone: str = "resnet18") -> tuple[nn.Module, nn.Module, nn.Module]:
    """netF, netB and netC as SHOT builds them."""
    import torchvision

    body = getattr(torchvision.models, backbone)(weights=None)
    features, body.fc = body.fc.in_features, nn.Identity()
    bottleneck = nn.Module()
    bottleneck.bn = nn.BatchNorm1d(256)
    bottleneck.bottleneck = nn.Linear(features, 256)
    head = nn.Module()
    head.fc = torch.nn.utils.weight_norm(nn.Linear(256, classes), name="weight")
    return shaken(body), shaken(bottleneck), shaken(head)


def save_shot(folder: Path, role: str, parts: tuple[nn.Module, nn.Module, nn.Module]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for letter, part in zip("FBC", parts, strict=True):
        ending = "" if role == "source" else "_par_0.3"
        torch.save(part.state_dict(), folder / f"{role}_{letter}{ending}.pt")
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_shots_three_files_give_shots_logits(tmp_path: Path) -> None:
    import torchvision

    body, bottleneck, head = parts = public_shot(CLASSES)
    folder = save_shot(tmp_path / "RA", "target", parts)
    model = Shot(torchvision.models.resnet18(weights=None), CLASSES)
    load_state(model, folder, "adapted")
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        # SHOT's own order: features, linear, BatchNorm, weight-normed linear.
        expected = head.fc(bottleneck.bn(bottleneck.bottleneck(body(x))))
        assert torch.allclose(model.eval()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_checkpoint_of_another_backbone_names_its_keys(tmp_path: Path) -> None:
    folder = save_shot(tmp_path / "R", "source", public_shot(65))
    model = load_model("hdrq_deploy.models:shot_resnet50")
    with pytest.raises(ModelError, match=r"missing \(first: netF.layer1.0.conv3.weight\)"):
        load_state(model, folder, "source")
    (folder / "source_B.pt").unlink()
    with pytest.raises(ModelError, match=r"found 0 files \*_B\*.pt"):
        load_state(model, folder, "source")


def conv_module(name: str, outputs: int, inputs: int, kernel: int) -> Iterator[tuple[str, Any]]:
    yield f"{name}.conv.weight", (outputs, inputs, kernel, kernel)
    yield from norm(f"{name}.bn", outputs)


def norm(name: str, width: int) -> Iterator[tuple[str, Any]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (width,)
    yield f"{name}.num_batches_tracked", ()


def layer(name: str, *shape: int) -> Iterator[tuple[str, Any]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def public_head(
    channels: tuple[int, ...], classes: int, width: int, fused: int = 0, attention: int = 0
) -> Iterator[tuple[str, Any]]:
    """Keys of mmseg's HRDAHead over two DAFormerHeads (conv1 for attention).

    The head is sepaspp, or conv1 where ``fused`` gives its channels.
    """
    widths = {"head": (width, fused or width), "scale_attention": (attention or width,) * 2}
    for head, (embedded, outputs) in widths.items():
        stem = f"decode_head.{head}"
        yield from layer(f"{stem}.conv_seg", classes, outputs, 1, 1)
        for i, inputs in enumerate(channels):
            yield from layer(f"{stem}.embed_layers.{i}.proj", embedded, inputs)
        total = 4 * embedded
        fuse = f"{stem}.fuse_layer"
        if head == "scale_attention" or fused:
            yield from conv_module(fuse, outputs, total, 1)
            continue
        yield from conv_module(f"{fuse}.aspp_modules.0", width, total, 1)
        for i in (1, 2, 3):
            yield from conv_module(f"{fuse}.aspp_modules.{i}.depthwise_conv", total, 1, 3)
            yield from conv_module(f"{fuse}.aspp_modules.{i}.pointwise_conv", width, total, 1)
        yield from conv_module(f"{fuse}.bottleneck", width, total, 3)


def public_mit(
    depths: tuple[int, ...], widths: tuple[int, ...], **_: Any
) -> Iterator[tuple[str, Any]]:
    """Keys of NVlabs' MixVisionTransformer, as mmseg holds it."""
    for s, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        kernel, inputs, ratio = (7, 3, 8) if s == 0 else (3, widths[s - 1], (8, 4, 2, 1)[s])
        stem = f"backbone.patch_embed{s + 1}"
        yield from layer(f"{stem}.proj", width, inputs, kernel, kernel)
        yield from layer(f"{stem}.norm", width)
        yield from layer(f"backbone.norm{s + 1}", width)
        for i in range(depth):
            block = f"backbone.block{s + 1}.{i}"
            yield from layer(f"{block}.norm1", width)
            yield from layer(f"{block}.attn.q", width, width)
            yield from layer(f"{block}.attn.kv", 2 * width, width)
            yield from layer(f"{block}.attn.proj", width, width)
            if ratio > 1:
                yield from layer(f"{block}.attn.sr", width, width, ratio, ratio)
                yield from layer(f"{block}.attn.norm", width)
            yield from layer(f"{block}.norm2", width)
            yield from layer(f"{block}.mlp.fc1", 4 * width, width)
            yield from layer(f"{block}.mlp.dwconv.dwconv", 4 * width, 1, 3, 3)
            yield from layer(f"{block}.mlp.fc2", width, 4 * width)


def public_resnet() -> Iterator[tuple[str, Any]]:
    """Keys of mmseg's ResNetV1c, depth 101."""
    for at, (outputs, inputs) in zip((0, 3, 6), ((32, 3), (32, 32), (64, 32)), strict=True):
        yield f"backbone.stem.{at}.weight", (outputs, inputs, 3, 3)
        yield from norm(f"backbone.stem.{at + 1}", outputs)
    inputs = 64
    for s, (blocks, width) in enumerate(zip((3, 4, 23, 3), (64, 128, 256, 512), strict=True)):
        for i in range(blocks):
            stem = f"backbone.layer{s + 1}.{i}"
            shapes = ((width, inputs, 1), (width, width, 3), (4 * width, width, 1))
            for n, (outputs, reads, kernel) in enumerate(shapes):
                yield f"{stem}.conv{n + 1}.weight", (outputs, reads, kernel, kernel)
                yield from norm(f"{stem}.bn{n + 1}", outputs)
            if i == 0:
                yield f"{stem}.downsample.0.weight", (4 * width, inputs, 1, 1)
                yield from norm(f"{stem}.downsample.1", 4 * width)
            inputs = 4 * width


def public(kind: str) -> dict[str, Tensor]:
    backbone = public_mit(**B5) if kind == "hrda_mit_b5" else public_resnet()
    channels = B5["widths"] if kind == "hrda_mit_b5" else (256, 512, 1024, 2048)
    widths = (786, 128, 256) if kind == "hrda_resnet101_conv1x1" else (256,)
    keys = [*backbone, *public_head(channels, 19, *widths)]
    return {name: torch.empty(shape, device="meta") for name, shape in keys}


def built(kind: str) -> Hrda:
    """The network of a factory, without memory for its weights."""
    with torch.device("meta"):
        return getattr(models, kind)()


@pytest.mark.parametrize("kind", HRDA)
@pytest.mark.parametrize("adapting", [False, True])
def test_the_keys_of_public_hrda_checkpoints_fit(kind: str, adapting: bool) -> None:
    model, state = built(kind), public(kind)
    if adapting:  # student, teacher and the network of the feature distance
        prefixes = ("model.", "ema_model.", "imnet_model.")
        state = {prefix + k: v for prefix in prefixes for k, v in state.items()}
    mapped = {k: tuple(v.shape) for k, v in model.map_checkpoint(state).items()}
    assert mapped == {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_hrda_as_hdrq_s_authors_have_it_is_of_their_size() -> None:
    """Widths are written in their configuration; the count is that of its convolutions."""
    head = 786 * (256 + 512 + 1024 + 2048) + 4 * 786 + 4 * 786 * 128 + 2 * 128 + 128 * 19 + 19
    share = 256 * (256 + 512 + 1024 + 2048) + 4 * 256 + 4 * 256 * 256 + 2 * 256 + 256 * 19 + 19
    # torchvision's ResNet-101 without its classifier, with the deep stem in place of 7x7.
    encoder = 44_549_160 - 1000 * 2049 - (64 * 3 * 49 + 128) + (27 * 32 + 288 * 32 + 288 * 64 + 256)
    model = built("hrda_resnet101_conv1x1")
    assert sum(p.numel() for p in model.parameters()) == head + share + encoder
    assert model.decode_head["head"].fuse_layer.conv.weight.shape == (128, 3144, 1, 1)


@pytest.mark.parametrize("own", HRDA)
@pytest.mark.parametrize("other", HRDA)
def test_a_checkpoint_of_another_form_names_the_factory_that_takes_it(own: str, other: str) -> None:
    state = {f"model.{key}": value for key, value in public(other).items()}
    if own == other:
        assert built(own).map_checkpoint(state)
        return
    with pytest.raises(ModelError, match=rf"use hdrq_deploy.models:{other}$") as error:
        built(own).map_checkpoint(state)
    assert "\n" not in str(error.value)


def test_a_refused_checkpoint_is_named(tmp_path: Path) -> None:
    form = {k: v for k, v in public("hrda_resnet101").items() if "layer1.0" in k or "aspp" in k}
    torch.save({"state_dict": {k: torch.zeros(1) for k in form}}, tmp_path / "aspp.pth")
    with pytest.raises(ModelError, match=r"aspp.pth: found a checkpoint of HRDA with ResNet"):
        load_state(built("hrda_resnet101_conv1x1"), tmp_path / "aspp.pth", "source")
    with pytest.raises(ModelError, match="found fusion 'aspp'; choose one of sepaspp, conv1x1"):
        Hrda(Mit(**SMALL), CLASSES, fusion="aspp")


def test_a_checkpoint_of_the_other_encoder_is_refused(tmp_path: Path) -> None:
    state = {k: torch.zeros(v.shape) for k, v in public("hrda_mit_b5").items() if "block1" in k}
    torch.save({"state_dict": state, "meta": {"CLASSES": ["road"]}}, tmp_path / "mit.pth")
    with pytest.raises(ModelError, match=r"first: backbone.stem.0.weight.*first: backbone.block1"):
        load_state(built("hrda_resnet101"), tmp_path / "mit.pth", "adapted")


def reference_mit(x: Tensor, state: dict[str, Tensor], heads: tuple[int, ...]) -> list[Tensor]:
    """MixVisionTransformer, written out over mmseg's names (NVlabs/SegFormer)."""

    def linear(y: Tensor, name: str) -> Tensor:
        return functional.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    def layer_norm(y: Tensor, name: str, eps: float) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(y, weight.shape, weight, bias, eps)

    def conv(y: Tensor, name: str, **how: Any) -> Tensor:
        return functional.conv2d(y, state[f"{name}.weight"], state[f"{name}.bias"], **how)

    def image(tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return tokens.transpose(1, 2).reshape(len(tokens), -1, *size)

    found = []
    for s, count in enumerate(heads):
        stem = f"backbone.patch_embed{s + 1}"
        how = {"stride": 4, "padding": 3} if s == 0 else {"stride": 2, "padding": 1}
        x = conv(x, f"{stem}.proj", **how)
        size = (x.shape[2], x.shape[3])
        x = layer_norm(x.flatten(2).transpose(1, 2), f"{stem}.norm", 1e-5)
        for i in range(SMALL["depths"][s]):
            block = f"backbone.block{s + 1}.{i}"
            y = layer_norm(x, f"{block}.norm1", 1e-6)
            n, length, width = y.shape
            reads = y
            if (ratio := (8, 4, 2, 1)[s]) > 1:
                small = conv(image(y, size), f"{block}.attn.sr", stride=ratio)
                reads = layer_norm(small.flatten(2).transpose(1, 2), f"{block}.attn.norm", 1e-5)
            q = linear(y, f"{block}.attn.q").reshape(n, length, count, -1).transpose(1, 2)
            pair = linear(reads, f"{block}.attn.kv").reshape(n, -1, 2, count, width // count)
            k, v = pair.permute(2, 0, 3, 1, 4)
            share = (q @ k.transpose(2, 3) / (width // count) ** 0.5).softmax(-1)
            y = (share @ v).transpose(1, 2).reshape(n, length, width)
            x = x + linear(y, f"{block}.attn.proj")
            y = linear(layer_norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")
            y = conv(image(y, size), f"{block}.mlp.dwconv.dwconv", padding=1, groups=y.shape[2])
            x = x + linear(functional.gelu(y.flatten(2).transpose(1, 2)), f"{block}.mlp.fc2")
        x = image(layer_norm(x, f"backbone.norm{s + 1}", 1e-6), size)
        found.append(x)
    return found


def test_mit_computes_what_the_public_encoder_does() -> None:
    model = small_hrda().eval()
    torch.manual_seed(1)
    state = {k: 0.2 * torch.randn(shape) for k, shape in public_mit(**SMALL)}
    own = model.map_checkpoint(state)
    model.load_state_dict(own, strict=False)
    assert set(own) == {k for k in model.state_dict() if k.startswith("backbone.")}
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        pairs = zip(model.backbone(x), reference_mit(x, state, SMALL["heads"]), strict=True)
        for got, expected in pairs:
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [small_hrda, small_conv1x1])
def test_hrda_fuses_crops_as_the_public_decoder_does(build: Callable[[], Hrda]) -> None:
    model = shaken(build())
    x = torch.randn(2, 3, 128, 192)
    resize = {"mode": "bilinear", "align_corners": False}
    with torch.no_grad():
        # mmseg's HRDAEncoderDecoder and HRDAHead, crop after crop.
        head, attention = model.decode_head["head"], model.decode_head["scale_attention"]
        low = model.backbone(functional.interpolate(x, scale_factor=0.5, **resize))
        total, count = torch.zeros(2, CLASSES, 32, 48), torch.zeros(1, 1, 32, 48)
        for top in (0, 32, 64):
            for left in (0, 48, 96):
                part = head(model.backbone(x[:, :, top : top + 64, left : left + 96]))
                place = (slice(top // 4, top // 4 + 16), slice(left // 4, left // 4 + 24))
                total[(..., *place)] += part
                count[(..., *place)] += 1
        share = torch.sigmoid(attention(low))
        coarse = functional.interpolate((1 - share) * head(low), scale_factor=2, **resize)
        share = functional.interpolate(share, scale_factor=2, **resize)
        expected = share * total / count + coarse
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


def public_head_scores(state: dict[str, Tensor], stem: str, features: list[Tensor]) -> Tensor:
    """DAFormerHead with one 1x1 convolution, written out over mmseg's names."""
    size, parts = features[0].shape[2:], []
    for i, feature in enumerate(features):
        name = f"{stem}.embed_layers.{i}.proj"
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        part = torch.einsum("nchw,dc->ndhw", feature, weight) + bias[:, None, None]
        parts.append(functional.interpolate(part, size, mode="bilinear", align_corners=False))
    joined = torch.einsum(
        "nchw,dc->ndhw", torch.cat(parts, 1), state[f"{stem}.fuse_layer.conv.weight"][:, :, 0, 0]
    )
    moments = [state[f"{stem}.fuse_layer.bn.{n}"] for n in ("running_mean", "running_var")]
    affine = [state[f"{stem}.fuse_layer.bn.{n}"] for n in ("weight", "bias")]
    fused = functional.batch_norm(joined, *moments, *affine).relu()
    weight, bias = state[f"{stem}.conv_seg.weight"], state[f"{stem}.conv_seg.bias"]
    return functional.conv2d(fused, weight, bias)


def test_a_head_fused_by_a_1x1_convolution_computes_what_the_public_one_does() -> None:
    model = shaken(small_conv1x1())
    sizes = zip(SMALL["widths"], (1, 2, 4, 4), strict=True)
    features = [torch.randn(2, n, 8 // s, 12 // s) for n, s in sizes]
    state = model.state_dict()
    with torch.no_grad():
        for name, head in model.decode_head.items():
            expected = public_head_scores(state, f"decode_head.{name}", features)
            assert torch.allclose(head(features), expected, rtol=1e-4, atol=1e-5)


class Steps(nn.Module):
    """An encoder of four convolutions, which is captured in a second."""

    channels = (8, 8, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        widths = zip((3, *self.channels), self.channels, (4, 2, 1, 1), strict=False)
        self.steps = nn.ModuleList(nn.Conv2d(i, o, 3, stride, 1) for i, o, stride in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for step in self.steps:
            features.append(torch.relu(step(features[-1] if features else x)))
        return features


@pytest.mark.parametrize("fusion", FUSIONS)
def test_both_classifiers_of_hrda_are_last_layers(fusion: str) -> None:
    torch.manual_seed(0)
    model = Hrda(Steps(), CLASSES, 16, fusion=fusion)  # type: ignore[arg-type]
    found = capture(model.eval(), torch.rand(2, 3, 128, 128))
    plan = plan_quantizers(found, Quantization(4, 4))
    wide = {site.module: site for site in plan.layers if site.spec and site.spec.bits == 8}
    heads = [f"decode_head.{name}.conv_seg" for name in ("head", "scale_attention")]
    first, *others = wide  # the first layer reads the images, resized and cut
    assert others == heads and first == "backbone.steps.0"
    assert all(site.activation_bits == (8,) for site in wide.values())
    # The embedded levels: one scale behind their concatenation, or one each.
    places = {name: plan_quantizers(found, Quantization(4, 4), name) for name in PLACEMENTS}
    levels = [f"decode_head.head.embed_layers.{i}.proj" for i in range(4)]
    real = {site.module: site.reason for site in places["paper"].layers if site.reason}
    fuse = "aspp_modules.0.conv" if fusion == "sepaspp" else "conv"
    assert "a scale each" in real[f"decode_head.head.fuse_layer.{fuse}"]
    assert real[first] and not set(levels) & set(real)
    assert not any(site.reason for site in places["engine"].layers)


def test_too_small_crops_are_one_line() -> None:
    with pytest.raises(ModelError, match="found images of 96x128; HRDA.*pass `size`"):
        small_hrda()(torch.randn(1, 3, 96, 128))


def test_rows_of_images_that_a_network_cuts_into_parts_stay_together(tmp_path: Path) -> None:
    values = torch.arange(24.0).reshape(12, 2)  # four images of three rows
    for budget in (1 << 20, 0):
        rows = Caches(budget, tmp_path).rows(4, torch.Size([2]), 3)
        rows.write(0, values[:6])
        rows.write(2, values[6:])
        assert len(rows) == 4
        assert torch.equal(rows.read(1, 3), values[3:9])
        chosen = rows.take(torch.tensor([3, 0]))
        assert torch.equal(chosen, torch.cat([values[9:], values[:3]]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hrda_is_calibrated_and_runs_in_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "small_hrda", sys.modules[__name__])
    base = tmp_path / "base.safetensors"
    save_file({k: v.clone() for k, v in small_hrda().state_dict().items()}, base)
    x = np.random.default_rng(0).standard_normal((6, 3, 128, 128)).astype(np.float32)
    bundle = calibrate(
        "small_hrda:small_hrda",
        ImageSet(x, None, None, None),
        "city",
        tmp_path / "city.hdrq",
        base,
        base,
        wbits=4,
        abits=4,
        options=Options.of("hdrq", iters=3, batch=2, lr=1e-3),
    )
    blocks = bundle.manifest.metrics["blocks"]
    assert any(block["learned"] for block in blocks)
    assert all(block["loss_after"] <= block["loss_before"] for block in blocks)
    engines = ["ort"]
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        pass
    else:
        engines.append("trt-rtx")
    for engine in engines:
        folder = export(bundle, tmp_path / engine, engine)
        report = json.loads((folder / "precision.json").read_text())
        assert report["summary"] == "24/24 Conv, 48/48 MatMul INT8"
