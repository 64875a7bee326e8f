"""From a network's normalised input to what an engine takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .manifest import EngineManifest

__all__ = ["decisions", "feed"]

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


def decisions(output: Array) -> Array:
    """Class of every position: the highest score on axis 1, or what an argmax engine says."""
    result: Array = output if output.dtype.kind in "iu" else output.argmax(1)
    return result
