"""One search of learning rates for every method, on calibration images alone.

The protocol is the same whatever learns. ``START`` rates lie a factor ``FACTOR`` apart around the
method's own published rate, which is scaled to the iterations (:data:`PUBLISHED_ITERS`). Of the
calibration images of each domain every fourth is held out: a trial learns from the others. Its
bundles are merged (mean, equal weights, rounded to nearest), and the trial's score is the cross
entropy of the merged model with the float expert of each domain on the held-out images of that
domain, in nats, as the mean over the domains. No label and no test image is read. Where the best
rate is the lowest or the highest one, the next rate beyond it is tried too, until the best lies
inside or ``MOST`` rates were tried; :attr:`RateSearch.is_at_edge` says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.methods import METHODS, PUBLISHED_ITERS
from ..calibration_data.readers import ImageSet, spread
from ..errors import CheckFailed, DataError, SpecError
from ..formats.atomic_files import scratch_folder
from ..formats.bundle import GRAPH, Bundle
from ..graph import reference_session
from ..merging import merge
from ..merging.weight_search import score
from ..numerics.batches import decisions, in_batches
from ..typing import Array

__all__ = [
    "CRITERION",
    "FACTOR",
    "FEWEST",
    "MOST",
    "START",
    "RateSearch",
    "agreements",
    "hold_out",
    "images_for",
    "judge",
    "protocol",
]

START, MOST = 5, 11
FACTOR = math.sqrt(10)
CRITERION = (
    "cross entropy of the merged model (mean, equal weights, nearest) with each domain's float "
    "expert on held-out calibration images of that domain, nats, mean over the domains"
)
# Every fourth calibration image is held out, and so many of them judge at most.
_EVERY, _JUDGES = 4, 256
# Calibration images of a domain that a search needs.
FEWEST = _EVERY
_BATCH = 16


def protocol() -> dict[str, Any]:
    """What all searches have in common, for the record."""
    return {
        "criterion": CRITERION,
        "rates_at_first": START,
        "rates_at_most": MOST,
        "factor": FACTOR,
        "centre": f"the method's published rate, times {PUBLISHED_ITERS} / fewer iterations",
        "held_out": f"every {_EVERY}th calibration image of each domain, at most {_JUDGES}",
    }


@dataclass(frozen=True)
class RateSearch:
    """The rates of one method, and which of them are to be tried.

    Attributes:
        centre: The middle of the rates that are tried at first.
    """

    centre: float

    @classmethod
    def of(cls, method: str, iters: int) -> RateSearch:
        """The search around a method's published rate, scaled to the iterations of a block.

        Raises:
            SpecError: The method learns nothing, so that it has no rate.
        """
        options = METHODS[method].options
        if not options.iterates:
            raise SpecError(
                f"found method {method}, which learns nothing; it has no rate to search"
            )
        return cls(options.lr * max(1.0, PUBLISHED_ITERS / iters))

    def rate(self, place: int) -> float:
        """The rate at a place of the grid, 0 the centre; three digits, as it is written."""
        return float(f"{self.centre * FACTOR**place:.3g}")

    def waiting(self, scores: Mapping[int, float]) -> list[int]:
        """Places to be tried next; none where the search has ended.

        Args:
            scores: What was found, by place; lower is better, NaN and infinity are the worst.
        """
        first = range(-(START // 2), START - START // 2)
        missing = [place for place in first if place not in scores]
        if missing or len(scores) >= MOST:
            return missing
        best = self.best(scores)
        if best == min(scores):
            return [best - 1]
        return [best + 1] if best == max(scores) else []

    def best(self, scores: Mapping[int, float]) -> int:
        """The place of the lowest score; of equal ones the one nearest to the centre."""
        return min(scores, key=lambda place: (_or_worst(scores[place]), abs(place), place))

    def is_at_edge(self, scores: Mapping[int, float]) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        return self.best(scores) in {min(scores), max(scores)}


def _or_worst(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def images_for(batch: int) -> int:
    """The fewest calibration images of a domain of which a trial can learn in such batches.

    >>> [images_for(batch) for batch in (1, 3, 4, 32)]
    [4, 4, 5, 42]
    """
    return max(FEWEST, batch + (batch - 1) // (_EVERY - 1))


def hold_out(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """The images that a trial learns from, and those that judge it.

    Args:
        images: Calibration images of one domain.

    Raises:
        DataError: Fewer than four images.
    """
    if len(images) < FEWEST:
        raise DataError(f"found {len(images)} calibration images; a search needs {FEWEST} or more")
    places = np.arange(len(images))
    judges = places % _EVERY == _EVERY - 1
    held = places[judges]
    return _part(images, places[~judges]), _part(images, held[spread(len(held), _JUDGES)])


def _part(images: ImageSet, places: Array) -> ImageSet:
    labels = None if images.y is None else images.y[places]
    return replace(images, x=images.x[places], y=labels)


def judge(
    bundles: Sequence[Bundle], experts: Mapping[str, Bundle], held: Mapping[str, Array]
) -> dict[str, Any]:
    """How far the merge of a trial's bundles, and each bundle alone, are from the float experts.

    Args:
        bundles: One of each domain, of one trial.
        experts: The float bundle of each domain.
        held: Held-out inputs (N, C, H, W) of each domain.

    Returns:
        ``score``, the mean over the domains, in nats; None where the merged model gave no finite
        output, which ``failed`` may explain. ``merged``, ``single`` and ``decisions`` by domain:
        the cross entropies of the merged model and of the domain's own bundle (None where they are
        not finite), and the share of images (or pixels) that the merged model decides as the expert
        does.
    """
    single = {}
    for name, bundle in zip(experts, bundles, strict=True):
        single[name] = _finite(_difference(bundle, experts[name], held[name])[0])
    with scratch_folder() as scratch:
        try:
            merged = merge(
                bundles, scratch / "merged.hdrq", method="mean", rounding="nearest", threads=1
            )
        except CheckFailed as error:
            return {"score": None, "failed": str(error), "single": single}
        nats, shares = agreements(merged, experts, held)
    return {
        "score": _finite(float(np.mean(list(nats.values())))),
        "merged": {name: _finite(value) for name, value in nats.items()},
        "single": single,
        "decisions": shares,
    }


def _finite(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None


def agreements(
    bundle: Bundle, experts: Mapping[str, Bundle], held: Mapping[str, Array]
) -> tuple[dict[str, float], dict[str, float]]:
    """By domain: cross entropy with the domain's expert in nats, and the share of equal decisions.

    Args:
        bundle: A merge; its graph is run with every operator as it is written.
        experts: The float bundle of each domain.
        held: Inputs (N, C, H, W) of each domain.
    """
    found = {name: _difference(bundle, experts[name], held[name]) for name in experts}
    nats = {name: value for name, (value, _) in found.items()}
    return nats, {name: share for name, (_, share) in found.items()}


def _difference(bundle: Bundle, expert: Bundle, images: Array) -> tuple[float, float]:
    """Cross entropy with the expert in nats, and the share of equal decisions."""
    own, other = (_Graph(b.path / GRAPH) for b in (bundle, expert))
    nats = equal = 0.0
    for rows in in_batches(images, _BATCH):
        logits, judgement = own(rows), other(rows)
        nats += score("agreement", logits, judgement) * len(rows)
        equal += float((decisions(logits) == decisions(judgement)).mean()) * len(rows)
    return nats / len(images), equal / len(images)


class _Graph:
    """A bundle's graph, every operator as it is written."""

    def __init__(self, path: Path) -> None:
        self._session = reference_session.unfused_session(path)
        self._port = self._session.get_inputs()[0].name

    def __call__(self, rows: Array) -> Array:
        logits: Array = self._session.run(None, {self._port: rows})[0]
        return logits
