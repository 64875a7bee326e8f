"""Intervals of accuracies over three sources of spread, and paired tests between methods.

A figure of a method is a mean over calibration seeds of means over rounding seeds; each of those
is a harmonic mean over domains of the accuracy, or the mean intersection over union, on the test
images. The three sources are resampled apart and their deviations added: the *images* of every
domain, the same for all runs; the *rounding* seeds of every calibration seed; and the *calibration*
seeds, less what the rounding within them explains. Seeds are few, so n - 1 of n are drawn, which
makes the variance that of a mean of n (Rao and Wu, JASA 1988), and each deviation is divided by
the root of chi-squared over its degrees of freedom, as in Student's t. A source of which there is
one seed adds nothing, and the record says how many there were.

Measurements of one run are ``{domain: (N,)}`` of 0 and 1, right or wrong, or for mean intersection
over union ``{domain: (N, classes, 3)}`` counts of pixels: hits, labelled, predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb, sqrt

import numpy as np

from ..typing import Array

__all__ = [
    "Bootstrap",
    "Difference",
    "Interval",
    "Sample",
    "figure",
    "mcnemar",
    "swap_test",
]

Measured = Mapping[str, Array]
_CHUNK = 256


def figure(measured: Measured) -> float:
    """The harmonic mean over the domains of one run, in 0 to 1."""
    return float(_harmonic([_metric(counts.sum(0), len(counts)) for counts in measured.values()]))


def _metric(total: Array, images: int) -> Array:
    """Accuracy of sums (...,), or mean IoU of sums (..., classes, 3)."""
    if total.ndim < 2 or total.shape[-1] != 3:
        return np.asarray(total / images)
    hits, labelled, predicted = (total[..., i] for i in range(3))
    union = labelled + predicted - hits
    known = union > 0
    shares = np.divide(hits, union, out=np.zeros(union.shape), where=known)
    return np.asarray(shares.sum(-1) / np.maximum(known.sum(-1), 1))


def _harmonic(values: Sequence[Array]) -> Array:
    """Harmonic mean over the first axis; 0 where one of them is 0."""
    stacked = np.stack([np.asarray(value, float) for value in values])
    safe = np.where(stacked > 0, stacked, 1.0)
    mean = len(stacked) / (1 / safe).sum(0)
    return np.asarray(np.where((stacked > 0).all(0), mean, 0.0))


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval, in 0 to 1.

    Attributes:
        value: The figure.
        low: Its 2.5% limit.
        high: Its 97.5% limit.
        spread: Standard deviation that each source adds: images, rounding, calibration.
        calibrations: Calibration seeds that it stands on.
    """

    value: float
    low: float
    high: float
    spread: Mapping[str, float]
    calibrations: int

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference(Interval):
    """A figure less another one on the same images.

    Attributes:
        p: Two-sided; of one run each it is the probability of the difference where the two runs
            are swapped image by image, else that of the bootstrap.
        is_exact: Whether ``p`` is of one run each. It then says nothing of other seeds.
    """

    p: float = 1.0
    is_exact: bool = False

    @property
    def wins(self) -> bool:
        """Whether the first is better outside the interval, over two calibration seeds or more."""
        return self.low > 0 and self.calibrations > 1


@dataclass(frozen=True)
class Sample:
    """What a method measured, resampled.

    Attributes:
        runs: Measurements by calibration seed, one for each rounding seed.
        images: Deviation of the figure in every replicate of the images, (replicates,).
        figures: Figures by calibration seed, one for each rounding seed.
    """

    runs: Mapping[int, Sequence[Measured]]
    images: Array
    figures: Mapping[int, Array]

    @property
    def means(self) -> dict[int, float]:
        """The mean over rounding seeds of every calibration seed."""
        return {seed: float(values.mean()) for seed, values in self.figures.items()}

    @property
    def value(self) -> float:
        """The mean over calibration seeds."""
        return float(np.mean(list(self.means.values())))

    @property
    def within(self) -> float:
        """Variance that rounding seeds leave in the mean of one calibration seed."""
        parts = [v.var(ddof=1) / len(v) if len(v) > 1 else 0.0 for v in self.figures.values()]
        return float(np.mean(parts))


