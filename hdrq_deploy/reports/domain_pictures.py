"""Pictures of domains for the top of a report: one image of every class, side by side."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from ..calibration_data.readers.decoding import decode, folders_of, images_of
from ..errors import DataError

__all__ = ["domain_pictures"]

_STYLE = "width:100%;max-width:40rem;image-rendering:pixelated"
_GAP = 1


def domain_pictures(folders: Mapping[str, Path]) -> str:
    """A figure in HTML for every domain, its picture inside the page.

    Args:
        folders: Image folders, with a folder for every class, by domain. The first image of
            every class is shown.

    Raises:
        DataError: A folder without images of classes, or an image that cannot be decoded.
    """
    figures = []
    for name, folder in folders.items():
        shown, what = html.escape(name), _strip(folder)
        figures.append(
            f'<figure style="margin:.5rem 0"><img alt="{shown}: one image of every class" '
            f'style="{_STYLE}" src="data:image/png;base64,{what}">'
            f"<figcaption>{shown}</figcaption></figure>"
        )
    return "".join(figures)


def _strip(folder: Path) -> str:
    """The images side by side, as PNG in base64."""
    classes = [images_of(inside, Counter()) for inside in folders_of(folder)]
    images = [decode(files[0], 3).image.convert("RGB") for files in classes if files]
    if not images:
        raise DataError(f"{folder}: found no images; needed a folder of them for every class")
    width, height = images[0].size
    strip = Image.new("RGB", (len(images) * (width + _GAP) - _GAP, height), "white")
    for place, image in enumerate(images):
        strip.paste(image.resize((width, height)), (place * (width + _GAP), 0))
    text = io.BytesIO()
    strip.save(text, format="PNG")
    return base64.b64encode(text.getvalue()).decode()
