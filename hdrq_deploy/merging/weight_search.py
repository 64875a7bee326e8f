"""Merge weights from images without labels.

Points of a grid on the simplex are merged in memory and run on a few images of each domain; the
point of the lowest score is taken. Points that are clearly worse leave early (see
:mod:`.weight_race`). The weights that are run are those before rounding to codes: the noise of
rounding at one point would be larger than the difference between neighbours. Scores are means
over the domains, in nats; lower is better. ``CRITERIA`` describes them:

``entropy``      How unsure the merged model's predictions are.
``information``  The same, less the entropy of the mean prediction: a model that is sure of one
                 class for every image is not a good one (Krause et al., NeurIPS 2010).
``agreement``    Cross entropy with the predictions of the bundle that was calibrated for the
                 domain: it is the best judge available, and needs no labels either.
``confidence``   The same where the domain of an image is unknown: each image is judged by the
                 bundle whose prediction for it has the lowest entropy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import comb
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import DataError, MergeError
from ..formats.bundle import Bundle
from ..numerics.spec import check_seed
from ..typing import Array, StepProgress
from .bundles import Merger
from .re_estimate import NewMoments
from .unrounded_network import UnroundedNetwork
from .weight_race import Point, Race

__all__ = ["CRITERIA", "ChosenWeights", "Criterion", "choose_weights", "score", "simplex"]

_MOST_POINTS = 100
# Images of each domain that give a point of the grid its new moments. All points take the same
# ones, so that what these few get wrong is common to them.
_RENEWED = 8
# Bytes of networks that are kept open for the next round, twice those of their weights each;
# further ones are merged and opened again.
_KEPT = 1 << 30

Images = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Criterion:
    """A score of predictions that needs no labels, as the table ``CRITERIA`` holds it.

    Attributes:
        summary: One line for the command's help.
        of_images: Called with predictions and judgements, see :func:`score`; gives the score of
            each image, shape (N,), in nats; lower is better.
        varied: Whether the entropy of the mean prediction is subtracted.
        judged: Whether the score compares with the predictions of the parents.
        own_judge: Whether each domain is judged by the parent that was calibrated for it.
    """

    summary: str
    of_images: Callable[[_Prediction, _Prediction | None], Array]
    varied: bool = False
    judged: bool = False
    own_judge: bool = False


@dataclass(frozen=True)
class _Prediction:
    """Probabilities (N, classes, ...) and their logarithms."""

    share: Array
    log_share: Array

    @classmethod
    def of(cls, logits: Array) -> _Prediction:
        """The softmax of logits (N, classes, ...), in float64."""
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        log_share = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return cls(np.exp(log_share), log_share)

    def entropies(self) -> Array:
        """Entropy of each prediction, shape (N, 1, ...), in nats."""
        result: Array = -(self.share * self.log_share).sum(1, keepdims=True)
        return result

    def rows(self, first: int, end: int) -> _Prediction:
        """Those of the images ``first`` to ``end``."""
        return _Prediction(self.share[first:end], self.log_share[first:end])


def _per_image(values: Array) -> Array:
    """Mean over the positions of each image: (N, ...) becomes (N,)."""
    result: Array = values.reshape(len(values), -1).mean(1)
    return result


def _entropy(prediction: _Prediction, judge: _Prediction | None) -> Array:
    return _per_image(prediction.entropies())


def _cross_entropy(prediction: _Prediction, judge: _Prediction | None) -> Array:
    assert judge is not None
    return _per_image(-(judge.share * prediction.log_share).sum(1))


CRITERIA: dict[str, Criterion] = {
    "entropy": Criterion("surest predictions", _entropy),
    "information": Criterion("sure and varied predictions", _entropy, varied=True),
    "agreement": Criterion(
        "most like each domain's own bundle", _cross_entropy, judged=True, own_judge=True
    ),
    "confidence": Criterion(
        "most like the bundle that is surest of an image", _cross_entropy, judged=True
    ),
}


@dataclass(frozen=True)
class _Scored:
    """What a criterion needs to know of the images of a domain.

    Attributes:
        scores: Score of each image, (N,).
        shares: Mean prediction of each image, (N, classes); None where nothing is subtracted.
    """

    scores: Array
    shares: Array | None

    @classmethod
    def of(cls, criterion: Criterion, outputs: _Prediction, judge: _Prediction | None) -> _Scored:
        """From predictions, and from the judge's predictions of the same images."""
        share = outputs.share
        mean = share.reshape(*share.shape[:2], -1).mean(2) if criterion.varied else None
        return cls(criterion.of_images(outputs, judge), mean)

    def __add__(self, more: _Scored) -> _Scored:
        scores = np.concatenate([self.scores, more.scores])
        if self.shares is None or more.shares is None:
            return _Scored(scores, None)
        return _Scored(scores, np.concatenate([self.shares, more.shares]))

    def parts(self, count: int) -> Array:
        """What each of the first ``count`` images adds; their mean is the score of these."""
        scores = self.scores[:count]
        if self.shares is None:
            return scores
        shares = self.shares[:count]
        result: Array = scores + shares @ np.log(np.maximum(shares.mean(0), 1e-30))
        return result


