from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import fuse_conv_bn_eval

from hdrq_deploy import Bundle
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.activation_cache import Caches
from hdrq_deploy.calibration.blocks import find_blocks
from hdrq_deploy.calibration.capture import capture
from hdrq_deploy.calibration.fake_quantizers import search_scale
from hdrq_deploy.calibration.fold_batch_norm import fold_batch_norm, fold_constants
from hdrq_deploy.calibration.loading import load_model, load_state
from hdrq_deploy.calibration.placement import plan_quantizers
from hdrq_deploy.calibration.rebuilding import fake_quantized
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration.request import Quantization
from hdrq_deploy.checks.stages import compare_stages
from hdrq_deploy.errors import HdrqError, ModelError, SpecError
from hdrq_deploy.graph import reference_session
from hdrq_deploy.numerics.spec import QuantSpec

MODELS = ("Tiny", "Net", "Attention")


@pytest.mark.parametrize("name", MODELS)
def test_the_folded_graph_computes_what_the_model_computes(work: Path, name: str) -> None:
    model = load_model(f"tiny_models:{name}")
    x = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
    found = capture(model, x[:2])
    fold_constants(found)
    assert fold_batch_norm(found) == []
    with torch.no_grad():
        got = found.module(x)
    # Folding multiplies in another order; float32 keeps about seven digits.
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_blocks_hold_every_heavy_node_once_and_split_at_long_skips(work: Path) -> None:
    for name in MODELS:
        found = capture(load_model(f"tiny_models:{name}"), torch.rand(2, 3, 16, 16))
        fold_constants(found)
        fold_batch_norm(found)
        plan = plan_quantizers(found, Quantization(4, 8))
        blocks = find_blocks(found)
        assert [n for b in blocks for n in b.heavy] == [site.node for site in plan.layers]


def load_unet(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    network: torch.nn.Module = importlib.import_module("architectures").unet()
    return network


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "blocks", "most"),
    [
        ("timm:resnet18", 64, 10, 3),
        ("timm:resnet50", 64, 18, 4),
        ("timm:mobilenetv2_100", 64, 33, 3),
        ("timm:efficientnet_b0", 64, 39, 5),
        ("timm:convnext_tiny", 64, 23, 3),
        ("timm:vit_small_patch16_224", 224, 26, 4),
        ("timm:swin_tiny_patch4_window7_224", 224, 29, 4),
        ("transformers:segformer", 64, None, 8),
        ("unet", 64, None, 8),
    ],
)
def test_architectures_are_captured_and_cut(
    monkeypatch: pytest.MonkeyPatch, name: str, side: int, blocks: int | None, most: int
) -> None:
    torch.manual_seed(0)
    model = load_unet(monkeypatch).eval() if name == "unet" else load_model(name)
    x = torch.rand(3, 3, side, side)
    with torch.no_grad():
        expected = model(x)
    expected = expected if isinstance(expected, torch.Tensor) else next(iter(expected.values()))
    found = capture(model, x[:2])
    fold_constants(found)
    assert fold_batch_norm(found) == []
    with torch.no_grad():
        got = found.module(x)
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    cut = find_blocks(found)
    assert blocks is None or len(cut) == blocks
    assert max(len(block.heavy) for block in cut) <= most
    plan = plan_quantizers(found, Quantization(4, 8))
    left = [site for site in plan.layers if site.weight is not None and site.spec is None]
    assert left == []


def test_search_scale_is_no_worse_than_any_scale_of_a_fine_grid() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, 4000).astype(np.float32))
    spec = QuantSpec.weight(4)

    def error(step: float) -> float:
        codes = torch.clamp(torch.round(x / step), spec.lo, spec.hi)
        return float(((codes * step - x).abs() ** 2.4).mean())

    best = min(error(s) for s in np.linspace(0.01, 0.8, 2000))
    # The search tries 100 ranges, so it may miss the optimum by one of its own steps.
    assert error(float(search_scale(x, spec))) <= best * 1.02


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("wbits", "abits"), [(8, 8), (4, 4), (3, 5), (6, 2)])
def test_torch_and_onnx_runtime_agree(
    make: Any, inputs: Any, name: str, wbits: int, abits: int
) -> None:
    bundle = make(name, wbits=wbits, abits=abits, per_channel=wbits == 3)
    (found,) = compare_stages(bundle, None, inputs, torch=True)
    assert len(found.tensors) == len(bundle.manifest.activations)
    # Both round the same reals; a value at a tie may fall to the other side.
    assert max(t.share_off for t in found.tensors) < 0.005
    assert found.max_steps <= 2 or abits > 4


def test_codes_stay_in_their_range(make: Any, inputs: Any) -> None:
    bundle = make(wbits=3, abits=3)
    for name, entry in bundle.manifest.tensors.items():
        if entry.role == "codes":
            codes = bundle.tensor(name)
            assert entry.lo <= codes.min() and codes.max() <= entry.hi
    by_scale = {a.scale: a for a in bundle.manifest.activations}
    assert {a.bits for a in by_scale.values()} == {3, 8}


