"""Images of several domains as one set, for a model that is calibrated for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import DataError
from ...formats.atomic_files import mapped_file
from .base import ImageSet

__all__ = ["joined"]

# Bytes of inputs that stay in memory, as those of one folder do.
_IN_MEMORY = 1 << 30


def joined(sets: Sequence[ImageSet], names: Sequence[str]) -> ImageSet:
    """The images of all sets, one set after the other, without labels.

    Args:
        sets: One or more; a single one is returned as it is.
        names: What an error calls them.

    Raises:
        DataError: Inputs of two sizes, or that were made in two ways.
    """
    first = sets[0]
    if len(sets) == 1:
        return first
    for images, name in zip(sets, names, strict=True):
        found, needed = images.x.shape[1:], first.x.shape[1:]
        if found != needed or images.preprocessing != first.preprocessing:
            how = f"inputs of shape {found}" if found != needed else "another preprocessing"
            raise DataError(
                f"{name}: found {how} after those of {names[0]}; needed {needed} and equal "
                "preprocessing in all domains: give a `size`, `mean` and `std` for all"
            )
    count = sum(len(images) for images in sets)
    shape, size = (count, *first.x.shape[1:]), 4 * count * first.x[0].size
    x = np.empty(shape, np.float32)
    if size > _IN_MEMORY:
        x = np.frombuffer(mapped_file(size, "images"), np.float32).reshape(shape)
    place = 0
    for images in sets:
        x[place : place + len(images)] = images.x
        place += len(images)
    classes = first.classes if all(s.classes == first.classes for s in sets) else None
    skipped = tuple(file for images in sets for file in images.skipped)
    return ImageSet(x, None, classes, first.preprocessing, skipped)
