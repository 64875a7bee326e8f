"""Regression: the weights that lose least on what the parents' layers saw.

For every layer, and every group of a convolution, the merged rows W minimise
``sum_i w_i E|x_i (W - W_i)|^2`` over the inputs x_i of each parent::

    W = (sum_i w_i M_i)^-1 sum_i w_i M_i W_i        M_i = alpha G_i + (1 - alpha) diag(G_i)

G_i are the second moments of parent i's inputs, a 1 for the bias among them. A ridge pulls what
the inputs leave open towards the weighted mean: it is added to every M_i.

Source:
    Jin et al., Dataless knowledge fusion by merging weights of language models, ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...numerics.layer_statistics import InputStatistics
from ...numerics.moments import Moments, mixed, second_moments
from .base import Floats, LayerMethod, LayerPart, MergeMethod, MethodOptions
from .mean import MEAN

__all__ = ["REGRESSION"]

# A layer's share of the ridge that a group without inputs still gets.
_FLOOR = 1e-6


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


def _ridge(moments: Moments, bias: bool, share: float) -> Floats:
    """(groups, features): a share of the mean diagonal, of the bias's own for the bias."""
    variances = moments.variances()
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
    layers=LayerMethod(_prepare, _merge),
)
