"""BatchNorm's moments behind a merged layer, beside moments of its outputs on the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import merge
from hdrq_deploy.formats.statistics import LayerRecord
from hdrq_deploy.merging.batchnorm_correction import correction, norms_of
from hdrq_deploy.numerics.layer_matrix import rows_of
from tests.merging.seen import drawn_rows, statistics_of, with_statistics

MIX = [0.3, 0.7]
LAYER = LayerRecord(weight="w", bias=None, layout="conv", groups=2, features=18, rank=18, rows=1)


def test_a_correction_is_what_the_outputs_of_both_say() -> None:
    rng = np.random.default_rng(0)
    inputs = [drawn_rows(seed, 2, 18) for seed in range(2)]
    parents = [rng.standard_normal((6, 2, 3, 3)) for _ in range(2)]
    merged = rng.standard_normal((6, 2, 3, 3))
    seen = [statistics_of(x) for x in inputs]
    got = correction(merged, parents, seen, MIX, LAYER)

    def mixture(outputs: Any) -> Any:
        mean = sum(m * y.mean(1) for m, y in zip(MIX, outputs, strict=True))
        square = sum(m * (y**2).mean(1) for m, y in zip(MIX, outputs, strict=True))
        return mean.ravel(), (square - mean**2).ravel()

    own = [x @ rows_of(w, LAYER) for x, w in zip(inputs, parents, strict=True)]
    mean, variance = mixture(own)
    mean_now, variance_now = mixture([x @ rows_of(merged, LAYER) for x in inputs])
    np.testing.assert_allclose(got.shift, mean_now - mean, atol=1e-5)
    np.testing.assert_allclose(got.ratio, variance_now / variance, rtol=1e-4)
    same = correction(parents[0], [parents[0]] * 2, seen, MIX, LAYER)
    np.testing.assert_allclose(same.shift, 0, atol=1e-6)
    np.testing.assert_allclose(same.ratio, 1, rtol=1e-6)


@pytest.mark.parametrize("model", ["Tiny", "PlainNorm"])
@pytest.mark.parametrize(("method", "options"), [("rtn", {"fold": "steps"}), ("float", {})])
def test_merges_with_statistics_correct_the_moments_that_bundles_keep_apart(
    make: Any, tmp_path: Path, method: str, options: Any, model: str
) -> None:
    bundles = [
        with_statistics(make(model, domain=d, method=method, **options), tmp_path / f"{d}.hdrq", k)
        for k, d in enumerate(("night", "day"))
    ]
    norms = norms_of(bundles[0])
    assert len(norms) == 2  # bn behind stem, bn1 behind conv1
    matched = merge(bundles, tmp_path / "mean.hdrq", rounding="nearest", method="mean")
    merged = merge(bundles, tmp_path / "m.hdrq")
    for norm in norms.values():
        ratio = merged.tensor(norm.variance) / matched.tensor(norm.variance)
        assert (ratio > 0).all() and np.abs(ratio - 1).max() > 1e-4
