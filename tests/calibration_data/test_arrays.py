"""Inputs and labels of an .npz: what is taken, and what is refused in one line."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.calibration_data.readers import ImageSet, Wanted, numbered, read
from hdrq_deploy.cli import bench
from hdrq_deploy.errors import DataError, EngineError
from hdrq_deploy.exporters import export
from hdrq_deploy.runtime import load_engine
from hdrq_deploy.runtime.engine import check_input

RNG = np.random.default_rng(0)
X = RNG.random((6, 3, 4, 5), dtype=np.float32)
Y = np.array([2, 0, 1, 3, 2, 1])


def saved(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


@pytest.mark.parametrize(
    "x",
    [
        X,
        X.astype(">f4"),
        X.astype("<f8"),
        X.astype(">f8"),
        np.asfortranarray(X),
        np.ascontiguousarray(X[::-1])[::-1],
        X.astype(np.longdouble),
    ],
    ids=["float32", "big-endian", "float64", "big float64", "fortran", "negative", "long double"],
)
def test_inputs_are_equal_however_they_lie(x: Any, tmp_path: Path) -> None:
    found = read(saved(tmp_path, x=x, y=Y.astype(">i2")))
    assert found.x.dtype == np.float32 and found.x.flags.c_contiguous
    np.testing.assert_array_equal(found.x, X)
    np.testing.assert_array_equal(found.y, Y)
    assert found.sha256 == ImageSet(X, None, None, None).sha256


def test_half_precision_is_exact(tmp_path: Path) -> None:
    found = read(saved(tmp_path, x=X.astype(np.float16)))
    np.testing.assert_array_equal(found.x, X.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    "y",
    [
        Y[:, None],
        Y.astype(np.uint8),
        Y.astype(np.float64),
        np.eye(4, dtype=np.int64)[Y],
        np.eye(4, dtype=np.float32)[Y],
        np.eye(4, dtype=bool)[Y],
        np.asfortranarray(np.eye(4)[Y]),
    ],
    ids=["(N,1)", "uint8", "whole floats", "one-hot", "real one-hot", "bool one-hot", "fortran"],
)
def test_forms_of_labels(y: Any, tmp_path: Path) -> None:
    found = read(saved(tmp_path, x=X, y=y))
    assert found.y is not None and found.y.dtype == np.int64
    np.testing.assert_array_equal(found.y, Y)


def test_labels_of_pixels(tmp_path: Path) -> None:
    maps = RNG.integers(0, 4, (6, 4, 5))
    for y in (maps, maps[:, None], maps.astype(np.uint8)):
        found = read(saved(tmp_path, x=X, y=y)).y
        np.testing.assert_array_equal(found, maps)


TWO_ONES = np.eye(4)[Y]
TWO_ONES[3, 0] = 1
SMOOTH = np.eye(4)[Y] * 0.9 + 0.025
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "scalar": ({"x": X, "y": np.int64(3)}, r"found y of shape \(\), int64 for 6 images"),
    "short": ({"x": X, "y": Y[:5]}, r"found y of shape \(5,\), int64 for 6 images"),
    "long one-hot": ({"x": X, "y": np.eye(4)[[0] * 7]}, r"found y of shape \(7, 4\)"),
    "two ones": ({"x": X, "y": TWO_ONES}, r"shape \(6, 4\); needed one integer label"),
    "no ones": ({"x": X, "y": np.zeros((6, 4))}, r"rows with a single 1 \(one-hot\)"),
    "smooth": ({"x": X, "y": SMOOTH}, "found label 0.025; needed integer labels"),
    "halves": ({"x": X, "y": Y + 0.5}, "found label 2.5; needed integer labels"),
    "nan label": ({"x": X, "y": np.where(Y == 3, np.nan, Y)}, "found label nan"),
    "huge label": (
        {"x": X, "y": np.full(6, 2**64 - 1, np.uint64)},
        "found label 18446744073709551",
    ),
    "infinite label": ({"x": X, "y": np.full(6, 1e300)}, r"found label 1e\+300"),
    "words": ({"x": X, "y": np.array(list("abcdef"))}, "<U1 for 6 images; needed one integer"),
    "times": ({"x": X, "y": np.zeros(6, "M8[s]")}, "datetime64.* for 6 images"),
    "complex": ({"x": X, "y": Y.astype(complex)}, "complex128 for 6 images"),
    "five axes": ({"x": X, "y": np.zeros((6, 1, 1, 1, 1), int)}, r"found y of shape \(6, 1, 1, 1"),
    "float32's end": (
        {"x": np.where(X[4, 1, 2, 3] == X, 1e300, X.astype(float))},
        r"found 1e\+300, which float32 cannot hold, in image 4",
    ),
    "nan": ({"x": np.where(X[2, 0, 0, 0] == X, np.nan, X)}, "found NaN or infinity in image 2"),
    "inf": ({"x": np.where(X[5, 0, 0, 0] == X, np.inf, X)}, "found NaN or infinity in image 5"),
    "pixels": (
        {"x": (X * 255).astype(np.uint8)},
        "uint8; needed .*float32.*divide pixels by 255",
    ),
    "no images": ({"x": X[:0]}, r"found x of shape \(0, 3, 4, 5\)"),
    "no rows": ({"x": X[:, :, :0]}, r"found x of shape \(6, 3, 0, 5\)"),
    "one axis": ({"x": X[:, 0, 0, 0]}, r"found x of shape \(6,\)"),
    "complex x": ({"x": X.astype(complex)}, "complex64|complex128"),
    "objects": ({"x": np.array([X[0], None], object)}, "an array holds Python objects"),
    "object labels": ({"x": X, "y": np.array([0, None] * 3, object)}, "holds Python objects"),
    "other names": ({"images": X}, r"found arrays \['images'\]; needed x"),
    "nothing": ({}, r"found arrays \[\]; needed x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_arrays_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    arrays, message = WRONG[name]
    with pytest.raises(DataError, match=message) as caught:
        read(saved(tmp_path, **arrays))
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "data.npz")) and "\n" not in text
    assert "allow_pickle" not in text


def test_arrays_beside_x_and_y_are_not_read(tmp_path: Path) -> None:
    found = read(saved(tmp_path, x=X, y=Y, names=np.array([None, "a"], object)))
    np.testing.assert_array_equal(found.y, Y)


def archive(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, data)
    return buffer.getvalue()


def npy(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, X)
    whole = saved(tmp_path, x=X, y=Y).read_bytes()
    altered = bytearray(whole)
    altered[400] ^= 0xFF
    huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 3, 4, 5), }"
    cases = {
        "an array": (buffer.getvalue(), "found a .npy array"),
        "text": (b"x = 1", "found no zip archive"),
        "empty": (b"", "found no zip archive"),
        "pickle": (b"\x80\x04K\x01.", "found no zip archive"),
        "cut": (whole[:-40], "cannot be read as .npz"),
        "altered": (bytes(altered), "cannot be read as .npz"),
        "huge": (archive("x.npy", npy(huge % 10**15)), "cannot be read as .npz"),
        "negative": (archive("x.npy", npy(huge % -6)), "cannot be read as .npz|found x of shape"),
        "no header": (archive("x.npy", npy("{'descr': ")), "cannot be read as .npz"),
        "no array": (archive("x.npy", b"text"), "cannot be read as .npz|found x of shape"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / "bad.npz").write_bytes(data)
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path / "bad.npz")
        assert "bad.npz: " in str(caught.value) and "\n" not in str(caught.value), name
        assert "allow_pickle" not in str(caught.value)
    (tmp_path / "x.npy").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"found a file .npy; .* an image folder .* or an .npz"):
        read(tmp_path / "x.npy")
    (tmp_path / "DATA.NPZ").write_bytes(whole)
    assert len(read(tmp_path / "DATA.NPZ")) == 6


def test_channels_on_the_last_axis(make: Any, inputs: Any, tmp_path: Path) -> None:
    last = np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
    file = saved(tmp_path, x=last)
    with pytest.raises(DataError, match=r"this is \(N,H,W,C\), save x.transpose\(0, 3, 1, 2\)"):
        read(file, Wanted(channels=3))
    with load_engine(export(make(), tmp_path / "engine")) as engine:
        with pytest.raises(EngineError, match=r"pass x.transpose\(0, 3, 1, 2\)$"):
            engine(last)
        with pytest.raises(EngineError, match=r"batch 1 or more\)$"):
            engine(inputs[:, :1])
        for x in (inputs.astype(">f4"), inputs.astype(np.float64)):
            with pytest.raises(EngineError, match="found an input of shape"):
                engine(x)
        free = engine.inputs[0].model_copy(update={"shape": ("batch", 3, "height", "width")})
        check_input(inputs, free, "engine")
        with pytest.raises(EngineError, match=r"found an input of shape \(48, 3, 0, 16\)"):
            check_input(inputs[:, :, :0], free, "engine")
        # Whatever the order of its bytes in memory, a batch is the same batch.
        expected = engine(inputs)
        for x in (np.asfortranarray(inputs), inputs[::-1][::-1], last.transpose(0, 3, 1, 2)):
            np.testing.assert_array_equal(engine(x), expected)
            np.testing.assert_array_equal(engine.run_async(x).wait(60), expected)


def test_labels_that_the_model_does_not_have(
    make: Any, inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = str(export(make(), tmp_path / "engine"))
    good = RNG.integers(0, 4, len(inputs))
    for bad in (-1, 4, 1000):
        y = good.copy()
        y[3] = bad
        file = saved(tmp_path, x=inputs, y=y)
        assert bench.main([engine, "--data", f"d={file}", "--iterations", "2"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "the model has 4 classes" in error, error
        assert (f"labels {bad} to 3" if bad < 0 else f"labels 0 to {bad}") in error
    with pytest.raises(DataError, match="labels -1 to 3; the model has classes from 0 on"):
        numbered(ImageSet(X, np.where(Y == 0, -1, Y), None, None), None, None, "d")
    maps = np.full((6, 4, 5), 255)
    assert numbered(ImageSet(X, maps, None, None), None, 4, "d").y is maps
    with pytest.raises(DataError, match="labels 0 to 9; .*255 for pixels to leave out"):
        numbered(ImageSet(X, np.where(maps == 255, 9, 0), None, None), None, 4, "d")
