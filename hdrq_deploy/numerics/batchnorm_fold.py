"""BatchNorm behind a convolution or linear, folded into the scales of its weight.

Averaging weights that have BatchNorm folded into them is not averaging the models. With BatchNorm
folded into the scales a bundle keeps what a merge should average (codes and scale of the raw
weight, and BatchNorm's own four tensors), and the graph reads what follows from them::

    gain = gamma / sqrt(variance + eps)
    scale = raw_scale * gain          bias = beta + (raw_bias - mean) * gain

A negative gamma would give a negative scale. It is made positive by changing the sign of that
channel's raw weight, bias and mean, which leaves the function as it was.
"""

from __future__ import annotations

import numpy as np

from ..typing import Array

__all__ = ["BLIND_GAIN", "SMALLEST_GAIN", "gain", "graph_tensors"]

# A channel that BatchNorm switches off still needs a scale > 0.
SMALLEST_GAIN = 1e-12
# A channel that is multiplied by less shows nothing of its weight and its mean.
BLIND_GAIN = 1e-6


def gain(gamma: Array, variance: Array, eps: float) -> Array:
    """What BatchNorm multiplies each channel by, float64, at least ``SMALLEST_GAIN``."""
    result: Array = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + eps)
    return np.maximum(result, SMALLEST_GAIN)


def graph_tensors(
    raw_scale: Array,
    gamma: Array,
    beta: Array,
    mean: Array,
    variance: Array,
    eps: float,
    raw_bias: Array | None = None,
    smallest: Array | None = None,
) -> tuple[Array, Array]:
    """The scale and bias that the graph reads.

    Args:
        raw_scale: Scale of the raw weight, (C,) or ().
        gamma: BatchNorm's weight, >= 0, (C,).
        beta: BatchNorm's bias, (C,).
        mean: Running mean, (C,).
        variance: Running variance, (C,).
        eps: Added to the variance.
        raw_bias: The layer's own bias, (C,).
        smallest: Smallest scale of each channel, (C,); the gain is raised where it would be less.

    Returns:
        Scale and bias, (C,) float32.

    >>> one = np.ones(1, np.float32)
    >>> graph_tensors(one / 4, 2 * one, 0 * one, 3 * one, one, 0.0)
    (array([0.5], dtype=float32), array([-6.], dtype=float32))
    """
    factor = gain(gamma, variance, eps)
    if smallest is not None:
        factor = np.maximum(factor, smallest / raw_scale.astype(np.float64))
    shift = (0.0 if raw_bias is None else raw_bias.astype(np.float64)) - mean.astype(np.float64)
    scale = raw_scale.astype(np.float64) * factor
    bias = beta.astype(np.float64) + shift * factor
    return scale.astype(np.float32), np.asarray(bias).astype(np.float32)
