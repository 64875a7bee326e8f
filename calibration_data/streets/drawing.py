"""The street-scene benchmark: ten classes of pixels, one source and three target domains.

======  ======================================================================================
domain  128x256 RGB drawings of a street, labelled by construction
======  ======================================================================================
clean   the source: plain colours in daylight
dusk    the same town in the last light: dark and blue, windows and lamps lit, read noise
fog     what is far vanishes in grey; soft and flat
brick   another town: brick and plaster, pale asphalt, striped pavements, other cars, a lower eye
======  ======================================================================================

A scene is a pure function of domain, split, number and seed: a vanishing point, road and
pavements towards it, rows of houses, trees, poles with signs, cars and people, drawn from far
to near into an image, a map of labels and a map of distances at once.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ...errors import DataError
from ...typing import Array
from ..splits import Split

__all__ = ["CLASSES", "DOMAINS", "SIZES", "SOURCE", "SPLITS", "TARGETS", "Split", "make", "write"]

Colour = tuple[int, int, int]
Point = tuple[float, float]

CLASSES = (
    "road",
    "sidewalk",
    "building",
    "vegetation",
    "sky",
    "car",
    "person",
    "sign",
    "pole",
    "terrain",
)
SOURCE = "clean"
TARGETS = ("dusk", "fog", "brick")
DOMAINS = (SOURCE, *TARGETS)
SPLITS = ("train", "calibration", "test")
SIZES = {"train": 600, "calibration": 128, "test": 100}
HEIGHT, WIDTH = 128, 256
_ID = {name: i for i, name in enumerate(CLASSES)}
_FAR = 60.0  # metres: the sky, and where fog has swallowed everything


@dataclass(frozen=True)
class _Town:
    """Colours of a town; each is varied from scene to scene and thing to thing."""

    road: Colour
    mark: Colour
    sidewalk: Colour
    terrain: Colour
    sky: Colour
    houses: tuple[Colour, ...]
    leaves: tuple[Colour, ...]
    cars: tuple[Colour, ...]
    signs: tuple[Colour, ...]
    pole: Colour
    bricks: bool
    horizon: tuple[float, float]


_HOME = _Town(
    road=(92, 92, 98),
    mark=(222, 222, 214),
    sidewalk=(168, 160, 152),
    terrain=(120, 148, 84),
    sky=(150, 190, 232),
    houses=((196, 172, 140), (178, 122, 104), (208, 202, 190), (150, 158, 170)),
    leaves=((58, 112, 52), (82, 132, 60), (44, 92, 56)),
    cars=((176, 34, 38), (36, 72, 150), (228, 228, 230), (40, 42, 48)),
    signs=((210, 30, 36), (30, 80, 190), (240, 200, 40)),
    pole=(112, 116, 120),
    bricks=False,
    horizon=(0.38, 0.5),
)
_ABROAD = _Town(
    road=(142, 138, 130),
    mark=(240, 206, 90),
    sidewalk=(120, 104, 98),
    terrain=(162, 150, 96),
    sky=(206, 214, 220),
    houses=((156, 78, 58), (120, 62, 52), (216, 186, 110), (98, 108, 112)),
    leaves=((104, 122, 40), (132, 112, 44), (74, 104, 70)),
    cars=((236, 190, 40), (22, 110, 86), (150, 154, 160), (232, 96, 40)),
    signs=((20, 120, 70), (236, 236, 236), (200, 60, 20)),
    pole=(66, 60, 54),
    bricks=True,
    horizon=(0.46, 0.58),
)


class _Canvas:
    """Image, labels and distances of one scene, drawn together."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.image = Image.new("RGB", (WIDTH, HEIGHT))
        self.label = Image.new("L", (WIDTH, HEIGHT))
        self.depth = Image.new("F", (WIDTH, HEIGHT), _FAR)
        self.lamps = Image.new("L", (WIDTH, HEIGHT))
        self._draws = [ImageDraw.Draw(i) for i in (self.image, self.label, self.depth)]
        self._lit = ImageDraw.Draw(self.lamps)

    def shade(self, colour: Colour, spread: int = 14, hue: int = 4) -> Colour:
        """A colour near another one."""
        shift = self.rng.integers(-spread, spread + 1) + self.rng.integers(-hue, hue + 1, 3)
        r, g, b = (int(v) for v in np.clip(np.array(colour) + shift, 0, 255))
        return r, g, b

    def _layers(self, name: str, colour: Colour, metres: float) -> Iterator[tuple[Any, Any]]:
        """What draws on each layer, and the value it draws."""
        yield from zip(self._draws, (colour, _ID[name], metres), strict=True)

    def polygon(self, points: list[Point], name: str, colour: Colour, metres: float) -> None:
        """A filled polygon of one class at one distance."""
        for draw, value in self._layers(name, colour, metres):
            draw.polygon(points, fill=value)

    def box(
        self, box: tuple[float, float, float, float], name: str, colour: Colour, m: float
    ) -> None:
        """A filled rectangle (left, top, right, bottom)."""
        left, top, right, bottom = box
        box = (left, top, max(right, left + 0.5), max(bottom, top + 0.5))
        for draw, value in self._layers(name, colour, m):
            draw.rectangle(box, fill=value)

    def ellipse(
        self, box: tuple[float, float, float, float], name: str, colour: Colour, m: float
    ) -> None:
        """A filled ellipse in a rectangle."""
        for draw, value in self._layers(name, colour, m):
            draw.ellipse(box, fill=value)

    def paint(self, box: tuple[float, float, float, float], colour: Colour, lamp: int = 0) -> None:
        """Colour alone: what a thing looks like, not what it is. ``lamp`` shines at dusk."""
        left, top, right, bottom = box
        box = (left, top, max(right, left + 0.5), max(bottom, top + 0.5))
        self._draws[0].rectangle(box, fill=colour)
        if lamp:
            self._lit.rectangle(box, fill=lamp)

    def line(self, points: list[Point], colour: Colour, width: int) -> None:
        """A line that is paint only."""
        self._draws[0].line(points, fill=colour, width=width)


