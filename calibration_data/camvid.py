"""CamVid (Brostow et al., 2009): its labels in both forms, its splits, and day with fog and snow.

Three layouts are read: ``LIGHT/images`` and ``LIGHT/labels`` with frames by ``day`` and at
``dusk``; the original ``701_StillsRaw_full`` and ``LabeledApproved_full``; and SegNet's ``train``
and ``trainannot`` (``val``, ``test``). In the last two the drive tells the light: ``0001TP`` is at
dusk, all others are by day. A frame is called by its drive and its number there (30 a second):
``0016E5_07959.png``, ``0001TP_006690.jpg``. Labels have its name, or the same with ``_L`` behind
it, as in the original distribution. Splits are those below in every layout.

Neighbouring frames are nearly equal, so that a split holds whole stretches of a drive. Stretch
number ``frame // 900`` lasts 30 seconds, and decides alone:

===========  =================================
split        stretch modulo 4
===========  =================================
test         0
calibration  2
training     1, 3
===========  =================================

The first two seconds of a stretch belong to no split, and of frames less than half a second apart
the first is taken (a part of one drive is labelled 15 times a second).

Fog and snow are those of ImageNet-C (Hendrycks and Dietterich, ICLR 2019) at severity 3, by the
package ``corrupt-tta``; every frame has a seed of its own, made of its name.

Source:
    mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid (32 colours); Badrinarayanan et al., PAMI
    2017 (SegNet: 11 classes).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError, ModelError
from ..typing import Array
from .readers.decoding import (
    Picture,
    checked,
    folders_by_name,
    images_of,
    opened,
    orientation,
    picture_of,
    upright,
)
from .readers.street_scenes import IGNORE, turned_with

__all__ = [
    "CLASSES",
    "COLOURS",
    "CORRUPTED",
    "DOMAINS",
    "SIZE",
    "SPLITS",
    "corrupted",
    "frame_of",
    "label_map",
    "light_folders",
    "split_of",
    "write",
]

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
# Colours of the original labels by class; black is void.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "sky": ((128, 128, 128),),
    # Building, archway, bridge, tunnel, wall.
    "building": ((128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)),
    # Column or pole, traffic cone.
    "pole": ((192, 192, 128), (0, 0, 64)),
    # Road, markings of lanes and others.
    "road": ((128, 64, 128), (128, 0, 192), (192, 0, 64)),
    # Sidewalk, parking block, road shoulder.
    "pavement": ((0, 0, 192), (64, 192, 128), (128, 128, 192)),
    # Tree, other vegetation.
    "tree": ((128, 128, 0), (192, 192, 0)),
    # Sign, other text, traffic light.
    "sign": ((192, 128, 128), (128, 128, 64), (0, 64, 64)),
    "fence": ((64, 64, 128),),
    # Car, SUV or pickup, truck or bus, train, others that move.
    "car": ((64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)),
    # Pedestrian, child, cart or pram, animal.
    "pedestrian": ((64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)),
    # Bicyclist, motorcycle.
    "bicyclist": ((0, 128, 192), (192, 0, 192)),
}
_VOID = (0, 0, 0)
CORRUPTED = ("fog", "snow")
DOMAINS = ("day", "dusk", *CORRUPTED)
SPLITS = ("training", "calibration", "test")
SIZE = (240, 320)
_SEVERITY = 3
_STRETCH, _GAP, _NEAREST = 900, 60, 15
_SPLIT_OF_STRETCH = ("test", "training", "calibration", "training")
# Folders of frames and of their labels, as they are distributed, in small letters.
_LAYOUTS = (
    (("701_stillsraw_full", "labeledapproved_full"),),
    (("train", "trainannot"), ("val", "valannot"), ("test", "testannot")),
)
_DRIVE_AT_DUSK = "0001tp"
_FRAME = re.compile(r"(.*?)(\d+)$")


def label_map(file: Path) -> Array:
    """Labels (H, W) uint8 of a file in either form, upright: 0 to 10, and 255 to leave out.

    A picture of colours, or a palette of CamVid's colours, is read by its colours. Numbers, and
    palettes of other colours, are read as the SegNet copy has them: 0 to 10, and 11 for void. The
    first twelve colours of a palette decide, used or not: of another palette, such as PASCAL VOC's,
    a frame may use those colours alone that CamVid has too.

    Raises:
        DataError: No picture, a colour that CamVid does not have, or a number above 11.
    """
    with opened(file) as image:
        picture = upright(image, file)
        if picture.mode in {"RGB", "RGBA"}:
            return _by_colour(picture, file)
        if picture.mode not in {"L", "P", "I", "I;16"}:
            raise DataError(
                f"{file}: found a picture of mode {picture.mode}; needed CamVid's colours, or one "
                "number a pixel"
            )
        numbers, void = np.asarray(picture), len(CLASSES)
        wrong = (numbers > void) & (numbers != IGNORE)
        if (
            picture.mode == "P"
            and not _strange_colours(picture).any()
            and (wrong.any() or _has_own_palette(picture))
        ):
            return _by_colour(picture, file)
    if wrong.any():
        raise DataError(
            f"{file}: found label {numbers[wrong].max()}; needed 0 to {void - 1}, and {void} for "
            "void"
        )
    return np.where(numbers == void, IGNORE, numbers).astype(np.uint8)


def _codes(picture: Image.Image) -> Array:
    """Colours (H, W) as one number each."""
    rgb = np.asarray(picture.convert("RGB")).astype(np.int32)
    codes: Array = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    return codes


def _table() -> dict[int, int]:
    """Class, or 255 of void, by the number of a colour."""
    classes = {
        colour: number for number, name in enumerate(CLASSES) for colour in COLOURS[name]
    } | {_VOID: IGNORE}
    return {(r << 16) | (g << 8) | b: number for (r, g, b), number in classes.items()}


def _strange_colours(picture: Image.Image) -> Array:
    return ~np.isin(_codes(picture), list(_table()))


def _has_own_palette(picture: Image.Image) -> bool:
    """Whether the first colours of a palette, one for each class and void, are all CamVid's."""
    colours = np.array(picture.getpalette() or [], np.int32)[: 3 * (len(CLASSES) + 1)]
    red, green, blue = colours.reshape(-1, 3).T
    return bool(np.isin((red << 16) | (green << 8) | blue, list(_table())).all())


