"""How right an engine is: classes of images, or of every pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...calibration_data.readers import ImageSet
from ...calibration_data.readers.street_scenes import IGNORE, Scenes
from ...errors import DataError
from ...formats.bench_result import Accuracy, harmonic_mean
from ...formats.engine_folder import EngineManifest
from ...formats.golden_inputs import GOLDEN, read_golden
from ...formats.preprocessing import feed
from ...numerics.batches import class_count, decides, decisions
from ...typing import Array
from ..engine import Engine, dtype_of
from ..predictions import enlarge, softmax

__all__ = [
    "Draw",
    "Labelled",
    "Seen",
    "accuracy",
    "classes_of",
    "confusion",
    "window_of",
    "windows",
]

Labelled = ImageSet | Scenes
# Called with domain, number of the image, its input, its labels and the predicted ones.
Draw = Callable[[str, int, Array, Array, Array], None]
# Called with domain, labels and predictions of a batch, and the number of classes.
Seen = Callable[[str, Array, Array, int], None]
_BATCH, _BINS, _TOP = 64, 15, 5


@dataclass
class _Counts:
    """What the images of one domain add up to."""

    classes: int = 0
    table: Array = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    top5: int = 0
    images: int = 0
    flips: int = 0
    decided: int = 0
    # Of every bin of confidence: images, right ones, sum of confidences.
    bins: Array = field(default_factory=lambda: np.zeros((3, _BINS)))
    scored: bool = True
    pixels: bool = False


def accuracy(
    engine: Engine,
    sets: Mapping[str, Labelled],
    reference: Engine | None = None,
    draw: Draw | None = None,
    seen: Seen | None = None,
) -> Accuracy:
    """Run an engine over the labelled images of each domain.

    Args:
        engine: A classifier (scores (N, classes) or labels (N,)) or a segmentation engine
            (scores (N, classes, h, w) or labels (N, h, w); scores are brought to the labels'
            size first). Images larger than its input are covered by windows.
        sets: Images and labels by domain.
        reference: Another engine whose decisions are compared.
        draw: Called with every image, its label map and the predicted one.
        seen: Called with labels and predictions of every batch.

    Raises:
        DataError: Labels out of range, of another form than the engine's answers, or of a domain
            in which no pixel counts.
    """
    counts = {n: _count(engine, images, n, reference, draw, seen) for n, images in sets.items()}
    pixels = all(count.pixels for count in counts.values())
    given = [images.classes for images in sets.values() if isinstance(images, Scenes)]
    names = engine.manifest.classes or (given[0] if given else None)
    scored = all(count.scored for count in counts.values())
    per_class = {d: _per_class(c.table, pixels) for d, c in counts.items()}
    right = {d: float(np.trace(c.table) / c.table.sum()) for d, c in counts.items()}
    domains = {d: _mean(values) for d, values in per_class.items()} if pixels else right
    ranked = scored and not pixels
    return Accuracy(
        metric="miou" if pixels else "top1",
        domains=domains,
        harmonic_mean=harmonic_mean(list(domains.values())),
        images={d: c.images for d, c in counts.items()},
        per_class={
            d: {names[i] if names and i < len(names) else str(i): v for i, v in enumerate(values)}
            for d, values in per_class.items()
        },
        top5={d: c.top5 / c.images for d, c in counts.items()}
        if ranked and all(c.classes > _TOP for c in counts.values())
        else None,
        pixel_accuracy=right if pixels else None,
        calibration_error={d: _calibration_error(c) for d, c in counts.items()} if ranked else None,
        decision_flips={d: c.flips / c.decided for d, c in counts.items()} if reference else None,
        reference=str(reference.path) if reference else None,
    )


def classes_of(path: Path, manifest: EngineManifest) -> int | None:
    """How many classes an engine tells apart; None where nothing in its folder says it.

    An engine that gives labels does not say it of its output; its golden outputs are the scores
    that the labels were made of.
    """
    if manifest.classes:
        return len(manifest.classes)
    (port, *_) = manifest.outputs
    count = class_count(port.shape) if dtype_of(port).kind == "f" else None
    if count is not None or GOLDEN not in manifest.files:
        return count
    output = read_golden(path / GOLDEN).get("output")
    return None if output is None else class_count(output.shape)


def confusion(labels: Array, predicted: Array, classes: int) -> Array:
    """(classes, classes + 1) counts: row is the label, column the prediction, the last for others.

    In maps (N, H, W) pixels of label IGNORE are left out.
    """
    known = labels != IGNORE if labels.ndim == 3 else np.ones(labels.shape, bool)
    columns = classes + 1
    pairs = labels[known].astype(np.int64) * columns + np.minimum(predicted[known], classes)
    return np.bincount(pairs, minlength=classes * columns).reshape(classes, columns)


def _count(
    engine: Engine,
    images: Labelled,
    name: str,
    reference: Engine | None,
    draw: Draw | None,
    seen: Seen | None,
) -> _Counts:
    counts = _Counts()
    for rows, labels in images.batches(_step(engine, images)):
        pixels = labels.ndim == 3
        output = _run(engine, rows, pixels)
        predicted = _decide(output, labels, engine, name)
        if not counts.classes:
            counts.pixels = pixels
            counts.classes = _classes(output, images, engine)
            counts.table = np.zeros((counts.classes, counts.classes + 1), np.int64)
        _check_labels(labels, counts.classes, name)
        counts.table += confusion(labels, predicted, counts.classes)
        if seen is not None:
            seen(name, labels, predicted, counts.classes)
        if draw is not None and counts.pixels:
            for i in range(len(rows)):
                draw(name, counts.images + i, rows[i], labels[i], predicted[i])
        counts.images += len(rows)
        counts.scored &= output.dtype.kind == "f"
        if output.ndim == 2 and output.dtype.kind == "f":
            _score(counts, output, labels, engine.manifest.postprocess == "softmax")
        if reference is not None:
            other = _decide(_run(reference, rows, pixels), labels, reference, name)
            counts.flips += int((other != predicted).sum())
            counts.decided += predicted.size
    if counts.pixels and not counts.table.any():
        raise DataError(
            f"{name}: found {counts.images} images in which every pixel is labelled {IGNORE}, "
            "to be left out; needed a pixel of a class in one of them"
        )
    return counts


def _step(engine: Engine, images: Labelled) -> int:
    fixed = engine.inputs[0].shape[0]
    if isinstance(fixed, int):
        return fixed
    if isinstance(images, Scenes):
        return 1  # scores of a whole street scene take 160 MB
    # Scores of whole images are large: some 256 MB of them at a time.
    output = engine.outputs[0].shape
    if len(output) < 3:
        return _BATCH
    sides = [d if isinstance(d, int) else 512 for d in output[1:]]
    return int(np.clip((1 << 26) // np.prod(sides), 1, 16))


def windows(length: int, window: int) -> list[int]:
    """Where windows begin that cover a length, two thirds of one apart; the last one ends it.

    >>> windows(100, 60)
    [0, 40]
    """
    last, step = length - window, max(1, 2 * window // 3)
    return [*range(0, last, step), last]


def window_of(engine: Engine, rows: Array) -> tuple[int, int] | None:
    """Size of the engine's input where the images are larger than that."""
    port = engine.inputs[0]
    sides = port.shape[1:3] if port.layout == "NHWC" else port.shape[2:]
    if rows.ndim != 4 or len(sides) != 2:
        return None
    height, width = sides
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    if rows.shape[2:] == (height, width):
        return None
    if rows.shape[2] < height or rows.shape[3] < width:
        raise DataError(
            f"found images of {rows.shape[2]}x{rows.shape[3]}; the engine {engine.path} takes "
            f"{height}x{width}: bring them to that size or a larger one (`image_size`)"
        )
    return height, width


