"""Images and labels from disk: an image folder (one folder per class) or an .npz file."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...formats.atomic_files import mapped_file
from ...formats.preprocessing import to_input
from ...formats.records import LARGEST_SIDE, Preprocessing
from .arrays import read_arrays
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
from .street_scenes import IGNORE, is_scenes, run_ahead, scene_images

__all__ = ["ImageSet", "Wanted", "cut", "numbered", "read", "relabel"]

Array = npt.NDArray[Any]

# Bytes of inputs that stay in memory, and images that are decoded ahead.
_IN_MEMORY = 1 << 30
_AHEAD = 32


@dataclass(frozen=True)
class Wanted:
    """How to read: what the caller fixes; None is taken from the data.

    Attributes:
        size: (height, width) that images are resized to.
        mean: Per channel, in units of [0, 1].
        std: Per channel, in units of [0, 1].
        channels: Channels the model reads, 1 or 3: grey images are repeated for a model of
            colour, colour becomes grey for a model of one channel. By default 3 if any image
            is of colour, else 1.
        resize: (height, width) that images are resized to first; ``size`` is then cut out of the
            middle.
        ignore_case: Class folders in alphabetical order whatever their case, as Office-Home is
            numbered (TV behind Trash_Can), not in that of their bytes (TV before Table).
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None
    resize: tuple[int, int] | None = None
    ignore_case: bool = False

    @classmethod
    def like(cls, preprocessing: Preprocessing | None) -> Wanted:
        """What a bundle or engine was calibrated for; None leaves all to the data."""
        p = preprocessing
        return cls() if p is None else cls((p.height, p.width), p.mean, p.std, p.channels, p.resize)


@dataclass(frozen=True)
class ImageSet:
    """Network inputs (N, C, H, W) float32, labels (N,) int64 or None, class names or None.

    Attributes:
        x: Inputs.
        y: Labels; (N, H, W) of every pixel from some .npz.
        classes: Names of the class folders, those without images included.
        preprocessing: How images became inputs; None from an .npz.
        skipped: Files that could not be decoded and were left out.
        empty: Those of the class folders that hold no images.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64] | None
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    skipped: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, count: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Inputs and labels, ``count`` at a time."""
        assert self.y is not None
        for first in range(0, len(self.x), count):
            yield self.x[first : first + count], self.y[first : first + count]

    def names_of(self, count: int | None) -> tuple[str, ...] | None:
        """Names of a model's ``count`` classes, or None where the folders do not tell them.

        With a folder too many nobody can say which one it is, one without images or another.
        """
        return self.classes if self.classes and len(self.classes) == count else None

    @property
    def sha256(self) -> str:
        """Hash of the inputs."""
        digest = hashlib.sha256()
        for row in np.ascontiguousarray(self.x):
            digest.update(row.tobytes())
        return digest.hexdigest()


def read(
    path: str | Path,
    wanted: Wanted | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
) -> ImageSet:
    """Read an image folder or an .npz with ``x`` (N, C, H, W) float32 and ``y`` (N,).

    Images are read as :func:`~.decoding.picture_of` says. Folders and files whose names begin
    with a dot are not looked at; files that are no images of a format that is read here are left
    out, and the logger ``hdrq_deploy`` says how many of which kind. Every folder is a class, one
    without images too.

    Args:
        path: Folder or .npz file.
        wanted: Size, normalisation and channels; ignored for .npz, whose ``x`` is final.
        limit: At most so many images, drawn by ``seed``.
        seed: Seed of that draw.
        skip_corrupt: Leave out images that cannot be decoded instead of failing.

    Raises:
        DataError: Nothing there, nothing readable, a corrupt image, mixed sizes or channels,
            wrong arrays, or values that are not finite.
    """
    path = Path(path)
    wanted = wanted or Wanted()
    if path.is_dir():
        return _read_folder(path, wanted, limit, seed, skip_corrupt)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _read_npz(path, wanted, limit, seed)
    found = f"a file {path.suffix}".strip() if path.exists() else "nothing"
    raise DataError(
        f"{path}: found {found}; needed an image folder (one folder per class) or an .npz "
        "with x (N,C,H,W float32) and y (N,)"
    )


def _chosen(count: int, limit: int | None, seed: int) -> npt.NDArray[np.intp]:
    if limit is not None and limit < 1:
        raise DataError(f"found a limit of {limit} images; needed 1 or more")
    if seed < 0:
        raise DataError(f"found seed {seed}; needed 0 or more")
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def _read_npz(path: Path, wanted: Wanted, limit: int | None, seed: int) -> ImageSet:
    x, y = read_arrays(path, wanted.channels)
    rows = _chosen(len(x), limit, seed)
    return ImageSet(np.ascontiguousarray(x[rows]), None if y is None else y[rows], None, None)


