"""The weighted mean of the parents' parameters: sum_i w_i theta_i."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...typing import Array
from .base import Floats, MergeMethod, MethodOptions

__all__ = ["MEAN", "matched_variance", "weighted_mean"]


def weighted_mean(
    values: Sequence[Array], merge_weights: Sequence[float], dtype: Any = np.float32
) -> Array:
    """sum_i w_i * values_i, computed in float64.

    Args:
        values: One array per parent, all of one shape.
        merge_weights: One per parent, sum 1.
        dtype: Data type of the result.

    Returns:
        The mean as ``dtype``. Where all values are equal, the first one as it is, so that no
        rounding error is added.
    """
    if all(np.array_equal(value, values[0]) for value in values):
        return values[0]
    total = sum(w * v.astype(np.float64) for w, v in zip(merge_weights, values, strict=True))
    return np.asarray(total).astype(dtype)


def matched_variance(
    variances: Sequence[Array],
    means: Sequence[Array],
    merge_weights: Sequence[float],
    dtype: Any = np.float32,
) -> Array:
    """Variance of the mixture: sum_i w_i * (variance_i + (mean_i - mean)^2).

    Args:
        variances: One array per parent, all of one shape.
        means: The means that belong to them, of the same shape.
        merge_weights: One per parent, sum 1.
        dtype: Data type of the result.

    Source:
        Li et al., ECCV 2024, on merging BatchNorm of models of several domains.
    """
    wide = [mean.astype(np.float64) for mean in means]
    centre = sum(w * mean for w, mean in zip(merge_weights, wide, strict=True))
    spread = [
        v.astype(np.float64) + (mean - centre) ** 2 for v, mean in zip(variances, wide, strict=True)
    ]
    return weighted_mean(spread, merge_weights, dtype).astype(dtype)


def _merge(
    tensors: Sequence[Floats],
    merge_weights: Sequence[float],
    base: Floats | None,
    options: MethodOptions,
) -> Floats:
    return weighted_mean(tensors, merge_weights, np.float64)


MEAN = MergeMethod(_merge, "weighted mean of the parameters", is_mean=True)
