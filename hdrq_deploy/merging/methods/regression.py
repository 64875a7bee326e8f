"""Regression: the weights that lose least on what the parents' layers saw.

For every layer, and every group of a convolution, the merged rows W minimise
``sum_i w_i E|x_i (W - W_i)|^2`` over the inputs x_i of each parent::

    W = (sum_i w_i M_i)^-1 sum_i w_i M_i W_i        M_i = alpha G_i + (1 - alpha) diag(G_i)

G_i are the second moments of parent i's inputs, a 1 for the bias among them. A ridge pulls what
the inputs leave open towards the weighted mean: it is added to every M_i. Where BatchNorm follows
the layer, its parts hold W_i times the gains of parent i (:func:`..layers.layer_part`).

Source:
    Jin et al., Dataless knowledge fusion by merging weights of language models, ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...numerics.layer_statistics import InputStatistics
from ...numerics.moment_mixtures import LowRankMixture, PairMixture
from ...numerics.moments import Moments, SingularError, mixed, second_moments
from .base import Floats, LayerAtMix, LayerMethod, LayerPart, MergeMethod, MethodOptions
from .mean import MEAN

__all__ = ["REGRESSION"]

# A layer's share of the ridge that a group without inputs still gets.
_FLOOR = 1e-6
# A smaller share of a feature's own diagonal and Woodbury's identity loses its digits.
_OWN_SHARE = 1e-8
# More features than this and the basis that two parents share costs minutes to find.
_LARGEST_BASIS = 1200


def _prepare(
    rows: Floats, statistics: InputStatistics, bias: bool, options: MethodOptions
) -> LayerPart:
    moments = second_moments(statistics, options.alpha, bias)
    return LayerPart(rows, moments, moments.times(rows), bias)


def _merge(
    parts: Sequence[LayerPart], merge_weights: Sequence[float], options: MethodOptions
) -> Floats:
    moments = mixed([part.moments for part in parts], merge_weights)
    ridge = _ridge(moments, parts[0].bias, options.ridge)
    mean = sum(w * part.rows for part, w in zip(parts, merge_weights, strict=True))
    target = sum(w * part.product for part, w in zip(parts, merge_weights, strict=True))
    return moments.raised(ridge).solved(np.asarray(target + ridge[:, :, None] * mean))


def _kept(parts: Sequence[LayerPart], options: MethodOptions) -> LayerAtMix:
    moments, rows = [part.moments for part in parts], [part.rows for part in parts]
    bias, own = parts[0].bias, [part.moments.variances() for part in parts]
    ridges = [_ridge_of(variances, bias, options.ridge) for variances in own]

    def ridge(merge_weights: Sequence[float]) -> Floats:
        variances = sum(w * v for v, w in zip(own, merge_weights, strict=True))
        return _ridge_of(np.asarray(variances), bias, options.ridge)

    def plain(merge_weights: Sequence[float]) -> Floats:
        return _merge(parts, merge_weights, options)

    if mixed(moments, [1 / len(parts)] * len(parts)).low_rank:
        if all(_own_diagonal(m, r) for m, r in zip(moments, ridges, strict=True)):
            low = LowRankMixture(moments, rows)
            return lambda merge_weights: low.solved(merge_weights, ridge(merge_weights))
    elif len(parts) == 2 and rows[0].shape[1] <= _LARGEST_BASIS and _linear(ridges, ridge):
        try:
            return PairMixture(moments, rows, ridges).solved
        except SingularError:
            return plain  # which says at every mix why there is no solution
    return plain


def _own_diagonal(moments: Moments, ridge: Floats) -> bool:
    """Whether Woodbury's identity keeps its digits."""
    raised = moments.raised(ridge)
    return bool((raised.diagonal > _OWN_SHARE * raised.variances()).all())


def _linear(ridges: Sequence[Floats], ridge: Callable[[Sequence[float]], Floats]) -> bool:
    """Whether the ridge of a mix is the mix of the ridges: no group is without inputs."""
    return np.allclose((ridges[0] + ridges[1]) / 2, ridge([0.5, 0.5]), rtol=1e-9, atol=0)


def _ridge(moments: Moments, bias: bool, share: float) -> Floats:
    """(groups, features): a share of the mean diagonal, of the bias's own for the bias."""
    return _ridge_of(moments.variances(), bias, share)


def _ridge_of(variances: Floats, bias: bool, share: float) -> Floats:
    inputs = variances[:, :-1] if bias else variances
    each = inputs.mean(1, keepdims=True)
    each = np.maximum(each, _FLOOR * each.mean())
    # A layer whose inputs are all zero has the mean as its solution.
    ridge = share * np.broadcast_to(np.where(each > 0, each, 1.0), variances.shape)
    if bias:
        ridge = ridge.copy()
        ridge[:, -1] = share * variances[:, -1]
    return ridge


REGRESSION = MergeMethod(
    MEAN.merge,
    "least squares on the inputs that the statistics describe",
    options=("alpha", "ridge"),
    layers=LayerMethod(_prepare, _merge, _kept),
)
