"""From a camera's frame to the network's input, and from its output to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..calibration_data.readers import cut
from ..calibration_data.street import IGNORE
from ..errors import EngineError
from ..manifest import Preprocessing

__all__ = ["Prediction", "enlarge", "network_input", "predictions", "softmax"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Prediction:
    """What an engine says of one frame.

    Attributes:
        index: Number of the most likely class; None for a mask.
        label: Its name, where the manifest has the classes' names.
        scores: Probabilities (classes,); None where the engine gives labels only.
        mask: Class of every pixel (H, W) of the frame, of a segmentation engine.
    """

    index: int | None = None
    label: str | None = None
    scores: Array | None = None
    mask: Array | None = None


def network_input(
    frames: Sequence[Array], p: Preprocessing | None, where: object, raw: bool = False
) -> Array:
    """Frames as the engine takes them: resized, and normalised unless the engine does it.

    Args:
        frames: (H, W, 3) uint8 RGB each, or (H, W) for a grey model; sizes may differ.
        p: The manifest's preprocessing.
        where: Names the engine in errors.
        raw: The engine takes uint8 frames (N, H, W, C) and normalises them itself.

    Raises:
        EngineError: Not such frames, or the manifest has no preprocessing.
    """
    if p is None:
        raise EngineError(
            f"{where}: the manifest has no preprocessing (calibrated from .npz); call the engine "
            "with network inputs, or calibrate from an image folder"
        )
    if not frames:
        raise EngineError(f"{where}: found no frames; needed one or more")
    rows = []
    for frame in frames:
        grey = p.channels == 1
        if frame.dtype != np.uint8 or frame.ndim != (2 if grey else 3):
            raise EngineError(
                f"{where}: found a frame of shape {frame.shape}, {frame.dtype}; needed "
                f"{'(H, W)' if grey else '(H, W, 3)'} uint8"
            )
        if not grey and frame.shape[2] != p.channels:
            raise EngineError(
                f"{where}: found a frame of {frame.shape[2]} channels; needed {p.channels} "
                f"({p.colour})"
            )
        if p.resize is not None:
            image = cut(Image.fromarray(frame), p.resize, (p.height, p.width), where)
            frame = np.asarray(image)
        elif frame.shape[:2] != (p.height, p.width):
            resized = Image.fromarray(frame).resize((p.width, p.height), Image.Resampling.BILINEAR)
            frame = np.asarray(resized)
        rows.append(frame.reshape(p.height, p.width, p.channels))
    batch = np.stack(rows)
    if raw:
        return batch
    # x / 255, minus mean, over std, as one multiplication and one addition.
    std = np.array(p.std, np.float32)
    gain, offset = (1 / (255 * std)).astype(np.float32), -np.array(p.mean, np.float32) / std
    x = batch.astype(np.float32) * gain + offset
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=np.float32)


def softmax(scores: Array) -> Array:
    """Probabilities along axis 1."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    result: Array = powers / powers.sum(1, keepdims=True)
    return result


def predictions(
    output: Array,
    sizes: Sequence[tuple[int, ...]],
    classes: Sequence[str] | None = None,
    probabilities: bool = False,
    p: Preprocessing | None = None,
) -> list[Prediction]:
    """One answer a frame.

    Args:
        output: Scores (N, classes) or (N, classes, h, w), or labels (N,) or (N, h, w).
        sizes: (height, width) of the frames, which masks are brought back to.
        classes: Their names.
        probabilities: Scores are that already.
        p: Where the input was cut out of the frame, a mask says IGNORE (255) outside of that.
    """
    labels = output.dtype.kind in "iu"
    if output.ndim > 2:
        return [
            Prediction(mask=_placed(row, (size[0], size[1]), p))
            for row, size in zip(output, sizes, strict=True)
        ]
    scores = None if labels else output if probabilities else softmax(output)
    best = output if labels else output.argmax(1)
    return [
        Prediction(
            int(index),
            classes[index] if classes else None,
            None if scores is None else scores[i],
        )
        for i, index in enumerate(best)
    ]


def _placed(row: Array, size: tuple[int, int], p: Preprocessing | None) -> Array:
    """The mask of a whole frame."""
    if p is None or p.resize is None:
        return _mask(row, size)
    height = round(size[0] * p.height / p.resize[0])
    width = round(size[1] * p.width / p.resize[1])
    part = _mask(row, (height, width))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    mask = np.full(size, IGNORE, part.dtype)
    mask[top : top + height, left : left + width] = part
    return mask


def _mask(row: Array, size: tuple[int, int]) -> Array:
    if row.dtype.kind in "iu":
        image = Image.fromarray(row.astype(np.int32), mode="I")
        nearest = image.resize((size[1], size[0]), Image.Resampling.NEAREST)
        return np.asarray(nearest).astype(np.uint8 if row.max(initial=0) < 256 else np.int32)
    mask: Array = enlarge(row, size).argmax(0)
    return mask.astype(np.uint8 if len(row) <= 256 else np.int32)


def enlarge(scores: Array, size: tuple[int, int]) -> Array:
    """Scores (classes, h, w) at another size, bilinear with half-pixel centres.

    The usual last step of a segmentation network whose output is smaller than its input
    (``interpolate(mode="bilinear", align_corners=False)``).
    """
    if scores.shape[1:] == size:
        return scores
    planes = [
        Image.fromarray(plane.astype(np.float32)).resize(
            (size[1], size[0]), Image.Resampling.BILINEAR
        )
        for plane in scores
    ]
    return np.stack([np.asarray(plane) for plane in planes])
