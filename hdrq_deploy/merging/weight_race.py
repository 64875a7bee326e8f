"""The point of the lowest mean over images, found without running every point on every image.

All points are run on the same images, so two points are compared by their differences image by
image, which vary far less than their scores. In every round the points that are left are run on
twice as many images as before, and a point leaves as soon as it is worse than the best one by
``CERTAIN`` standard errors of that difference. What is left after the last round was run on all
images. Then the neighbours of the best point that had left are run on all images too, until the
best point has no better neighbour.

Source:
    Moore and Lee, ICML 1994 (racing with blocking); Jamieson and Talwalkar, AISTATS 2016
    (successive halving).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["CERTAIN", "FIRST", "Point", "Race", "Sample"]

Point = tuple[float, ...]
# Each image's part of the score, an array (N,) for every domain; the score of a point is the mean
# over domains of the mean over images.
Sample = Sequence[npt.NDArray[np.float64]]
# Images of each domain in the first round, and the standard errors that make a point worse.
FIRST = 32
CERTAIN = 3.0


@dataclass
class Race:
    """A race between points.

    Args:
        points: The points to choose from.
        sample: Called with a point and a number of images; gives the parts of the first that many
            images of every domain, of all where a domain has fewer.
        sizes: Images of each domain.
        near: The neighbours of a point, of those in ``points``.
        coarse: Points to begin with, if any; of the others only neighbours of those that stay
            after the first round are run at all.
        kept: Those of the points that are run on all images, however bad they are.
        progress: Called with (images run, images that will have been run if no more points leave).

    Attributes:
        finished: Score on all images, of every point that was run on all.
        left: Score of every other point when it left, and the images of each domain until then.
        runs: Images run, over all points.
    """

    points: Sequence[Point]
    sample: Callable[[Point, int], Sample]
    sizes: Sequence[int]
    near: Callable[[Point], Iterable[Point]]
    coarse: Sequence[Point] = ()
    kept: Sequence[Point] = ()
    progress: Callable[[int, int], None] | None = None
    finished: dict[Point, float] = field(default_factory=dict)
    left: dict[Point, tuple[float, int]] = field(default_factory=dict)
    runs: int = 0
    _seen: dict[Point, int] = field(default_factory=dict)

    def run(self) -> Point:
        """The best point."""
        count, last = min(FIRST, max(self.sizes)), max(self.sizes)
        active = list(self.points)
        if self.coarse and count < last:
            begun = {*self.coarse, *self.kept}
            stay = self._round([p for p in active if p in begun], count, whole=False)
            wanted = {*stay, *(other for point in stay for other in self.near(point))}
            active = [p for p in active if p in wanted]
        while count < last:
            active = self._round(active, count)
            count = min(2 * count, last)
        self._finish(active)
        while missing := [p for p in self.near(self.best) if p not in self.finished]:
            self._finish(missing)
        return self.best

    @property
    def best(self) -> Point:
        """The point of the lowest score on all images; the first one of equals."""
        return min((p for p in self.points if p in self.finished), key=self.finished.__getitem__)

    def _round(self, points: Sequence[Point], count: int, whole: bool = True) -> list[Point]:
        """The points that stay; ``whole`` says that these images are most of those there are."""
        samples = {}
        for i, point in enumerate(points):
            samples[point] = self._run(point, count, len(points) - i)
        scores = {point: _score(sample) for point, sample in samples.items()}
        best = min(points, key=scores.__getitem__)
        shares = [min(count, size) / size if whole else 0.0 for size in self.sizes]
        stay = [
            point
            for point in points
            if point in self.kept or not _worse(samples[point], samples[best], shares)
        ]
        self.left |= {p: (scores[p], count) for p in points if p not in stay}
        return stay

    def _finish(self, points: Sequence[Point]) -> None:
        """Run points on all images."""
        for i, point in enumerate(points):
            self.finished[point] = _score(self._run(point, max(self.sizes), len(points) - i))
            self.left.pop(point, None)

    def _run(self, point: Point, count: int, waiting: int) -> Sample:
        """The sample of a point, and a report; ``waiting`` points of this round are not run yet."""
        before, self._seen[point] = self._seen.get(point, 0), count
        found = self.sample(point, count)
        self.runs += self._images(count) - self._images(before)
        if self.progress:
            total = self._images(max(self.sizes))
            rest = (waiting - 1) * (total - self._images(before)) + total - self._images(count)
            self.progress(self.runs, self.runs + rest)
        return found

    def _images(self, count: int) -> int:
        return sum(min(count, size) for size in self.sizes)


def _score(sample: Sample) -> float:
    return float(np.mean([part.mean() for part in sample]))


def _worse(sample: Sample, best: Sample, shares: Sequence[float]) -> bool:
    """Whether a point is worse than the best one on all images too, by differences on these.

    ``shares`` says for each domain which part of all images these are: the mean of the rest is
    uncertain, not that of the whole.
    """
    differences = [ours - theirs for ours, theirs in zip(sample, best, strict=True)]
    worse = float(np.mean([d.mean() for d in differences]))
    variance = 0.0
    for d, share in zip(differences, shares, strict=True):
        if share < 1:
            variance += float(d.var(ddof=1)) / len(d) * (1 - share) if len(d) > 1 else math.inf
    return worse > CERTAIN * math.sqrt(variance) / len(differences)
