"""The digits benchmark: ten classes, one source and three target domains, no download.

===========  =================================================================================
domain       32x32 RGB images of the digits 0 to 9
===========  =================================================================================
fonts        the source: digits typeset in the fonts that matplotlib ships
handwriting  real handwriting (scikit-learn's digits, UCI Optical Recognition), coloured
photo        the same handwriting blended into real photographs, the MNIST-M recipe
             (Ganin et al., 2016): the absolute difference of photograph and stroke
night        typeset digits seen by a dark, blurred camera with shot and read noise
===========  =================================================================================

Every split is a pure function of its name and a seed. The handwriting is divided into
disjoint sets of images (and the photographs into disjoint regions) for train, calibration
and test before any augmentation, so no stroke that is tested was seen before.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ...errors import DataError
from ..splits import Split

__all__ = ["CLASSES", "DOMAINS", "SIZES", "SOURCE", "SPLITS", "TARGETS", "Split", "make", "write"]

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SOURCE = "fonts"
TARGETS = ("handwriting", "photo", "night")
DOMAINS = (SOURCE, *TARGETS)
SPLITS = ("train", "calibration", "test")
SIZES = {"train": 8000, "calibration": 256, "test": 500}
CLASSES = tuple("0123456789")
SIDE = 32
# How many of the 1797 handwritten digits each split may draw on, in this order.
_HANDWRITTEN = {"test": 600, "calibration": 297, "train": 900}
_FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
)


def make(domain: str, split: str, seed: int = 0, count: int | None = None) -> Split:
    """Draw one split of one domain.

    Args:
        domain: One of ``DOMAINS``.
        split: ``train``, ``calibration`` or ``test``.
        seed: Another seed gives other augmentations of the same strokes and photographs.
        count: How many images; by default ``SIZES[split]``.

    Raises:
        DataError: The domain or split is unknown, or scikit-learn or matplotlib is missing.
    """
    if domain not in DOMAINS or split not in SPLITS:
        raise DataError(
            f"found domain {domain!r}, split {split!r}; "
            f"the digits benchmark has {', '.join(DOMAINS)} and {', '.join(SPLITS)}"
        )
    count = SIZES[split] if count is None else count
    rng = np.random.default_rng([seed, DOMAINS.index(domain), SPLITS.index(split)])
    labels = rng.permutation(np.arange(count) % len(CLASSES)).astype(np.int64)
    draw = {"fonts": _fonts, "handwriting": _handwriting, "photo": _photo, "night": _night}[domain]
    images = np.stack([draw(int(label), split, rng) for label in labels])
    return Split(images, labels)


def write(root: Path, domains: tuple[str, ...], splits: tuple[str, ...], seed: int = 0) -> None:
    """Write ``root/DOMAIN/SPLIT/CLASS/00000.png``, the layout that ``--data`` reads."""
    for domain in domains:
        for name in splits:
            split = make(domain, name, seed)
            for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
                folder = root / domain / name / CLASSES[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{index:05d}.png")


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise DataError(
            f"the digits benchmark needs {module}, which is not installed: "
            "pip install 'hdrq-deploy[demo]'"
        )


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    _need("matplotlib")
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name
    # The basic layout engine is the same in every build of Pillow.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _strokes(split: str, label: int) -> npt.NDArray[np.float64]:
    """Handwritten digits of one class that belong to ``split``, (N, 8, 8) in [0, 1]."""
    _need("sklearn")
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(20250523).permutation(len(data.target))
    start = 0
    for name, size in _HANDWRITTEN.items():
        mine = order[start : start + size]
        start += size
        if name == split:
            break
    mine = mine[data.target[mine] == label]
    strokes: npt.NDArray[np.float64] = data.images[mine] / 16.0
    return strokes


@cache
def _photographs(split: str) -> tuple[Images, ...]:
    """The part of scikit-learn's two photographs that belongs to ``split``."""
    _need("sklearn")
    from sklearn.datasets import load_sample_image

    columns = {"train": (0.0, 0.5), "calibration": (0.5, 0.7), "test": (0.7, 1.0)}[split]
    parts = []
    for name in ("china.jpg", "flower.jpg"):
        photo = np.asarray(load_sample_image(name))
        first, last = (round(edge * photo.shape[1]) for edge in columns)
        parts.append(photo[:, first:last])
    return tuple(parts)


