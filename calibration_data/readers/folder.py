"""Image folders: one folder per class, or images without labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import DataError
from ...formats.atomic_files import mapped_file
from ...formats.preprocessing import to_input
from ...formats.records import LARGEST_SIDE, Preprocessing
from ...typing import Array
from .base import ImageSet, Reader, Selection, Wanted
from .decoding import (
    BESIDE,
    FOLDER,
    Picture,
    Undecodable,
    checked,
    cut,
    decode,
    folders_of,
    images_of,
)
from .run_ahead import run_ahead

__all__ = ["IMAGE_FOLDER", "read_files"]


# Bytes of inputs that stay in memory, and images that are decoded ahead.
_IN_MEMORY = 1 << 30
_AHEAD = 32


def _read(folder: Path, wanted: Wanted, selection: Selection) -> ImageSet:
    others: Counter[str] = Counter()
    beside = images_of(folder, others)
    others.pop(FOLDER, None)  # those are looked into
    inside = {d.name: images_of(d, others) for d in folders_of(folder)}
    classes: tuple[str, ...] = ()
    files = [(f, -1) for f in beside]
    if any(inside.values()):
        classes = tuple(sorted(inside, key=str.lower if wanted.ignore_case else None))
        files = [(f, i) for i, name in enumerate(classes) for f in inside[name]]
        others[BESIDE] = len(beside)
    checked(files, others, folder)
    empty = tuple(name for name in classes if not inside[name])
    images = read_files(folder, files, wanted, selection)
    return replace(images, classes=classes, empty=empty) if classes else replace(images, y=None)


IMAGE_FOLDER = Reader("an image folder (one folder per class)", Path.is_dir, _read)


def read_files(
    folder: Path, files: Sequence[tuple[Path, int]], wanted: Wanted, selection: Selection
) -> ImageSet:
    """Decode image files.

    Args:
        folder: Names the data in errors.
        files: Image files and their class numbers.
        wanted: Size, normalisation and channels.
        selection: Which of the files are read.

    Returns:
        Inputs and class numbers, without class names.

    Raises:
        DataError: No image that can be decoded, a corrupt one, or mixed sizes or channels.
    """
    files = [files[i] for i in selection.rows(len(files))]
    try:
        return _decoded_all(folder, files, wanted, selection.skip_corrupt)
    except _Coloured:
        wanted = replace(wanted, channels=3)
        return _decoded_all(folder, files, wanted, selection.skip_corrupt)


class _Coloured(Exception):
    """A colour image after grey ones, where the channels of the model are unknown."""


def _decoded_all(
    folder: Path, files: Sequence[tuple[Path, int]], wanted: Wanted, skip_corrupt: bool
) -> ImageSet:
    """Inputs and class numbers; inputs beyond ``_IN_MEMORY`` lie in a mapped file."""
    rows: _Rows | None = None
    labels, skipped = [], []
    todo = ((file, wanted) for file, _ in files)
    pictures = run_ahead(_decoded, todo, min(os.cpu_count() or 1, 16), _AHEAD)
    for (file, label), picture in zip(files, pictures, strict=True):
        if isinstance(picture, Undecodable):
            if not skip_corrupt:
                raise DataError(
                    f"{picture}, or leave such images out (`skip_corrupt` of calibration, "
                    "adaptation and measurement)"
                ) from picture
            skipped.append(str(file))
            continue
        if rows is None:
            rows = _Rows(len(files), picture, wanted, folder)
        rows.add(picture, file)
        labels.append(label)
    if rows is None:
        raise DataError(f"{folder}: found no image that can be decoded among {len(files)}")
    y = np.array(labels, np.int64)
    return ImageSet(rows.filled, y, None, rows.preprocessing, tuple(skipped))


def _decoded(file: Path, wanted: Wanted) -> Picture | Undecodable:
    """An image at the wanted size, or why there is none."""
    try:
        picture = decode(file, wanted.channels)
    except Undecodable as error:
        return error
    if wanted.resize is not None:
        return Picture(cut(picture.image, wanted.resize, wanted.size or wanted.resize, file))
    if wanted.size is not None:
        return picture.resized(wanted.size)
    if max(picture.size) > LARGEST_SIDE:
        raise DataError(
            f"{file}: found {picture.size[0]}x{picture.size[1]}; needed at most {LARGEST_SIDE} "
            "pixels a side: give a `size`"
        )
    return picture


class _Rows:
    """Network inputs (N, C, H, W), filled one by one."""

    def __init__(self, count: int, first: Picture, wanted: Wanted, folder: Path) -> None:
        self._any = wanted.channels is None
        channels = wanted.channels or first.channels
        height, width = first.size
        shape = (channels, height, width)
        self.preprocessing = _preprocessing((height, width), channels, wanted, folder)
        size = 4 * count * channels * height * width
        if size <= _IN_MEMORY:
            self._x = np.empty((count, *shape), np.float32)
        else:
            self._x = np.frombuffer(mapped_file(size, "images"), np.float32).reshape(count, *shape)
        self._count = 0

    def add(self, picture: Picture, file: Path) -> None:
        channels, height, width = self._x.shape[1:]
        if picture.size != (height, width):
            raise DataError(
                f"{file}: found {picture.size[0]}x{picture.size[1]} after images of "
                f"{height}x{width}; give a `size` to resize them all"
            )
        if self._any and picture.channels > channels:
            raise _Coloured
        self._x[self._count] = to_input(picture.pixels(channels), self.preprocessing)
        self._count += 1

    @property
    def filled(self) -> Array:
        return self._x[: self._count]


def _preprocessing(
    size: tuple[int, int], channels: int, wanted: Wanted, folder: Path
) -> Preprocessing:
    def each(values: Sequence[float] | None, default: float, name: str) -> tuple[float, ...]:
        given = tuple(values) if values else (default,)
        full = given * channels if len(given) == 1 else given
        if len(full) != channels or (name == "std" and min(full) <= 0):
            raise DataError(
                f"{folder}: found {name} {' '.join(map(str, given))} for images of {channels} "
                f"channels; needed one value or {channels}" + (", > 0" if name == "std" else "")
            )
        return full

    return Preprocessing(
        height=size[0],
        width=size[1],
        channels=channels,
        mean=each(wanted.mean, 0.0, "mean"),
        std=each(wanted.std, 1.0, "std"),
        colour="RGB" if channels == 3 else "L",
        resize=wanted.resize,
    )
