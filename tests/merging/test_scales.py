"""The search of a merged layer's scales, beside a search that tries every candidate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hdrq_deploy.merging import scales
from hdrq_deploy.numerics.spec import QuantSpec


def every_candidate(values: Any, spec: QuantSpec, likely: Any) -> Any:
    """One channel at a time, one candidate at a time, the first of the best."""
    found = []
    for row, first in zip(values, likely, strict=True):
        widest = max(row.max() / spec.hi, row.min() / spec.lo)
        candidates = [first, *(widest * k / 100 for k in range(1, 101))]
        candidates = [max(c, 1e-12) for c in candidates]
        errors = [
            (np.abs(np.clip(np.rint(row / c), spec.lo, spec.hi) * c - row) ** 2.4).mean()
            for c in candidates
        ]
        found.append(candidates[int(np.argmin(errors))])
    return np.array(found)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [9, 64, 1200])
def test_the_scale_is_the_best_of_all_candidates(bits: int, count: int) -> None:
    rng, spec = np.random.default_rng(bits), QuantSpec.weight(bits, 0)
    weights = np.stack(
        [
            rng.standard_normal(count),
            rng.standard_t(3, count),
            np.round(2 * rng.standard_normal(count)) / 4,
            np.zeros(count),
            *rng.uniform(-1, 1, (3, count)),
        ]
    )
    likely = (np.abs(weights).max(1) / spec.hi * 0.9 + 1e-3).astype(np.float32)
    expected = every_candidate(np.sort(weights, 1), spec, likely.astype(np.float64))
    got = scales.searched_scale(weights, spec, likely, True)
    np.testing.assert_array_equal(got, expected.astype(np.float32))
    assert len({*(got[:2] / np.abs(weights[:2]).max(1))}) == 2
    whole = scales.searched_scale(weights, spec, likely[0], False)
    flat = np.sort(weights.reshape(1, -1), 1)
    if flat.size <= 4096:
        expected = every_candidate(flat, spec, likely[:1].astype(np.float64))
        assert whole == np.float32(expected[0])


def test_a_bound_that_is_wrong_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, spec = np.random.default_rng(0), QuantSpec.weight(3, 0)
    weights = rng.standard_normal((4, 500))
    likely = np.full(4, 9.0, np.float32)
    right = scales.searched_scale(weights, spec, likely, True)
    bound = scales._beyond
    monkeypatch.setattr(scales, "_beyond", lambda *a: 100 * bound(*a))
    assert not np.array_equal(scales.searched_scale(weights, spec, likely, True), right)
