from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle
from hdrq_deploy.errors import BundleError
from hdrq_deploy.formats.bundle import GRAPH
from hdrq_deploy.formats.statistics import STATISTICS, Histogram, Statistics
from hdrq_deploy.numerics.layer_statistics import InputStatistics

WEIGHT = "conv1.weight_codes"


def statistics_of(bundle: Bundle) -> Statistics:
    shape = bundle.manifest.tensors[WEIGHT].shape
    features = int(np.prod(shape[1:]))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, features)) * np.geomspace(1e-4, 1e4, features)
    layer = InputStatistics.of(100, x.mean(0)[None], np.cov(x.T, bias=True)[None], 5)
    histogram = Histogram(-1.0, 2.0, np.arange(16, dtype=np.float32))
    return Statistics(5, {WEIGHT: (None, "conv")}, {WEIGHT: layer}, {"input.act_scale": histogram})


def with_statistics(bundle: Bundle, path: Path) -> Bundle:
    graph = (bundle.path / GRAPH).read_bytes()
    return Bundle.write(
        path,
        bundle.manifest.model_copy(update={"statistics": None}),
        bundle.tensors(),
        graph,
        bundle.golden(),
        statistics=statistics_of(bundle),
    )


def test_statistics_come_back_and_are_no_part_of_the_identity(make: Any, tmp_path: Path) -> None:
    plain = make()
    bundle = Bundle.open(with_statistics(plain, tmp_path / "full.hdrq").path)
    assert bundle.manifest_sha256 == plain.manifest_sha256
    file, needed = bundle.statistics(), statistics_of(plain).layers[WEIGHT]
    assert file is not None and file.weights == (WEIGHT,)
    layer = file.layer(WEIGHT)
    np.testing.assert_array_equal(layer.mean, needed.mean)
    largest = np.abs(needed.factor).max(2, keepdims=True)
    assert np.max(np.abs(layer.factor - needed.factor) / largest) < 2**-11
    assert file.histogram("input.act_scale").counts.sum() == 120


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_statistics_are_named(make: Any, tmp_path: Path, damage: str) -> None:
    path = with_statistics(make(), tmp_path / "full.hdrq").path / STATISTICS
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-9])
    with pytest.raises(BundleError, match=f"{STATISTICS}: (missing|found)"):
        Bundle.open(path.parent)


def test_a_record_that_fits_no_weight_is_refused(make: Any, tmp_path: Path) -> None:
    bundle = with_statistics(make(), tmp_path / "full.hdrq")
    manifest = bundle.path / "manifest.json"
    text = manifest.read_text()
    features = bundle.manifest.statistics.layers[0].features
    manifest.write_text(text.replace(f'"features": {features}', f'"features": {features + 1}'))
    with pytest.raises(BundleError, match="statistics of 1 x"):
        Bundle.open(bundle.path)