class _Street:
    """One scene: a camera over a straight street, x in metres from its axis, z ahead."""

    def __init__(self, town: _Town, rng: np.random.Generator) -> None:
        self.town, self.rng = town, rng
        self.canvas = _Canvas(rng)
        self.vx = WIDTH * rng.uniform(0.38, 0.62)
        self.vy = HEIGHT * rng.uniform(*town.horizon)
        self.focal = WIDTH * rng.uniform(0.5, 0.62)
        self.eye = rng.uniform(1.4, 2.4)
        self.half = rng.uniform(3.0, 5.5)
        self.curb = self.half + rng.uniform(1.6, 3.0)
        self.walls = self.curb + rng.uniform(0.3, 5.0)

    def at(self, x: float, y: float, z: float) -> Point:
        """Where a point (right, up from the ground, ahead) is seen."""
        return self.vx + self.focal * x / z, self.vy + self.focal * (self.eye - y) / z

    def draw(self) -> _Canvas:
        """From far to near."""
        town, canvas = self.town, self.canvas
        canvas.box((0, 0, WIDTH, HEIGHT), "sky", canvas.shade(town.sky, 20), _FAR)
        self._ground()
        things: list[tuple[float, Callable[..., None], tuple[float, ...]]] = []
        for side in (-1, 1):
            z = self.rng.uniform(2, 5)
            while z < 55:
                length = self.rng.uniform(5, 13)
                if self.rng.random() < 0.82:
                    things.append((z + length, self._house, (side, z, z + length)))
                z += length + self.rng.choice([0.0, 0.0, self.rng.uniform(2, 8)])
            for _ in range(self.rng.poisson(3.5)):
                z = self.rng.uniform(5, 40)
                things.append(
                    (z, self._tree, (side * self.rng.uniform(self.curb, self.walls + 2), z))
                )
            for _ in range(self.rng.poisson(2.6)):
                z = self.rng.uniform(4, 30)
                things.append((z, self._pole, (side * (self.half + 0.4), z)))
            for _ in range(self.rng.poisson(2.2)):
                z = self.rng.uniform(4, 22)
                x = side * self.rng.uniform(self.half - 0.6, self.curb)
                things.append((z, self._person, (x, z)))
        for _ in range(1 + self.rng.poisson(2.2)):
            z = self.rng.uniform(5, 34)
            x = self.rng.choice([-1, 1]) * self.half * self.rng.uniform(0.25, 0.85)
            things.append((z, self._car, (x, z)))
        for _, thing, place in sorted(things, key=lambda entry: -entry[0]):
            thing(*place)
        return canvas

    def _ground(self) -> None:
        town, canvas = self.town, self.canvas
        grass, walk, road = (canvas.shade(c) for c in (town.terrain, town.sidewalk, town.road))
        near = 1.2
        # Strips of ground, so that distance grows towards the horizon.
        edges = [*np.geomspace(55, near, 40)]
        for far, close in itertools.pairwise(edges):
            y_far, y_close = self.at(0, 0, far)[1], self.at(0, 0, close)[1]
            canvas.box((0, y_far, WIDTH, y_close), "terrain", grass, close)
            for reach, name, colour in ((self.curb, "sidewalk", walk), (self.half, "road", road)):
                corners = [self.at(-reach, 0, far), self.at(reach, 0, far)]
                corners += [self.at(reach, 0, close), self.at(-reach, 0, close)]
                canvas.polygon(corners, name, colour, close)
        for z in np.arange(2, 50, 4.0):
            corners = [
                self.at(x, 0, d) for x, d in ((-0.08, z), (0.08, z), (0.08, z + 2), (-0.08, z + 2))
            ]
            ImageDraw.Draw(canvas.image).polygon(corners, fill=town.mark)
        if town.bricks:
            dark = canvas.shade(
                (town.sidewalk[0] - 24, town.sidewalk[1] - 22, town.sidewalk[2] - 20)
            )
            for z in np.geomspace(2, 45, 26):
                for side in (-1, 1):
                    canvas.line(
                        [self.at(side * self.half, 0, z), self.at(side * self.curb, 0, z)], dark, 1
                    )

    def _house(self, side: float, near: float, far: float) -> None:
        town, canvas, rng = self.town, self.canvas, self.rng
        colour = canvas.shade(town.houses[rng.integers(len(town.houses))], 18)
        tall, x = rng.uniform(5, 15), side * self.walls
        (x0, top0), (x1, top1) = self.at(x, tall, near), self.at(x, tall, far)
        bottom0, bottom1 = self.at(x, 0, near)[1], self.at(x, 0, far)[1]
        metres = (near + far) / 2
        # The end of the house that faces us, behind its side.
        outer = x0 + side * self.focal * 12 / near
        left, right = sorted((x0, outer))
        front = canvas.shade((colour[0] - 16, colour[1] - 16, colour[2] - 14), 4)
        canvas.box((left, top0, right, bottom0), "building", front, near)
        canvas.polygon(
            [(x0, top0), (x1, top1), (x1, bottom1), (x0, bottom0)], "building", colour, metres
        )
        glass = canvas.shade((70, 84, 100), 10)
        if town.bricks:
            seam = canvas.shade((colour[0] - 22, colour[1] - 20, colour[2] - 18), 4)
            for y in np.arange(0.6, tall, 0.9):
                canvas.line([self.at(x, y, near), self.at(x, y, far)], seam, 1)
        for z in np.arange(near + 1, far - 1, 2.6):
            for y in np.arange(1.2, tall - 1.6, 2.8):
                (a, top), (b, bottom) = self.at(x, y + 1.5, z), self.at(x, y, z + 1.2)
                lamp = 220 if rng.random() < 0.35 else 0
                canvas.paint((min(a, b), top, max(a, b), bottom), glass, lamp)

    def _tree(self, x: float, z: float) -> None:
        canvas, rng = self.canvas, self.rng
        tall = rng.uniform(3.5, 8)
        (cx, ground), (_, crown) = self.at(x, 0, z), self.at(x, tall * 0.62, z)
        trunk = self.focal * 0.16 / z
        bark = canvas.shade((86, 66, 48), 10)
        canvas.box((cx - trunk, crown, cx + trunk, ground), "vegetation", bark, z)
        radius = self.focal * tall * 0.26 / z
        leaf = self.town.leaves[rng.integers(len(self.town.leaves))]
        for _ in range(9):
            dx, dy = rng.uniform(-0.8, 0.8) * radius, rng.uniform(-0.8, 0.6) * radius
            r = radius * rng.uniform(0.45, 0.8)
            box = (cx + dx - r, crown + dy - r, cx + dx + r, crown + dy + r)
            canvas.ellipse(box, "vegetation", canvas.shade(leaf, 16), z)

    def _pole(self, x: float, z: float) -> None:
        canvas, rng = self.canvas, self.rng
        tall = rng.uniform(2.6, 5.5)
        (cx, ground), (_, top) = self.at(x, 0, z), self.at(x, tall, z)
        half = max(self.focal * 0.09 / z, 0.6)
        canvas.box((cx - half, top, cx + half, ground), "pole", canvas.shade(self.town.pole), z)
        if rng.random() < 0.7:
            size = self.focal * rng.uniform(0.35, 0.6) / z
            colour = canvas.shade(self.town.signs[rng.integers(len(self.town.signs))])
            box = (cx - size, top - size, cx + size, top + size)
            if rng.random() < 0.5:
                canvas.ellipse(box, "sign", colour, z)
            else:
                canvas.box(box, "sign", colour, z)
            inner = size * 0.45
            canvas.paint(
                (cx - inner, top - inner / 3, cx + inner, top + inner / 3), (240, 240, 240)
            )
        else:
            size = max(self.focal * 0.18 / z, 1)
            canvas.paint((cx - half, top, cx + half, top + size), (232, 224, 190), 255)

    def _person(self, x: float, z: float) -> None:
        canvas, rng = self.canvas, self.rng
        tall = rng.uniform(1.5, 1.95)
        (cx, ground), (_, top) = self.at(x, 0, z), self.at(x, tall, z)
        height = ground - top
        coat, legs = (canvas.shade((120, 120, 120), 60, 60) for _ in range(2))
        wide = height * 0.15
        hip = top + 0.55 * height
        for leg in (-1, 1):
            left = cx + leg * wide * 0.55
            canvas.box((left - wide * 0.4, hip, left + wide * 0.4, ground), "person", legs, z)
        canvas.ellipse((cx - wide, top + 0.13 * height, cx + wide, hip + 2), "person", coat, z)
        head = height * 0.075
        skin = canvas.shade((198, 152, 124), 30)
        canvas.ellipse((cx - head, top, cx + head, top + 2 * head), "person", skin, z)

    def _car(self, x: float, z: float) -> None:
        canvas, rng = self.canvas, self.rng
        colour = canvas.shade(self.town.cars[rng.integers(len(self.town.cars))])
        wide, tall = rng.uniform(1.6, 1.95), rng.uniform(1.35, 1.9)
        (left, ground), (right, top) = self.at(x - wide / 2, 0, z), self.at(x + wide / 2, tall, z)
        height, width = ground - top, right - left
        belt = top + 0.45 * height
        canvas.box((left, belt, right, ground - 0.08 * height), "car", colour, z)
        roof = [
            (left + 0.14 * width, top),
            (right - 0.14 * width, top),
            (right, belt),
            (left, belt),
        ]
        canvas.polygon(roof, "car", colour, z)
        for wheel in (left + 0.04 * width, right - 0.22 * width):
            box = (wheel, ground - 0.3 * height, wheel + 0.18 * width, ground)
            canvas.box(box, "car", (24, 24, 26), z)
        glass = canvas.shade((52, 62, 74), 10)
        canvas.paint((left + 0.2 * width, top + 0.1 * height, right - 0.2 * width, belt), glass)
        lamp = (226, 60, 48) if x > 0 else (244, 240, 214)
        for place in (left + 0.04 * width, right - 0.16 * width):
            box = (place, belt + 0.12 * height, place + 0.12 * width, belt + 0.24 * height)
            canvas.paint(box, lamp, 255)