def _by_colour(picture: Image.Image, file: Path) -> Array:
    table, codes = _table(), _codes(picture)
    strange = ~np.isin(codes, list(table))
    if strange.any():
        code = int(codes[strange][0])
        colour = (code >> 16, code >> 8 & 255, code & 255)
        raise DataError(
            f"{file}: found {int(strange.sum())} pixels of colours that CamVid does not have "
            f"(first: {colour}); needed its 32 colours, saved without loss"
        )
    known = np.array(sorted(table))
    numbers = np.array([table[code] for code in known], np.uint8)
    labels: Array = numbers[np.searchsorted(known, codes)]
    return labels


def frame_of(file: Path) -> tuple[str, int]:
    """Drive and number of a frame.

    >>> frame_of(Path("Seq05VD_f00030.png")), frame_of(Path("0016E5_07959_L.png"))
    (('Seq05VD_f', 30), ('0016E5_', 7959))

    Raises:
        DataError: The name does not end with a number.
    """
    match = _FRAME.match(file.stem.removesuffix("_L"))
    if match is None:
        raise DataError(
            f"{file}: found no number at the end of the name; needed the drive and the number of "
            "the frame, such as 0016E5_07959.png: it decides the split"
        )
    return match[1], int(match[2])


def split_of(number: int) -> str | None:
    """The split of a frame by its number, or None between two stretches.

    >>> [split_of(number) for number in (30, 60, 930, 1000, 2000, 3000)]
    [None, 'test', None, 'training', 'calibration', 'training']
    """
    if number % _STRETCH < _GAP:
        return None
    return _SPLIT_OF_STRETCH[number // _STRETCH % len(_SPLIT_OF_STRETCH)]


def light_folders(data: Path, domain: str) -> list[tuple[Path, Path]]:
    """The folders that a domain's frames come from, and those of their labels.

    Capitals in the names do not count.

    Raises:
        DataError: It is not there, frames or labels without the other, or two names that differ in
            capitals alone.
        ModelError: The package that makes fog and snow is not installed.
    """
    light = _light_of(domain)
    found = folders_by_name(data) if data.is_dir() else {}
    pairs = [] if light in found else _distributed(found)
    if not pairs:
        names = [folder.name for folder in found.values()]
        inside = folders_by_name(found[light]) if light in found else {}
        for kind in ("images", "labels"):
            if kind not in inside:
                raise DataError(
                    f"{data / light / kind}: not there; needed day/images, day/labels, dusk/images "
                    "and dusk/labels, or the folders as they are distributed (701_StillsRaw_full "
                    "and LabeledApproved_full, or train and trainannot; found "
                    f"{', '.join(names) or 'no folders'})"
                )
        pairs = [(inside["images"], inside["labels"])]
    if domain in CORRUPTED and importlib.util.find_spec("corrupt_tta") is None:
        raise ModelError(
            f"{domain} is made by corrupt-tta: pip install 'hdrq-deploy[corruptions]', or choose "
            "`targets` without fog and snow"
        )
    return pairs


def _light_of(domain: str) -> str:
    """By what light the frames of a domain were taken."""
    return "day" if domain in CORRUPTED else domain


def _distributed(found: Mapping[str, Path]) -> list[tuple[Path, Path]]:
    """Folders of frames and labels of the first layout of which there is a pair.

    Raises:
        DataError: There is half of another pair of it.
    """
    for layout in _LAYOUTS:
        pairs = [(found[a], found[b]) for a, b in layout if a in found and b in found]
        for names in layout if pairs else ():
            there = [found[name] for name in names if name in found]
            if len(there) == 1:
                (other,) = set(names) - {there[0].name.lower()}
                raise DataError(
                    f"{there[0]}: found no {other} beside it; needed frames and labels of each "
                    "split: add it, or move this one away"
                )
        if pairs:
            return pairs
    return []


def write(data: Path, folder: Path, domains: Sequence[str]) -> None:
    """Write ``DOMAIN/SPLIT/images`` and ``labels`` into a new folder, frames at 240x320.

    Args:
        data: CamVid, by light.
        folder: The new folder.
        domains: Names out of ``DOMAINS``.

    Raises:
        DataError: A folder or the labels of a frame are missing, a label is none of CamVid, sizes
            or orientations differ, or a split would have no frame or no pixel of a class.
        ModelError: As :func:`light_folders`.
    """
    for domain in domains:
        counts, labelled = Counter[str](), Counter[str]()
        for split, image, label in _chosen(light_folders(data, domain), _light_of(domain)):
            counts[split] += 1
            target = folder / domain / split
            for kind in ("images", "labels"):
                (target / kind).mkdir(parents=True, exist_ok=True)
            with opened(image) as stored:
                turned, frame = orientation(stored), picture_of(stored, image, 3)
            place = target / "labels" / f"{image.stem}.png"
            labelled[split] += _write_labels(label, frame.size, turned, place)
            _write_frame(image, frame, turned, domain, target / "images")
        empty = [split for split in SPLITS if not counts[split]]
        if empty:
            raise DataError(
                f"{data}: found {counts.total()} frames of {domain}, of which none is for the "
                f"split {empty[0]}; the number of a frame decides ({_STRETCH} frames a stretch; "
                "modulo 4, stretch 0 is for the test, 2 for calibration): add frames of other "
                "stretches"
            )
        void = [split for split in ("training", "test") if not labelled[split]]
        if void:
            raise DataError(
                f"{data}: found {counts[void[0]]} frames of {domain} for the split {void[0]} "
                "whose labels are all void; needed a pixel of a class in one of them"
            )


def _chosen(folders: Sequence[tuple[Path, Path]], light: str) -> Iterator[tuple[str, Path, Path]]:
    """Split, image and labels of the frames of a light that are taken, drive by drive.

    Raises:
        DataError: A name without a number, or a frame without labels.
    """
    before: tuple[str, int] | None = None
    frames, known = list[tuple[tuple[str, int], Path, Path]](), dict[tuple[Path, str], Path]()
    for images, labels in folders:
        others: Counter[str] = Counter()
        files = checked(images_of(images, others), others, images)
        frames += [(frame_of(file), file, labels) for file in files]
        known |= {(labels, file.name.lower()): file for file in images_of(labels, Counter())}
    if folders[0][0].name.lower() != "images":  # all drives are in one folder
        at_dusk = light == "dusk"
        frames = [row for row in frames if row[0][0].lower().startswith(_DRIVE_AT_DUSK) == at_dusk]
    for frame, image, labels in sorted(frames):
        split = split_of(frame[1])
        near = before is not None and before[0] == frame[0] and frame[1] - before[1] < _NEAREST
        if split is None or near:
            continue
        before = frame
        names = (f"{image.stem}.png", f"{image.stem}_L.png")
        kept = ((labels, name.lower()) for name in names)
        label = next((known[key] for key in kept if key in known), None)
        if label is None:
            raise DataError(
                f"{labels / names[0]}: not there; needed the labels of every frame, with "
                f"its name or {names[1]}"
            )
        yield split, image, label


def _write_labels(label: Path, size: tuple[int, int], turned: int, target: Path) -> bool:
    """Write the labels of a frame as it lies; whether any pixel of them counts.

    Args:
        label: Their file.
        size: (height, width) of the frame, upright.
        turned: Its EXIF orientation.
        target: The PNG.

    Raises:
        DataError: They are not CamVid's, or not of the frame.
    """
    with opened(label) as file:
        own = orientation(file)
    picture = turned_with(size, turned, Image.fromarray(label_map(label)), own, label)
    if (picture.height, picture.width) != size:
        raise DataError(
            f"{label}: found labels of {picture.height}x{picture.width} for a frame of "
            f"{size[0]}x{size[1]}; needed one label a pixel"
        )
    if size != SIZE:
        picture = picture.resize(SIZE[::-1], Image.Resampling.NEAREST)
    picture.save(target)
    return bool((np.asarray(picture) != IGNORE).any())


def _write_frame(image: Path, frame: Picture, turned: int, domain: str, folder: Path) -> None:
    if domain not in CORRUPTED and frame.size == SIZE and turned == 1:
        shutil.copyfile(image, folder / image.name)
        return
    pixels = np.rint(frame.resized(SIZE).pixels(3)).astype(np.uint8)
    if domain in CORRUPTED:
        pixels = corrupted(pixels, domain, image.stem)
    Image.fromarray(pixels).save(folder / f"{image.stem}.png")


def corrupted(pixels: Array, kind: str, name: str) -> Array:
    """An image (H, W, 3) uint8 in fog, snow or frost; the same name gives the same weather.

    The package draws from NumPy's global generator, whose state is put back afterwards.
    """
    library = importlib.import_module("corrupt_tta")
    before = np.random.get_state()
    np.random.seed(zlib.crc32(f"{kind}/{name}".encode()))
    try:
        changed = library.corrupt(pixels, _SEVERITY, kind)
    finally:
        np.random.set_state(before)
    result: Array = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    return result
