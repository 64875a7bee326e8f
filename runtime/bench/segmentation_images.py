"""Pictures of segmentation: image, labels and predictions, side by side."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...calibration_data.readers.street_scenes import CITYSCAPES, IGNORE, PALETTE
from ...formats.atomic_files import write_bytes
from ...formats.engine_folder import EngineManifest
from ...formats.file_kinds import PICTURE, PICTURE_MARK
from ...formats.preprocessing import to_frames
from ...typing import Array

__all__ = ["PICTURES", "Pictures", "in_colours", "palette", "picture_names", "write_picture"]

_GAP = 4
# Drawn of every domain.
PICTURES = 20


def palette(classes: int) -> Array:
    """(256, 3) uint8: Cityscapes' colours for its 19 classes, even hues for others, else black."""
    table = np.zeros((256, 3), np.uint8)
    if classes == len(CITYSCAPES):
        table[:classes] = PALETTE
        return table
    for i in range(min(classes, IGNORE)):
        hue = colorsys.hsv_to_rgb(i / classes, 0.75, 0.6 + 0.35 * (i % 2))
        table[i] = [round(255 * part) for part in hue]
    return table


def in_colours(
    x: Array, labels: Array, predicted: Array, manifest: EngineManifest
) -> tuple[Array, Array, Array]:
    """A network input (C, H, W) and two label maps (H, W) as pictures (H, W, 3) uint8.

    What was found where nothing was asked (IGNORE) is black, as the labels are there.
    """
    (frame,) = to_frames(x[None], manifest.preprocessing)
    if frame.shape[2] == 1:
        frame = np.repeat(frame, 3, 2)
    # (N, classes, h, w); an engine of labels has no such dimension.
    shape = manifest.outputs[0].shape
    classes = shape[1] if len(shape) == 4 and isinstance(shape[1], int) else 0
    known = int(np.max(np.where(labels == IGNORE, 0, labels), initial=predicted.max(initial=0))) + 1
    table = palette(max(classes, known))
    return frame, table[labels], table[np.where(labels == IGNORE, IGNORE, predicted)]


def picture_names(domain: str, limit: int = PICTURES) -> list[str]:
    """Names of the pictures of a domain, in the folder that they are drawn to."""
    return [f"{domain}/{number:04}.png" for number in range(limit)]


def write_picture(file: Path, picture: Image.Image) -> None:
    """Write a PNG that bears our mark, in the place of an earlier one or where none is.

    Raises:
        HdrqError: Another file is there, or the disk is full.
    """
    marks = PngInfo()
    marks.add_text(*PICTURE_MARK)
    text = io.BytesIO()
    picture.save(text, "PNG", pnginfo=marks)
    write_bytes(file, text.getvalue(), PICTURE)


class Pictures:
    """Writes ``DOMAIN/NUMBER.png`` for the first images of every domain.

    Args:
        folder: Folder of the images.
        manifest: Manifest of the engine, which says how its inputs become pixels again.
        limit: Pictures a domain.
    """

    def __init__(self, folder: Path, manifest: EngineManifest, limit: int = PICTURES) -> None:
        self._folder, self._manifest, self._limit = folder, manifest, limit

    def __call__(self, domain: str, number: int, x: Array, labels: Array, predicted: Array) -> None:
        """Write one picture: x (C, H, W), labels and predicted (H, W)."""
        if number >= self._limit:
            return
        frame, wanted, drawn = in_colours(x, labels, predicted, self._manifest)
        gap = np.full((frame.shape[0], _GAP, 3), 255, np.uint8)
        parts = [frame, gap, wanted, gap, drawn]
        file = self._folder.absolute() / domain / f"{number:04}.png"
        write_picture(file, Image.fromarray(np.concatenate(parts, 1)))
