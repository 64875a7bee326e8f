"""Regression prepared once, beside the plain solution at every mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.merging import Merger
from hdrq_deploy.merging.methods import METHODS, MethodOptions
from hdrq_deploy.numerics.moment_mixtures import LowRankMixture, PairMixture
from hdrq_deploy.numerics.moments import Moments, SingularError
from tests.merging.seen import drawn_rows, statistics_of, with_statistics

MIXES = {2: [(0.5, 0.5), (0.03, 0.97), (0.8, 0.2), (1.0, 0.0)], 3: [(0.2, 0.3, 0.5), (0.6, 0, 0.4)]}
LAYERS = METHODS["regression"].layers
assert LAYERS is not None


@pytest.mark.parametrize("parents", [2, 3])
@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_kept_layer_gives_what_the_plain_solution_gives(
    parents: int, rank: int, bias: bool
) -> None:
    rng = np.random.default_rng(parents)
    rows = [(k + 1) * drawn_rows(k, 2, 40) for k in range(parents)]
    for x in rows:
        x[:, :, 5] = 0  # a channel that is always 0 takes the mean
    weights = [rng.standard_normal((2, 40 + bias, 6)) for _ in rows]
    options = MethodOptions()
    parts = [
        LAYERS.prepare(w, statistics_of(x, rank), bias, options)
        for w, x in zip(weights, rows, strict=True)
    ]
    kept = LAYERS.kept(parts, options)
    for mix in MIXES[parents]:
        expected = LAYERS.merge(parts, mix, options)
        np.testing.assert_allclose(kept(mix), expected, rtol=2e-5, atol=2e-5)
        mean = sum(w * x for w, x in zip(mix, weights, strict=True))
        assert max(mix) == 1 or np.abs(expected - mean).max() > 0.01  # no mean in disguise


def test_mixtures_are_solutions_of_the_whole_system() -> None:
    rng = np.random.default_rng(0)
    moments = [Moments(rng.standard_normal((1, 4, 30)), rng.uniform(0.1, 9, (1, 30))) for _ in "ab"]
    rows = [rng.standard_normal((1, 30, 5)) for _ in "ab"]
    ridge = np.full((1, 30), 0.3)
    one, other = (m.whole()[0] for m in moments)
    for first in (0.1, 0.7):
        whole = first * one + (1 - first) * other + 0.3 * np.eye(30)
        mean = first * rows[0][0] + (1 - first) * rows[1][0]
        target = first * one @ rows[0][0] + (1 - first) * other @ rows[1][0] + 0.3 * mean
        expected = np.linalg.solve(whole, target)
        mix = (first, 1 - first)
        low = LowRankMixture(moments, rows).solved(mix, ridge)[0]
        pair = PairMixture(moments, rows, [ridge, ridge]).solved(mix)[0]
        np.testing.assert_allclose(low, expected, atol=2e-6)
        np.testing.assert_allclose(pair, expected, atol=2e-6)
        turned = PairMixture(moments, rows, [ridge, ridge]).solved(mix[::-1])[0]
        assert np.abs(turned - expected).max() > 0.01


def test_a_mixture_without_a_solution_says_so() -> None:
    nothing = [Moments(np.ones((1, 1, 6)), np.zeros((1, 6)))] * 2
    rows, ridge = [np.ones((1, 6, 2))] * 2, np.zeros((1, 6))
    with pytest.raises(SingularError, match="sum of others"):
        LowRankMixture(nothing, rows).solved([0.5, 0.5], ridge)
    with pytest.raises(SingularError, match="singular|badly conditioned"):
        PairMixture(nothing, rows, [ridge, ridge])
    zero = [Moments(np.zeros((1, 1, 6)), np.zeros((1, 6)))] * 2
    with pytest.raises(SingularError, match="always 0"):
        PairMixture(zero, rows, [ridge, ridge])
    # Asked through the method, the layer gives the reason at every mix.
    options = MethodOptions(alpha=1.0, ridge=0.0)
    parts = [
        LAYERS.prepare(np.ones((1, 5, 2)), statistics_of(np.zeros((1, 9, 5))), False, options)
    ] * 2
    with pytest.raises(SingularError, match="always 0"):
        LAYERS.kept(parts, options)([0.5, 0.5])


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("rank", [4, 1000])
def test_a_merger_that_keeps_its_systems_gives_the_tensors_of_one_that_does_not(
    make: Any, tmp_path: Path, rounding: str, rank: int
) -> None:
    parents = [
        with_statistics(make(domain=d, per_channel=True), tmp_path / f"{d}.hdrq", k, rank=rank)
        for k, d in enumerate(("night", "day"))
    ]
    plain, kept = (Merger(parents, rounding, method="regression", keep=k) for k in (False, True))
    for mix in ([0.3, 0.7], [0.9, 0.1], [0.3, 0.7]):
        expected, got = plain.tensors(mix), kept.tensors(mix)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            if plain.parents[0].manifest.tensors[name].role == "codes":
                apart = np.abs(got[name].astype(int) - value)
                assert apart.max() <= 1 and (apart > 0).mean() < 1e-3, name
            else:
                np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
