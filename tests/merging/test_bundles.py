from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle, merge
from hdrq_deploy.errors import MergeError
from hdrq_deploy.graph import reference_session
from hdrq_deploy.merging import rounding as module
from hdrq_deploy.merging.rounding import ambiguous, merge_codes, round_up_share
from hdrq_deploy.numerics.spec import QuantSpec


def parents(seed: int, count: int = 2, channels: int = 6) -> tuple[list[Any], list[Any]]:
    rng = np.random.default_rng(seed)
    codes = [rng.integers(-8, 8, (channels, 20)).astype(np.int8) for _ in range(count)]
    scales = [rng.uniform(0.05, 0.1, channels).astype(np.float32) for _ in range(count)]
    return codes, scales


def test_nearest_rounds_the_weighted_mean_of_the_real_weights() -> None:
    codes, scales = parents(0, 3)
    mix = [0.5, 0.3, 0.2]
    scale = sum(m * s for m, s in zip(mix, scales, strict=True)).astype(np.float32)
    got = merge_codes(codes, scales, scale, mix, QuantSpec.weight(4, 0), "nearest").codes
    for c in range(6):  # one element at a time, in Python floats
        for i in range(20):
            real = sum(
                m * float(s[c]) * int(q[c, i]) for m, s, q in zip(mix, scales, codes, strict=True)
            )
            assert got[c, i] == max(-8, min(7, round(real / float(scale[c]))))


@pytest.mark.parametrize(
    "shares", ["1/2 1/2", "1/3 1/3 1/3", "1/4 1/4 1/4 1/4", "1/2 1/4 1/4", "3/10 7/10", "1/5 4/5"]
)
def test_ambiguous_is_a_sum_that_is_a_half_exactly(shares: str) -> None:
    exact = [Fraction(share) for share in shares.split()]
    rng = np.random.default_rng(0)
    codes = [rng.integers(-128, 128, 500).astype(np.int8) for _ in exact]
    found = ambiguous(codes, [float(share) for share in exact])
    sums = [sum(f * int(q[i]) for f, q in zip(exact, codes, strict=True)) for i in range(500)]
    np.testing.assert_array_equal(found, [total % 1 == Fraction(1, 2) for total in sums])
    assert found.any() == (shares not in {"1/3 1/3 1/3", "1/5 4/5"})


def test_weights_that_are_no_small_fractions_have_no_ties() -> None:
    codes = [np.array([1, 3], np.int8), np.array([2, 4], np.int8)]
    assert not ambiguous(codes, [0.5 + 1e-9, 0.5 - 1e-9]).any()
    assert ambiguous(codes, [0.5, 0.5]).all()


@pytest.mark.parametrize("rounding", ["noise", "advanced"])
def test_three_parents_at_equal_weights_are_rounded_to_nearest(rounding: str) -> None:
    codes, scales = parents(3, 3)
    scale = np.mean(scales, 0).astype(np.float32)
    thirds, spec = [1 / 3] * 3, QuantSpec.weight(4, 0)
    near = merge_codes(codes, scales, scale, thirds, spec, "nearest")
    got = merge_codes(codes, scales, scale, thirds, spec, rounding)
    np.testing.assert_array_equal(got.codes, near.codes)
    assert got.ambiguous == 0 and got.changed == 0


def test_noise_changes_only_ambiguous_codes_and_breaks_ties_both_ways() -> None:
    a = np.zeros(20000, np.int8)
    b = np.tile(np.array([1, 2], np.int8), 10000)
    step = np.array(0.1, np.float32)
    got = merge_codes([a, b], [step, step], step, [0.5, 0.5], QuantSpec.weight(8), "noise")
    assert set(got.codes[1::2]) == {1} and got.ambiguous == 0.5
    # A fair coin: 10,000 draws stay within four standard deviations of a half.
    assert abs(got.codes[0::2].mean() - 0.5) < 4 * 0.005


