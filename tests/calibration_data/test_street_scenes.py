"""Street-scene data sets in their own layouts, and engines measured on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration_data.readers import Wanted, read
from hdrq_deploy.calibration_data.readers.street_scenes import (
    CITYSCAPES,
    PALETTE,
    Scenes,
    find_scenes,
)
from hdrq_deploy.cli import bench as command
from hdrq_deploy.errors import DataError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.runtime import load_engine
from hdrq_deploy.runtime.bench.accuracy import accuracy, windows
from hdrq_deploy.runtime.bench.segmentation_images import palette

# Label in the data set's own numbers -> name of the training class, or None: left out.
LABEL_IDS = {0: None, 3: None, 7: "road", 8: "sidewalk", 11: "building", 26: "car", 33: "bicycle"}
LEVEL3 = {0: "road", 1: None, 2: "sidewalk", 8: None, 9: "car", 12: None, 20: "pole", 25: "sky"}
TRAIN_IDS = {0: "road", 2: "building", 13: "car", 18: "bicycle", 255: None}


def save(file: Path, pixels: Any, mode: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":  # GTA5's label maps are palette pictures
        table = np.zeros((256, 3), np.uint8)
        table[7] = PALETTE[0]
        image = image.convert("L")
        image.putpalette(table.ravel().tolist())
    image.save(file)


def cityscapes(root: Path, kind: str, i: int, frame: Any, label: Any) -> None:
    city, stem = ("aachen", "ulm")[i % 2], f"x_{i:06}_000019"
    save(root / "leftImg8bit" / "val" / city / f"{stem}_leftImg8bit.png", frame)
    save(root / "gtFine" / "val" / city / f"{stem}_gtFine_{kind}.png", label)


def gta5(root: Path, i: int, frame: Any, label: Any) -> None:
    save(root / "images" / f"{i:05}.png", frame)
    save(root / "labels" / f"{i:05}.png", label, "P")


def bdd100k(root: Path, i: int, frame: Any, label: Any) -> None:
    save(root / "images" / "10k" / "val" / f"a-{i}.jpg", frame)
    save(root / "labels" / "sem_seg" / "masks" / "val" / f"a-{i}.png", label)


def plain(root: Path, i: int, frame: Any, label: Any) -> None:
    save(root / "images" / f"{i}.png", frame)
    save(root / "labels" / f"{i}.png", label)


LAYOUTS: dict[str, tuple[Callable[..., None], dict[int, str | None]]] = {
    "cityscapes ids": (lambda r, i, f, y: cityscapes(r, "labelIds", i, f, y), LABEL_IDS),
    "cityscapes": (lambda r, i, f, y: cityscapes(r, "labelTrainIds", i, f, y), TRAIN_IDS),
    "idd": (lambda r, i, f, y: cityscapes(r, "labellevel3Ids", i, f, y), LEVEL3),
    "gta5": (gta5, LABEL_IDS),
    "bdd100k": (bdd100k, TRAIN_IDS),
}


def tree(root: Path, layout: str, count: int = 3, size: tuple[int, int] = (24, 40)) -> list[Any]:
    """Write a small tree; returns frames and labels in the data set's numbers."""
    write, names = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        frame = rng.integers(0, 256, (*size, 3), np.uint8)
        label = rng.choice(list(names), size).astype(np.uint8)
        write(root, i, frame, label)
        made.append((frame, label))
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_found_and_mapped(layout: str, tmp_path: Path) -> None:
    made = tree(tmp_path, layout)
    names = LAYOUTS[layout][1]
    scenes = find_scenes(tmp_path)
    assert scenes.layout == layout.split()[0] and len(scenes) == 3
    assert scenes.classes == CITYSCAPES
    found = [pair for batch in scenes.batches(2) for pair in zip(*batch, strict=True)]
    # Cities are read one after the other.
    order = [0, 2, 1] if "leftImg8bit" in str(scenes.pairs[0][0]) else [0, 1, 2]
    for (x, y), i in zip(found, order, strict=True):
        frame, label = made[i]
        ids = {v: 255 if n is None else CITYSCAPES.index(n) for v, n in names.items()}
        expected = np.vectorize(ids.get)(label)
        np.testing.assert_array_equal(y, expected)
        if layout != "bdd100k":  # its images are JPEG
            np.testing.assert_allclose(x, frame.transpose(2, 0, 1) / 255, atol=1e-6)


