"""Readers of data sets: image folders, arrays and street scenes; no torch.

To add a reader, write a file like ``arrays.py`` here and add one line to ``READERS``; the page
CONTRIBUTING.md shows it.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import DataError
from .arrays import ARRAYS
from .base import ImageSet, Reader, Selection, Wanted, spread
from .decoding import cut
from .folder import IMAGE_FOLDER
from .joining import joined
from .numbering import numbered, relabel
from .street_scenes import STREET_SCENES

__all__ = [
    "READERS",
    "ImageSet",
    "Reader",
    "Wanted",
    "cut",
    "joined",
    "numbered",
    "read",
    "relabel",
    "spread",
]

# The first reader that claims a path reads it: street scenes lie in folders too.
READERS: dict[str, Reader] = {
    "street scenes": STREET_SCENES,
    "image folder": IMAGE_FOLDER,
    "arrays": ARRAYS,
}


def read(
    path: str | Path,
    wanted: Wanted | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
) -> ImageSet:
    """Read images, and labels where the form has them: street scenes are read without labels.

    Images are read as :func:`.decoding.picture_of` says. Folders and files whose names begin with
    a dot are ignored; files that are no images of a format that is read here are left out, and
    the logger ``hdrq_deploy`` says how many of which kind. Every folder is a class, one without
    images too.

    Args:
        path: An image folder (one folder per class), a folder of street scenes, or an .npz with
            ``x`` (N, C, H, W) float32 and ``y`` (N,).
        wanted: Size, normalisation and channels; ignored for .npz, whose ``x`` is final.
        limit: The largest number of images, drawn by ``seed``; all by default.
        seed: Seed of that draw.
        skip_corrupt: Leave out images that cannot be decoded instead of failing.

    Raises:
        DataError: Nothing there, nothing readable, a corrupt image, mixed sizes or channels,
            wrong arrays, or values that are not finite.
    """
    path, selection = Path(path), Selection(limit, seed, skip_corrupt)
    for reader in READERS.values():
        if reader.reads(path):
            return reader.read(path, wanted or Wanted(), selection)
    thing = f"a file {path.suffix}".strip() if path.exists() else "nothing"
    forms = dict.fromkeys(reader.form for reader in READERS.values())
    raise DataError(f"{path}: found {thing}; needed {' or '.join(forms)}")
