"""Rounding that compensates its errors, beside the algorithm as its paper writes it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import merge
from hdrq_deploy.numerics import error_compensation as module
from hdrq_deploy.numerics.error_compensation import compensated, damped, error_of
from hdrq_deploy.numerics.moments import Moments
from hdrq_deploy.numerics.spec import QuantSpec
from tests.merging.seen import with_statistics


def gptq(rows: Any, covariance: Any, scale: float, spec: QuantSpec) -> Any:
    """GPTQ, column by column, with the Cholesky factor of the inverse (Frantar et al., alg. 1)."""
    order = np.argsort(-np.diag(covariance), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(covariance[np.ix_(order, order)])).T
    left, codes = rows[order].copy(), np.zeros(rows.shape)
    for j, feature in enumerate(order):
        codes[feature] = np.clip(np.rint(left[j] / scale), spec.lo, spec.hi)
        error = (left[j] - scale * codes[feature]) / factor[j, j]
        left[j:] -= np.outer(factor[j, j:], error)
    return codes


@pytest.mark.parametrize(("features", "rank"), [(9, 2), (9, 9), (50, 6), (50, 50), (150, 10)])
def test_codes_are_those_of_gptq(features: int, rank: int, monkeypatch: Any) -> None:
    rng = np.random.default_rng(features + rank)
    monkeypatch.setattr(module, "_BLOCK", 16)
    moments = damped(
        Moments(rng.standard_normal((2, rank, features)), rng.uniform(0.1, 0.5, (2, features)))
    )
    rows, spec = rng.standard_normal((2, features, 5)), QuantSpec.weight(3)
    got = compensated(rows, moments, np.full((1, 1, 1), 0.6), spec)
    for group in range(2):
        covariance = moments.whole()[group]
        np.testing.assert_array_equal(got[group], gptq(rows[group], covariance, 0.6, spec))
        # Without the compensation it would not be: half of the codes are others.
        assert (got[group] != np.clip(np.rint(rows[group] / 0.6), -4, 3)).mean() > 0.05


def test_the_error_lies_between_the_best_there_is_and_that_of_nearest() -> None:
    spec, found = QuantSpec.weight(2), []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        moments = damped(Moments(rng.standard_normal((1, 2, 4)), rng.uniform(0.01, 0.1, (1, 4))))
        rows = rng.uniform(-1.5, 1, (1, 4, 1))
        nearest = np.clip(np.rint(rows), -2, 1)
        codes = compensated(rows, moments, np.ones((1, 1, 1)), spec)
        everything = np.array(list(itertools.product(range(-2, 2), repeat=4)), float)
        off = everything - rows[0, :, 0]
        best = np.einsum("ni,ij,nj->n", off, moments.whole()[0], off).min()
        found.append((best, error_of(codes - rows, moments), error_of(nearest - rows, moments)))
        assert found[-1][0] <= found[-1][1] * (1 + 1e-9)
    best, own, near = np.sum(found, 0)
    assert own < 0.6 * near and own < 2 * best


def test_a_layers_bias_makes_up_for_the_mean_of_what_rounding_loses(
    make: Any, tmp_path: Path
) -> None:
    bundles = [
        with_statistics(make(domain=d, wbits=2), tmp_path / f"{d}.hdrq", k)
        for k, d in enumerate(("night", "day"))
    ]
    mean = merge(bundles, tmp_path / "m.hdrq", method="mean", rounding="compensated")
    statistics = mean.statistics()
    assert mean.manifest.options["merge"]["rounding"] == "compensated"
    assert "method" not in mean.manifest.options["merge"]
    real = sum(
        b.tensor("conv1.weight_codes") * b.tensor("conv1.weight_scale").astype(np.float64) / 2
        for b in bundles
    )
    (bias,) = (r.bias for r in statistics.record.layers if r.weight == "conv1.weight_codes")
    before = sum(b.tensor(bias).astype(np.float64) / 2 for b in bundles)
    scale = float(mean.tensor("conv1.weight_scale"))
    after = mean.tensor("conv1.weight_codes") * scale
    inputs = statistics.layer("conv1.weight_codes").mean[0]
    lost = (real - after).reshape(8, -1) @ inputs
    # Biases are whole multiples of the scales' product, moved by two of them at most.
    (operand,) = (float(mean.tensor(a.scale)) for a in mean.manifest.activations[1:2])
    unit = 2.5 * scale * max(operand, float(mean.tensor("input.act_scale"))) / 64
    assert np.abs(mean.tensor(bias) - (before + lost)).max() < unit
    assert np.abs(lost).max() > 2 * unit