def test_sizes_and_batches(tmp_path: Path) -> None:
    made = tree(tmp_path, "gta5", 5)
    from dataclasses import replace

    scenes = replace(
        find_scenes(tmp_path), size=(12, 20), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    batches = list(scenes.batches(2))
    assert [x.shape for x, _ in batches] == [(2, 3, 12, 20), (2, 3, 12, 20), (1, 3, 12, 20)]
    small = np.asarray(Image.fromarray(made[0][0]).resize((20, 12), Image.Resampling.BILINEAR))
    expected = (small / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(batches[0][0][0], expected.transpose(2, 0, 1), atol=1e-5)
    images = read(tmp_path, Wanted((12, 20)), limit=3)
    assert images.x.shape == (3, 3, 12, 20) and images.y is None


def test_a_folder_of_other_classes(tmp_path: Path) -> None:
    label = np.arange(24 * 40, dtype=np.uint8).reshape(24, 40) % 7
    plain(tmp_path, 0, np.zeros((24, 40, 3), np.uint8), label)
    scenes = find_scenes(tmp_path)
    assert (scenes.layout, scenes.classes) == ("folder", None)
    np.testing.assert_array_equal(next(scenes.batches(1))[1][0], label)


def test_reading_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "gta5", 12)
    scenes = find_scenes(tmp_path)
    begun = []
    whole = Scenes.read
    monkeypatch.setattr(Scenes, "read", lambda self, *f: begun.append(f) or whole(self, *f))
    stream = scenes.batches(2)
    next(stream)
    assert len(begun) <= 6
    assert sum(len(x) for x, _ in stream) == 10


def relabel(value: int, shape: tuple[int, ...] = (24, 40)) -> Callable[[Path], None]:
    return lambda root: save(root / "labels" / "00001.png", np.full(shape, value, np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "labels" / "00001.png").unlink(), "00001.png: not there; needed the label"),
        (relabel(77), "00001.png: found label 77; gta5 has 0 to 34 and 255"),
        (relabel(7, (24, 41)), "found labels of 24x41 for an image of 24x40"),
        (relabel(7, (24, 40, 3)), "mode RGB; needed one number a pixel"),
        (lambda r: (r / "images" / "00001.png").write_bytes(b"no picture"), "cannot be decoded"),
    ],
)
def test_bad_trees(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    tree(tmp_path, "gta5")
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        list(find_scenes(tmp_path).batches(2))


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    tree(tmp_path / "c", "cityscapes")
    with pytest.raises(DataError, match=r"leftImg8bit.test: not there; needed a split .val"):
        find_scenes(tmp_path / "c", "test")
    for file in (tmp_path / "c").rglob("*_gtFine_*"):
        file.unlink()
    with pytest.raises(DataError, match="found no labels; needed CITY"):
        find_scenes(tmp_path / "c")
    with pytest.raises(DataError, match="found no street scenes"):
        find_scenes(tmp_path)


def test_windows_cover_everything() -> None:
    for length in range(5, 60):
        for window in range(1, length + 1):
            starts = windows(length, window)
            covered = np.zeros(length, int)
            for start in starts:
                covered[start : start + window] += 1
            assert covered.min() >= 1 and starts[-1] == length - window
            assert len(set(starts)) == len(starts)


@pytest.fixture(scope="module")
def engine(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmentation engine of 16x16 inputs and four classes."""
    folder = tmp_path_factory.mktemp("net")
    wanted = Wanted(mean=(0.5,) * 3, std=(0.25,) * 3)
    bundle = calibrate(
        "tiny_models:Net", work / "images", "night", folder / "b.hdrq", method="rtn", wanted=wanted
    )
    return export(bundle, folder / "engine")


def scenes_of(root: Path, size: tuple[int, int], count: int = 3) -> Path:
    rng = np.random.default_rng(5)
    for i in range(count):
        label = rng.integers(0, 4, size).astype(np.uint8)
        label[:2] = 255
        plain(root, i, rng.integers(0, 256, (*size, 3), np.uint8), label)
    return root


def test_larger_images_are_seen_through_windows(engine: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    scenes = replace(find_scenes(scenes_of(tmp_path, (24, 40))), mean=(0.5,) * 3, std=(0.25,) * 3)
    with load_engine(engine) as run:
        result = accuracy(run, {"d": scenes})
        table = np.zeros((4, 4))
        for x, y in scenes.batches(1):
            total, times = np.zeros((4, 24, 40)), np.zeros((24, 40))
            for top in (0, 8):
                for left in (0, 10, 20, 24):
                    part = np.ascontiguousarray(x[:, :, top : top + 16, left : left + 16])
                    total[:, top : top + 16, left : left + 16] += run(part)[0]
                    times[top : top + 16, left : left + 16] += 1
            best = (total / times).argmax(0)
            for a, b in zip(y[0].ravel(), best.ravel(), strict=True):
                if a != 255:
                    table[a, b] += 1
        hits = np.diag(table)
        iou = hits / (table.sum(0) + table.sum(1) - hits)
        assert result.metric == "miou" and result.images == {"d": 3}
        assert result.domains["d"] == pytest.approx(iou.mean(), abs=1e-3)
        small = replace(scenes, size=(8, 8))
        with pytest.raises(DataError, match=r"images of 8x8; .* takes 16x16: .*`image_size`"):
            accuracy(run, {"d": small})


def test_a_domain_in_which_no_pixel_counts_has_no_accuracy(engine: Path, tmp_path: Path) -> None:
    seen, void = scenes_of(tmp_path / "seen", (16, 16)), scenes_of(tmp_path / "void", (16, 16))
    for file in (void / "labels").iterdir():
        Image.fromarray(np.full((16, 16), 255, np.uint8)).save(file)
    with load_engine(engine) as run:
        sets = {"seen": find_scenes(seen), "void": find_scenes(void)}
        with pytest.raises(DataError, match="void: found 3 images in which every pixel is labelle"):
            accuracy(run, sets)


def test_the_command_measures_and_draws(engine: Path, tmp_path: Path) -> None:
    root, out = scenes_of(tmp_path / "data", (24, 40)), tmp_path / "o.json"
    flags = [str(engine), "--data", f"d={root}", "--iterations", "3", "--json", str(out)]
    assert command.main([*flags, "--draw", str(tmp_path / "drawn")]) == 0
    record = json.loads(out.read_text())
    assert record["accuracy"]["metric"] == "miou" and len(record["accuracy"]["per_class"]["d"]) == 4
    pictures = sorted((tmp_path / "drawn" / "engine" / "d").iterdir())
    assert [p.name for p in pictures] == ["0000.png", "0001.png", "0002.png"]
    drawn = np.asarray(Image.open(pictures[0]))
    assert drawn.shape == (24, 3 * 40 + 8, 3)
    frame = np.asarray(Image.open(root / "images" / "0.png"))
    label = np.asarray(Image.open(root / "labels" / "0.png"))
    np.testing.assert_array_equal(drawn[:, :40], frame)
    np.testing.assert_array_equal(drawn[:, 44:84], palette(4)[label])
    assert (drawn[:2, 88:] == 0).all()  # nothing was asked there
    assert command.main([*flags, "--image-size", "16", "16"]) == 0
    for wrong in (("8", "8"), ("0", "8"), ("-1", "8")):
        assert command.main([*flags, "--image-size", *wrong]) == 2
    assert command.main([*flags, "--skip-corrupt"]) == 2
    (root / "labels" / "0.png").write_bytes(b"no picture")
    assert command.main(flags) == 2


def test_engines_of_labels(engine: Path, work: Path, tmp_path: Path) -> None:
    bundle = calibrate(
        "tiny_models:Net", work / "images", "night", tmp_path / "b.hdrq", method="rtn"
    )
    options = GraphOptions(postprocess="argmax")
    labels = export(bundle, tmp_path / "labels", options=options)
    plain_ = export(bundle, tmp_path / "plain")
    scenes = find_scenes(scenes_of(tmp_path / "s", (16, 16)))
    with load_engine(labels) as one, load_engine(plain_) as other:
        first, second = (accuracy(e, {"d": scenes}) for e in (one, other))
        assert first.domains == second.domains and first.pixel_accuracy == second.pixel_accuracy
        larger = find_scenes(scenes_of(tmp_path / "l", (24, 24)))
        with pytest.raises(DataError, match="windows need score maps"):
            accuracy(one, {"d": larger})
