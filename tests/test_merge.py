from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle, merge
from hdrq_deploy.errors import MergeError
from hdrq_deploy.merge import ambiguous, merge_codes
from hdrq_deploy.spec import QuantSpec


def parents(seed: int, count: int = 2, channels: int = 6) -> tuple[list[Any], list[Any]]:
    rng = np.random.default_rng(seed)
    codes = [rng.integers(-8, 8, (channels, 20)).astype(np.int8) for _ in range(count)]
    scales = [rng.uniform(0.05, 0.1, channels).astype(np.float32) for _ in range(count)]
    return codes, scales


def test_nearest_rounds_the_weighted_mean_of_the_real_weights() -> None:
    codes, scales = parents(0, 3)
    mix = [0.5, 0.3, 0.2]
    scale = sum(m * s for m, s in zip(mix, scales, strict=True)).astype(np.float32)
    got = merge_codes(
        codes, scales, scale, mix, QuantSpec.weight(4, 0), "nearest", 1, np.random.default_rng(0)
    )
    for c in range(6):  # one element at a time, in Python floats
        for i in range(20):
            real = sum(
                m * float(s[c]) * int(q[c, i]) for m, s, q in zip(mix, scales, codes, strict=True)
            )
            assert got[c, i] == max(-8, min(7, round(real / float(scale[c]))))


def test_ambiguous_is_an_odd_sum_of_two_codes_at_half() -> None:
    a, b = np.array([1, 2, -3, -8], np.int8), np.array([2, 4, -3, 7], np.int8)
    found = ambiguous([a, b], np.zeros(4), [0.5, 0.5])
    np.testing.assert_array_equal(found, [True, False, False, True])
    # Three parents have no exact ties: a third and two thirds are within 0.25 of a half.
    scaled = np.array([0, 1 / 3, 2 / 3, 0.1])
    np.testing.assert_array_equal(
        ambiguous([a, a, a], scaled, [1 / 3] * 3), [False, True, True, False]
    )


def test_noise_changes_only_ambiguous_codes_and_breaks_ties_both_ways() -> None:
    a = np.zeros(20000, np.int8)
    b = np.tile(np.array([1, 2], np.int8), 10000)
    step = np.array(0.1, np.float32)
    got = merge_codes(
        [a, b],
        [step, step],
        step,
        [0.5, 0.5],
        QuantSpec.weight(8),
        "noise",
        1,
        np.random.default_rng(0),
    )
    assert set(got[1::2]) == {1}
    # A fair coin: 10,000 draws stay within four standard deviations of a half.
    assert abs(got[0::2].mean() - 0.5) < 4 * 0.005


@pytest.mark.parametrize("count", [2, 3])
def test_advanced_keeps_the_draw_that_brute_force_keeps(count: int) -> None:
    codes, scales = parents(3, count)
    mix = [1 / count] * count
    spec = QuantSpec.weight(4, 0)
    scale = np.mean(scales, 0).astype(np.float32)
    got = merge_codes(codes, scales, scale, mix, spec, "advanced", 40, np.random.default_rng(5))
    real = [s[:, None].astype(np.float64) * q for s, q in zip(scales, codes, strict=True)]
    middle = sum(m * r for m, r in zip(mix, real, strict=True))
    step = scale[:, None].astype(np.float64)
    where = ambiguous(codes, middle / step, mix)

    def cosines(candidate: Any) -> list[float]:
        away = [(candidate * step - r).ravel() for r in real]
        aim = [(middle - r).ravel() for r in real]
        norm = np.linalg.norm
        return [abs(a @ m) / (norm(a) * norm(m)) for a, m in zip(away, aim, strict=True)]

    rng = np.random.default_rng(5)
    best = np.clip(np.rint(middle / step), -8, 7)
    for _ in range(40):
        errors = sum(
            m
            * np.broadcast_to(s[:, None], middle.shape)[where].astype(np.float64)
            * rng.uniform(-0.5, 0.5, int(where.sum()))
            for m, s in zip(mix, scales, strict=True)
        )
        draw = best.copy()
        noisy = (middle[where] - errors) / np.broadcast_to(step, middle.shape)[where]
        draw[where] = np.clip(np.rint(noisy), -8, 7)
        if all(n > o for n, o in zip(cosines(draw), cosines(best), strict=True)):
            best = draw
    np.testing.assert_array_equal(got, best)


def test_a_merge_of_bundles_averages_steps_and_biases(make: Any, tmp_path: Path) -> None:
    bundles = [make(domain=d) for d in ("night", "day")]
    merged = merge(bundles, tmp_path / "m.hdrq", [0.25, 0.75], "nearest")
    again = Bundle.open(merged.path)
    assert again.manifest.domains == {"night": 0.25, "day": 0.75}
    assert again.graph_sha256 == bundles[0].graph_sha256
    for name in ("conv1.weight_scale", "input.act_scale", "fc.bias"):
        mean = 0.25 * bundles[0].tensor(name) + 0.75 * bundles[1].tensor(name)
        np.testing.assert_allclose(again.tensor(name), mean, rtol=1e-6)


def test_float_bundles_match_batch_norm_moments(make: Any, tmp_path: Path) -> None:
    bundles = [make(domain=d, method="float") for d in ("night", "day")]
    merged = merge(bundles, tmp_path / "f.hdrq")
    means = [b.tensor("bn.running_mean") for b in bundles]
    variances = [b.tensor("bn.running_var") for b in bundles]
    centre = np.mean(means, 0)
    # Two domains of one sample each: the variance of their mixture.
    expected = np.mean([v + (m - centre) ** 2 for v, m in zip(variances, means, strict=True)], 0)
    np.testing.assert_allclose(merged.tensor("bn.running_var"), expected, rtol=1e-6)


def test_the_first_difference_is_named(make: Any, tmp_path: Path) -> None:
    night = make()
    cases = [
        (make(domain="day", wbits=3), "different scheme wbits: 4 .* 3"),
        (make(domain="day", per_channel=True), "scheme per_channel"),
        (make("Wide"), "different model: tiny_models:Tiny"),
        (make(domain="day", method="float"), "method is float"),
    ]
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
