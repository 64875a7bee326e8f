"""From a camera's frame to the network's input, and from its output to an answer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..calibration_data.readers.decoding import Picture, cut, decode, picture_of
from ..calibration_data.readers.street_scenes import IGNORE
from ..errors import EngineError
from ..formats.preprocessing import to_input
from ..formats.records import Preprocessing
from ..numerics.batches import decides
from ..typing import Array

__all__ = [
    "Frame",
    "Prediction",
    "enlarge",
    "frames_of",
    "network_input",
    "predictions",
    "sizes_of",
    "softmax",
]

# What an application may give for one frame, and what is known of it once it was read.
Frame = Array | Image.Image | str | os.PathLike[str]
Taken = Array | Picture
_FRAMES = "arrays (H, W, 3) uint8, paths or images of Pillow"


@dataclass(frozen=True)
class Prediction:
    """What an engine says of one frame.

    Attributes:
        index: Number of the most likely class; None for a mask.
        label: Name of the class, where the manifest has the classes' names.
        scores: Probabilities (classes,); None where the engine gives labels only.
        mask: Class of every pixel (H, W) of the frame, of a segmentation engine.
    """

    index: int | None = None
    label: str | None = None
    scores: Array | None = None
    mask: Array | None = None


def frames_of(given: Iterable[Any], p: Preprocessing | None, where: object) -> list[Taken]:
    """Frames as they were given, and what was read of files and of Pillow's images.

    Args:
        given: Arrays (see :func:`network_input`), paths of image files, images of Pillow.
        p: The manifest's preprocessing.
        where: Names the engine in errors.

    Raises:
        EngineError: None, something else, or the manifest has no preprocessing.
        DataError: A file that cannot be read, or a mode whose values have no range.
    """
    channels = _needed(p, where).channels
    if not isinstance(given, Iterable):
        raise EngineError(f"{where}: found frames of type {type(given).__name__}; needed {_FRAMES}")
    frames: list[Taken] = []
    for frame in given:
        if isinstance(frame, (str, os.PathLike)):
            frame = decode(frame, channels)
        elif isinstance(frame, Image.Image):
            frame = picture_of(frame, f"{where}: a frame", channels)
        elif not isinstance(frame, (np.ndarray, Picture)):
            raise EngineError(
                f"{where}: found a frame of type {type(frame).__name__}; needed {_FRAMES}"
            )
        frames.append(frame)
    if not frames:
        raise EngineError(f"{where}: found no frames; needed one or more")
    return frames


def sizes_of(frames: Sequence[Taken]) -> list[tuple[int, ...]]:
    """(height, width) of every frame."""
    return [f.size if isinstance(f, Picture) else f.shape[:2] for f in frames]


def network_input(
    frames: Iterable[Frame | Picture], p: Preprocessing | None, where: object, raw: bool = False
) -> Array:
    """Frames as the engine takes them: resized, and normalised unless the engine does it.

    Args:
        frames: (H, W, 3) uint8 RGB each, or (H, W) for a grey model; sizes may differ. Paths and
            images of Pillow are read first (:func:`frames_of`).
        p: The manifest's preprocessing.
        where: Names the engine in errors.
        raw: The engine takes uint8 frames (N, H, W, C) and normalises them itself.

    Raises:
        EngineError: Not such frames, or the manifest has no preprocessing.
        DataError: As :func:`frames_of`.
    """
    p = _needed(p, where)
    batch = np.stack([_fitted(frame, p, where) for frame in frames_of(frames, p, where)])
    if raw:  # more than 8 bits do not go in
        return batch if batch.dtype == np.uint8 else np.rint(batch).astype(np.uint8)
    return to_input(batch, p)


def _needed(p: Preprocessing | None, where: object) -> Preprocessing:
    if p is None:
        raise EngineError(
            f"{where}: the manifest has no preprocessing (calibrated from .npz); call the engine "
            "with network inputs, or calibrate from an image folder"
        )
    return p


def _fitted(frame: Taken, p: Preprocessing, where: object) -> Array:
    """One frame (height, width, channels) at the network's size."""
    size = (p.height, p.width)
    if isinstance(frame, np.ndarray):
        _check_frame(frame, p, where)
        if p.resize is None and frame.shape[:2] == size:
            return frame.reshape(*size, p.channels)
        frame = Picture(Image.fromarray(frame))
    if 0 in frame.size:
        raise EngineError(f"{where}: found a frame of {frame.size[0]}x{frame.size[1]} pixels")
    if p.resize is not None:
        frame = Picture(cut(frame.image, p.resize, size, where))
    return frame.resized(size).pixels(p.channels)


def _check_frame(frame: Array, p: Preprocessing, where: object) -> None:
    grey = p.channels == 1
    if frame.dtype != np.uint8 or frame.ndim != (2 if grey else 3) or 0 in frame.shape:
        raise EngineError(
            f"{where}: found a frame of shape {frame.shape}, {frame.dtype}; needed "
            f"{'(H, W)' if grey else '(H, W, 3)'} uint8 of one pixel or more"
        )
    if not grey and frame.shape[2] != p.channels:
        raise EngineError(
            f"{where}: found a frame of {frame.shape[2]} channels; needed {p.channels} ({p.colour})"
        )


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
    where: object = "predict",
) -> list[Prediction]:
    """One answer a frame.

    Args:
        output: Scores (N, classes) or (N, classes, h, w), or labels (N,) or (N, h, w).
        sizes: (height, width) of the frames, which masks are brought back to.
        classes: Their names.
        probabilities: Scores are that already.
        p: Preprocessing. Where it cuts the frame, a mask says IGNORE (255) outside of the cut.
        where: Names the engine in errors.

    Raises:
        EngineError: An output of another form: one number an image or pixel is no decision.
    """
    if not decides(output):
        raise EngineError(
            f"{where}: found an output of shape {output.shape}, {output.dtype}; needed labels or "
            "scores of two classes or more: call the engine itself for other numbers"
        )
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