def _run(engine: Engine, rows: Array, pixels: bool) -> Array:
    """Outputs of the rows; scenes larger than the input in windows whose scores are averaged."""
    window = window_of(engine, rows) if pixels else None
    if window is None:
        return engine.all_rows(feed(rows, engine.manifest))
    height, width = window
    total: Array | None = None
    times = np.zeros(rows.shape[2:], np.float32)
    for top in windows(rows.shape[2], height):
        for left in windows(rows.shape[3], width):
            part = rows[:, :, top : top + height, left : left + width]
            scores = engine.all_rows(feed(np.ascontiguousarray(part), engine.manifest))
            if scores.dtype.kind != "f" or scores.ndim != 4:
                raise DataError(
                    f"{engine.path}: found outputs of shape {scores.shape}, {scores.dtype}; "
                    "windows need score maps to average: export without `postprocess` argmax"
                )
            if total is None:
                total = np.zeros((len(rows), scores.shape[1], *rows.shape[2:]), np.float32)
            place = (slice(top, top + height), slice(left, left + width))
            for sums, row in zip(total, scores, strict=True):
                sums[(slice(None), *place)] += enlarge(row, window)
            times[place] += 1
    assert total is not None
    total /= times
    return total


def _decide(output: Array, labels: Array, engine: Engine, name: str) -> Array:
    """Classes in the form of the labels."""
    pixels = labels.ndim == 3
    if not decides(output) or output.ndim - (output.dtype.kind == "f") != (3 if pixels else 1):
        raise DataError(
            f"{engine.path}: found outputs of shape {output.shape} for labels of shape "
            f"{labels.shape} in {name}; needed one row of two class scores or more (or one label) "
            "an image, or for labels (N, H, W) a map of them"
        )
    if not pixels or output.shape[-2:] == labels.shape[1:]:
        return decisions(output)
    if output.dtype.kind in "iu":
        raise DataError(
            f"{engine.path}: found label maps of {output.shape[1:]} for labels of "
            f"{labels.shape[1:]} in {name}; export without `postprocess` argmax"
        )
    size = (labels.shape[1], labels.shape[2])
    return np.stack([enlarge(row, size).argmax(0) for row in output])


