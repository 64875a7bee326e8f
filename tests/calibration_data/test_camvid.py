"""CamVid in both forms of its labels: classes, stretches of drives, fog and snow."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy.calibration_data import camvid
from hdrq_deploy.calibration_data.readers.street_scenes import IGNORE, find_scenes
from hdrq_deploy.errors import DataError, ModelError
from hdrq_deploy.typing import Array
from tests.calibration_data.test_decoding import TURNS, exif

# Some of the original label_colors.txt, and the class that SegNet's authors give them.
ORIGINAL = {
    (128, 128, 128): "sky",
    (64, 192, 0): "building",  # wall
    (0, 0, 64): "pole",  # traffic cone
    (128, 0, 192): "road",  # lane markings
    (128, 128, 192): "pavement",  # road shoulder
    (192, 192, 0): "tree",  # other vegetation
    (0, 64, 64): "sign",  # traffic light
    (64, 64, 128): "fence",
    (192, 128, 192): "car",  # truck or bus
    (64, 128, 64): "pedestrian",  # animal
    (192, 0, 192): "bicyclist",  # motorcycle
    (0, 0, 0): None,
}
EXPECTED = np.array([[*list(range(11)), IGNORE]], np.uint8).repeat(2, 0)


def coloured() -> Image.Image:
    return Image.fromarray(np.array([list(ORIGINAL)], np.uint8).repeat(2, 0))


def palette(colours: list[tuple[int, int, int]]) -> Image.Image:
    """Indices 0 to 11 of a palette."""
    image = Image.fromarray(np.arange(12, dtype=np.uint8)[None].repeat(2, 0), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


@pytest.mark.parametrize(
    "image",
    [
        coloured(),
        coloured().convert("RGBA"),
        # Colours decide, wherever the palette holds them.
        palette(list(ORIGINAL)).convert("RGB").quantize(256, dither=Image.Dither.NONE),
        palette([(n, n, n + 1) for n in range(12)]),
        Image.fromarray(np.arange(12, dtype=np.uint8)[None].repeat(2, 0)),
        Image.fromarray(EXPECTED),
    ],
    ids=["colours", "alpha", "palette", "other palette", "numbers", "numbers with 255"],
)
def test_labels_of_every_form_are_the_same(image: Image.Image, tmp_path: Path) -> None:
    assert list(ORIGINAL.values()) == [*camvid.CLASSES, None]
    image.save(tmp_path / "label.png")
    found = camvid.label_map(tmp_path / "label.png")
    assert found.dtype == np.uint8 and np.array_equal(found, EXPECTED)


@pytest.mark.parametrize("used", [[0, 1, 3, 7], [0, 5, 6], [1], list(range(12))])
def test_numbers_with_the_palette_of_another_set_are_numbers(
    used: list[int], tmp_path: Path
) -> None:
    """PASCAL VOC's palette has some colours of CamVid, at other places."""
    bits = np.arange(8)
    numbers = np.arange(256)[:, None]
    palette = np.stack(
        [((numbers >> (3 * bits + c) & 1) << (7 - bits)).sum(1) for c in range(3)], 1
    )
    assert palette[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    values = np.resize(np.array(used, np.uint8), (4, 6))
    picture = Image.fromarray(values)
    picture.putpalette(palette.astype(np.uint8).ravel().tolist())
    picture.save(tmp_path / "label.png")
    expected = np.where(values == 11, IGNORE, values)
    assert np.array_equal(camvid.label_map(tmp_path / "label.png"), expected)


@pytest.mark.parametrize("name", ["car", "sky", "bicyclist"])
def test_a_palette_of_few_colours_of_camvid_is_read_by_colour(name: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 4), camvid.COLOURS[name][0])
    picture.putpixel((0, 0), (0, 0, 0))
    picture.quantize(4).save(tmp_path / "label.png")
    with Image.open(tmp_path / "label.png") as saved:
        assert saved.mode == "P"
    found = camvid.label_map(tmp_path / "label.png")
    assert found[0, 0] == IGNORE and (found.ravel()[1:] == camvid.CLASSES.index(name)).all()


