"""What every reader takes and gives: how to read, the images that were read, and a reader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...formats.records import Preprocessing

__all__ = ["ImageSet", "Reader", "Selection", "Wanted", "spread"]


@dataclass(frozen=True)
class Wanted:
    """How images become inputs: what the caller decides; None is taken from the data.

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
            numbered (TV after Trash_Can), not in that of their bytes (TV before Table).
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

        They do not where there are more folders than classes: any of them may be the wrong one.
        """
        return self.classes if self.classes and len(self.classes) == count else None

    @property
    def sha256(self) -> str:
        """Hash of the inputs."""
        digest = hashlib.sha256()
        for row in np.ascontiguousarray(self.x):
            digest.update(row.tobytes())
        return digest.hexdigest()


def spread(count: int, most: int) -> npt.NDArray[np.intp]:
    """At most so many numbers below ``count``, evenly apart.

    Image folders are read class by class, so that their first images are those of few classes.

    >>> spread(10, 4).tolist(), spread(3, 4).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    """
    few = min(count, most)
    return np.arange(few) * count // max(few, 1)


@dataclass(frozen=True)
class Selection:
    """Which images are read.

    Attributes:
        limit: The largest number of images, drawn by ``seed``; None for all.
        seed: Seed of that draw.
        skip_corrupt: Leave out images that cannot be decoded instead of failing.

    Raises:
        DataError: A limit below 1 or a seed below 0.
    """

    limit: int | None = None
    seed: int = 0
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DataError(f"found a limit of {self.limit} images; needed 1 or more")
        if self.seed < 0:
            raise DataError(f"found seed {self.seed}; needed 0 or more")

    def rows(self, count: int) -> npt.NDArray[np.intp]:
        """The numbers of the selected images of ``count``, in rising order."""
        if self.limit is None or self.limit >= count:
            return np.arange(count)
        return np.sort(np.random.default_rng(self.seed).permutation(count)[: self.limit])


@dataclass(frozen=True)
class Reader:
    """A form in which images come, as the table ``READERS`` holds it.

    Attributes:
        form: What an error says that is needed, such as ``an .npz with x``.
        reads: Whether a path is of this form; looks at names only.
        read: Reads a path of this form; see :func:`hdrq_deploy.calibration_data.readers.read`.
    """

    form: str
    reads: Callable[[Path], bool]
    read: Callable[[Path, Wanted, Selection], ImageSet]
