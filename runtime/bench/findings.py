"""Collects what an engine decides while its accuracy is measured: confusion and a few images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from ...calibration_data.readers import ImageSet
from ...calibration_data.readers.street_scenes import IGNORE
from ...formats.engine_folder import EngineManifest
from ...formats.findings import MOST_CLASSES, DomainFindings, Findings, Sample
from ...formats.preprocessing import to_frames
from ...typing import Array
from .accuracy import Labelled, confusion
from .segmentation_images import in_colours

__all__ = ["Decided"]

# Images, scenes and mistakes of each domain that are kept.
_IMAGES, _SCENES, _CONFUSED = 12, 2, 8
# Sides in pixels: of a larger image, of one that is left as it is, and of a part of a scene.
_SIDE, _SMALL, _SCENE = 112, 64, 240


class Decided:
    """Pass ``seen`` and ``draw`` to :func:`.accuracy.accuracy`, then call :meth:`findings`.

    Args:
        manifest: Manifest of the engine, which names classes and says how inputs become pixels.
        sets: The labelled images.
    """

    def __init__(self, manifest: EngineManifest, sets: Mapping[str, Labelled]) -> None:
        self._manifest, self._sets = manifest, sets
        self._tables: dict[str, Array] = {}
        self._predicted: dict[str, list[Array]] = {}
        self._scenes: dict[str, list[Sample]] = {}

    def seen(self, domain: str, labels: Array, predicted: Array, classes: int) -> None:
        """Take a batch."""
        table = confusion(labels, predicted, classes)
        self._tables[domain] = self._tables.get(domain, 0) + table
        if labels.ndim == 1:
            self._predicted.setdefault(domain, []).append(predicted)

    def draw(self, domain: str, number: int, x: Array, labels: Array, predicted: Array) -> None:
        """Take a scene: x (C, H, W), labels and predicted (H, W)."""
        if number >= _SCENES:
            return
        known = labels != IGNORE
        share = float((predicted == labels)[known].mean()) if known.any() else 0.0
        parts = [_shrunk(part) for part in in_colours(x, labels, predicted, self._manifest)]
        picture, kind = _encoded(np.concatenate(parts, 1), "JPEG")
        scene = Sample(picture=picture, kind=kind, label="", predicted="", share=share)
        self._scenes.setdefault(domain, []).append(scene)

    def findings(self) -> Findings:
        """All that was seen."""
        count = max((len(table) for table in self._tables.values()), default=0)
        given = [images.classes for images in self._sets.values() if images.classes]
        known = self._manifest.classes or (given[0] if given else ())
        names = known if len(known) == count else tuple(str(i) for i in range(count))
        return Findings(
            classes=names,
            domains={
                domain: DomainFindings(
                    table=_rows(table) if len(table) <= MOST_CLASSES else None,
                    confused=_confused(table, names),
                    samples=tuple(self._scenes.get(domain, ())) or self._samples(domain, names),
                )
                for domain, table in self._tables.items()
            },
        )

    def _samples(self, domain: str, names: Sequence[str]) -> tuple[Sample, ...]:
        images = self._sets[domain]
        if not isinstance(images, ImageSet) or images.y is None or domain not in self._predicted:
            return ()
        predicted = np.concatenate(self._predicted[domain])
        return tuple(
            self._sample(images.x[i], int(images.y[i]), int(predicted[i]), names)
            for i in _chosen(images.y)
        )

    def _sample(self, x: Array, label: int, predicted: int, names: Sequence[str]) -> Sample:
        (frame,) = to_frames(x[None], self._manifest.preprocessing)
        frame = frame if frame.shape[2] == 3 else np.repeat(frame[:, :, :1], 3, 2)
        small = max(frame.shape[:2]) <= _SMALL
        picture, kind = _encoded(*(frame, "PNG") if small else (_shrunk(frame, _SIDE), "JPEG"))
        shown = names[predicted] if 0 <= predicted < len(names) else str(predicted)
        return Sample(
            picture=picture,
            kind=kind,
            label=names[label],
            predicted=shown,
            share=float(label == predicted),
        )


def _chosen(labels: Array) -> list[int]:
    """Numbers of the images that are shown: the first of every class, then the second, and so on.

    Of many classes some are taken, evenly.
    """
    present = np.unique(labels)
    if len(present) > _IMAGES:
        present = present[np.linspace(0, len(present) - 1, _IMAGES).round().astype(int)]
    places = [np.flatnonzero(labels == label) for label in present]
    found = [
        int(of_class[turn])
        for turn in range(_IMAGES)
        for of_class in places
        if turn < len(of_class)
    ]
    return sorted(found[:_IMAGES], key=lambda i: (int(labels[i]), i))


def _rows(table: Array) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(count) for count in row) for row in table)


def _confused(table: Array, names: Sequence[str]) -> tuple[tuple[str, str, int], ...]:
    """The most frequent mistakes; equally frequent ones in the order of the classes."""
    wrong = table.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSED]
    columns = (*names, "another class")
    pairs = [divmod(int(place), wrong.shape[1]) for place in order]
    return tuple((names[i], columns[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j])


def _shrunk(frame: Array, side: int = _SCENE) -> Array:
    picture = Image.fromarray(np.ascontiguousarray(frame))
    picture.thumbnail((side, side))
    return np.asarray(picture)


def _encoded(frame: Array, form: str) -> tuple[str, str]:
    """Base64 and media type."""
    text = io.BytesIO()
    Image.fromarray(frame).save(text, form, **({"quality": 85} if form == "JPEG" else {}))
    return base64.b64encode(text.getvalue()).decode(), f"image/{form.lower()}"
