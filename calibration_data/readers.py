"""Images and labels from disk: an image folder (one folder per class) or an .npz file."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from hdrq_deploy.errors import DataError
from hdrq_deploy.files import mapped_file
from hdrq_deploy.manifest import Preprocessing

from .street import is_scenes, run_ahead, scene_images

__all__ = ["ImageSet", "Wanted", "cut", "read"]

Array = npt.NDArray[Any]

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
# Bytes of inputs that stay in memory, and images that are decoded ahead.
_IN_MEMORY = 1 << 30
_AHEAD = 32
_UNREADABLE = (
    OSError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    SyntaxError,
    ValueError,
)
_CHANNELS = {"1": 1, "L": 1, "I;16": 1, "RGB": 3, "P": 3, "RGBA": 4, "CMYK": 4, "LA": 2}


@dataclass(frozen=True)
class Wanted:
    """How to read: what the caller fixes; None is taken from the data.

    Attributes:
        size: (height, width) that images are resized to.
        mean: Per channel, in units of [0, 1].
        std: Per channel, in units of [0, 1].
        channels: Channels the model reads; a folder with others is an error.
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
    def like(cls, preprocessing: Preprocessing) -> Wanted:
        """What a bundle or engine was calibrated for."""
        p = preprocessing
        return cls((p.height, p.width), p.mean, p.std, p.channels, p.resize)


@dataclass(frozen=True)
class ImageSet:
    """Network inputs (N, C, H, W) float32, labels (N,) int64 or None, class names or None."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64] | None
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, count: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Inputs and labels, ``count`` at a time."""
        assert self.y is not None
        for first in range(0, len(self.x), count):
            yield self.x[first : first + count], self.y[first : first + count]

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
    if path.is_dir():
        return _read_folder(path, wanted or Wanted(), limit, seed, skip_corrupt)
    if path.is_file() and path.suffix == ".npz":
        return _read_npz(path, limit, seed)
    found = "a file" if path.exists() else "nothing"
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


def _read_npz(path: Path, limit: int | None, seed: int) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error}); write it again") from error
    if "x" not in arrays:
        raise DataError(f"{path}: found arrays {sorted(arrays)}; needed x and, for labels, y")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim < 2 or x.dtype.kind != "f" or len(x) == 0:
        raise DataError(
            f"{path}: found x of shape {x.shape}, {x.dtype}; needed (N,C,H,W) float32 with N > 0"
        )
    if y is not None and (len(y) != len(x) or y.dtype.kind not in "iu"):
        raise DataError(
            f"{path}: found y of shape {y.shape}, {y.dtype} for {len(x)} images; "
            "needed one integer label an image"
        )
    if not np.isfinite(x).all():
        bad = int(np.argmin(np.isfinite(x.reshape(len(x), -1)).all(1)))
        raise DataError(f"{path}: found NaN or infinity in image {bad}; needed finite values")
    rows = _chosen(len(x), limit, seed)
    labels = None if y is None else y[rows].astype(np.int64)
    return ImageSet(np.ascontiguousarray(x[rows], np.float32), labels, None, None)


def _read_folder(
    folder: Path, wanted: Wanted, limit: int | None, seed: int, skip_corrupt: bool
) -> ImageSet:
    if is_scenes(folder):  # images alone; labels are for whoever measures
        images = [(file, -1) for file in scene_images(folder)]
        return _read_files(folder, images, (), wanted, limit, seed, skip_corrupt)
    names = [d.name for d in folder.iterdir() if d.is_dir() and _images(d)]
    classes = tuple(sorted(names, key=str.lower if wanted.ignore_case else None))
    files = [(f, i) for i, name in enumerate(classes) for f in _images(folder / name)]
    if not files:
        files = [(f, -1) for f in _images(folder)]
    if not files:
        raise DataError(
            f"{folder}: found no images ({', '.join(sorted(EXTENSIONS))}); needed one folder "
            "of images per class, or images"
        )
    return _read_files(folder, files, classes, wanted, limit, seed, skip_corrupt)