@dataclass(frozen=True)
class ChosenWeights:
    """The result of a search.

    Attributes:
        weights: The merge weights of the lowest score.
        criterion: Name of the criterion that scored.
        tried: Every point that was run on all images, with its score.
        left: Every point that was clearly worse on fewer images, with its score on them and their
            number in each domain.
        runs: Images run, summed over the points.
        seconds: Time that the search took.
        entry: The name of its record in the manifest.
    """

    weights: Point
    criterion: str
    tried: tuple[tuple[Point, float], ...]
    left: tuple[tuple[Point, float, int], ...]
    runs: int
    seconds: float
    entry: ClassVar[str] = "auto"

    @property
    def summary(self) -> str:
        """Mixes, images and seconds, for people."""
        mixes = len(self.tried) + len(self.left)
        return f"{mixes} mixes, {self.runs} images run in {self.seconds:.1f} s"

    def record(self) -> dict[str, Any]:
        """The entry of the manifest: all but the seconds, so that equal merges have equal bytes."""
        return {
            "weights": self.weights,
            "criterion": self.criterion,
            "tried": self.tried,
            "left": self.left,
            "mixes": len(self.tried) + len(self.left),
            "images_run": self.runs,
        }


def choose_weights(
    merger: Merger,
    images: Images,
    criterion: str | None = None,
    renewed: Images | None = None,
    progress: StepProgress | None = None,
    also: Sequence[Point] = (),
    *,
    seed: int = 0,
    exhaustive: bool = False,
) -> ChosenWeights:
    """The merge weights of the lowest score.

    Every second point of the grid is run on more and more images first, then the neighbours of
    those that are not clearly worse. Where no point of the grid mixes all parents, as from five
    parents on, equal weights are run beside them. The weights that are chosen were run on all
    images, and so were their neighbours on the grid, but those that were clearly worse.

    Args:
        merger: The merger whose parents are merged at the points of the grid.
        images: Inputs (N, C, H, W) of each domain, as the parents' preprocessing makes them;
            every domain counts the same.
        criterion: Name of one of ``CRITERIA``; by default agreement where every name in
            ``images`` is a domain of one parent, else information.
        renewed: Images for :func:`re_estimate`; every point is then scored with new moments, of 8
            images a domain at most.
        progress: Called with (images run, images in all as far as is known), over all points.
        also: Further points, beside the grid's; they are run on all images.
        seed: Seed of the order in which images are taken.
        exhaustive: Run every point of the grid on all images.

    Raises:
        DataError: No images, images that the graph does not take, or the criterion agreement
            where a name is no parent's domain.
        MergeError: Images for new moments, and bundles that keep no BatchNorm separately; or more
            than 100 parents.
        SpecError: A seed that NumPy does not take.
    """
    if not images or not all(len(rows) for rows in images.values()):
        raise DataError("found no images; a search of merge weights needs `data` of every domain")
    check_seed(seed)
    began = time.monotonic()
    name = _criterion_of(criterion, merger.parents, images)
    count = len(merger.parents)
    grid = list(simplex(count))
    if count > _parts_of(grid):
        also = (*also, (1 / count,) * count)
    points = list(dict.fromkeys([*grid, *also]))
    race = Race(
        points,
        _Sampler(
            merger.in_memory(),
            _shuffled(images, seed),
            CRITERIA[name],
            {n: rows[:_RENEWED] for n, rows in _shuffled(renewed or {}, seed).items()},
        ),
        [len(rows) for rows in images.values()],
        lambda point: _neighbours(point, grid),
        _every_second(grid),
        points if exhaustive else also,
        progress,
    )
    best = race.run()
    tried = tuple((p, race.finished[p]) for p in points if p in race.finished)
    left = tuple((p, *race.left[p]) for p in points if p in race.left)
    return ChosenWeights(best, name, tried, left, race.runs, time.monotonic() - began)