@dataclass
class Bootstrap:
    """Replicates of test images that all methods share, so that differences are paired.

    Attributes:
        replicates: How many.
        seed: Seed of all draws.
    """

    replicates: int = 2000
    seed: int = 0
    _weights: dict[tuple[str, int], Array] = field(default_factory=dict)

    def sample(self, runs: Mapping[int, Sequence[Measured]]) -> Sample:
        """Resample the images of all runs of a method.

        Args:
            runs: Measurements by calibration seed, one for each rounding seed, one at least.
        """
        figures, images = {}, np.zeros(self.replicates)
        for seed, drawn in runs.items():
            figures[seed] = np.array([figure(measured) for measured in drawn])
            for measured, value in zip(drawn, figures[seed], strict=True):
                images += (self._resampled(measured) - value) / (len(runs) * len(drawn))
        return Sample(runs, images, figures)

    def interval(self, sample: Sample) -> Interval:
        """The figure of a method and its interval, within 0 to 1."""
        value, means = sample.value, list(sample.means.values())
        parts = self._parts(sample.images, means, sample.within, [sample])
        low, high, spread = _limits(value, parts)
        return Interval(value, max(low, 0.0), min(high, 1.0), spread, len(means))

    def difference(self, first: Sample, second: Sample) -> Difference:
        """How much better the first is, on the same images.

        Calibration seeds are paired where both have the same ones, else drawn apart. Rounding
        seeds are drawn apart, since draws of different codes have nothing in common.
        """
        value, images = first.value - second.value, first.images - second.images
        a, b = first.means, second.means
        if a.keys() == b.keys():
            within = first.within + second.within
            parts = self._parts(images, [a[s] - b[s] for s in a], within, [first, second])
        else:
            parts = self._parts(images, list(a.values()), first.within, [first, second])
            more = self._parts(images, list(b.values()), second.within, [], salt=1)
            parts["calibration"] = parts["calibration"] - more["calibration"]
        low, high, spread = _limits(value, parts)
        seeds = min(len(a), len(b))
        runs = [run for sample in (first, second) for r in sample.runs.values() for run in r]
        if len(runs) == 2:
            p = swap_test(runs[0], runs[1], seed=self.seed)
            return Difference(value, low, high, spread, seeds, p, True)
        moved = value + np.sum(list(parts.values()), axis=0)
        beyond = min(np.count_nonzero(moved <= 0), np.count_nonzero(moved >= 0))
        p = min(1.0, 2 * (beyond + 1) / (self.replicates + 1))
        return Difference(value, low, high, spread, seeds, p)

    def winner(self, samples: Sequence[Sample]) -> int | None:
        """The one that is better than every other one outside its interval; None if none is."""
        if len(samples) < 2:
            return None
        best = int(np.argmax([sample.value for sample in samples]))
        others = [sample for i, sample in enumerate(samples) if i != best]
        return best if all(self.difference(samples[best], o).wins for o in others) else None

    def _resampled(self, measured: Measured) -> Array:
        """The figure of one run in every replicate, (replicates,)."""
        parts = []
        for name, counts in measured.items():
            weights = self._weights_of(name, len(counts))
            totals = weights @ counts.reshape(len(counts), -1).astype(np.float32)
            shape = (self.replicates, *counts.shape[1:])
            parts.append(_metric(totals.astype(float).reshape(shape), len(counts)))
        return _harmonic(parts)

    def _weights_of(self, domain: str, images: int) -> Array:
        """How often each image of a domain is drawn, (replicates, N) float32."""
        key = (domain, images)
        if key not in self._weights:
            rng = np.random.default_rng([self.seed, images, *domain.encode()])
            rows = [
                np.bincount(rng.integers(images, size=images), minlength=images)
                for _ in range(self.replicates)
            ]
            self._weights[key] = np.array(rows, np.float32)
        return self._weights[key]

    def _parts(
        self,
        images: Array,
        means: Sequence[float],
        within: float,
        rounded: Sequence[Sample],
        salt: int = 0,
    ) -> dict[str, Array]:
        """Deviations by source in every replicate."""
        rng = np.random.default_rng([self.seed, salt, len(means)])
        values = np.array(means)
        between = float(values.var(ddof=1)) if len(values) > 1 else 0.0
        left = sqrt(max(0.0, 1 - within / between)) if between > 0 else 0.0
        rounding = np.zeros(self.replicates)
        for sign, sample in zip((1, -1), rounded, strict=False):
            rounding = rounding + sign * self._rounding(rng, sample)
        return {
            "images": images,
            "rounding": rounding,
            "calibration": left * _few(rng, [values], self.replicates),
        }

    def _rounding(self, rng: np.random.Generator, sample: Sample) -> Array:
        return _few(rng, list(sample.figures.values()), self.replicates)