def _seen(canvas: _Canvas, domain: str, rng: np.random.Generator) -> Array:
    """The image as the domain's camera takes it, (H, W, 3) uint8."""
    x = np.asarray(canvas.image, np.float32) / 255
    x = x + 0.03 * rng.standard_normal(x.shape[:2])[:, :, None]  # surfaces are not even
    if domain == "dusk":
        level = rng.uniform(0.2, 0.38)
        x = np.clip(x, 0, 1) ** 1.25 * level * np.array([0.85, 0.92, 1.25])
        glow = canvas.lamps.filter(ImageFilter.GaussianBlur(1.2))
        lit = np.asarray(glow, np.float32)[:, :, None] / 255
        x = x + lit * np.array([0.95, 0.78, 0.45])
        x = x + 0.035 * rng.standard_normal(x.shape)
    elif domain == "fog":
        metres = np.asarray(canvas.depth, np.float32)[:, :, None]
        clear = np.exp(-metres / rng.uniform(9, 20))
        grey = rng.uniform(0.62, 0.82) * np.array([0.98, 1.0, 1.02])
        x = x * clear + grey * (1 - clear)
        soft = Image.fromarray(np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8))
        x = np.asarray(soft.filter(ImageFilter.GaussianBlur(0.8)), np.float32) / 255
        x = x + 0.01 * rng.standard_normal(x.shape)
    else:
        x = x + 0.012 * rng.standard_normal(x.shape)
    return np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)