def _shuffled(images: Images, seed: int) -> dict[str, Array]:
    """Images of each domain in an order that says nothing of their classes."""
    order = {n: np.random.default_rng(seed).permutation(len(rows)) for n, rows in images.items()}
    return {name: rows[order[name]] for name, rows in images.items()}


class _Sampler:
    """Runs points on images, each point on each image once; see :class:`Race`."""

    def __init__(
        self, merger: Merger, images: Images, criterion: Criterion, renewed: Images
    ) -> None:
        self._merger, self._images, self._criterion = merger, images, criterion
        self._renewed = renewed
        self._network = UnroundedNetwork(merger.parents[0])
        self._measure = NewMoments(merger.parents[0]) if renewed else None
        self._judges = self._judged() if criterion.judged else {}
        self._runs: dict[Point, Callable[[Array, str], Array]] = {}
        self._kept = 0
        self._moments: dict[Point, dict[str, Array]] = {}
        self._scored: dict[tuple[Point, str], _Scored] = {}

    def __call__(self, point: Point, count: int) -> list[Array]:
        new = {name: rows[self._done(point, name) : count] for name, rows in self._images.items()}
        if any(map(len, new.values())):
            run = self._runs.get(point) or self._opened(point)
            for name, rows in new.items():
                if len(rows):
                    self._add(point, name, _Prediction.of(run(rows, name)))
        return [self._scored[point, name].parts(count) for name in self._images]

    def _done(self, point: Point, name: str) -> int:
        found = self._scored.get((point, name))
        return 0 if found is None else len(found.scores)

    def _add(self, point: Point, name: str, outputs: _Prediction) -> None:
        done = self._done(point, name)
        judge = self._judges.get(name)
        part = None if judge is None else judge.rows(done, done + len(outputs.share))
        more = _Scored.of(self._criterion, outputs, part)
        before = self._scored.get((point, name))
        self._scored[point, name] = more if before is None else before + more

    def _opened(self, point: Point) -> Callable[[Array, str], Array]:
        """The network of a point, kept open where there is room.

        With images for new moments, these are measured the first time.
        """
        layers = self._merger.merged_layers(point, corrected=not self._renewed)
        if self._measure and point not in self._moments:
            weights = self._merger.folded(layers, {})
            self._moments[point] = self._measure.of(weights, self._renewed)
        weights = self._merger.folded(layers, self._moments.get(point, {}))
        run = self._network.opened(weights)
        size = 2 * sum(value.nbytes for value in weights.values())
        if self._kept + size <= _KEPT:
            self._runs[point], self._kept = run, self._kept + size
        return run

    def _judged(self) -> dict[str, _Prediction]:
        """For every domain the predictions that those of a merge are compared with."""
        parents = self._merger.parents
        opinions: dict[str, list[_Prediction]] = {name: [] for name in self._images}
        for i, parent in enumerate(parents):
            alone = [float(i == j) for j in range(len(parents))]
            run = self._network.opened(self._merger.unrounded(alone))
            for name, rows in self._images.items():
                if not self._criterion.own_judge or parent.domain == name:
                    opinions[name].append(_Prediction.of(run(rows, name)))
        return {name: _surest(predictions) for name, predictions in opinions.items()}


