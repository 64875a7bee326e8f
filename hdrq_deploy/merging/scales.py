"""Scales of merged weights, searched on the weights themselves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..numerics.spec import QuantSpec
from ..typing import Array

__all__ = ["searched_scale"]

Floats = npt.NDArray[np.float64]
_CANDIDATES = 100
# Weights of one scale that are looked at, equally spaced in order of size.
_SAMPLE = 4096
_POWER = 2.4
_SMALLEST = 1e-12


def searched_scale(
    weight: Array, spec: QuantSpec, likely: Array, per_channel: bool
) -> npt.NDArray[np.float32]:
    """The scale that minimises mean |w_hat - w|^2.4, out of fractions of the widest and ``likely``.

    Args:
        weight: Merged real weights.
        spec: Range and axis of the codes.
        likely: The mean of the parents' scales, () or (weight.shape[axis],).
        per_channel: One scale for every channel; else one for all, whatever the shape.

    Returns:
        float32, > 0, of the shape of ``likely``.
    """
    if per_channel and spec.axis is not None:
        channels = np.moveaxis(weight, spec.axis, 0).reshape(weight.shape[spec.axis], -1)
        guess = np.broadcast_to(likely, (len(channels),)).astype(np.float64)
    else:
        channels = weight.reshape(1, -1)
        guess = np.asarray(likely, np.float64).reshape(-1)[:1]
    some = _sample(channels.astype(np.float64))
    best = _search(some, spec, guess)
    result: npt.NDArray[np.float32] = np.empty(likely.shape, np.float32)
    result[...] = best if len(best) > 1 or not likely.ndim else best[0]
    return result if likely.ndim else np.asarray(np.float32(best[0]))


def _sample(channels: Floats) -> Floats:
    """Weights of each channel in order of size, the smallest and the largest among them."""
    count = channels.shape[1]
    ordered = np.sort(channels, axis=1)
    if count <= _SAMPLE:
        return ordered
    places = np.rint(np.linspace(0, count - 1, _SAMPLE)).astype(np.int64)
    result: Floats = ordered[:, places]
    return result


def _search(values: Floats, spec: QuantSpec, likely: Floats) -> Floats:
    """(channels,) scales of (channels, n) values."""
    widest = np.maximum(values.max(1) / spec.hi, -values.min(1) / -spec.lo if spec.lo else 0.0)
    least = np.full(len(values), np.inf)
    best = np.maximum(likely, _SMALLEST)
    fractions = [best, *(widest * k / _CANDIDATES for k in range(1, _CANDIDATES + 1))]
    for scale in fractions:
        usable = np.maximum(scale, _SMALLEST)[:, None]
        off = np.abs(np.rint(values / usable).clip(spec.lo, spec.hi) * usable - values)
        error = (off**_POWER).mean(1)
        better = error < least
        best, least = np.where(better, usable[:, 0], best), np.where(better, error, least)
    return best