def make(domain: str, split: str, seed: int = 0, count: int | None = None) -> Split:
    """Scenes of one domain; the same arguments give the same bytes.

    Args:
        domain: One of ``DOMAINS``.
        split: One of ``SPLITS``.
        seed: Seed of all random numbers.
        count: Scenes; ``SIZES`` by default. A smaller count is a prefix.

    Raises:
        DataError: An unknown domain or split.
    """
    if domain not in DOMAINS or split not in SPLITS:
        raise DataError(
            f"found domain {domain!r}, split {split!r}; needed one of {', '.join(DOMAINS)} and of "
            f"{', '.join(SPLITS)}"
        )
    town = _ABROAD if domain == "brick" else _HOME
    images, labels = [], []
    for number in range(SIZES[split] if count is None else count):
        key = [seed, zlib.crc32(f"{domain} {split}".encode()), number]
        rng = np.random.default_rng(key)
        canvas = _Street(town, rng).draw()
        images.append(_seen(canvas, domain, rng))
        labels.append(np.asarray(canvas.label))
    return Split(np.stack(images), np.stack(labels))


def write(folder: Path, domains: tuple[str, ...], splits: tuple[str, ...], seed: int = 0) -> None:
    """Write ``DOMAIN/SPLIT/images`` and ``labels``, as :func:`find_scenes` reads them."""
    for domain in domains:
        for split in splits:
            made = make(domain, split, seed)
            for kind, pictures in (("images", made.images), ("labels", made.labels)):
                target = folder / domain / split / kind
                target.mkdir(parents=True, exist_ok=True)
                for i, pixels in enumerate(pictures):
                    Image.fromarray(pixels).save(target / f"{i:04}.png")
