"""Images on their way into a network or engine, and decisions on their way out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine_folder import EngineManifest
from .records import Preprocessing

__all__ = ["class_count", "decides", "decisions", "feed", "in_batches", "pixels"]

Array = npt.NDArray[Any]


def feed(x: Array, manifest: EngineManifest) -> Array:
    """Inputs of the network as an engine takes them: normalised, or as the frames they were."""
    (port,) = manifest.inputs
    if port.dtype != "uint8":
        return x
    return pixels(x, manifest.preprocessing)


def pixels(x: Array, preprocessing: Preprocessing | None) -> Array:
    """The frames (N, H, W, C) uint8 that inputs (N, C, H, W) were made from."""
    side = (1, -1, 1, 1)
    p = preprocessing
    mean = np.array(p.mean if p else 0, np.float32).reshape(side)
    std = np.array(p.std if p else 1, np.float32).reshape(side)
    frames: Array = np.rint((x * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(frames.transpose(0, 2, 3, 1))


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
