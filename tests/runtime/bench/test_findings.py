"""What is kept of an engine's decisions, against a count by hand."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hdrq_deploy.calibration_data.readers import ImageSet, numbered, read
from hdrq_deploy.exporters import export
from hdrq_deploy.formats.engine_folder import read_manifest
from hdrq_deploy.formats.findings import MOST_CLASSES
from hdrq_deploy.runtime.bench.findings import Decided
from hdrq_deploy.runtime.bench.measurement import benchmark_all
from hdrq_deploy.runtime.loading import load_engine


def pixels_of(text: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_a_benchmark_keeps_what_was_decided(make: Any, work: Path, tmp_path: Path) -> None:
    engine = export(make(), tmp_path / "engine")
    found: dict[str, Any] = {}
    data = {"night": work / "images", "arrays": work / "data.npz"}
    (result,) = benchmark_all([engine], data, threads=1, found=found)
    kept = found[result.path]
    assert kept.classes == tuple("abcd")  # the folders' names
    images = numbered(read(work / "images"), None, 4, "images")
    with load_engine(engine) as loaded:
        predicted = loaded(images.x).argmax(1)
    table = np.zeros((4, 5), int)
    for label, column in zip(images.y, predicted, strict=True):
        table[label, column] += 1
    night = kept.domains["night"]
    assert np.array_equal(night.table, table)
    wrong = Counter(
        ("abcd"[a], "abcd"[b]) for a, b in zip(images.y, predicted, strict=True) if a != b
    )
    assert {(a, b): n for a, b, n in night.confused} == dict(wrong)
    assert len(night.samples) == 12  # all there are
    for i, sample in enumerate(night.samples):
        assert (sample.label, sample.predicted) == ("abcd"[images.y[i]], "abcd"[predicted[i]])
        assert sample.share == (images.y[i] == predicted[i])
        frame = np.rint(255 * images.x[i].transpose(1, 2, 0))
        assert sample.kind == "image/png" and np.array_equal(pixels_of(sample.picture), frame)


def test_images_are_chosen_by_their_labels(make: Any, tmp_path: Path) -> None:
    manifest = read_manifest(export(make(), tmp_path / "engine"))
    labels = np.repeat(np.arange(60), 3)
    x = np.zeros((len(labels), 1, 300, 200), np.float32)
    decided = Decided(manifest, {"d": ImageSet(x, labels, None, None)})
    decided.seen("d", labels, labels, 60)
    (found,) = decided.findings().domains.values()
    assert found.table is None and len(decided.findings().classes) == 60 > MOST_CLASSES
    shown = [int(sample.label) for sample in found.samples]
    assert len(shown) == 12 and shown == sorted(set(shown)) and (shown[0], shown[-1]) == (0, 59)
    assert found.confused == () and max(pixels_of(found.samples[0].picture).shape[:2]) == 112


def test_scenes_are_shown_beside_their_labels(make: Any, work: Path, tmp_path: Path) -> None:
    engine = export(make("Net"), tmp_path / "engine")
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 4, (3, 16, 16))
    np.savez(tmp_path / "maps.npz", x=rng.random((3, 3, 16, 16), np.float32), y=maps)
    found: dict[str, Any] = {}
    (result,) = benchmark_all([engine], {"d": tmp_path / "maps.npz"}, threads=1, found=found)
    domain = found[result.path].domains["d"]
    assert len(domain.samples) == 2 and domain.samples[0].label == ""
    assert pixels_of(domain.samples[0].picture).shape == (16, 48, 3)
    assert result.accuracy and result.accuracy.pixel_accuracy
    assert sum(map(sum, domain.table)) == maps.size
    hits = sum(domain.table[i][i] for i in range(4))
    assert hits / maps.size == result.accuracy.pixel_accuracy["d"]
