"""Street scenes with a label for every pixel, in the layouts that the data sets come in.

Cityscapes, GTA5, IDD and BDD100K, all mapped to the 19 training classes of Cityscapes; and any
folder with ``images/`` and ``labels/`` of equal file names. Pixels that no figure counts have the
label 255. Images are read when they are needed, a few at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import DataError
from ...formats.preprocessing import to_input
from ...typing import Array
from .base import ImageSet, Reader, Selection, Wanted
from .decoding import (
    TURNS,
    Picture,
    checked,
    folders_of,
    images_of,
    loaded,
    opened,
    orientation,
    picture_of,
    upright,
)
from .folder import read_files
from .run_ahead import run_ahead

__all__ = [
    "CITYSCAPES",
    "IGNORE",
    "PALETTE",
    "STREET_SCENES",
    "Scenes",
    "find_scenes",
    "is_scenes",
    "scene_images",
    "turned_with",
]

IGNORE = 255
# Pillow's modes of one number a pixel.
_NUMBERS = {"L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N"}

# github.com/mcordts/cityscapesScripts, helpers/labels.py: train id, label id, name, colour.
_CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CITYSCAPES = tuple(name for _, name, _ in _CLASSES)
PALETTE = tuple(colour for _, _, colour in _CLASSES)
# github.com/AutoNUE/public-code, helpers/anue_labels.py: level3Id to the train id above. What
# Cityscapes does not know, or level 3 does not tell apart (12: caravan, trailer, train), is left
# out of every figure.
_IDD_LEVEL3 = {
    0: "road",
    2: "sidewalk",
    3: "terrain",
    4: "person",
    5: "rider",
    6: "motorcycle",
    7: "bicycle",
    9: "car",
    10: "truck",
    11: "bus",
    14: "wall",
    15: "fence",
    18: "traffic sign",
    19: "traffic light",
    20: "pole",
    22: "building",
    24: "vegetation",
    25: "sky",
}


def _table(pairs: dict[int, int], known: int) -> Array:
    """256 entries: train id, ``IGNORE``, or -1 for a value that the data set does not have."""
    table = np.full(256, -1, np.int16)
    table[:known] = IGNORE
    table[IGNORE] = IGNORE
    for label, train in pairs.items():
        table[label] = train
    return table


_IDENTITY = _table({i: i for i in range(len(_CLASSES))}, len(_CLASSES))
# Label ids run to 33; GTA5 knows 34 more as 34 and Cityscapes the licence plate as -1, 255 here.
_LABEL_IDS = _table({label: i for i, (label, _, _) in enumerate(_CLASSES)}, 35)
_LEVEL3 = _table({k: CITYSCAPES.index(name) for k, name in _IDD_LEVEL3.items()}, 27)


@dataclass(frozen=True)
class Scenes:
    """Pairs of an image and its label map, not read yet.

    Attributes:
        layout: ``cityscapes``, ``gta5``, ``idd``, ``bdd100k`` or ``folder``.
        pairs: Files.
        classes: Names, or None where a folder does not tell.
        size: (height, width) that images and labels are brought to; None keeps theirs.
        mean, std: Normalisation of the network's input, per channel.
        channels: Channels of the network's input, 3 or 1.
    """

    layout: str
    pairs: tuple[tuple[Path, Path], ...]
    table: Array
    classes: tuple[str, ...] | None
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels: int = 3

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, count: int, workers: int = 4) -> Iterator[tuple[Array, Array]]:
        """Inputs (n, C, H, W) float32 and labels (n, H, W) int64, with n up to ``count``.

        Reading runs ahead by one batch; a batch holds images of one size.

        Raises:
            DataError: A file that cannot be read, a label out of range, or sizes that differ.
        """
        batch: list[tuple[Array, Array]] = []
        for image, label in run_ahead(self.read, self.pairs, workers, 2 * count):
            if batch and batch[0][1].shape != label.shape:
                yield _stacked(batch)
                batch = []
            batch.append((image, label))
            if len(batch) == count:
                yield _stacked(batch)
                batch = []
        if batch:
            yield _stacked(batch)

    def read(self, image_file: Path, label_file: Path) -> tuple[Array, Array]:
        """One input (C, H, W) float32 and its labels (H, W) int64.

        Raises:
            DataError: As :meth:`batches`.
        """
        frame, label = _pair(image_file, label_file, self.channels)
        if self.size is not None and frame.size != self.size:
            frame = frame.resized(self.size)
            label = label.resize(self.size[::-1], Image.Resampling.NEAREST)
        x = to_input(frame.pixels(self.channels), self)
        return x, self._mapped(np.asarray(label), label_file)

    def _mapped(self, label: Array, file: Path) -> Array:
        mapped: Array = self.table[np.clip(label, 0, 255)].astype(np.int64)
        if label.min(initial=0) < 0 or label.max(initial=0) > 255 or mapped.min(initial=0) < 0:
            wrong = int(label[(label < 0) | (label > 255) | (mapped < 0)].max())
            raise DataError(
                f"{file}: found label {wrong}; {self.layout} has {_known(self.table)} and 255 for "
                "pixels to leave out"
            )
        return mapped


def _known(table: Array) -> str:
    values = np.flatnonzero(table[:255] >= 0)
    return f"0 to {values[-1]}"


def _stacked(batch: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    images, labels = zip(*batch, strict=True)
    return np.stack(images), np.stack(labels)


def _pair(image_file: Path, label_file: Path, channels: int) -> tuple[Picture, Image.Image]:
    """An image and its labels, both upright: what EXIF turns is turned with its partner.

    Labels are numbers, so that nothing is made of their mode: a palette keeps its indices.

    Raises:
        DataError: A file that cannot be read, labels that are not one number a pixel, or of
            which it cannot be told which way they lie.
    """
    with opened(image_file) as image, opened(label_file) as label:
        turned, own = orientation(image), orientation(label)
        frame = picture_of(image, image_file, channels)
        labels = upright(label, label_file)
        if labels.mode not in _NUMBERS:
            raise DataError(
                f"{label_file}: found a picture of mode {labels.mode}; needed one number a pixel "
                "(grey or palette)"
            )
        if labels.mode not in {"L", "P"}:
            labels = labels.convert("I")
        labels = turned_with(frame.size, turned, labels, own, label_file)
    if frame.size != (labels.height, labels.width):
        raise DataError(
            f"{label_file}: found labels of {labels.height}x{labels.width} for an image of "
            f"{frame.size[0]}x{frame.size[1]}; needed one label a pixel"
        )
    return frame, labels.copy()


def turned_with(
    size: tuple[int, int], turned: int, labels: Image.Image, own: int, file: Path
) -> Image.Image:
    """Labels as an image lies that EXIF turns, where theirs turns them otherwise or not at all.

    Only a quarter turn of an image that is no square tells by the sizes whether they were drawn
    on the image as it is stored or as it is shown.

    Args:
        size: (height, width) of the image, upright.
        turned: The image's EXIF orientation.
        labels: Upright by their own.
        own: Their EXIF orientation.
        file: Theirs, for the error.

    Raises:
        DataError: The sizes do not tell.
    """
    if turned == own:
        return labels
    height, width = size
    if own == 1 and turned in range(5, 9) and height != width:
        stored = (labels.height, labels.width) == (width, height)
        return labels.transpose(TURNS[turned]) if stored else labels
    raise DataError(
        f"{file}: found EXIF orientation {own} beside an image of orientation {turned}; needed "
        "labels that lie as their image does: save both upright, without the EXIF tag"
    )


def is_scenes(root: Path) -> bool:
    """Whether a folder has one of the layouts, complete or not."""
    both = (root / "images").is_dir() and (root / "labels").is_dir()
    return (root / "leftImg8bit").is_dir() or both


def find_scenes(root: str | Path, split: str = "val") -> Scenes:
    """Find images and labels.

    Args:
        root: ``leftImg8bit/SPLIT/CITY`` and ``gtFine/SPLIT/CITY`` (Cityscapes, IDD);
            ``images/10k/SPLIT`` and ``labels/sem_seg/masks/SPLIT`` (BDD100K); ``images`` and
            ``labels`` with files of equal names (GTA5, or any other).
        split: Name of the split, for the layouts that have splits.

    Raises:
        DataError: No such layout, a split that is not there, or an image without labels.
    """
    folder = Path(root)
    if (folder / "leftImg8bit").is_dir():
        return _cityscapes(folder, split)
    if (folder / "labels" / "sem_seg").is_dir():
        images = _split(folder / "images" / "10k", split)
        labels = _split(folder / "labels" / "sem_seg" / "masks", split)
        pairs = _paired(images, lambda f: labels / f"{f.stem}.png")
        return Scenes("bdd100k", pairs, _IDENTITY, CITYSCAPES)
    if (folder / "labels").is_dir():
        return _plain(folder)
    raise DataError(
        f"{folder}: found no street scenes; needed leftImg8bit/ and gtFine/ (Cityscapes, IDD), "
        "images/10k/ and labels/sem_seg/masks/ (BDD100K), or images/ and labels/ (GTA5)"
    )


def _read(folder: Path, wanted: Wanted, selection: Selection) -> ImageSet:
    """Images alone; whoever measures reads the labels with :func:`find_scenes`."""
    images = read_files(folder, [(file, -1) for file in scene_images(folder)], wanted, selection)
    return replace(images, y=None)


STREET_SCENES = Reader("street scenes (a folder with images and labels)", is_scenes, _read)


def scene_images(root: Path) -> list[Path]:
    """Images for calibration: those of the split ``train`` where there is one.

    Raises:
        DataError: No images.
    """
    bases = (root / "leftImg8bit", root / "images" / "10k", root / "images")
    base = next(b for b in bases if b.is_dir())
    return _images(base / "train" if (base / "train").is_dir() else base)


def _split(folder: Path, split: str) -> Path:
    if (folder / split).is_dir():
        return folder / split
    splits = [f.name for f in folders_of(folder)] if folder.is_dir() else []
    raise DataError(
        f"{folder / split}: not there; needed a split ({', '.join(splits) or 'none was found'})"
    )


def _cityscapes(folder: Path, split: str) -> Scenes:
    images, labels = _split(folder / "leftImg8bit", split), _split(folder / "gtFine", split)
    kinds = {
        "labellevel3Ids": ("idd", _LEVEL3),
        "labelTrainIds": ("cityscapes", _IDENTITY),
        "labelIds": ("cityscapes", _LABEL_IDS),
    }
    for kind, (layout, table) in kinds.items():
        if not any(next(d.glob(f"*_gtFine_{kind}.png"), None) for d in folders_of(labels)):
            continue

        def label_of(image: Path, kind: str = kind) -> Path:
            stem = image.stem.removesuffix("_leftImg8bit")
            return labels / image.parent.name / f"{stem}_gtFine_{kind}.png"

        return Scenes(layout, _paired(images, label_of), table, CITYSCAPES)
    raise DataError(
        f"{labels}: found no labels; needed CITY/*_gtFine_ with labelTrainIds.png or labelIds.png "
        "(Cityscapes), or labellevel3Ids.png (IDD)"
    )


def _plain(folder: Path) -> Scenes:
    labels = folder / "labels"
    pairs = _paired(folder / "images", lambda f: labels / f"{f.stem}.png")
    with opened(pairs[0][1]) as first:
        palette = loaded(first, pairs[0][1]).getpalette() if first.mode == "P" else None
    # GTA5's label maps carry the palette of Cityscapes' label ids: 7 is road.
    if palette is not None and tuple(palette[21:24]) == PALETTE[0]:
        return Scenes("gta5", pairs, _LABEL_IDS, CITYSCAPES)
    return Scenes("folder", pairs, _table({i: i for i in range(255)}, 255), None)


def _paired(images: Path, label_of: Callable[[Path], Path]) -> tuple[tuple[Path, Path], ...]:
    pairs = tuple((file, label_of(file)) for file in _images(images))
    missing = [label for _, label in pairs if not label.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: not there; needed the labels of every image ({len(missing)} of "
            f"{len(pairs)} are missing)"
        )
    return pairs


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: not there; needed a folder of images")
    others: Counter[str] = Counter()
    return list(checked(images_of(folder, others, deep=True), others, folder))
