"""Images on their way into a network or engine, and decisions on their way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .manifest import EngineManifest

__all__ = ["decisions", "feed", "in_batches"]

Array = npt.NDArray[Any]


def feed(x: Array, manifest: EngineManifest) -> Array:
    """Inputs of the network as an engine takes them: normalised, or as the frames they were."""
    (port,) = manifest.inputs
    if port.dtype != "uint8":
        return x
    assert manifest.preprocessing is not None
    side = (1, -1, 1, 1)
    mean = np.array(manifest.preprocessing.mean, np.float32).reshape(side)
    std = np.array(manifest.preprocessing.std, np.float32).reshape(side)
    frames: Array = np.rint((x * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(frames.transpose(0, 2, 3, 1))


def in_batches(x: Array, size: int) -> Iterator[Array]:
    """Rows of ``x``, ``size`` at a time."""
    for first in range(0, len(x), size):
        yield x[first : first + size]


def decisions(output: Array) -> Array:
    """Class of every position: the highest score on axis 1, or what an argmax engine says."""
    result: Array = output if output.dtype.kind in "iu" else output.argmax(1)
    return result
