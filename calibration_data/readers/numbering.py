"""Class numbers of labels, as the model numbers its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import DataError
from .base import ImageSet
from .street_scenes import IGNORE

__all__ = ["numbered", "relabel"]


def relabel(images: ImageSet, classes: Sequence[str] | None, origin: Any) -> ImageSet:
    """Number the labels of a folder as ``classes`` does.

    Args:
        images: From :func:`read`; returned as they are where they have no class folders.
        classes: The model's classes, or None.
        origin: Names the data in errors.

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
        count: The model's number of classes, or None where that is not known either.
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
    given = f"{len(images.classes)} class folders"
    if images.empty:
        given += f" ({len(images.empty)} without images, such as {images.empty[0]!r})"
    if count is None:
        return (
            f"{origin}: found {given} for a model that names no classes and does not say how many "
            "it has; needed names: calibrate on one folder per class, or pass an .npz with y"
        )
    return (
        f"{origin}: found {given} for {count} scores, and the manifest does not name the classes; "
        "needed one folder for every class, which may be empty, and no others"
    )
