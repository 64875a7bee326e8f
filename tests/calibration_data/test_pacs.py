"""PACS as it is distributed: which image belongs to which split, and what is no PACS."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy.calibration_data import pacs
from hdrq_deploy.errors import DataError


def distributed(root: Path, numbers: range, domains: tuple[str, ...] = pacs.DOMAINS) -> Path:
    """A folder of every domain and class; the colour of an image tells its number."""
    for domain in domains:
        for name in pacs.CLASSES:
            (root / domain / name).mkdir(parents=True, exist_ok=True)
            for n in numbers:
                pixels = np.full((20, 24, 3), n, np.uint8)
                Image.fromarray(pixels).save(root / domain / name / f"pic_{n:03}.png")
    return root


def splits_of(folder: Path) -> dict[str, set[str]]:
    return {s: {f.name for f in (folder / s).rglob("*.png")} for s in pacs.SPLITS}


def test_every_image_is_in_the_split_of_its_number(tmp_path: Path) -> None:
    pacs.write(distributed(tmp_path / "pacs", range(1, 25)), tmp_path / "out", ("photo", "sketch"))
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["photo", "sketch"]
    found = splits_of(tmp_path / "out" / "photo")
    # By hand, for the numbers 1 to 24.
    assert found["test"] == {f"pic_{n:03}.png" for n in (4, 8, 12, 16, 20, 24)}
    assert found["calibration"] == {f"pic_{n:03}.png" for n in (3, 9, 15, 21)}
    assert len(found["training"]) == 14
    assert not any(a & b for a in found.values() for b in found.values() if a is not b)
    for split in pacs.SPLITS:
        folders = sorted(f.name for f in (tmp_path / "out" / "photo" / split).iterdir())
        assert folders == sorted(pacs.CLASSES)
    file = Path("photo") / "dog" / "pic_003.png"
    copied = tmp_path / "out" / "photo" / "calibration" / "dog" / "pic_003.png"
    assert copied.read_bytes() == (tmp_path / "pacs" / file).read_bytes()


def test_images_that_are_missing_move_no_other(tmp_path: Path) -> None:
    """Every fifth image is missing, or only those are there: as the whole set is split."""
    whole = distributed(tmp_path / "whole", range(120), ("photo",))
    pacs.write(whole, tmp_path / "of-whole", ("photo",))
    expected = splits_of(tmp_path / "of-whole" / "photo")
    for name, keep in (("gaps", lambda n: n % 5 != 4), ("rest", lambda n: n % 5 == 4)):
        part = distributed(tmp_path / name, range(120), ("photo",))
        for file in part.rglob("*.png"):
            if not keep(pacs.file_number(file)):
                file.unlink()
        pacs.write(part, tmp_path / f"of-{name}", ("photo",))
        found = splits_of(tmp_path / f"of-{name}" / "photo")
        for split, files in found.items():
            assert files < expected[split] and len(files) > len(expected[split]) / 10


def test_sketches_of_one_photo_stay_together() -> None:
    names = [f"n02103406_343-{sketch}.png" for sketch in range(1, 7)]
    assert {pacs.file_number(Path(name)) for name in names} == {343}
    assert pacs.file_number(Path("056_0012.jpg")) == 12 and pacs.split_of(12) == "test"


def without_class(root: Path) -> None:
    for file in (root / "sketch" / "house").iterdir():
        file.unlink()
    (root / "sketch" / "house").rmdir()


def without_number(root: Path) -> None:
    (root / "sketch" / "dog" / "pic_001.png").rename(root / "sketch" / "dog" / "first.png")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def one_split(root: Path) -> None:
    for file in root.rglob("*.png"):
        if pacs.split_of(pacs.file_number(file)) != "test":
            file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "sketch").rename(root / "drawings"),
            "sketch: not there; needed PACS",
        ),
        (without_class, "house: not there; needed a folder of images for each of dog, elephant"),
        (without_number, "first.png: found no number at the end of the name"),
        (one_split, "found 14 images, of which none is for the split training"),
        (lambda root: [f.unlink() for f in (root / "sketch" / "dog").iterdir()], "no images"),
        (
            lambda root: (root / "sketch" / "dog" / "pic_001.png").write_bytes(b"cut"),
            "pacs/sketch/dog/pic_001.png: cannot be decoded",
        ),
        (
            lambda root: (root / "sketch" / "dog" / "pic_020.png").symlink_to(root / "gone.png"),
            "pic_020.png: cannot be decoded",
        ),
        (lambda root: (root / "Sketch").mkdir(), "sketch: found Sketch beside it; join the two"),
        (
            lambda root: fifo(root / "sketch" / "dog" / "pic_020.png"),
            "pic_020.png: cannot be decoded .it is a named pipe",
        ),
        (lambda root: (root / "sketch" / "Dog").mkdir(), "dog: found Dog beside it; join the two"),
    ],
)
def test_what_is_no_pacs(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    root = distributed(tmp_path / "pacs", range(1, 10))
    spoil(root)
    with pytest.raises(DataError, match=message):
        pacs.write(root, tmp_path / "out", ("sketch",))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="photo: not there; needed PACS .*found no folders"):
        pacs.domain_folder(tmp_path / "nowhere", "photo")


def test_capitals_do_not_count_and_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = distributed(tmp_path / "pacs", range(1, 25), ("sketch",))
    pacs.write(root, tmp_path / "expected", ("sketch",))
    assert not capsys.readouterr().err
    (root / "sketch" / "dog").rename(root / "sketch" / "Dog")
    (root / "sketch").rename(root / "Sketch")
    (root / "Sketch" / "zebra").mkdir()
    for n in (1, 2):
        shutil.copy(root / "Sketch" / "Dog" / f"pic_{n:03}.png", root / "Sketch")
    (root / "Sketch" / "horse" / "more").mkdir()
    (root / "Sketch" / "horse" / "notes.txt").write_text("")
    for n in (4, 8, 12, 16, 20, 24):
        (root / "Sketch" / "house" / f"pic_{n:03}.png").unlink()
    pacs.write(root, tmp_path / "out", ("sketch",))
    said = capsys.readouterr().err
    assert "left out zebra, 2 images beside the class folders; classes are dog" in said
    assert "horse: left out 1 folder, 1 .txt" in said or "horse: left out 1 .txt, 1 folder" in said
    assert "house: none of its 18 images is for test, by their numbers" in said
    expected, found = (splits_of(tmp_path / name / "sketch") for name in ("expected", "out"))
    assert {s: len(files) for s, files in found.items()} == {
        s: len(files) for s, files in expected.items()
    }
    assert len(list((tmp_path / "out/sketch/test/house").iterdir())) == 0
    assert len(list((tmp_path / "out/sketch/test/dog").iterdir())) == 6
