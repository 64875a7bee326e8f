"""Rates, stages, first activation scales and distance, each beside what it says by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdrq_deploy import Bundle
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.methods import Options
from hdrq_deploy.errors import SpecError
from hdrq_deploy.numerics.quantization import search_scale
from hdrq_deploy.numerics.spec import QuantSpec


@pytest.fixture
def tiny(work: Path, tmp_path: Path) -> Callable[..., Bundle]:
    def make(method: str, abits: int = 4, name: str = "b", **options: Any) -> Bundle:
        return calibrate(
            "tiny_models:Tiny",
            work / "data.npz",
            "night",
            tmp_path / f"{name}.hdrq",
            work / "Tiny-night.safetensors",
            work / "Tiny-base.safetensors",
            method=method,
            wbits=4,
            abits=abits,
            options=Options.of(method, **{"iters": 10, "batch": 8, **options}),
        )

    return make


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, list[float]]]:
    """Of every step of Adam: whether all its variables are scales of activations, and rates."""
    seen: list[tuple[bool, list[float]]] = []
    plain = torch.optim.Adam.step

    def step(self: torch.optim.Adam, closure: Any = None) -> Any:
        scalars = all(p.ndim == 0 for g in self.param_groups for p in g["params"])
        seen.append((scalars, [g["lr"] for g in self.param_groups]))
        return plain(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return seen


def cosine(i: int, iters: int, warm: float = 0.0) -> float:
    rising = iters * warm
    if i < rising:
        return 0.001 + 0.999 * i / rising
    return float(0.5 * (1 + np.cos(np.pi * (i - rising) / (iters - rising))))


def test_learned_rounding_has_a_constant_rate_and_scales_a_cosine(
    tiny: Callable[..., Bundle], steps: list[tuple[bool, list[float]]]
) -> None:
    tiny("qdrop", step_change=0.0)
    weights = [rates for scalars, rates in steps if not scalars]
    assert weights and all(rate == 1e-3 for rates in weights for rate in rates)
    scales = [rates[0] for scalars, rates in steps if scalars]
    assert scales[:10] == pytest.approx([4e-5 * cosine(i, 10) for i in range(10)])
    # One stage: the two take turns within an iteration.
    assert [scalars for scalars, _ in steps[:4]] == [False, True, False, True]


def test_rates_grow_where_iterations_are_fewer_than_published(
    tiny: Callable[..., Bundle], steps: list[tuple[bool, list[float]]]
) -> None:
    tiny("hdrq", step_change=0.0, scale_rates=True)
    weights = [rates for scalars, rates in steps if not scalars][:10]
    # 20,000 / 10 iterations.
    expected = [1e-4 * 2000 * cosine(i, 10, 0.2) for i in range(10)]
    for rates, rate in zip(weights, expected, strict=True):
        assert rates == pytest.approx([rate] * len(rates))
    scales = [rates[0] for scalars, rates in steps if scalars]
    assert scales[:10] == pytest.approx([4e-5 * 2000 * cosine(i, 10) for i in range(10)])
    assert Options(iters=40000, scale_rates=True).rate_factor == 1
    assert Options(iters=200).rate_factor == 1


def codes(bundle: Bundle) -> dict[str, Any]:
    entries = bundle.manifest.tensors
    return {name: bundle.tensor(name) for name, e in entries.items() if e.role == "codes"}


def test_brecq_rounds_with_real_activations_and_then_learns_their_scales(
    tiny: Callable[..., Bundle], steps: list[tuple[bool, list[float]]]
) -> None:
    common = {"lr": 0.2, "act_lr": 1e-2, "keep_best": False}
    two = tiny("brecq", 2, "two", **common)
    # Ten steps of the roundings, then ten of the scales, in each of three blocks.
    order = [scalars for scalars, _ in steps]
    assert order[:40] == [*[False] * 10, *[True] * 10] * 2
    eight = tiny("brecq", 8, "eight", **common)
    for name, found in codes(two).items():
        np.testing.assert_array_equal(found, codes(eight)[name], name)
    together = [tiny("brecq-one-stage", bits, f"one-{bits}", **common) for bits in (2, 8)]
    pairs = zip(*(codes(bundle).values() for bundle in together), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("stages", [0, 3])
def test_one_or_two_stages(stages: int) -> None:
    with pytest.raises(SpecError, match=f"found stages={stages}; needed 1 .* or 2"):
        Options(stages=stages)


def test_the_largest_scale_of_eight_images(tiny: Callable[..., Bundle], work: Path) -> None:
    found = {kind: tiny("rtn", 4, kind, act_init=kind) for kind in ("pooled", "per-image-max")}
    site = next(a for a in found["pooled"].manifest.activations if a.module == "input")
    spec = QuantSpec(site.bits, site.lo, site.hi)
    with np.load(work / "data.npz") as data:
        images = data["x"][::6]  # 8 of 48
    each = [search_scale(np.append(x, (x.max(), x.min())), spec) for x in images]
    ours = float(found["per-image-max"].tensor(site.scale))
    assert ours == pytest.approx(float(max(each)), rel=1e-5)
    assert ours != float(found["pooled"].tensor(site.scale))


@pytest.mark.parametrize("form", ["norm", "relative"])
def test_either_distance_pulls_towards_the_source(
    tiny: Callable[..., Bundle], work: Path, tmp_path: Path, form: str
) -> None:
    common = {"iters": 30, "lr": 1e-2, "keep_best": False, "distance_form": form}
    near = [tiny("hdrq", 8, f"d{d}", distance=d, **common) for d in (0.0, 50.0)]
    base = calibrate(
        "tiny_models:Tiny", work / "data.npz", "base", tmp_path / "base.hdrq",
        work / "Tiny-base.safetensors", method="rtn",
    )  # fmt: skip

    def weight(bundle: Bundle) -> Any:
        return bundle.tensor("conv1.weight_codes") * bundle.tensor("conv1.weight_scale")

    free, pulled = (float(np.linalg.norm(weight(b) - weight(base))) for b in near)
    assert pulled < free


def test_a_relative_distance_is_a_share_of_error_and_size() -> None:
    from hdrq_deploy.calibration.fake_quantizers import WeightQuantizer
    from hdrq_deploy.calibration.reconstruction import _pulls

    source = torch.tensor([[3.0, 4.0]])
    layer = WeightQuantizer(source + 1, QuantSpec.weight(8))
    nothing = torch.zeros(1, 2)
    options = Options(distance=0.1, distance_form="relative")
    shares = [share for *_, share in _pulls([(layer, source), (layer, nothing)], options, 2.0)]
    assert shares == pytest.approx([0.1 * 2.0 / 5.0, 0.0])
    (norm,) = _pulls([(layer, source)], Options(distance=0.1), 2.0)
    assert norm[2] == 0.1
    assert _pulls([(layer, source)], Options(distance=0.0), 2.0) == []
