"""PACS (Li et al., ICCV 2017) as it is distributed, and its splits: ``DOMAIN/CLASS/NUMBER.jpg``.

An image belongs to a split by the number in its file's name alone, so that images which are
added or missing move no other image.

===========  ====================================
split        number modulo 12
===========  ====================================
test         0, 4, 8 (a quarter)
calibration  3, 9 (a sixth)
training     all others (seven twelfths)
===========  ====================================

The number is the last run of digits in the name; one behind a hyphen is left out, because the
sketches ``n02103406_343-1.png`` and ``-2`` are drawn from one photo and must not be parted.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from .readers.decoding import BESIDE, FOLDER, checked, decode, folders_by_name, images_of, left_out

__all__ = ["CLASSES", "DOMAINS", "SPLITS", "domain_folder", "file_number", "split_of", "write"]

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
SPLITS = ("training", "calibration", "test")
_PERIOD = 12
_RESIDUES = {"test": {0, 4, 8}, "calibration": {3, 9}}
_log = logging.getLogger("hdrq_deploy")
_NUMBER = re.compile(r"(\d+)(?:-\d+)?$")


def file_number(file: Path) -> int:
    """The number of an image in its file's name.

    >>> [file_number(Path(name)) for name in ("0007.jpg", "pic_012.jpg", "n0210_343-2.png")]
    [7, 12, 343]

    Raises:
        DataError: The name does not end with a number.
    """
    match = _NUMBER.search(file.stem)
    if match is None:
        raise DataError(
            f"{file}: found no number at the end of the name; needed one, such as pic_012.jpg: "
            "it decides whether the image is for training, calibration or test"
        )
    return int(match[1])


def split_of(number: int) -> str:
    """The split of an image by the number of its file.

    >>> [split_of(number) for number in range(5)]
    ['test', 'training', 'training', 'calibration', 'test']
    """
    rest = number % _PERIOD
    return next((name for name, rests in _RESIDUES.items() if rest in rests), "training")


def domain_folder(data: Path, domain: str) -> Path:
    """The folder of a domain, with a folder of every class inside, in capitals or small letters.

    Raises:
        DataError: It is not there, a class is missing, or two names differ in capitals alone.
    """
    found = folders_by_name(data) if data.is_dir() else {}
    if domain not in found:
        raise DataError(
            f"{data / domain}: not there; needed PACS as it is distributed, a folder for each of "
            f"{', '.join(DOMAINS)} (found {', '.join(found) or 'no folders'})"
        )
    classes = folders_by_name(found[domain])
    missing = [name for name in CLASSES if name not in classes]
    if missing:
        raise DataError(
            f"{found[domain] / missing[0]}: not there; needed a folder of images for each of "
            f"{', '.join(CLASSES)} (found {', '.join(sorted(classes)) or 'no folders'})"
        )
    return found[domain]


def write(data: Path, folder: Path, domains: Sequence[str]) -> None:
    """Copy the images to ``DOMAIN/SPLIT/CLASS`` of a new folder, once all of them were decoded.

    The logger ``hdrq_deploy`` says what is left out: other folders and files, and splits that have
    no image of a class.

    Args:
        data: PACS as it is distributed.
        folder: The new folder.
        domains: Names out of ``DOMAINS``.

    Raises:
        DataError: A folder is missing or has no image, a file has no number or cannot be decoded,
            or a split would have no image.
    """
    for domain in domains:
        source = domain_folder(data, domain)
        folders = folders_by_name(source)
        unknown = [place.name for name, place in folders.items() if name not in CLASSES]
        beside: Counter[str] = Counter()
        beside[BESIDE] = len(images_of(source, beside))
        del beside[FOLDER]
        if unknown or +beside:
            _log.warning(
                "%s: left out %s; classes are %s",
                source, ", ".join([*unknown, *filter(None, [left_out(beside)])]),
                ", ".join(CLASSES),
            )  # fmt: skip
        counts: Counter[str] = Counter()
        for name in CLASSES:
            for split in SPLITS:
                (folder / domain / split / name).mkdir(parents=True)
            others: Counter[str] = Counter()
            own = Counter(dict.fromkeys(SPLITS, 0))
            for file in checked(images_of(folders[name], others), others, folders[name]):
                decode(file)
                split = split_of(file_number(file))
                own[split] += 1
                shutil.copyfile(file, folder / domain / split / name / file.name)
            without = [split for split, count in own.items() if not count]
            if without:
                _log.warning(
                    "%s: none of its %d images is for %s, by their numbers",
                    folders[name], own.total(), " and ".join(without),
                )  # fmt: skip
            counts += own
        empty = [split for split in SPLITS if not counts[split]]
        if empty:
            raise DataError(
                f"{source}: found {counts.total()} images, of which none is for the split "
                f"{empty[0]}; the number of a file modulo {_PERIOD} decides (test "
                f"{_listed('test')}; calibration {_listed('calibration')}; training the others): "
                "add images of other numbers"
            )


def _listed(split: str) -> str:
    return ", ".join(map(str, sorted(_RESIDUES[split])))
