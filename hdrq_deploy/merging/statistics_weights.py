"""Merge weights from the statistics in bundles, without images.

A regression is solved at every point of a grid on the simplex. The statistics then say how far the
outputs of each merged layer are from those of a parent's own layer on that parent's inputs, as a
share of the outputs' variance. The point of the smallest mean share over the parents and the later
half of the layers is taken: over all layers, the choice was worse than equal weights on the digits.
``benchmarks/weights_from_statistics.py`` has what else was tried, and what merges at these weights
reach beside equal ones and beside those that images choose.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import MergeError
from ..formats.statistics import LayerRecord
from ..graph.operators import LAYERS
from ..graph.qdq import weight_name
from ..numerics.layer_matrix import rows_of, times_outputs, with_bias
from ..numerics.moments import covariance, second_moments
from ..typing import StepProgress
from .bundles import Merger, in_parallel
from .layers import LayerMerge, statistics_of
from .methods import METHODS
from .methods.base import Floats
from .weight_race import Point
from .weight_search import simplex

__all__ = [
    "PredictedWeights",
    "check_predicts",
    "layers_in_order",
    "output_errors",
    "weights_from_statistics",
]

# A parent whose outputs vary by less than this share of the parents' mean says nothing of a layer.
_NOTHING = 1e-6
# Shares that differ by less are equal, and equal merge weights are then the better choice.
_SAME = 1e-6


@dataclass(frozen=True)
class PredictedWeights:
    """What the statistics choose.

    Attributes:
        weights: The merge weights of the lowest score.
        tried: Every point with its score, a share of variance.
        layers: Weights of the layers that were looked at.
        seconds: Time that it took.
        entry: The name of its record in the manifest.
    """

    weights: Point
    tried: tuple[tuple[Point, float], ...]
    layers: tuple[str, ...]
    seconds: float
    entry: ClassVar[str] = "from_statistics"

    @property
    def summary(self) -> str:
        """Mixes, layers and seconds, for people."""
        looked = f"{len(self.tried)} mixes, {len(self.layers)} layers"
        return f"statistics: {looked} in {self.seconds:.1f} s"

    def record(self) -> dict[str, Any]:
        """The entry of the manifest: all but the seconds, so that equal merges have equal bytes."""
        return {"weights": self.weights, "tried": self.tried, "layers": self.layers}


def weights_from_statistics(
    merger: Merger, progress: StepProgress | None = None, threads: int | None = None
) -> PredictedWeights:
    """The merge weights at which the later layers of a regression lose least.

    Args:
        merger: The parents, and the method's numbers; its method is ``regression``.
        progress: Called with (layers done, layers in all).
        threads: Layers at a time; one per core by default. The result is the same.

    A regression of two parents is prepared once for all mixes. With three and more, layers of more
    than about a thousand inputs are solved anew for every mix.

    Raises:
        MergeError: Another method, parents without statistics, none of the same layers, or layers
            that are not finite or whose outputs do not vary.
    """
    began = time.monotonic()
    check_predicts(merger)
    merging = LayerMerge(
        merger.parents,
        METHODS["regression"],
        "nearest",
        merger.method_options,
        merger.parents[0].manifest.tensors,
        keep=True,
    )
    names = layers_in_order(merging)
    if not names:
        raise MergeError(
            "found no layer whose inputs all bundles have statistics of; give numbers as weights"
        )
    later = names[len(names) // 2 :]
    count = len(merger.parents)
    equal = (1 / count,) * count
    points = list(dict.fromkeys([equal, *simplex(count)]))
    errors = output_errors(merging, later, points, progress, threads)
    if np.isnan(errors).all():
        raise MergeError(
            "found no later layer whose outputs vary, by the statistics; give numbers as weights"
        )
    scores = np.nanmean(errors, axis=(1, 2))
    best = int(np.argmin(scores))
    if scores[best] >= scores[0] - _SAME:
        best = 0
    tried = tuple(
        (point, round(float(score), 6)) for point, score in zip(points, scores, strict=True)
    )
    return PredictedWeights(points[best], tried, tuple(later), time.monotonic() - began)


def check_predicts(merger: Merger) -> None:
    """Refuse parents and methods whose merge weights statistics do not predict.

    Raises:
        MergeError: A parent without statistics, or another method than regression.
    """
    for parent in merger.parents:
        statistics_of(parent)
    if merger.method != "regression":
        raise MergeError(
            f"found merge weights from statistics with method {merger.method!r} and rounding "
            f"{merger.rounding!r}; they are those of a regression: choose `method` regression and "
            "`rounding` nearest or compensated, or give numbers"
        )


def layers_in_order(merging: LayerMerge) -> list[str]:
    """Weights of the layers that all parents saw, in the order in which the graph computes."""
    layers = (n for n in merging.parents[0].graph_ir().graph if n.op_type in LAYERS)
    wanted = set(merging.weights)
    return list(dict.fromkeys(n for layer in layers if (n := weight_name(layer)) in wanted and n))


def output_errors(
    merging: LayerMerge,
    names: Sequence[str],
    points: Sequence[Sequence[float]],
    progress: StepProgress | None = None,
    threads: int | None = None,
) -> Floats:
    """Squared errors of merged layers' outputs, as shares of their variance; before rounding.

    Args:
        merging: Merges the layers; asked to keep their systems, it is faster.
        names: Weights of the layers.
        points: Merge weights, one sequence for each merge.
        progress: Called with (layers done, layers in all).
        threads: Layers at a time; one per core by default.

    Returns:
        (points, parents, layers). Where BatchNorm follows a layer, outputs are those behind it, and
        the shift of their mean is left out. NaN where a parent's outputs hardly vary, as those of
        a layer that saw zeros.
    """
    found: dict[str, Floats] = {}

    def one(name: str) -> None:
        record = merging.record(name)
        assert record is not None
        # One layer's system is in memory at a time, on every thread.
        found[name] = _errors(merging.apart(), name, record, points)
        if progress:
            progress(len(found), len(names))

    in_parallel(one, names, threads)
    return np.stack([found[name] for name in names], 2)


def _errors(
    merging: LayerMerge,
    name: str,
    record: LayerRecord,
    points: Sequence[Sequence[float]],
) -> Floats:
    """(points, parents) of one layer."""
    inputs = merging.inputs_of(name)
    spreads = [covariance([part], [1.0]) for part in inputs]
    own = [rows_of(w.astype(np.float64), record) for w in merging.weights_of(name)]
    norm = merging.norm_at(name, points[0])
    if norm is not None:
        own = [times_outputs(rows, gain) for rows, gain in zip(own, norm.gains, strict=True)]
    energies = np.asarray([(r * s.times(r)).sum() for r, s in zip(own, spreads, strict=True)])
    moments, bias = spreads, None
    if norm is None:
        bias = record.bias
        moments = [second_moments(part, 1.0, bias is not None) for part in inputs]
    if bias is not None:
        biases = [parent.tensor(bias) for parent in merging.parents]
        own = [with_bias(rows, each) for rows, each in zip(own, biases, strict=True)]
    found = []
    for point in points:
        real = merging.real(name, point)
        merged = with_bias(rows_of(real.weight, record), None if bias is None else real.bias)
        if (norm := merging.norm_at(name, point)) is not None:
            gain = norm.gain
            if not real.behind:  # its variance is corrected
                moments_now = merging.moments(name, real.weight, point, behind=False)
                gain = norm.norm.gain({**norm.tensors, **moments_now})
            merged = times_outputs(merged, gain)
        away = [merged - rows for rows in own]
        found.append([(e * m.times(e)).sum() for e, m in zip(away, moments, strict=True)])
    errors = np.asarray(found)
    if not (np.isfinite(energies).all() and np.isfinite(errors).all()):
        raise MergeError(
            f"{name}: found NaN or infinity in its weights or statistics; calibrate the bundles "
            "again, or give numbers as weights"
        )
    return errors / np.where(energies > _NOTHING * energies.mean(), energies, np.nan)
