"""Image files of every mode, way up and format: their pixels, or one line that names the file."""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from hdrq_deploy import calibrate
from hdrq_deploy.calibration_data.readers import Wanted, decoding, read
from hdrq_deploy.calibration_data.readers.decoding import decode, images_of
from hdrq_deploy.calibration_data.readers.street_scenes import find_scenes
from hdrq_deploy.cli import calibrate as calibrate_command
from hdrq_deploy.errors import DataError, EngineError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.runtime import load_engine

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 10), np.uint8)
COLOUR = RNG.integers(0, 256, (12, 10, 3), np.uint8)
SIXTEEN = RNG.integers(0, 65536, (12, 10), np.uint16)
ALPHA = RNG.integers(0, 256, (12, 10), np.uint8)


@pytest.fixture
def notes() -> Iterator[list[str]]:
    """What the library logs."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Keep(), logging.getLogger("hdrq_deploy")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def one(file: Path, **wanted: Any) -> Any:
    """The only image of a folder, as a network takes it: (C, H, W)."""
    return read(file.parent, Wanted(**wanted)).x[0]


def planes(pixels: Any) -> Any:
    """Pixels (H, W) or (H, W, C) from 0 to 255, as the network's input."""
    array = np.asarray(pixels, np.float64) / 255
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def same(found: Any, expected: Any, atol: float = 1e-6) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=atol)


# Range of 16-bit grey


@pytest.mark.parametrize("ending", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_go_from_black_to_white(tmp_path: Path, ending: str, order: str) -> None:
    file = tmp_path / f"a{ending}"
    if ending == ".pgm":  # by hand: netpbm's own order is the big-endian one
        file.write_bytes(b"P5 10 12 65535\n" + SIXTEEN.astype(">u2").tobytes())
    elif ending == ".tif":
        Image.fromarray(SIXTEEN.astype(order)).save(file)
    else:
        Image.fromarray(SIXTEEN).save(file)
    same(one(file), (SIXTEEN / 65535)[None])
    same(one(file, channels=3), np.repeat((SIXTEEN / 65535)[None], 3, axis=0))


def test_sixteen_bits_keep_their_precision_when_they_are_resized(tmp_path: Path) -> None:
    values = np.full((8, 8), 300, np.uint16)  # 8 bits would make 1 of it, 1/255
    Image.fromarray(values).save(tmp_path / "a.png")
    same(one(tmp_path / "a.png", size=(4, 4)), np.full((1, 4, 4), 300 / 65535))
    x = one(tmp_path / "a.png", size=(4, 4), mean=(0.5,), std=(0.25,))
    same(x, np.full((1, 4, 4), (300 / 65535 - 0.5) / 0.25))


def tiff_12_bits(values: Any) -> bytes:
    """An uncompressed TIFF of one strip with 12 bits a sample, two samples in three bytes."""
    rows = []
    for row in values:
        pairs = row.reshape(-1, 2).astype(np.uint32)
        word = (pairs[:, 0] << 12) | pairs[:, 1]
        parts = [(word >> 16).astype(np.uint8), (word >> 8).astype(np.uint8), word.astype(np.uint8)]
        rows.append(np.stack(parts, 1).tobytes())
    data = b"".join(rows)
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, 12), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory


def test_twelve_bits_go_to_white_too(tmp_path: Path) -> None:
    values = RNG.integers(0, 4096, (6, 8)).astype(np.uint16)
    (tmp_path / "a.tif").write_bytes(tiff_12_bits(values))
    same(one(tmp_path / "a.tif"), (values / 4095)[None])