@pytest.mark.parametrize("rounding", ["noise", "advanced"])
def test_parents_that_agree_leave_nothing_to_toss(rounding: str) -> None:
    codes, scales = parents(0)
    spec = QuantSpec.weight(4, 0)
    for others, mix in (([codes[0]] * 2, [0.5, 0.5]), (codes, [1.0, 0.0])):
        same = [scales[0], scales[0]]
        got = merge_codes(others, same, scales[0], mix, spec, rounding)
        np.testing.assert_array_equal(got.codes, codes[0])
        assert got.ambiguous == 0


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.3, 0.7], [0.2, 0.3, 0.5], [1.0, 0.0]])
def test_a_toss_has_the_probability_of_drawn_rounding_errors(shares: list[float]) -> None:
    rng = np.random.default_rng(0)
    errors = sum(h * rng.uniform(-0.5, 0.5, 200_000) for h in shares)
    for fraction in (0.05, 0.3, 0.5, 0.8):
        drawn = float(np.mean(np.rint(fraction - errors) == 1))
        (found,) = round_up_share(np.array([fraction]), shares)
        # 200,000 draws: a share is known to about 0.001.
        assert found == pytest.approx(drawn, abs=0.005)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_advanced_keeps_the_draw_that_brute_force_keeps(
    monkeypatch: pytest.MonkeyPatch, count: int, axis: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = [rng.integers(-8, 8, (30, 40)).astype(np.int8) for _ in range(count)]
    shape = () if axis is None else (codes[0].shape[axis],)
    scales = [rng.uniform(0.05, 0.1, shape).astype(np.float32) for _ in range(count)]
    scale = np.mean(scales, 0).astype(np.float32)
    mix, spec = [1 / count] * count, QuantSpec.weight(4, axis)
    monkeypatch.setattr(module, "_PIECE", 200)  # several pieces, each with its own draws
    drawn: list[Any] = []
    toss = module.toss
    monkeypatch.setattr(module, "toss", lambda *a: drawn.append(toss(*a)) or drawn[-1])
    got = merge_codes(codes, scales, scale, mix, spec, "advanced", 40, (5,))

    # Brute force: whole tensors, one candidate at a time, from the same tosses.
    def wide(s: Any) -> Any:
        return s.astype(np.float64).reshape([-1 if i == axis else 1 for i in range(2)])

    real = [wide(s) * q for s, q in zip(scales, codes, strict=True)]
    middle = sum(m * r for m, r in zip(mix, real, strict=True))
    scaled = middle / wide(scale)
    # Pieces follow the order of channels.
    order = (lambda x: x.T) if axis == 1 else (lambda x: x)
    mask = order(ambiguous(codes, mix))
    tosses = np.concatenate(drawn, axis=1)
    assert tosses.shape == (40, mask.sum())

    def cosines(candidate: Any) -> list[float]:
        away = [(candidate * wide(scale) - r).ravel() for r in real]
        aim = [(middle - r).ravel() for r in real]
        norm = np.linalg.norm
        return [abs(a @ m) / (norm(a) * norm(m)) for a, m in zip(away, aim, strict=True)]

    best, highest = None, [0.0] * count
    for row in tosses:
        draw = order(np.rint(scaled)).copy()
        draw[mask] = np.floor(order(scaled)[mask]) + row
        draw = order(np.clip(draw, -8, 7))
        found = cosines(draw)
        if all(n > o for n, o in zip(found, highest, strict=True)):
            best, highest = draw, found
    np.testing.assert_array_equal(got.codes, best)
    # Sums over pieces are in single precision.
    np.testing.assert_allclose(got.cosines, highest, rtol=1e-6)
    nearest = cosines(np.clip(np.rint(scaled), -8, 7))
    np.testing.assert_allclose(got.nearest_cosines, nearest, rtol=1e-6)


def test_merging_is_the_same_on_any_number_of_threads(make: Any, tmp_path: Path) -> None:
    bundles = [make(domain=d) for d in ("night", "day")]
    one, four = (merge(bundles, tmp_path / f"{n}.hdrq", threads=n, method="mean") for n in (1, 4))
    assert one.manifest == four.manifest
    layers = one.manifest.metrics["layers"]
    assert set(layers) == {n for n, e in one.manifest.tensors.items() if e.role == "codes"}
    assert 0 < layers["conv1.weight_codes"]["ambiguous"] < 1


def test_bundles_with_the_fold_in_the_steps_merge_like_unfolded_models(
    make: Any, work: Path, inputs: Any, tmp_path: Path
) -> None:
    bundles = [make(domain=d, fold="steps", wbits=8) for d in ("night", "day")]
    merged = merge(bundles, tmp_path / "m.hdrq", rounding="nearest", method="mean")
    floats = [make(domain=d, method="float") for d in ("night", "day")]
    unfolded = merge(floats, tmp_path / "f.hdrq", method="mean")
    fold = merged.manifest.folds["conv1.weight_codes"]
    gamma, variance = unfolded.tensor("bn1.weight"), unfolded.tensor("bn1.running_var")
    np.testing.assert_allclose(merged.tensor(fold.variance), variance, rtol=1e-6)
    np.testing.assert_allclose(merged.tensor(fold.gamma), np.abs(gamma), rtol=1e-6)
    gain = np.abs(gamma) / np.sqrt(variance.astype(np.float64) + fold.eps)
    np.testing.assert_allclose(
        merged.tensor(fold.scale), merged.tensor(fold.raw_scale) * gain, rtol=1e-6
    )
    real = merged.tensor("conv1.weight_codes") * merged.tensor(fold.raw_scale)[:, None, None, None]
    wanted = unfolded.tensor("conv1.weight") * np.sign(gamma)[:, None, None, None]
    # 8 bits: half a step of each parent and half of the merged one.
    assert np.abs(real - wanted).max() <= 1.01 * float(merged.tensor(fold.raw_scale).max())
    run = reference_session.unfused_session(merged.path / "model.onnx").run(
        None, {"input": inputs}
    )[0]
    expected = reference_session.unfused_session(unfolded.path / "model.onnx").run(
        None, {"input": inputs}
    )
    assert reference_session.compare(expected[0], run)["relative_rms"] < 0.05


def test_a_merge_of_bundles_averages_steps_and_biases(make: Any, tmp_path: Path) -> None:
    bundles = [make(domain=d) for d in ("night", "day")]
    merged = merge(bundles, tmp_path / "m.hdrq", [0.25, 0.75], "nearest", method="mean")
    again = Bundle.open(merged.path)
    assert again.manifest.domains == {"night": 0.25, "day": 0.75}
    assert again.graph_sha256 == bundles[0].graph_sha256
    for name in ("conv1.weight_scale", "input.act_scale", "fc.bias"):
        mean = 0.25 * bundles[0].tensor(name) + 0.75 * bundles[1].tensor(name)
        np.testing.assert_allclose(again.tensor(name), mean, rtol=1e-6)


def test_float_bundles_match_batch_norm_moments(make: Any, tmp_path: Path) -> None:
    bundles = [make(domain=d, method="float") for d in ("night", "day")]
    merged = merge(bundles, tmp_path / "f.hdrq", method="mean")
    means = [b.tensor("bn.running_mean") for b in bundles]
    variances = [b.tensor("bn.running_var") for b in bundles]
    centre = np.mean(means, 0)
    # Two domains of one sample each: the variance of their mixture.
    expected = np.mean([v + (m - centre) ** 2 for v, m in zip(variances, means, strict=True)], 0)
    np.testing.assert_allclose(merged.tensor("bn.running_var"), expected, rtol=1e-6)


def test_folded_float_bundles_average_folded_weights(make: Any, tmp_path: Path) -> None:
    bundles = [make(domain=d, method="float-folded") for d in ("night", "day")]
    merged = merge(bundles, tmp_path / "f.hdrq", method="mean")
    for name in ("conv1.weight", "fc.bias"):
        mean = np.mean([b.tensor(name) for b in bundles], 0)
        np.testing.assert_allclose(merged.tensor(name), mean, rtol=1e-6)


def test_the_first_difference_is_named(make: Any, tmp_path: Path) -> None:
    night = make()
    cases = [
        (make(domain="day", wbits=3), "different scheme wbits: 4 .* 3"),
        (make(domain="day", per_channel=True), "scheme per_channel"),
        (make("Wide"), "different model: tiny_models:Tiny"),
        (make(domain="day", method="float"), "method is float"),
    ]
    apart, folded = (make(domain="day", method=m) for m in ("float", "float-folded"))
    with pytest.raises(MergeError, match="different scheme fold: none .* weights"):
        merge([apart, folded], tmp_path / "no.hdrq")
    for other, message in cases:
        with pytest.raises(MergeError, match=message):
            merge([night, other], tmp_path / "no.hdrq")
    for weights, message in (
        ([0.5, 0.6], "sum 1.1"),
        ([1.0], "1 weights for 2"),
        ([-1, 2], ">= 0"),
    ):
        with pytest.raises(MergeError, match=message):
            merge([night, night], tmp_path / "no.hdrq", weights)
    with pytest.raises(MergeError, match="two or more"):
        merge([night], tmp_path / "no.hdrq")
    assert not (tmp_path / "no.hdrq").exists()
