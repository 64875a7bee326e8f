from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hdrq_deploy import Bundle
from hdrq_deploy.errors import BundleError
from hdrq_deploy.formats.bundle import GRAPH
from hdrq_deploy.formats.checkpoints import checkpoint_sha256, open_checkpoint
from hdrq_deploy.formats.file_kinds import BUNDLE, CHECKPOINT_STATISTICS
from hdrq_deploy.formats.statistics import (
    STATISTICS,
    CheckpointStatistics,
    Histogram,
    Statistics,
    read_statistics,
)
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
    largest = np.abs(needed.mean).max()
    np.testing.assert_allclose(layer.mean, needed.mean, rtol=2**-11, atol=1e-7 * largest)
    largest = np.abs(needed.factor).max(2, keepdims=True)
    assert np.max(np.abs(layer.factor - needed.factor) / largest) < 0.501 / 127
    variances = np.diag(needed.covariance(0))
    np.testing.assert_allclose(
        np.diag(layer.covariance(0)), variances, rtol=2e-3, atol=1e-5 * variances.max()
    )
    np.testing.assert_allclose(file.histogram("input.act_scale").counts, np.arange(16), rtol=2**-11)


def test_inputs_that_are_next_to_nothing_are_kept_as_zeros(tmp_path: Path) -> None:
    least = np.full((1, 4), 1e-44)
    layer = InputStatistics.of(9.0, least, np.diag([1e-44] * 4)[None], 2)
    statistics = Statistics(2, {"w": (None, "linear")}, {"w": layer}, {})
    path = tmp_path / "a.safetensors"
    with np.errstate(all="raise", under="ignore"):
        path.write_bytes(statistics.serialize_for_checkpoint("m", "", ""))
    kept = read_statistics(path).layer("w")
    assert not kept.mean.any() and np.abs(kept.covariance(0)).max() < 1e-40


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


def test_statistics_of_a_checkpoint_carry_their_record(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "night.statistics.safetensors"
    statistics = statistics_of(make())
    path.write_bytes(statistics.serialize_for_checkpoint("a:B", "11", "22"))
    file = read_statistics(path)
    assert isinstance(file.record, CheckpointStatistics)
    assert (file.record.model, file.record.checkpoint_sha256) == ("a:B", "11")
    np.testing.assert_allclose(file.layer(WEIGHT).mean, statistics.layers[WEIGHT].mean, 1e-3, 1e-4)
    assert CHECKPOINT_STATISTICS.is_ours(path)
    path.write_bytes(statistics.serialize())
    assert not CHECKPOINT_STATISTICS.is_ours(path)
    with pytest.raises(BundleError, match="found no statistics of a checkpoint"):
        read_statistics(path)


def test_the_hash_of_a_checkpoint_is_that_of_its_values(tmp_path: Path) -> None:
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}

    def hashed(name: str, **changed: np.ndarray[Any, Any]) -> str:
        save_file({**values, **changed}, tmp_path / name, {"note": name})
        return checkpoint_sha256(open_checkpoint(tmp_path / name))

    same = hashed("a.safetensors")
    assert hashed("b.safetensors", **{"n.num_batches_tracked": np.array(3)}) == same
    others = [{"a": values["a"].reshape(3, 2)}, {"b": np.zeros(2, np.float16)}, {"c": values["b"]}]
    assert len({same, *(hashed("c.safetensors", **other) for other in others)}) == 4


def test_a_bundle_with_statistics_may_be_replaced(make: Any, tmp_path: Path) -> None:
    bundle = with_statistics(make(), tmp_path / "full.hdrq")
    assert BUNDLE.stranger(bundle.path) == ""
    (bundle.path / "notes.txt").write_text("mine")
    assert "notes.txt" in BUNDLE.stranger(bundle.path)


def test_a_manifest_that_is_used_again_promises_no_statistics(make: Any, tmp_path: Path) -> None:
    bundle = with_statistics(make(), tmp_path / "full.hdrq")
    graph = (bundle.path / GRAPH).read_bytes()
    again = Bundle.write(tmp_path / "again.hdrq", bundle.manifest, bundle.tensors(), graph)
    assert bundle.manifest.statistics and Bundle.open(again.path).statistics() is None