@pytest.mark.parametrize(
    ("pixels", "what"),
    [
        (SIXTEEN.astype(np.int32), "32-bit integers, which no value makes white"),
        (SIXTEEN.astype(np.float32) / 65535, "floats, which no value makes white"),
    ],
)
def test_values_without_a_range_are_refused_by_name(
    pixels: Any, what: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    Image.fromarray(pixels).save(tmp_path / "data" / "deep.tif")
    argv = ["--model", "tiny_models:Tiny", "--weights", str(work / "Tiny-night.safetensors")]
    argv += ["--data", str(tmp_path / "data"), "--domain", "n", "--method", "rtn"]
    assert calibrate_command.main([*argv, "-o", str(tmp_path / "n.hdrq")]) == 2
    error = capsys.readouterr().err
    assert "deep.tif: found an image of" in error and what in error
    assert error.count("\n") == 1


def test_what_pillow_does_not_turn_over_is_refused(tmp_path: Path) -> None:
    Image.fromarray(SIXTEEN).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with pytest.raises(DataError, match="a.tif: found a 16-bit TIFF in which 0 is white"):
        read(tmp_path)
    Image.new("LAB", (4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: found an image of other bands .*mode LAB"):
        read(tmp_path)


# Modes


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = GREY > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    same(one(tmp_path / "a.png"), bits[None].astype(float))


def test_palettes_become_their_colours(tmp_path: Path) -> None:
    table = RNG.integers(0, 256, (16, 3), np.uint8)
    indices = RNG.integers(0, 16, (12, 10), np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(table.ravel().tolist())
    image.save(tmp_path / "a.png")
    same(one(tmp_path / "a.png"), planes(table[indices]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of what a conversion would lose
        image.save(tmp_path / "a.png", transparency=bytes(range(0, 256, 16)))
        same(one(tmp_path / "a.png"), planes(table[indices]))
        image.save(tmp_path / "a.png", transparency=3)
        same(one(tmp_path / "a.png"), planes(table[indices]))


def test_alpha_is_dropped_and_not_composited(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([COLOUR, ALPHA])).save(tmp_path / "a.png")
    same(one(tmp_path / "a.png"), planes(COLOUR))
    Image.fromarray(np.dstack([GREY, ALPHA]), "LA").save(tmp_path / "a.png")
    same(one(tmp_path / "a.png"), planes(GREY))


def test_other_colour_spaces_become_rgb(tmp_path: Path) -> None:
    inks = RNG.integers(0, 256, (12, 10, 4), np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    free, black = 255 - inks[:, :, :3].astype(float), 255 - inks[:, :, 3:].astype(float)
    same(one(tmp_path / "a.tif"), planes(free * black / 255), atol=1.01 / 255)
    y = RNG.integers(60, 190, (12, 10)).astype(np.uint8)
    cb, cr = (RNG.integers(110, 146, (12, 10)).astype(np.uint8) for _ in range(2))
    Image.fromarray(np.dstack([y, cb, cr]), "YCbCr").save(tmp_path / "a.tif")
    blue, red = cb.astype(float) - 128, cr.astype(float) - 128  # ITU-R 601, as JPEG has it
    rgb = np.dstack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue])
    same(one(tmp_path / "a.tif"), planes(rgb), atol=1.01 / 255)


def test_sixteen_bits_of_colour_are_read_as_their_upper_eight(tmp_path: Path) -> None:
    values = RNG.integers(0, 65536, (6, 5, 3)).astype(np.uint16)
    (tmp_path / "a.ppm").write_bytes(b"P6 5 6 65535\n" + values.astype(">u2").tobytes())
    same(one(tmp_path / "a.ppm"), (values / 65535).transpose(2, 0, 1), atol=1.01 / 255)


def test_grey_for_a_network_of_colour_and_the_other_way_round(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    same(one(tmp_path / "a.png", channels=3), np.repeat(planes(GREY), 3, axis=0))
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    same(one(tmp_path / "a.png", channels=1), planes(luma), atol=1.01 / 255)
    with pytest.raises(DataError, match="a.png: found an image for a model that reads 4 channels"):
        read(tmp_path, Wanted(channels=4))


@pytest.mark.parametrize("names", [("a_grey", "b_colour"), ("b_grey", "a_colour")])
def test_grey_among_colour_becomes_colour_in_any_order(
    names: tuple[str, str], tmp_path: Path
) -> None:
    for name in names:
        pixels = GREY if "grey" in name else COLOUR
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    found = read(tmp_path)
    expected = {"grey": np.repeat(planes(GREY), 3, axis=0), "colour": planes(COLOUR)}
    for row, name in zip(found.x, sorted(names), strict=True):
        same(row, expected[name[2:]])
    assert found.preprocessing and found.preprocessing.colour == "RGB"


# Which way is up

TURNS: dict[int, Any] = {  # Exif 2.3, tag 0x0112: where the stored row 0 and column 0 belong
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a),
}


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


@pytest.mark.parametrize("orientation", list(TURNS))
@pytest.mark.parametrize("ending", [".png", ".tif", ".webp", ".jpg"])
def test_images_are_turned_as_exif_says(orientation: int, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{ending}"
    pixels = np.kron(RNG.integers(0, 256, (2, 3, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    if ending == ".tif":
        Image.fromarray(pixels).save(file, tiffinfo={274: orientation})
    else:
        options = {"lossless": True} if ending == ".webp" else {"quality": 100, "subsampling": 0}
        Image.fromarray(pixels).save(file, exif=exif(orientation), **options)
    same(one(file), planes(TURNS[orientation](pixels)), atol=4 / 255 if ending == ".jpg" else 1e-6)


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    for block in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=block)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same(one(tmp_path / "a.png"), planes(COLOUR))


def scene(root: Path, frame: Any, label: Any, turned: int, own: int, mode: str = "L") -> None:
    for name in ("images", "labels"):
        (root / name).mkdir(exist_ok=True)
    Image.fromarray(frame).save(root / "images" / "0.png", exif=exif(turned))
    made = Image.fromarray(label)
    if mode == "P":
        made.putpalette(RNG.integers(0, 256, 768).astype(np.uint8).tolist())
    made.save(root / "labels" / "0.png", exif=exif(own))


@pytest.mark.parametrize("orientation", list(TURNS))
@pytest.mark.parametrize("mode", ["L", "P"])
def test_labels_lie_as_their_image_does(orientation: int, mode: str, tmp_path: Path) -> None:
    label = RNG.integers(0, 9, (6, 4), np.uint8)
    frame = np.stack([label * 20] * 3, 2)  # a pixel's colour is its label
    turn = TURNS[orientation]

    def check() -> None:
        ((x, y),) = find_scenes(tmp_path).batches(1)
        same(x[0], planes(turn(frame)))
        np.testing.assert_array_equal(y[0], turn(label))
        np.testing.assert_array_equal(np.rint(x[0, 0] * 255 / 20), y[0])

    scene(tmp_path, frame, label, orientation, orientation, mode)  # both say it
    check()
    if orientation >= 5:  # the sizes tell
        scene(tmp_path, frame, label, orientation, 1, mode)  # drawn on what is stored
        check()
        scene(tmp_path, frame, np.ascontiguousarray(turn(label)), orientation, 1, mode)  # shown
        check()
    elif orientation > 1:
        scene(tmp_path, frame, label, orientation, 1, mode)
        with pytest.raises(DataError, match="0.png: found EXIF orientation 1 beside an image of"):
            next(find_scenes(tmp_path).batches(1))


def test_a_square_scene_that_only_one_file_turns_is_refused(tmp_path: Path) -> None:
    label = RNG.integers(0, 9, (6, 6), np.uint8)
    for turned, own in ((6, 1), (1, 6), (6, 3)):
        scene(tmp_path, np.stack([label] * 3, 2), label, turned, own)
        with pytest.raises(DataError, match=f"labels/0.png: found EXIF orientation {own} beside"):
            next(find_scenes(tmp_path).batches(1))


def test_deep_scenes_and_labels(tmp_path: Path) -> None:
    label = RNG.integers(0, 200, (12, 10), np.uint16)
    for name, pixels in (("images", SIXTEEN), ("labels", label)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    ((x, y),) = find_scenes(tmp_path).batches(1)
    same(x[0], np.repeat((SIXTEEN / 65535)[None], 3, axis=0))
    np.testing.assert_array_equal(y[0], label)
    Image.fromarray(SIXTEEN.astype(np.float32)).save(tmp_path / "images" / "0.tif")
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(DataError, match="0.tif: found an image of floats"):
        next(find_scenes(tmp_path).batches(1))


# Formats


def test_all_formats_that_pillow_decodes_are_read(tmp_path: Path) -> None:
    image = Image.fromarray(np.kron(COLOUR[:2, :2], np.ones((8, 8, 1), np.uint8)))
    lossless = ["png", "bmp", "dib", "tga", "tif", "TIFF", "ppm", "pnm", "pcx", "PNG"]
    lossy = ["jpg", "jfif", "JPEG", "jpe", "gif", "mpo"]
    lossless += ["webp"] if features.check("webp") else []
    lossless += ["jp2"] if features.check("jpg_2000") else []
    lossy += ["avif"] if features.check("avif") else []
    for ending in [*lossless, *lossy]:
        options: dict[str, Any] = {"lossless": True} if ending == "webp" else {}
        image.save(tmp_path / f"{ending}.{ending}", **options)
    found = read(tmp_path)
    names = [f.stem for f in images_of(tmp_path, Counter())]
    assert names == sorted([*lossless, *lossy])
    for row, name in zip(found.x, names, strict=True):
        assert np.abs(row - planes(image)).mean() < (1e-6 if name in lossless else 0.05), name


def test_of_an_animation_the_first_image_is_taken(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (40, 90, 200)]
    for ending in ("gif", "tif", "png"):
        file = tmp_path / ending / f"a.{ending}"
        file.parent.mkdir()
        frames[0].save(file, save_all=True, append_images=frames[1:])
        same(one(file, channels=1), np.full((1, 8, 8), 40 / 255))


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, notes: list[str]) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(COLOUR).save(tmp_path / name / "0.png")
    for name in ("1.heic", "2.HEIC", "3.svg", "plain", ".hidden.svg", "Thumbs.db"):
        (tmp_path / "a" / name).write_bytes(b"x")
    (tmp_path / "b" / "nested").mkdir()
    Image.fromarray(COLOUR).save(tmp_path / "beside.png")
    assert len(read(tmp_path)) == 2
    (line,) = notes
    assert line.startswith(f"{tmp_path}: left out 2 .heic, 1 .svg, 1 folder, 1 image ")
    assert "1 image beside the class folders, 1 without ending; images are" in line
    assert ".jfif" in line and "hidden" not in line
    notes.clear()
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"found no images \(2 .heic, 1 .svg, 1 folder, 1 without"):
        read(tmp_path)
    assert notes == []


def test_scenes_say_what_they_leave_out(tmp_path: Path, notes: list[str]) -> None:
    scene(tmp_path, COLOUR, GREY % 7, 1, 1)
    (tmp_path / "images" / "1.heic").write_bytes(b"x")
    (tmp_path / "images" / ".ipynb_checkpoints").mkdir()
    Image.fromarray(COLOUR).save(tmp_path / "images" / ".ipynb_checkpoints" / "0.png")
    assert len(find_scenes(tmp_path)) == 1
    assert [line.split("; ")[0] for line in notes] == [f"{tmp_path / 'images'}: left out 1 .heic"]


# Damage


def test_damaged_files_get_one_line(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    whole = buffer.getvalue()
    cases = {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.jpg": b"no image",
        "head.png": whole[:40],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: cannot be decoded") as caught:
            read(tmp_path)
        assert "BytesIO" not in str(caught.value) and "\n" not in str(caught.value)
        assert "`skip_corrupt`" in str(caught.value)
        (tmp_path / name).unlink()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match="gone.png: cannot be decoded .No such file"):
        read(tmp_path)


@pytest.mark.parametrize("most", [1000, 3000])
def test_a_bomb_is_refused_before_it_is_unpacked(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Up to twice the limit Pillow itself only warns.
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match=r"big.png: cannot be decoded \(Image size \(4096"):
            read(tmp_path)
    assert [w for w in seen if w.category is Image.DecompressionBombWarning] == []


# Frames of an application


@pytest.fixture(scope="module")
def engines(work: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier and a camera's engine of Tiny, and a segmentation network."""
    folder = tmp_path_factory.mktemp("engines")
    bundle = calibrate(
        "tiny_models:Tiny", work / "images", "night", folder / "n.hdrq", method="rtn"
    )
    net = calibrate("tiny_models:Net", work / "images", "night", folder / "m.hdrq", method="rtn")
    camera = GraphOptions(fold_preprocess=True, postprocess="argmax")
    return {
        "plain": export(bundle, folder / "plain"),
        "camera": export(bundle, folder / "camera", options=camera),
        "net": export(net, folder / "net"),
    }


def test_a_path_an_image_and_an_array_get_one_answer(
    engines: dict[str, Path], tmp_path: Path
) -> None:
    pixels = np.kron(RNG.integers(0, 256, (4, 5, 3), np.uint8), np.ones((6, 6, 1), np.uint8))
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file, exif=exif(6))
    upright = np.ascontiguousarray(np.rot90(pixels, -1))
    with load_engine(engines["plain"]) as engine:
        expected = engine.predict(upright)
        assert not isinstance(expected, list) and expected.scores is not None
        for image in (file, str(file), Image.open(file)):
            found = engine.predict(image)
            assert not isinstance(found, list) and found.label == expected.label
            np.testing.assert_array_equal(found.scores, expected.scores)
        several = engine.predict([file, upright, Image.open(file)])
        assert isinstance(several, list)
        assert [s.index for s in several] == [expected.index] * 3
        grey = engine.predict(Image.fromarray(GREY))
        wide = engine.predict(np.repeat(GREY[:, :, None], 3, axis=2))
        assert not isinstance(grey, list) and not isinstance(wide, list)
        np.testing.assert_array_equal(grey.scores, wide.scores)
        x = engine.prepare([Image.fromarray(SIXTEEN).resize((16, 16))])
        values = np.asarray(Image.fromarray(SIXTEEN).resize((16, 16)))
        same(x[0], np.repeat((values / 65535)[None], 3, axis=0))
    with load_engine(engines["net"]) as engine:
        answer = engine.predict(file)
        assert not isinstance(answer, list) and answer.mask is not None
        assert answer.mask.shape == upright.shape[:2]
    with load_engine(engines["camera"]) as camera:  # 8 bits go in
        rounded = np.rint(values / 257).astype(np.uint8)
        np.testing.assert_array_equal(
            camera.prepare([Image.fromarray(values)])[0], np.repeat(rounded[:, :, None], 3, axis=2)
        )


def test_a_file_gives_a_frame_what_it_gives_calibration(
    engines: dict[str, Path], tmp_path: Path
) -> None:
    Image.fromarray(np.dstack([COLOUR, ALPHA])).save(tmp_path / "a.png")
    Image.fromarray(SIXTEEN).save(tmp_path / "b.png")
    x = read(tmp_path, Wanted((16, 16), channels=3)).x
    with load_engine(engines["plain"]) as engine:
        given = engine.prepare([str(tmp_path / "a.png"), tmp_path / "b.png"])
    np.testing.assert_allclose(given, x, atol=1e-6)


def test_frames_that_are_none_are_refused_in_one_line(
    engines: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    wrong: dict[str, Any] = {
        "found a frame of shape .0, 16, 3.": np.zeros((0, 16, 3), np.uint8),
        "found a frame of shape .16, 0, 3.": np.zeros((16, 0, 3), np.uint8),
        "found a frame of 5x0 pixels": Image.new("RGB", (0, 5)),
        "float64; needed": np.full((16, 16, 3), np.nan),
        "found a frame of shape .2, 16, 16, 3.": np.zeros((2, 16, 16, 3), np.uint8),
        "found a frame of type list": [[1, 2], [3]],
        "found frames of type int": 7,
        "found a frame of type int": b"bytes",
        "found no frames": iter(()),
        "nowhere.png: cannot be decoded .No such file": tmp_path / "nowhere.png",
        "text.png: cannot be decoded .it is no image": str(tmp_path / "text.png"),
        "cannot be decoded .Is a directory": tmp_path,
        "a frame: found an image of floats": Image.new("F", (4, 4)),
    }
    for name in ("plain", "camera"):
        with load_engine(engines[name]) as engine:
            for message, frame in wrong.items():
                with pytest.raises((EngineError, DataError), match=message) as caught:
                    engine.predict(frame)
                assert "\n" not in str(caught.value)


def test_hidden_files_are_those_of_tools_and_systems() -> None:
    hidden = {".git", ".ipynb_checkpoints", "__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"}
    assert all(decoding.is_hidden(name) for name in hidden)
    assert not any(decoding.is_hidden(name) for name in ("cat", "n01440764", "_night", "eadir"))


def test_decoding_says_what_channels_it_found(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    picture = decode(tmp_path / "a.png")
    assert (picture.channels, picture.size) == (1, (12, 10))
    np.testing.assert_array_equal(picture.pixels(1)[:, :, 0], GREY)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file after some bytes were altered, and perhaps its end was lost."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        place = rng.integers(0, min(len(changed), rng.choice([40, 200, 1 << 30])))
        changed[place] = rng.choice([0, 127, 255, rng.integers(0, 256)])
    return bytes(changed[: rng.integers(1, len(changed) + 1)] if rng.random() < 0.2 else changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "npz"])
def test_altered_files_are_read_or_refused(ending: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    if ending == "npz":
        np.savez_compressed(buffer, x=planes(COLOUR)[None].astype(np.float32), y=[3])
    else:
        kind = Image.registered_extensions()[f".{ending}"]
        Image.fromarray(COLOUR).save(buffer, kind, exif=exif(6))
    file = tmp_path / f"a.{ending}"
    refused = 0
    for _ in range(60):
        file.write_bytes(mutated(buffer.getvalue(), rng))
        try:
            read(file if ending == "npz" else tmp_path)
        except DataError as error:
            refused += 1
            assert f"a.{ending}: " in str(error) and "\n" not in str(error)
    assert refused > 0
