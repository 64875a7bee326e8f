"""Network inputs and labels of an .npz file, checked before anything computes with them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ...typing import Array
from .base import ImageSet, Reader, Selection, Wanted

__all__ = ["ARRAYS", "labels_of", "read_arrays"]

_SAVE = "write it with numpy.savez(FILE, x=x, y=y)"
# Whole numbers up to here are exact in float64.
_EXACT = 2**53


def _reads(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".npz"


def _read(path: Path, wanted: Wanted, selection: Selection) -> ImageSet:
    x, y = read_arrays(path, wanted.channels)
    rows = selection.rows(len(x))
    return ImageSet(np.ascontiguousarray(x[rows]), None if y is None else y[rows], None, None)


ARRAYS = Reader("an .npz with x (N,C,H,W float32) and y (N,)", _reads, _read)


def read_arrays(path: Path, channels: int | None = None) -> tuple[Array, Array | None]:
    """``x`` (N, ...) as float32 and ``y``, or None where there is none; other arrays stay unread.

    Args:
        path: The .npz file.
        channels: Channels that the model reads, where they are known.

    Raises:
        DataError: Not an .npz, no ``x``, values that are not real, finite or within float32, or
            labels that are not one integer an image or pixel.
    """
    with _archive(path) as file:
        if "x" not in file.files:
            raise DataError(
                f"{path}: found arrays {sorted(file.files)[:12]}; needed x and, for labels, y"
            )
        x = _inputs(file["x"], path, channels)
        y = labels_of(file["y"], len(x), path) if "y" in file.files else None
    return x, y


@contextmanager
def _archive(path: Path) -> Iterator[Any]:
    """The open file. What NumPy raises within becomes a DataError."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                what = "a .npy array" if file.read(6) == b"\x93NUMPY" else "no zip archive"
            raise DataError(f"{path}: cannot be read as .npz (found {what}); {_SAVE}")
        with np.load(path, allow_pickle=False) as archive:
            yield archive
    except DataError:
        raise
    except Exception as error:  # zip, zlib, NumPy's header and memory each raise their own
        text = " ".join(str(error).split()) or type(error).__name__
        if "allow_pickle" in text:
            text = "an array holds Python objects, not numbers"
        raise DataError(f"{path}: cannot be read as .npz ({text[:200]}); {_SAVE}") from error


def _inputs(x: Array, path: Path, channels: int | None) -> Array:
    if x.ndim < 2 or x.dtype.kind != "f" or x.size == 0:
        hint = ""
        if x.dtype.kind in "iu":
            hint = ": divide pixels by 255, normalise them as the model was trained, and cast them"
        raise DataError(
            f"{path}: found x of shape {x.shape}, {x.dtype}; needed (N,C,H,W) float32 with N > 0"
            + hint
        )
    if channels is not None and x.ndim == 4 and x.shape[1] != channels:
        turned = x.shape[3] == channels
        raise DataError(
            f"{path}: found x of shape {x.shape}; the model reads {channels} channels, (N,C,H,W)"
            + (": this is (N,H,W,C), save x.transpose(0, 3, 1, 2)" if turned else "")
        )
    with np.errstate(over="ignore"):
        real = x.astype(np.float32, order="C", copy=False)
    finite = np.isfinite(real)
    if not finite.all():
        place = np.unravel_index(int(np.argmin(finite)), x.shape)
        value = x[place]
        what = f"{value!s}, which float32 cannot hold," if np.isfinite(value) else "NaN or infinity"
        raise DataError(f"{path}: found {what} in image {place[0]}; needed finite values")
    return real


def labels_of(y: Array, count: int, where: object) -> Array:
    """Labels (N,), or (N, H, W) of every pixel, as int64.

    A second axis of one entry is dropped. Rows (N, C) with a single 1 among zeros are the place
    of that 1. Real numbers must be whole.

    Args:
        y: Labels as they were stored.
        count: N.
        where: Names them in errors.

    Raises:
        DataError: Another number of labels, another form, or labels that are not whole numbers.
    """
    if y.ndim in {2, 4} and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in {1, 2, 3} or len(y) != count or y.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: found y of shape {y.shape}, {y.dtype} for {count} images; needed one "
            "integer label an image, (N,)"
        )
    wide = y.astype(np.float64)
    odd = ~(np.isfinite(wide) & (np.abs(wide) < _EXACT) & (np.floor(wide) == wide))
    if odd.any():
        raise DataError(f"{where}: found label {y[odd][0]!s}; needed integer labels from 0 on")
    if y.ndim == 2:
        ones = (y == 1).sum(1) == 1
        if not (ones & ((y == 0).sum(1) == y.shape[1] - 1)).all():
            raise DataError(
                f"{where}: found y of shape {y.shape}; needed one integer label an image, (N,), "
                "or rows with a single 1 (one-hot)"
            )
        y = y.argmax(1)
    return np.ascontiguousarray(y, np.int64)
