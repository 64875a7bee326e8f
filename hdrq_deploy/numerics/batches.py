"""Rows a few at a time, and what outputs of a classifier say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..typing import Array

__all__ = ["class_count", "decides", "decisions", "in_batches"]


def in_batches(x: Array, size: int) -> Iterator[Array]:
    """Rows of ``x``, ``size`` at a time."""
    for first in range(0, len(x), size):
        yield x[first : first + size]


def decides(output: Array) -> bool:
    """Whether an output tells classes apart: labels, or scores of two classes or more on axis 1.

    Labels are (N,) or (N, h, w) integers, scores (N, classes) or (N, classes, h, w) floats.
    """
    if output.dtype.kind in "iu":
        return output.ndim in {1, 3}
    return class_count(output.shape) is not None


def class_count(shape: Sequence[int | str]) -> int | None:
    """How many classes scores of this shape tell apart; None where it is no shape of scores."""
    if len(shape) not in {2, 4} or not isinstance(shape[1], int) or shape[1] < 2:
        return None
    return shape[1]


def decisions(output: Array) -> Array:
    """Class of every position: the highest score on axis 1, or what an argmax engine says."""
    result: Array = output if output.dtype.kind in "iu" else output.argmax(1)
    return result