def _place(mask: Image.Image, rng: np.random.Generator, angle: float = 12) -> Image.Image:
    """Rotate, scale, shear and shift a mask by random amounts."""
    turn = np.deg2rad(rng.uniform(-angle, angle))
    zoom, shear = rng.uniform(0.95, 1.25), rng.uniform(-0.15, 0.15)
    dx, dy = rng.uniform(-2.5, 2.5, 2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = zoom * matrix @ np.array([[1, shear], [0, 1]])
    centre = np.array([SIDE / 2, SIDE / 2])
    shift = centre - matrix @ (centre + np.array([dx, dy]))
    terms = (*matrix[0], shift[0], *matrix[1], shift[1])
    return mask.transform((SIDE, SIDE), Image.Transform.AFFINE, terms, Image.Resampling.BILINEAR)


def _typeset(label: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A typeset digit as coverage in [0, 1], (32, 32, 1)."""
    font = _font(_FONT_FILES[rng.integers(len(_FONT_FILES))], int(rng.integers(22, 31)))
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).text(
        (SIDE / 2, SIDE / 2), CLASSES[label], fill=255, font=font, anchor="mm"
    )
    return np.asarray(_place(mask, rng), np.float64)[..., None] / 255


def _written(label: int, split: str, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A handwritten digit as coverage in [0, 1], (32, 32, 1)."""
    strokes = _strokes(split, label)
    small = Image.fromarray((strokes[rng.integers(len(strokes))] * 255).astype(np.uint8))
    mask = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    cover = np.asarray(_place(mask, rng, angle=8), np.float64)[..., None] / 255
    return np.clip((cover - 0.25) * 2, 0, 1)


def _colours(rng: np.random.Generator) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Paper and ink, at least 90 grey levels apart; either may be the darker one."""
    while True:
        paper, ink = rng.uniform(0, 255, (2, 3))
        if abs(paper.mean() - ink.mean()) > 90:
            return paper, ink


def _paint(cover: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    paper, ink = _colours(rng)
    painted: npt.NDArray[np.float64] = paper + cover * (ink - paper)
    return painted


def _bytes(image: npt.NDArray[np.float64]) -> Images:
    codes: Images = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return codes


def _fonts(label: int, split: str, rng: np.random.Generator) -> Images:
    image = _paint(_typeset(label, rng), rng)
    return _bytes(image + rng.normal(0, 4, image.shape))


def _handwriting(label: int, split: str, rng: np.random.Generator) -> Images:
    image = _paint(_written(label, split, rng), rng)
    return _bytes(image + rng.normal(0, 4, image.shape))


def _photo(label: int, split: str, rng: np.random.Generator) -> Images:
    photos = _photographs(split)
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(SIDE, 3 * SIDE))
    top = int(rng.integers(photo.shape[0] - side))
    left = int(rng.integers(photo.shape[1] - side))
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    ground = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    return _bytes(np.abs(ground - 255 * _written(label, split, rng)))


def _night(label: int, split: str, rng: np.random.Generator) -> Images:
    scene = Image.fromarray(_bytes(_paint(_typeset(label, rng), rng)))
    blurred = scene.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.2))))
    light = np.asarray(blurred, np.float64) / 255 * np.array([0.8, 0.9, 1.1])
    electrons = rng.poisson(light * rng.uniform(25, 60)) + rng.normal(0, 1.5, light.shape)
    return _bytes(12 + 1.1 * electrons)