def _classes(output: Array, images: Labelled, engine: Engine) -> int:
    if output.dtype.kind == "f":
        return int(output.shape[1])
    known_count = classes_of(engine.path, engine.manifest)
    if known_count is not None:
        return known_count
    if isinstance(images, Scenes):
        return len(images.classes) if images.classes else IGNORE
    assert images.y is not None
    known = images.y[images.y != IGNORE] if images.y.ndim == 3 else images.y
    return int(max(known.max(initial=0), output.max())) + 1


def _check_labels(labels: Array, classes: int, name: str) -> None:
    known = labels[labels != IGNORE] if labels.ndim == 3 else labels
    if len(known) and not 0 <= known.min() <= known.max() < classes:
        raise DataError(
            f"{name}: found labels {known.min()} to {known.max()}; the model has {classes} classes"
            + (f" (and {IGNORE} for pixels to leave out)" if labels.ndim == 3 else "")
        )


def _score(counts: _Counts, output: Array, labels: Array, probabilities: bool) -> None:
    shares = output if probabilities else softmax(output)
    if output.shape[1] > _TOP:
        best = np.argpartition(-output, _TOP, axis=1)[:, :_TOP]
        counts.top5 += int((best == labels[:, None]).any(1).sum())
    sure, right = shares.max(1), output.argmax(1) == labels
    # The first bin is closed below; a confidence of 1 belongs to the last.
    where = np.clip(np.ceil(sure * _BINS).astype(int) - 1, 0, _BINS - 1)
    for row, weights in enumerate((np.ones(len(sure)), right.astype(float), sure)):
        counts.bins[row] += np.bincount(where, weights, _BINS)


def _calibration_error(counts: _Counts) -> float:
    images, right, sure = counts.bins
    return float(np.abs(right - sure).sum() / images.sum())


def _per_class(table: Array, pixels: bool) -> list[float | None]:
    hits, labelled, predicted = np.diag(table), table.sum(1), table.sum(0)[:-1]
    counted = labelled + predicted - hits if pixels else labelled
    return [float(h / w) if w else None for h, w in zip(hits, counted, strict=True)]


def _mean(values: list[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else 0.0
