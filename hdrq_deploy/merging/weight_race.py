"""The point of the lowest mean over images, found without running every point on every image.

All points are run on the same images, so two points are compared by their differences image by
image, which vary far less than their scores. In every round the points that are left are run on
twice as many images as before, and a point leaves as soon as it is worse than the best one by
``LIKELY`` standard errors of that difference. A coarser grid of points, where there is one, races
first, and of the others only the neighbours of what is left of it. What is left after the last
round is run on all images. Then the neighbours of the best point come back, until none of them is
better: each is run on twice as many images until it is worse than the best by ``CERTAIN`` standard
errors, or has seen all of them.

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

from ..typing import StepProgress

__all__ = ["CERTAIN", "FIRST", "LIKELY", "Point", "Race", "Sample"]

Point = tuple[float, ...]
# Each image's part of the score, an array (N,) for every domain; the score of a point is the mean
# over domains of the mean over images.
Sample = Sequence[npt.NDArray[np.float64]]
# Images of each domain in the first round, and the standard errors that make a point worse: few of
# them cost images, a point that leaves by mistake costs the best choice. How often these choose as
# all points on all images do is in ``weight_search.json`` of the evidence.
FIRST = 16
LIKELY = 1.5
CERTAIN = 3.0


@dataclass
class Race:
    """A race between points.

    Args:
        points: The points to choose from.
        sample: Called with a point and a number of images; gives the parts of the first that many
            images of every domain, of all where a domain has fewer. Numbers may fall again.
        sizes: Images of each domain.
        near: The neighbours of a point, of those in ``points``.
        coarse: Points that race first, if any; of the others only neighbours of those that stay
            are run at all.
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
    progress: StepProgress | None = None
    finished: dict[Point, float] = field(default_factory=dict)
    left: dict[Point, tuple[float, int]] = field(default_factory=dict)
    runs: int = 0
    _seen: dict[Point, int] = field(default_factory=dict)
    _worse: set[tuple[Point, Point]] = field(default_factory=set)

    def run(self) -> Point:
        """The best point."""
        active = list(self.points)
        if self.coarse and max(self.sizes) > FIRST:
            begun = {*self.coarse, *self.kept}
            stay = self._rounds([p for p in active if p in begun], whole=False)
            wanted = {*stay, *(other for point in stay for other in self.near(point))}
            active = [p for p in active if p in wanted]
        self._finish(self._rounds(active))
        while waiting := [p for p in self.near(self.best) if not self._is_judged(p)]:
            for i, point in enumerate(waiting):
                self._judge(point, len(waiting) - i)
        if self.progress:
            self.progress(self.runs, self.runs)
        return self.best

    @property
    def best(self) -> Point:
        """The point of the lowest score on all images; the first one of equals."""
        return min((p for p in self.points if p in self.finished), key=self.finished.__getitem__)

    def _rounds(self, points: Sequence[Point], whole: bool = True) -> Sequence[Point]:
        """The points that stay, on more and more images, before any is run on all of them.

        ``whole`` says that what is found on all images decides; else it is one more sample.
        """
        count, last = FIRST, max(self.sizes)
        while count < last:
            points = self._round(points, count, whole)
            count *= 2
        return points

    def _round(self, points: Sequence[Point], count: int, whole: bool) -> list[Point]:
        samples = {}
        for i, point in enumerate(points):
            samples[point] = self._run(point, count, len(points) - i)
        best = min(points, key=lambda point: _score(samples[point]))
        shares = self._shares(count) if whole else [0.0] * len(self.sizes)
        stay = []
        for point in points:
            worse = _is_worse(samples[point], samples[best], shares, LIKELY)
            if worse and point not in self.kept:
                self._leave(point)
            else:
                stay.append(point)
        return stay

    def _leave(self, point: Point) -> None:
        count = self._seen[point]
        self.left[point] = (_score(self.sample(point, count)), count)

    def _finish(self, points: Sequence[Point]) -> None:
        """Run points on all images."""
        for i, point in enumerate(points):
            self.finished[point] = _score(self._run(point, max(self.sizes), len(points) - i))
            self.left.pop(point, None)

    def _is_judged(self, point: Point) -> bool:
        """Whether a point was run on all images, or is certainly worse than the best one."""
        return point in self.finished or (point, self.best) in self._worse

    def _judge(self, point: Point, waiting: int) -> None:
        """Run a point on more and more images, to the end or until it is certainly worse."""
        best, last = self.best, max(self.sizes)
        whole = self.sample(best, last)
        count = min(max(FIRST, self._seen.get(point, 0)), last)
        while count < last:
            sample = self._run(point, count, waiting)
            part = [rows[:count] for rows in whole]
            if _is_worse(sample, part, self._shares(count), CERTAIN):
                self._leave(point)
                self._worse.add((point, best))
                return
            count = min(2 * count, last)
        self._finish([point])

    def _shares(self, count: int) -> list[float]:
        """Which part of all images of each domain so many are."""
        return [min(count, size) / size for size in self.sizes]

    def _run(self, point: Point, count: int, waiting: int) -> Sample:
        """The sample of a point, and a report; ``waiting`` points of this round are not run yet."""
        before = self._seen.get(point, 0)
        after = self._seen[point] = max(before, count)
        found = self.sample(point, count)
        self.runs += self._images(after) - self._images(before)
        if self.progress:
            total = self._images(max(self.sizes))
            rest = (waiting - 1) * (total - self._images(before)) + total - self._images(after)
            self.progress(self.runs, self.runs + rest)
        return found

    def _images(self, count: int) -> int:
        return sum(min(count, size) for size in self.sizes)


def _score(sample: Sample) -> float:
    return float(np.mean([part.mean() for part in sample]))


def _is_worse(sample: Sample, best: Sample, shares: Sequence[float], errors: float) -> bool:
    """Whether a point is worse than the best one on all images too, by differences on these.

    ``shares`` says for each domain which part of all images these are: the mean of the rest is
    uncertain, not that of the whole. ``errors`` is how many standard errors make a point worse.
    """
    differences = [ours - theirs for ours, theirs in zip(sample, best, strict=True)]
    worse = float(np.mean([d.mean() for d in differences]))
    variance = 0.0
    for d, share in zip(differences, shares, strict=True):
        if share < 1:
            variance += float(d.var(ddof=1)) / len(d) * (1 - share) if len(d) > 1 else math.inf
    return worse > errors * math.sqrt(variance) / len(differences)