def test_the_32_colours_differ() -> None:
    colours = [colour for name in camvid.CLASSES for colour in camvid.COLOURS[name]]
    assert len(set(colours)) == len(colours) == 31 and (0, 0, 0) not in colours


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (4, 4), 12), "found label 12; needed 0 to 10, and 11 for void"),
        (Image.new("RGB", (4, 2), (1, 2, 3)), r"found 8 pixels of colours .*first: \(1, 2, 3\)"),
        (Image.new("F", (4, 4)), "found a picture of mode F; needed CamVid's colours"),
    ],
)
def test_labels_that_are_not_camvids(image: Image.Image, message: str, tmp_path: Path) -> None:
    image.save(tmp_path / "label.tiff")
    with pytest.raises(DataError, match=message):
        camvid.label_map(tmp_path / "label.tiff")


def drive(
    root: Path, numbers: range, name: str = "0016E5_", size: tuple[int, int] = (24, 32)
) -> Path:
    """A light with one drive; a frame's colour and label tell its number."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for n in numbers:
        Image.new("RGB", size[::-1], (n % 256,) * 3).save(root / "images" / f"{name}{n:05}.png")
        Image.new("L", size[::-1], n // 30 % 12).save(root / "labels" / f"{name}{n:05}.png")
    return root


def test_splits_are_stretches_of_a_drive(tmp_path: Path) -> None:
    data = tmp_path / "CamVid"
    drive(data / "day", range(0, 3600, 30))
    drive(data / "day", range(3600, 3700, 2), "Seq05VD_f")
    camvid.write(data, tmp_path / "out", ("day",))
    found = {
        split: [
            camvid.frame_of(f) for f in sorted((tmp_path / "out/day" / split / "images").iterdir())
        ]
        for split in camvid.SPLITS
    }
    first = {s: [n for drive, n in frames if drive == "0016E5_"] for s, frames in found.items()}
    # By hand: stretches of 900 frames, without their first two seconds.
    assert first["test"] == list(range(60, 900, 30))
    assert first["calibration"] == list(range(1860, 2700, 30))
    assert first["training"] == [*range(960, 1800, 30), *range(2760, 3600, 30)]
    # Of frames that are nearly equal one in half a second.
    assert [n for drive, n in found["test"] if drive == "Seq05VD_f"] == [3660, 3676, 3692]
    # What is missing moves no other frame.
    for file in (data / "day" / "images").glob("*[02468]0.png"):
        if camvid.frame_of(file)[1] % 150 == 0:
            file.unlink()
    camvid.write(data, tmp_path / "gaps", ("day",))
    for split, frames in found.items():
        files = (tmp_path / "gaps/day" / split / "images").iterdir()
        assert {camvid.frame_of(f) for f in files} <= set(frames)


def test_frames_and_labels_are_those_that_were_there(tmp_path: Path) -> None:
    data = drive(tmp_path / "CamVid" / "dusk", range(0, 3600, 180), "0001TP_", camvid.SIZE).parent
    for file in (data / "dusk" / "labels").iterdir():
        file.rename(file.with_name(f"{file.stem}_L.png"))  # as in the original distribution
    camvid.write(data, tmp_path / "out", ("dusk",))
    scenes = find_scenes(tmp_path / "out" / "dusk" / "test")
    assert len(scenes) == 4
    for (image, _), (x, y) in zip(
        scenes.pairs, (scenes.read(*p) for p in scenes.pairs), strict=True
    ):
        number = camvid.frame_of(image)[1]
        assert x.shape == (3, 240, 320) and np.allclose(x * 255, number % 256)
        expected = number // 30 % 12
        assert (y == (IGNORE if expected == 11 else expected)).all()
        assert image.read_bytes() == (data / "dusk" / "images" / image.name).read_bytes()
    # Larger ones, as the original has them, are brought to the same size.
    drive(tmp_path / "large" / "dusk", range(0, 3600, 180), "0001TP_", (480, 640))
    camvid.write(tmp_path / "large", tmp_path / "from-large", ("dusk",))
    for file in (tmp_path / "out").rglob("*.png"):
        other = tmp_path / "from-large" / file.relative_to(tmp_path / "out")
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(other)))


def test_capitals_in_names_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = drive(tmp_path / "CamVid" / "day", range(0, 3600, 180)).parent
    camvid.write(data, tmp_path / "expected", ("day",))
    for file in (data / "day" / "labels").iterdir():
        file.rename(file.with_name(f"{file.stem}_l.PNG"))
    (data / "day" / "images" / "notes.txt").write_text("")
    (data / "day").rename(data / "Day")
    for kind in ("images", "labels"):
        (data / "Day" / kind).rename(data / "Day" / kind.upper())
    camvid.write(data, tmp_path / "out", ("day",))
    assert "left out 1 .txt" in capsys.readouterr().err
    for file in (tmp_path / "expected").rglob("*.png"):
        other = tmp_path / "out" / file.relative_to(tmp_path / "expected")
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(other)))


@pytest.mark.parametrize(
    ("folders", "suffix"),
    [
        ({"": ("701_StillsRaw_full", "LabeledApproved_full")}, "_L"),
        ({s: (s, f"{s}annot") for s in ("train", "val", "test")}, ""),
    ],
    ids=["original", "segnet"],
)
def test_layouts_as_they_are_distributed(
    folders: dict[str, tuple[str, str]], suffix: str, tmp_path: Path
) -> None:
    """The drive tells the light; every layout gives the same splits and bytes."""
    sorted_by_light = tmp_path / "sorted"
    drive(sorted_by_light / "day", range(0, 3600, 180))
    drive(sorted_by_light / "dusk", range(60, 3660, 180), "0001TP_")
    whole = tmp_path / "whole"
    places = list(folders.values())
    files = [f for light in ("day", "dusk") for f in (sorted_by_light / light / "images").iterdir()]
    for i, file in enumerate(sorted(files)):
        images, labels = (whole / name for name in places[i % len(places)])
        for folder in (images, labels):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, images / file.name)
        label = file.parent.with_name("labels") / f"{file.stem}.png"
        shutil.copy(label, labels / f"{file.stem}{suffix}.png")
    for data, out in ((sorted_by_light, "expected"), (whole, "found")):
        camvid.write(data, tmp_path / out, ("day", "dusk"))
    expected, found = (
        {f.relative_to(tmp_path / out): f.read_bytes() for f in (tmp_path / out).rglob("*.png")}
        for out in ("expected", "found")
    )
    assert len(expected) > 20 and found == expected
    # Half of a pair is no split: neither its frames nor its labels may be dropped.
    for half in places[-1] if len(places) > 1 else ():
        shutil.move(whole / half, tmp_path / "away")
        with pytest.raises(DataError, match=f"found no {half} beside it; needed frames and labels"):
            camvid.light_folders(whole, "day")
        shutil.move(tmp_path / "away", whole / half)
    # What is at dusk is not by day.
    for folder in places:
        for file in (whole / folder[0]).glob("0001TP*"):
            file.unlink()
    with pytest.raises(DataError, match="found 0 frames of dusk"):
        camvid.write(whole, tmp_path / "none", ("dusk",))


@pytest.mark.parametrize("size", [camvid.SIZE, (480, 640)], ids=["copied", "resized"])
@pytest.mark.parametrize("orientation", list(TURNS))
def test_labels_lie_as_their_frame_does(
    orientation: int, size: tuple[int, int], tmp_path: Path
) -> None:
    """The frame shows its upper left quarter in white, whose class is 3."""
    data = drive(tmp_path / "CamVid" / "day", range(60, 3600, 90), size=size).parent
    back = TURNS[{6: 8, 8: 6}.get(orientation, orientation)]
    shown = np.zeros(size, np.uint8)
    shown[: size[0] // 2, : size[1] // 2] = 255
    frame, labels = Image.fromarray(back(shown)), back(shown) // 255 * 3
    name = "0016E5_00060.png"
    frame.convert("RGB").save(data / "day/images" / name, exif=exif(orientation))

    def written(label: Array, own: int) -> None:
        Image.fromarray(label).save(data / "day/labels" / name, exif=exif(own))
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        camvid.write(data, out, ("day",))
        scenes = find_scenes(out / "day" / "test")
        (pair,) = (pair for pair in scenes.pairs if pair[0].name == name)
        x, y = scenes.read(*pair)
        assert y.shape == camvid.SIZE and y[:120, :160].all() and y.sum() == 3 * 120 * 160
        assert ((x[0] > 0.5) == (y == 3)).mean() > 0.99

    written(labels, orientation)  # both say how they lie
    if orientation == 1:
        return
    if orientation >= 5:  # the sizes tell
        written(labels, 1)
        written(shown // 255 * 3, 1)
        return
    with pytest.raises(DataError, match="needed labels that lie as their image does"):
        written(labels, 1)


@pytest.mark.parametrize("size", [camvid.SIZE, (480, 640)])
def test_grey_frames_of_16_bits_are_brought_to_8(size: tuple[int, int], tmp_path: Path) -> None:
    data = drive(tmp_path / "CamVid" / "day", range(60, 3600, 90), size=size).parent
    for file in (data / "day" / "images").iterdir():
        Image.fromarray(np.full(size, 257 * 100, np.uint16)).save(file)
    camvid.write(data, tmp_path / "out", ("day",))
    for pair in find_scenes(tmp_path / "out" / "day" / "test").pairs:
        x, _ = find_scenes(tmp_path / "out" / "day" / "test").read(*pair)
        assert x.shape == (3, *camvid.SIZE) and np.allclose(x * 255, 100)


def test_frames_by_light_are_taken_whatever_lies_beside(tmp_path: Path) -> None:
    data = drive(tmp_path / "CamVid" / "day", range(60, 3600, 90)).parent
    for name in ("train", "trainannot", "val"):
        (data / name).mkdir()
    assert camvid.light_folders(data, "day") == [(data / "day/images", data / "day/labels")]


def all_void(root: Path) -> None:
    for file in (root / "day" / "labels").iterdir():
        if camvid.split_of(camvid.frame_of(file)[1]) == "test":
            Image.new("L", (32, 24), 11).save(file)


def beside_it(root: Path) -> None:
    shutil.copytree(root / "day", root / "Day")


def beside_the_labels(root: Path) -> None:
    (root / "day" / "Labels").mkdir()


def without_label(root: Path) -> None:
    (root / "day" / "labels" / "0016E5_00090.png").unlink()


def of_another_size(root: Path) -> None:
    Image.new("L", (30, 24)).save(root / "day" / "labels" / "0016E5_00090.png")


def without_number(root: Path) -> None:
    (root / "day" / "images" / "0016E5_00090.png").rename(root / "day" / "images" / "frame.png")


def too_short(root: Path) -> None:
    for file in (root / "day" / "images").iterdir():
        if camvid.frame_of(file)[1] > 1800:
            file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_label, "0016E5_00090.png: not there; needed the labels of every frame"),
        (of_another_size, "found labels of 24x30 for a frame of 24x32; needed one label a pixel"),
        (without_number, "frame.png: found no number at the end of the name"),
        (too_short, "of which none is for the split calibration"),
        (
            lambda root: (root / "day" / "labels").rename(root / "masks"),
            "labels: not there; needed",
        ),
        (all_void, "9 frames of day for the split test whose labels are all void; needed a pixel"),
        (beside_it, "found [dD]ay beside it; join the two folders"),
        (beside_the_labels, "found [lL]abels beside it; join the two folders"),
    ],
)
def test_what_is_no_camvid(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    data = drive(tmp_path / "CamVid" / "day", range(0, 3600, 90)).parent
    spoil(data)
    with pytest.raises(DataError, match=message):
        camvid.write(data, tmp_path / "out", ("day",))


def test_fog_and_snow_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = drive(tmp_path / "CamVid" / "day", range(0, 90, 90)).parent
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"fog is made by corrupt-tta: pip install 'hdrq-deploy\[corruptions\]', or choose"
    with pytest.raises(ModelError, match=message):
        camvid.light_folders(data, "fog")
    day = data / "day"
    assert camvid.light_folders(data, "day") == [(day / "images", day / "labels")]


def test_weather_is_that_of_the_frame(tmp_path: Path) -> None:
    pytest.importorskip("corrupt_tta")
    data = drive(tmp_path / "CamVid" / "day", range(60, 3600, 600), size=camvid.SIZE).parent
    np.random.seed(5)
    drawn = np.random.random()
    np.random.seed(5)
    camvid.write(data, tmp_path / "out", ("fog", "snow"))
    assert np.random.random() == drawn  # the caller's generator is as it was
    (file,) = (tmp_path / "out/fog/test/images").glob("*_00060.png")
    frame = np.asarray(Image.open(data / "day/images" / file.name))
    fog = np.asarray(Image.open(file))
    assert np.array_equal(fog, camvid.corrupted(frame, "fog", file.stem))
    assert not np.array_equal(fog, camvid.corrupted(frame, "fog", "another"))
    assert not np.array_equal(
        fog, np.asarray(Image.open(tmp_path / "out/snow/test/images" / file.name))
    )
    assert frame.std() == 0 and fog.std() > 5
    labels = (tmp_path / "out" / kind / "test/labels" / file.name for kind in ("fog", "snow"))
    assert len({label.read_bytes() for label in labels}) == 1
