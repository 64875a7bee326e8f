"""Street scenes beside what the merged engines of a grid make of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from ..calibration_data.readers.street_scenes import Scenes
from ..errors import DataError
from ..formats.bundle import Bundle
from ..runtime.bench.accuracy import accuracy
from ..runtime.bench.segmentation_images import in_colours, write_picture
from ..typing import Array
from .cells import engine_of, labelled_set
from .grid import Grid, Merge, bundle_path

__all__ = ["SCENES", "draw", "picture_name"]

_GAP, _TITLE = 4, 14
# Scenes that are drawn of every domain.
SCENES = 2


def picture_name(domain: str, number: int) -> str:
    """Path of a picture in the folder of a run."""
    return f"pictures/{domain}-{number}.png"


def draw(grid: Grid, out: Path, bits: str, scenes: int = SCENES) -> list[Path]:
    """``OUT/pictures/DOMAIN-NUMBER.png``: image, labels, float merged, merged at ``bits``.

    Args:
        grid: The grid whose merges of all domains are drawn, for the first seed and rounding.
        out: Folder of the run.
        bits: Bits such as ``w4a4``.
        scenes: Scenes of every domain.

    Raises:
        DataError: No such cells, or data without label maps.
    """
    columns = list(_columns(grid, out, bits))
    if all(title.startswith("float merged") for title, _ in columns):
        raise DataError(f"{out}: found no merged cells of {bits}; run them first")
    shown: dict[tuple[str, int], list[tuple[str, Array]]] = {}
    for title, bundle in columns:
        _run(grid, bundle, title, scenes, shown)
    files = []
    for (domain, number), parts in shown.items():
        file = out / picture_name(domain, number)
        write_picture(file, _beside(parts))
        files.append(file)
    return files


def _columns(grid: Grid, out: Path, bits: str) -> Iterator[tuple[str, Bundle]]:
    """Titles and merged bundles: float, then every setting and method, its last way to merge."""
    for run in grid.runs():
        if run.method != "float" and (run.bits != bits or run.seed != grid.seeds[0]):
            continue
        merges: list[Merge] = [m for m in grid.merges(run) if m.members == grid.domains]
        path = bundle_path(out, merges[-1].cell(0)) if merges else None
        if path is not None and path.is_dir():
            name = "float merged" if run.setting == "float" else f"float merged, {run.setting}"
            if run.method != "float":
                name = f"{run.method} {bits.upper()}, {run.setting}"
            yield name, Bundle.open(path)


def _run(
    grid: Grid,
    bundle: Bundle,
    title: str,
    scenes: int,
    shown: dict[tuple[str, int], list[tuple[str, Array]]],
) -> None:
    with engine_of(bundle, "cpu", 0) as engine:

        def see(domain: str, number: int, x: Array, labels: Array, predicted: Array) -> None:
            frame, wanted, drawn = in_colours(x, labels, predicted, engine.manifest)
            parts = shown.setdefault((domain, number), [("image", frame), ("labels", wanted)])
            parts.append((title, drawn))

        sets = {}
        for domain in grid.task.domains:
            images = labelled_set(engine, grid.task, domain)
            if not isinstance(images, Scenes):
                raise DataError(f"{domain.test}: found no label maps; pictures are of segmentation")
            sets[domain.name] = replace(images, pairs=images.pairs[:scenes])
        accuracy(engine, sets, draw=see)


def _beside(parts: list[tuple[str, Array]]) -> Image.Image:
    height, width = parts[0][1].shape[:2]
    size = (len(parts) * (width + _GAP) - _GAP, height + _TITLE)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, part) in enumerate(parts):
        left = i * (width + _GAP)
        pen.text((left + 2, 1), title, fill="black")
        sheet.paste(Image.fromarray(part), (left, _TITLE))
    return sheet
