"""Activation scales of a merged model, from those of its parents.

``mean``        the weighted mean, as published;
``max``         the largest of the parents': no parent's range is cut;
``statistics``  searched on the weighted histogram of the values that the parents saw, as a
                calibration searches its first scales on its images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import MergeError
from ..formats.bundle import Bundle
from ..formats.bundle_manifest import Activation
from ..formats.statistics import Histogram
from ..numerics.quantization import rounded
from ..numerics.spec import QuantSpec
from .merged_statistics import merged_histogram
from .methods.mean import weighted_mean

__all__ = ["ACTIVATION_SCALES", "ActivationScales", "check_activation_scales", "histogram_scale"]

_CANDIDATES, _POWER = 100, 2.4

Scale = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ActivationScales:
    """A way to merge activation scales, as the table ``ACTIVATION_SCALES`` holds it.

    Attributes:
        summary: One line for the command's help.
        merged: The merged scale, from (the parents, their scales, the merge weights, the
            activation).
        needs_statistics: Whether the parents must hold histograms.
    """

    summary: str
    merged: Callable[[Sequence[Bundle], Sequence[Scale], Sequence[float], Activation], Scale]
    needs_statistics: bool = False


def histogram_scale(histogram: Histogram, lo: int, hi: int) -> Scale:
    """The scale that minimises mean |x_hat - x|^2.4 of a histogram's values, shape ().

    Args:
        histogram: Values of an activation; those of a bin count as its middle.
        lo, hi: Lowest and highest code.
    """
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    values, counts = (edges[1:] + edges[:-1]) / 2, histogram.counts.astype(np.float64)
    widest = max(histogram.high / hi, histogram.low / lo if lo else 0.0, 1e-30)
    scales = widest * np.arange(1, _CANDIDATES + 1)[:, None] / _CANDIDATES
    off = np.abs(rounded(values / scales, QuantSpec(8, lo, hi)) * scales - values)
    best = float(scales[int(np.argmin((off**_POWER) @ counts)), 0])
    # An activation of zeros has no range; any normal scale represents it.
    return np.array(best if best > 1e-20 else 1e-6, np.float32)


def _mean(
    parents: Sequence[Bundle],
    scales: Sequence[Scale],
    merge_weights: Sequence[float],
    activation: Activation,
) -> Scale:
    return np.asarray(weighted_mean(scales, merge_weights), np.float32)


def _max(
    parents: Sequence[Bundle],
    scales: Sequence[Scale],
    merge_weights: Sequence[float],
    activation: Activation,
) -> Scale:
    used = [s for s, weight in zip(scales, merge_weights, strict=True) if weight > 0]
    return np.asarray(np.max(used, axis=0), np.float32)


def _statistics(
    parents: Sequence[Bundle],
    scales: Sequence[Scale],
    merge_weights: Sequence[float],
    activation: Activation,
) -> Scale:
    seen = [
        statistics.histogram(activation.scale)
        for statistics in (parent.statistics() for parent in parents)
        if statistics is not None and activation.scale in statistics.record.histograms
    ]
    if len(seen) < len(parents):
        raise MergeError(
            f"found no histogram of {activation.module} in some of the bundles; needed those of "
            "all for `activation_scales` statistics: calibrate again, or choose mean"
        )
    return histogram_scale(merged_histogram(seen, merge_weights), activation.lo, activation.hi)


ACTIVATION_SCALES: dict[str, ActivationScales] = {
    "mean": ActivationScales("the weighted mean", _mean),
    "max": ActivationScales("the largest", _max),
    "statistics": ActivationScales(
        "searched on what the parents saw", _statistics, needs_statistics=True
    ),
}


def check_activation_scales(name: str) -> None:
    """Refuse a name that the table does not have.

    Raises:
        MergeError: Says which there are.
    """
    if name not in ACTIVATION_SCALES:
        raise MergeError(
            f"found activation_scales {name!r}; choose one of {', '.join(ACTIVATION_SCALES)}"
        )