def _few(rng: np.random.Generator, groups: Sequence[Array], replicates: int) -> Array:
    """Deviations of the mean of group means, n - 1 of the n values of each group drawn."""
    free = sum(len(values) - 1 for values in groups)
    result = np.zeros(replicates)
    if not free:
        return result
    for values in groups:
        if len(values) > 1:
            places = rng.integers(len(values), size=(replicates, len(values) - 1))
            result += (values[places].mean(1) - values.mean()) / len(groups)
    return np.asarray(result * np.sqrt(free / rng.chisquare(free, replicates)))


def _limits(value: float, parts: Mapping[str, Array]) -> tuple[float, float, dict[str, float]]:
    low, high = np.quantile(value + sum(parts.values()), (0.025, 0.975))
    return float(low), float(high), {name: float(part.std()) for name, part in parts.items()}


def mcnemar(first: Array, second: Array) -> float:
    """Exact two-sided p of two classifiers on the same images (McNemar, 1947, by the binomial).

    Args:
        first: 0 or 1 for each image.
        second: The same of the other one.
    """
    better = int(((first > 0) & (second == 0)).sum())
    worse = int(((first == 0) & (second > 0)).sum())
    apart = better + worse
    tail = sum(comb(apart, k) for k in range(min(better, worse) + 1))
    return float(min(1.0, tail * 2 / 2**apart))


def swap_test(first: Measured, second: Measured, draws: int = 5000, seed: int = 0) -> float:
    """Two-sided p of two runs on the same images: the two are swapped image by image.

    Of one domain and right or wrong it is :func:`mcnemar`'s; else the figure of ``draws`` random
    swaps is compared, the observed one counted among them.
    """
    if len(first) == 1:
        ((name, own),) = first.items()
        if own.ndim == 1:
            return mcnemar(own, second[name])
    rng = np.random.default_rng(seed)
    observed = abs(figure(first) - figure(second))
    beyond = done = 0
    while done < draws:
        count = min(_CHUNK, draws - done)
        parts: tuple[list[Array], list[Array]] = ([], [])
        for name, own in first.items():
            swaps = rng.integers(2, size=(count, len(own))).astype(float)
            a, b = (rows.reshape(len(rows), -1).astype(float) for rows in (own, second[name]))
            shift = (swaps @ (b - a)).reshape(count, *own.shape[1:])
            parts[0].append(_metric(own.sum(0) + shift, len(own)))
            parts[1].append(_metric(second[name].sum(0) - shift, len(own)))
        gaps = np.abs(_harmonic(parts[0]) - _harmonic(parts[1]))
        beyond, done = beyond + int((gaps >= observed - 1e-12).sum()), done + count
    return (beyond + 1) / (draws + 1)