def _read_folder(
    folder: Path, wanted: Wanted, limit: int | None, seed: int, skip_corrupt: bool
) -> ImageSet:
    if is_scenes(folder):  # images alone; labels are for whoever measures
        images = [(file, -1) for file in scene_images(folder)]
        return _read_files(folder, images, (), (), wanted, limit, seed, skip_corrupt)
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
    return _read_files(folder, files, classes, empty, wanted, limit, seed, skip_corrupt)


def _read_files(
    folder: Path,
    files: list[tuple[Path, int]],
    classes: tuple[str, ...],
    empty: tuple[str, ...],
    wanted: Wanted,
    limit: int | None,
    seed: int,
    skip_corrupt: bool,
) -> ImageSet:
    """Images and class numbers (-1: none)."""
    files = [files[i] for i in _chosen(len(files), limit, seed)]
    try:
        found = _decoded_all(folder, files, wanted, skip_corrupt)
    except _Coloured:
        found = _decoded_all(folder, files, replace(wanted, channels=3), skip_corrupt)
    return replace(found, classes=classes or None, y=found.y if classes else None, empty=empty)


class _Coloured(Exception):
    """An image of colour behind grey ones, where nobody said what the model reads."""


def _decoded_all(
    folder: Path, files: list[tuple[Path, int]], wanted: Wanted, skip_corrupt: bool
) -> ImageSet:
    """Inputs and class numbers; inputs beyond ``_IN_MEMORY`` lie in a mapped file."""
    rows: _Rows | None = None
    labels, skipped = [], []
    todo = ((file, wanted) for file, _ in files)
    found = run_ahead(_decoded, todo, min(os.cpu_count() or 1, 16), _AHEAD)
    for (file, label), picture in zip(files, found, strict=True):
        if isinstance(picture, Undecodable):
            if not skip_corrupt:
                raise DataError(f"{picture}, or pass --skip-corrupt") from picture
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
            "pixels a side: pass --size H W"
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
                f"{height}x{width}; pass --size HEIGHT WIDTH to resize them all"
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
                f"{folder}: found --{name} {' '.join(map(str, given))} for images of {channels} "
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


def relabel(images: ImageSet, classes: Sequence[str] | None, origin: Any) -> ImageSet:
    """Number the labels of a folder as ``classes`` does.

    Raises:
        DataError: The folder holds images of a class that the model does not know.
    """
    if classes is None or images.classes is None or images.y is None:
        return images
    index = {name: i for i, name in enumerate(classes)}
    unknown = [n for n in images.classes if n not in index and n not in images.empty]
    if unknown:
        raise DataError(
            f"{origin}: found class folder {unknown[0]!r}; the model's classes are "
            f"{', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}"
        )
    table = np.array([index.get(name, -1) for name in images.classes], np.int64)
    empty = tuple(name for name in images.empty if name in index)
    return replace(images, y=table[images.y], classes=tuple(classes), empty=empty)


def numbered(
    images: ImageSet, names: Sequence[str] | None, count: int | None, origin: Any
) -> ImageSet:
    """Images whose labels are numbered as the model numbers its classes.

    Class folders are matched by name where the model's names are known, else by their number.

    Args:
        images: From :func:`read`.
        names: The model's classes, or None.
        count: How many classes the model has, or None where that is not known either.
        origin: Names the data in errors.

    Raises:
        DataError: Folders that cannot be matched, or labels below 0 or beyond the classes.
    """
    if images.y is None:
        return images
    if images.classes is not None:
        matched = names or images.names_of(count)
        if matched is None:
            raise DataError(_unmatched(images, count, origin))
        images = relabel(images, matched, origin)
    assert images.y is not None
    known = images.y[images.y != IGNORE] if images.y.ndim == 3 else images.y
    most = len(names) if names else count
    low, high = int(known.min(initial=0)), int(known.max(initial=0))
    if low < 0 or (most is not None and high >= most):
        raise DataError(
            f"{origin}: found labels {low} to {high}; the model has "
            f"{'classes from 0 on' if most is None else f'{most} classes'}"
            + (f" (and {IGNORE} for pixels to leave out)" if images.y.ndim == 3 else "")
        )
    return images


def _unmatched(images: ImageSet, count: int | None, origin: Any) -> str:
    assert images.classes is not None
    found = f"{len(images.classes)} class folders"
    if images.empty:
        found += f" ({len(images.empty)} without images, such as {images.empty[0]!r})"
    if count is None:
        return (
            f"{origin}: found {found} for a model that names no classes and does not say how many "
            "it has; needed names: calibrate on one folder per class, or pass an .npz with y"
        )
    return (
        f"{origin}: found {found} for {count} scores, and the manifest does not name the classes; "
        "needed one folder for every class, which may be empty, and no others"
    )