def _criterion_of(criterion: str | None, parents: Sequence[Bundle], images: Images) -> str:
    """The criterion as given, or the best one that the images' names allow."""
    domains = [parent.domain for parent in parents]
    known = set(images) <= set(domains) and None not in domains
    known = known and len(set(domains)) == len(domains)
    name = criterion or ("agreement" if known else "information")
    if CRITERIA[name].own_judge and not known:
        named = [domain for domain in domains if domain is not None]
        raise DataError(
            f"found images of {', '.join(images)}, bundles of {', '.join(named) or 'no one domain'}"
            f"; {name} needs the names of the bundles' domains: name the images so, or choose "
            "`criterion` information"
        )
    return name


def simplex(parents: int) -> Iterator[tuple[float, ...]]:
    """Grid of merge weights with sum 1, spaced as finely as ``_MOST_POINTS`` allow, >= 0.05.

    >>> len(list(simplex(2))), len(list(simplex(3)))
    (21, 66)

    Raises:
        MergeError: More parents than ``_MOST_POINTS``.
    """
    if parents > _MOST_POINTS:
        raise MergeError(
            f"found {parents} bundles; merge weights are searched for {_MOST_POINTS} at most: give "
            "numbers"
        )
    fitting = [n for n in range(1, 21) if comb(n + parents - 1, parents - 1) <= _MOST_POINTS]
    parts = max(n for n in fitting if n in {1, 2, 3, 4, 5, 10, 20})

    def split(left: int, places: int) -> Iterator[tuple[int, ...]]:
        if places == 1:
            yield (left,)
            return
        for first in range(left + 1):
            for rest in split(left - first, places - 1):
                yield (first, *rest)

    for point in split(parts, parents):
        yield tuple(n / parts for n in point)


def _parts_of(grid: Sequence[Point]) -> int:
    """How many steps of the grid lie between two corners."""
    return round(1 / min(share for point in grid for share in point if share > 0))


def _every_second(grid: Sequence[Point]) -> list[Point]:
    """The points of the grid of twice the spacing; none where there is no such grid."""
    parts = _parts_of(grid)
    if parts % 2 or parts < 4:
        return []
    return [p for p in grid if all(round(share * parts) % 2 == 0 for share in p)]


def _neighbours(point: Point, grid: Sequence[Point]) -> list[Point]:
    """The points of the grid at which one parent has one step more and another one less."""
    parts = _parts_of(grid)
    steps = {tuple(round(share * parts) for share in p): p for p in grid}
    if point not in steps.values():
        return []
    near = []
    for more, less in permutations(range(len(point)), 2):
        moved_by = [(i == more) - (i == less) for i in range(len(point))]
        place = tuple(round(s * parts) + m for s, m in zip(point, moved_by, strict=True))
        if place in steps:
            near.append(steps[place])
    return near


def score(criterion: str, logits: Array, judge: Array | None = None) -> float:
    """How bad predictions are, in nats, without labels.

    Args:
        criterion: Name of one of ``CRITERIA``.
        logits: (N, classes, ...).
        judge: Logits of the model to agree with, for ``agreement`` and ``confidence``.

    >>> even = np.zeros((2, 4))
    >>> round(score("entropy", even), 4), round(score("information", even), 4)
    (1.3863, 0.0)
    """
    judgement = None if judge is None else _Prediction.of(judge)
    scored = _Scored.of(CRITERIA[criterion], _Prediction.of(logits), judgement)
    return float(scored.parts(len(logits)).mean())


def _surest(opinions: Sequence[_Prediction]) -> _Prediction:
    """Position by position the prediction that has the lowest entropy."""
    if len(opinions) == 1:
        return opinions[0]
    best = np.argmin(np.stack([opinion.entropies() for opinion in opinions]), axis=0)[None]

    def taken(arrays: list[Array]) -> Array:
        result: Array = np.take_along_axis(np.stack(arrays), best, axis=0)[0]
        return result

    return _Prediction(taken([o.share for o in opinions]), taken([o.log_share for o in opinions]))
