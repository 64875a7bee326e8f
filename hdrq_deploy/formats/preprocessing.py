"""From the pixels of an image to the network's input, and back: the one arithmetic of all readers.

Whoever computes it otherwise (a graph that takes frames, a server's settings) gets its constants
here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ..typing import Array

if TYPE_CHECKING:
    from .engine_folder import EngineManifest

__all__ = [
    "Normalisation",
    "as_constants",
    "as_factor_and_offsets",
    "feed",
    "to_frames",
    "to_input",
]


class Normalisation(Protocol):
    """What has a mean and a standard deviation per channel, in units of [0, 1]."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of every channel."""

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of every channel."""


def as_constants(p: Normalisation | None) -> list[tuple[str, str, Array]]:
    """The arithmetic as operators on planes (N, C, H, W) of float32 values 0 to 255, in order.

    Args:
        p: Normalisation; None scales to [0, 1] alone.

    Returns:
        ONNX operator (Div or Sub), a label, and its second operand: a scalar, or (1, C, 1, 1).
        What changes nothing is left out.
    """
    steps: list[tuple[str, str, Array]] = [("Div", "unit", np.array(255, np.float32))]
    if p is None:
        return steps
    mean, std = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (p.mean, p.std))
    if mean.any():
        steps.append(("Sub", "centred", mean))
    if (std != 1).any():
        steps.append(("Div", "scaled", std))
    return steps


def as_factor_and_offsets(p: Normalisation) -> tuple[float, list[float]]:
    """The arithmetic as ``factor * (pixel - offset)``, with one factor for all channels.

    Where the standard deviations differ the factor is that of their geometric mean.
    """
    std = float(np.exp(np.log(np.array(p.std, np.float64)).mean()))
    return 1 / (255 * std), [255 * mean for mean in p.mean]


def to_input(frames: Array, p: Normalisation | None) -> npt.NDArray[np.float32]:
    """Network inputs of frames at the network's size.

    Args:
        frames: (N, H, W, C) or (H, W, C), values 0 to 255 of uint8 or float32.
        p: Normalisation; None scales to [0, 1] alone.

    Returns:
        (N, C, H, W) or (C, H, W) float32, ``(frames / 255 - mean) / std``.
    """
    x = np.array(np.moveaxis(frames, -1, -3), np.float32, order="C")
    for op, _, value in as_constants(p):
        operand = value[0] if value.ndim > x.ndim else value
        (np.divide if op == "Div" else np.subtract)(x, operand, out=x)
    return x


def to_frames(x: Array, p: Normalisation | None) -> npt.NDArray[np.uint8]:
    """The frames (N, H, W, C) that inputs (N, C, H, W) were made from."""
    side = (1, -1, 1, 1)
    mean, std = (np.array(v, np.float32).reshape(side) for v in ((p.mean, p.std) if p else (0, 1)))
    frames = np.rint((x * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(frames.transpose(0, 2, 3, 1))


def feed(x: Array, manifest: EngineManifest) -> Array:
    """Inputs of the network as an engine takes them: normalised, or as the frames they were."""
    (port,) = manifest.inputs
    return to_frames(x, manifest.preprocessing) if port.dtype == "uint8" else x