def test_the_paper_grid_reaches_255(make: Any) -> None:
    bundle = make(grid="paper")
    assert {(a.lo, a.hi) for a in bundle.manifest.activations} == {(-128, 127), (0, 255)}


# A rate of 2e-4 is too low for 100 iterations: the noise then leaves weights between codes,
# and the loss of Tiny's depthwise block rises.
@pytest.mark.parametrize("name", MODELS)
def test_hdrq_lowers_the_reconstruction_error(make: Any, name: str) -> None:
    rtn, hdrq = make(name, wbits=3, abits=4), make(name, method="hdrq", wbits=3, abits=4)
    last = [b.manifest.metrics["blocks"][-1]["loss_after"] for b in (rtn, hdrq)]
    assert last[1] < last[0]


def test_same_seed_same_bytes_and_the_distance_term_pulls(work: Path, tmp_path: Path) -> None:
    def bundle(name: str, **options: Any) -> Any:
        return calibrate(
            "tiny_models:Tiny",
            work / "data.npz",
            "night",
            tmp_path / name,
            work / "Tiny-night.safetensors",
            work / "Tiny-base.safetensors",
            wbits=4,
            options=Options.of("hdrq", iters=30, lr=1e-2, **options),
        )

    a, b = bundle("a"), bundle("b")
    assert a.manifest.files == b.manifest.files
    source = (
        bundle("free", distance=0.0, keep_best=False),
        bundle("pulled", distance=50.0, keep_best=False),
    )
    base = calibrate(
        "tiny_models:Tiny",
        work / "data.npz",
        "base",
        tmp_path / "base",
        work / "Tiny-base.safetensors",
        method="rtn",
        wbits=8,
    )
    name = "conv1.weight"
    target = base.tensor(f"{name}_codes") * base.tensor(f"{name}_scale")
    free, pulled = (
        float(np.linalg.norm(s.tensor(f"{name}_codes") * s.tensor(f"{name}_scale") - target))
        for s in source
    )
    assert pulled < free


def test_float_bundles_keep_the_model(make: Any, work: Path, inputs: Any) -> None:
    bundle = make(method="float")
    model = load_model("tiny_models:Tiny")
    load_state(model, work / "Tiny-night.safetensors", "adapted")
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
    session = reference_session.unfused_session(bundle.path / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"input": inputs})[0], expected, atol=1e-5)


def test_a_folded_float_bundle_holds_the_weights_that_torch_fuses(
    make: Any, work: Path, inputs: Any
) -> None:
    folded, apart = make(method="float-folded"), make(method="float")
    model = load_model("tiny_models:Tiny")
    load_state(model, work / "Tiny-night.safetensors", "adapted")
    fused = fuse_conv_bn_eval(model.conv1, model.bn1)
    np.testing.assert_allclose(
        folded.tensor("conv1.weight"), fused.weight.detach().numpy(), rtol=1e-5, atol=1e-7
    )
    assert not any("running" in name for name in folded.manifest.tensors)
    assert (folded.manifest.scheme.fold, apart.manifest.scheme.fold) == ("weights", "none")
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
    session = reference_session.unfused_session(folded.path / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"input": inputs})[0], expected, atol=1e-5)
    again = fake_quantized(folded, torch.from_numpy(inputs))(torch.from_numpy(inputs))
    np.testing.assert_allclose(again.detach().numpy(), expected, atol=1e-5)


def test_without_weights_the_factory_s_own_are_calibrated(work: Path, tmp_path: Path) -> None:
    hashes = []
    for base in (None, work / "Tiny-base.safetensors"):
        torch.manual_seed(5)
        bundle = calibrate(
            "tiny_models:Tiny", work / "data.npz", "x", tmp_path / "b", None, base, "rtn"
        )
        hashes.append(bundle.manifest.adapted_sha256["x"])
    assert hashes[0] == hashes[1] != bundle.manifest.source_sha256