def _read_files(
    folder: Path,
    files: list[tuple[Path, int]],
    classes: tuple[str, ...],
    wanted: Wanted,
    limit: int | None,
    seed: int,
    skip_corrupt: bool,
) -> ImageSet:
    """Images and class numbers (-1: none); inputs beyond ``_IN_MEMORY`` lie in a mapped file."""
    files = [files[i] for i in _chosen(len(files), limit, seed)]
    rows: _Rows | None = None
    labels, skipped = [], []
    todo = ((file, wanted) for file, _ in files)
    found = run_ahead(_decoded, todo, min(os.cpu_count() or 1, 16), _AHEAD)
    for (file, label), pixels in zip(files, found, strict=True):
        if isinstance(pixels, Exception):
            if not skip_corrupt:
                raise DataError(
                    f"{file}: cannot be decoded ({pixels}); mend or remove it, or pass "
                    "--skip-corrupt"
                ) from pixels
            skipped.append(str(file))
            continue
        if rows is None:
            rows = _Rows(len(files), pixels.shape, wanted, folder)
        rows.add(pixels, file)
        labels.append(label)
    if rows is None:
        raise DataError(f"{folder}: found no image that can be decoded among {len(files)}")
    y = np.array(labels, np.int64) if classes else None
    return ImageSet(rows.filled, y, classes or None, rows.preprocessing, tuple(skipped))


def _decoded(file: Path, wanted: Wanted) -> Array | Exception:
    """Pixels (C, H, W) uint8, or why there are none."""
    try:
        return _pixels(_decode(file, wanted.channels), file, wanted)
    except _UNREADABLE as error:
        return error


def _pixels(image: Image.Image, file: Path, wanted: Wanted) -> Array:
    if wanted.resize is not None:
        image = cut(image, wanted.resize, wanted.size or wanted.resize, file)
    elif wanted.size is not None and image.size != wanted.size[::-1]:
        image = image.resize(wanted.size[::-1], Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def cut(
    image: Image.Image, resize: tuple[int, int], size: tuple[int, int], where: object
) -> Image.Image:
    """``image`` brought to ``resize``, and ``size`` (height, width) cut out of its middle.

    Raises:
        DataError: ``size`` is larger than ``resize``.
    """
    top, left = (resize[0] - size[0]) // 2, (resize[1] - size[1]) // 2
    if top < 0 or left < 0:
        raise DataError(
            f"{where}: found a crop of {size[0]}x{size[1]} from images of {resize[0]}x{resize[1]}; "
            "needed a crop no larger than the image"
        )
    if image.size != resize[::-1]:
        image = image.resize(resize[::-1], Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size[1], top + size[0]))


class _Rows:
    """Network inputs (N, C, H, W), filled one by one."""

    def __init__(self, count: int, shape: tuple[int, ...], wanted: Wanted, folder: Path) -> None:
        channels, height, width = shape
        self.preprocessing = _preprocessing((height, width), channels, wanted, folder)
        p = self.preprocessing
        self._mean, self._std = (np.array(v, np.float32)[:, None, None] for v in (p.mean, p.std))
        size = 4 * count * channels * height * width
        if size <= _IN_MEMORY:
            self._x = np.empty((count, *shape), np.float32)
        else:
            self._x = np.frombuffer(mapped_file(size, "images"), np.float32).reshape(count, *shape)
        self._count = 0

    def add(self, pixels: Array, file: Path) -> None:
        channels, height, width = self._x.shape[1:]
        if pixels.shape[1:] != (height, width):
            raise DataError(
                f"{file}: found {pixels.shape[1]}x{pixels.shape[2]} after images of "
                f"{height}x{width}; pass --size HEIGHT WIDTH to resize them all"
            )
        if len(pixels) != channels:
            raise DataError(
                f"{file}: found {len(pixels)} channels after images of {channels}; needed one "
                "kind: convert the images"
            )
        self._x[self._count] = (pixels.astype(np.float32) / 255 - self._mean) / self._std
        self._count += 1

    @property
    def filled(self) -> Array:
        return self._x[: self._count]


def _images(folder: Path) -> list[Path]:
    return sorted(
        f for f in folder.iterdir() if f.suffix.lower() in EXTENSIONS and not f.name.startswith(".")
    )


def _decode(file: Path, channels: int | None) -> Image.Image:
    with Image.open(file) as opened:
        opened.load()
        found = _CHANNELS.get(opened.mode, len(opened.getbands()))
        if channels is not None and found != channels:
            raise DataError(
                f"{file}: found {found} channels (mode {opened.mode}), the model reads "
                f"{channels}: convert the image"
            )
        if found not in {1, 3}:
            raise DataError(
                f"{file}: found {found} channels (mode {opened.mode}); needed 1 or 3: "
                "convert the image to grey or RGB"
            )
        return opened.convert("L" if found == 1 else "RGB")


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
        DataError: The folder holds a class that the model does not know.
    """
    if classes is None or images.classes is None or images.y is None:
        return images
    index = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in images.classes if name not in index]
    if unknown:
        raise DataError(
            f"{origin}: found class folder {unknown[0]!r}; the model's classes are "
            f"{', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}"
        )
    table = np.array([index[name] for name in images.classes], np.int64)
    return ImageSet(images.x, table[images.y], tuple(classes), images.preprocessing, images.skipped)
