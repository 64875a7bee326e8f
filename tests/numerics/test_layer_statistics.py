from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from hdrq_deploy.numerics.layer_statistics import InputStatistics, mixture


def rows(seed: int, count: int, features: int) -> npt.NDArray[np.float64]:
    """Correlated rows with a mean."""
    rng = np.random.default_rng(seed)
    turn = rng.standard_normal((features, features)) * np.geomspace(3, 0.05, features)[:, None]
    return rng.standard_normal((count, features)) @ turn + rng.standard_normal(features)


def statistics(x: npt.NDArray[np.float64], rank: int) -> InputStatistics:
    return InputStatistics.of(len(x), x.mean(0)[None], np.cov(x.T, bias=True)[None], rank)


def test_full_rank_is_the_covariance_and_low_rank_keeps_its_diagonal() -> None:
    x = rows(0, 300, 24)
    whole = np.cov(x.T, bias=True)
    np.testing.assert_allclose(statistics(x, 24).covariance(0), whole, atol=1e-5 * whole.max())
    few = statistics(x, 6)
    assert few.rank == 6
    np.testing.assert_allclose(np.diag(few.covariance(0)), np.diag(whole), rtol=1e-5)
    values, vectors = np.linalg.eigh(whole)
    best = (vectors[:, -6:] * values[-6:]) @ vectors[:, -6:].T
    np.testing.assert_allclose(few.factor[0].T @ few.factor[0], best, atol=1e-5 * whole.max())


def test_many_features_are_reduced_without_all_eigenvectors() -> None:
    x = rows(1, 500, 120)
    whole = np.cov(x.T, bias=True)
    few = statistics(x, 8)  # far less than a third of the features
    values = np.linalg.eigvalsh(whole)
    error = np.linalg.norm(whole - few.factor[0].T @ few.factor[0], 2)
    assert error < 1.05 * values[-9]


@pytest.mark.parametrize("rank", [30, 5])
def test_a_mixture_is_that_of_the_rows(rank: int) -> None:
    parts = [rows(2, 200, 30), rows(3, 200, 30)]
    merged = mixture([statistics(x, 30) for x in parts], [0.25, 0.75], rank)
    drawn = np.concatenate([parts[0], np.tile(parts[1], (3, 1))])
    whole = np.cov(drawn.T, bias=True)
    np.testing.assert_allclose(merged.mean[0], drawn.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.diag(merged.covariance(0)), np.diag(whole), rtol=1e-4)
    kept = merged.factor[0].astype(np.float64)
    values = np.linalg.eigvalsh(whole)
    beyond = values[-rank - 1] if rank < 30 else 0.0
    assert np.linalg.norm(whole - kept.T @ kept, 2) < 1.01 * beyond + 1e-4 * values[-1]


def test_a_feature_that_never_changes_is_no_division_by_zero() -> None:
    x = rows(4, 50, 9)
    x[:, 3] = 0.0
    few = statistics(x, 3)
    assert few.diagonal[0, 3] == 0 and np.isfinite(few.covariance(0)).all()