def test_mistakes_get_one_line(work: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    nan = load_file(work / "Tiny-night.safetensors")
    nan["conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(nan, tmp_path / "nan.safetensors")
    huge = load_file(work / "Tiny-night.safetensors")
    huge["fc.weight"][:] = 3e38
    save_file(huge, tmp_path / "huge.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    good = {
        "model": "tiny_models:Tiny",
        "data": work / "data.npz",
        "domain": "night",
        "output": tmp_path / "out",
        "weights": work / "Tiny-night.safetensors",
        "base": work / "Tiny-base.safetensors",
        "options": Options(iters=2),
    }
    wide = r"does not fit the model: 2 mis-shaped \(first: fc.weight \(5, 8\) instead of \(4, 8\)\)"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weights": tmp_path / "none.pt"}, "found no file"),
        ({"weights": tmp_path / "broken.safetensors"}, "cannot be read as a checkpoint"),
        ({"weights": tmp_path / "broken.pt"}, "cannot be read as a checkpoint"),
        ({"weights": tmp_path / "nan.safetensors"}, "NaN or infinity in conv1.weight"),
        ({"weights": tmp_path / "huge.safetensors"}, "NaN or infinity in the float activations"),
        ({"weights": work / "Wide-night.safetensors"}, f"adapted checkpoint {wide}"),
        ({"base": work / "Wide-base.safetensors"}, f"source checkpoint {wide}"),
        ({"base": work / "Net-base.safetensors"}, r"missing \(first: stem.weight\).*unexpected"),
        ({"base": None}, "give `base`"),
        ({"wbits": 1}, "found wbits=1"),
        ({"abits": 9}, "found abits=9"),
        ({"method": "magic"}, "choose one of"),
        ({"model": "tiny_models:Absent"}, "cannot import"),
        ({"model": "tiny_models"}, "needed PKG.MOD:FACTORY"),
    ]
    for change, message in cases:
        with pytest.raises(HdrqError, match=message):
            calibrate(**{**good, **change})
    with pytest.raises(SpecError, match="iters=0"):
        Options.of("hdrq", iters=0)
    assert not (tmp_path / "out").exists()


def test_an_operator_without_onnx_form_is_named(work: Path, tmp_path: Path) -> None:
    (work / "odd_models.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Inner(nn.Module):\n    def forward(self, x):\n"
        "        return torch.linalg.matrix_exp(x)\n"
        "class Odd(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 3, 1)\n        self.inner = Inner()\n"
        "    def forward(self, x):\n        return self.inner(self.conv(x)).mean((2, 3))\n"
    )
    with pytest.raises(ModelError, match=r"matrix_exp.* in inner"):
        calibrate("odd_models:Odd", work / "data.npz", "x", tmp_path / "odd", method="rtn")


def test_models_that_cannot_be_captured_say_where_and_what_to_change(
    work: Path, tmp_path: Path
) -> None:
    (work / "refused_models.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Gate(nn.Module):\n    def forward(self, x):\n"
        "        if x.mean() > 0:\n            return x\n        return -x\n"
        "class Branch(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 3, 1)\n        self.gate = Gate()\n"
        "    def forward(self, x):\n        return self.gate(self.conv(x)).mean((2, 3))\n"
        "class Fixed(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 3, 1)\n"
        "    def forward(self, x):\n        return self.conv(x).reshape(2, 3, -1).mean(2)\n"
        "class Nothing(nn.Module):\n    def forward(self, x):\n        return x.mean((2, 3))\n"
    )
    cases = {
        "Branch": r"refused_models.py:5 in forward \(if x.mean\(\) > 0:\).*use torch.where",
        "Fixed": "batch size is fixed inside the model: use x.shape",
        "Nothing": "nothing to quantize",
    }
    for name, message in cases.items():
        with pytest.raises(ModelError, match=message):
            calibrate(
                f"refused_models:{name}", work / "data.npz", "x", tmp_path / name, method="rtn"
            )
    with pytest.raises(HdrqError, match="48 images; needed 64 or more"):
        calibrate(
            "tiny_models:Tiny",
            work / "data.npz",
            "x",
            tmp_path / "few",
            method="qdrop",
            options=Options.of("qdrop", iters=2, batch=64),
        )
    assert list(tmp_path.iterdir()) == []


def test_activations_beyond_the_budget_go_to_mapped_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = Caches(4 * 8 * 10, tmp_path)
    values = torch.rand(10, 8)
    rows = [caches.rows(10, torch.Size([8])) for _ in range(2)]
    monkeypatch.setattr(
        "hdrq_deploy.calibration.activation_cache._RESIDENT", 64
    )  # let go all the time
    for kept in rows:
        kept.write(0, values[:6])
        kept.write(6, values[6:])
        torch.testing.assert_close(kept.read(2, 9), values[2:9])
        index = torch.tensor([9, 0, 9])
        torch.testing.assert_close(kept.take(index), values[index])
    assert caches.spilled == 4 * 8 * 10
    assert list(tmp_path.iterdir()) == []  # files without a name
    rows[0].free()
    caches.rows(10, torch.Size([8]))
    assert caches.spilled == 4 * 8 * 10

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HdrqError, match="no room for .* fewer images, or hold more in memory"):
        caches.rows(10, torch.Size([8]))


def test_where_activations_lie_does_not_change_the_bundle(work: Path, tmp_path: Path) -> None:
    def files(name: str, cache_gb: float) -> Any:
        return calibrate(
            "tiny_models:Tiny",
            work / "data.npz",
            "night",
            tmp_path / name,
            work / "Tiny-night.safetensors",
            work / "Tiny-base.safetensors",
            options=Options.of("hdrq", iters=3, batch=8),
            cache_gb=cache_gb,
        ).manifest.files

    assert files("memory", 4) == files("mapped", 0)


def test_a_full_disk_leaves_nothing_behind(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make()
    graph = (bundle.path / "model.onnx").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HdrqError, match="No space left on device.*nothing was changed"):
        Bundle.write(tmp_path / "b.hdrq", bundle.manifest, bundle.tensors(), graph)
    assert list(tmp_path.iterdir()) == []
