"""Scales of merged weights, searched on the weights themselves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..numerics.quantization import rounded
from ..numerics.spec import QuantSpec
from ..typing import Array

__all__ = ["searched_scale"]

Floats = npt.NDArray[np.float64]
_CANDIDATES = 100
# Weights of one scale that are looked at, equally spaced in order of size.
_SAMPLE = 4096
_POWER = 2.4
_SMALLEST = 1e-12
# Values at a time: they stay in a core's cache.
_BLOCK = 1 << 15
# A share 1 / (16 hi) of the values at either end bounds what saturates.
_TAIL = 16
_MARGIN = 1e-9


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
    """(channels,) scales of (channels, n) values in order of size."""
    height = max(1, _BLOCK // values.shape[1])
    cuts = [slice(first, first + height) for first in range(0, len(values), height)]
    return np.concatenate([_search_block(values[cut], spec, likely[cut]) for cut in cuts])


def _search_block(values: Floats, spec: QuantSpec, likely: Floats) -> Floats:
    """The same for channels that fit into a core's cache.

    Scales are tried from the widest down. What saturates loses more with every smaller one, so a
    channel is done as soon as that alone is above its least error: no smaller scale can be best.
    """
    widest = np.maximum(values.max(1) / spec.hi, -values.min(1) / -spec.lo if spec.lo else 0.0)
    best = np.maximum(likely, _SMALLEST)
    least = _error(values, best, spec)
    found, lowest = best.copy(), np.full(len(values), np.inf)
    tail = values.shape[1] // (_TAIL * spec.hi) + 1
    low, high = values[:, :tail], values[:, -tail:]
    left = np.arange(len(values))
    for k in range(_CANDIDATES, 0, -1):
        scale = np.maximum(widest[left] * k / _CANDIDATES, _SMALLEST)
        saturated = _beyond(low, high, scale, spec) / values.shape[1]
        open_ = saturated <= np.minimum(lowest, least)[left] * (1 + _MARGIN)
        if not open_.all():
            left, scale = left[open_], scale[open_]
            values, low, high = values[open_], low[open_], high[open_]
        if not len(left):
            break
        error = _error(values, scale, spec)
        better = error <= lowest[left]  # of equal ones the smallest
        places = left[better]
        found[places], lowest[places] = scale[better], error[better]
    return np.where(lowest < least, found, best)


def _error(values: Floats, scale: Floats, spec: QuantSpec) -> Floats:
    """Mean |w_hat - w|^2.4 of each channel."""
    wide = scale[:, None]
    off = np.abs(rounded(values / wide, spec) * wide - values)
    result: Floats = (off**_POWER).mean(1)
    return result


def _beyond(low: Floats, high: Floats, scale: Floats, spec: QuantSpec) -> Floats:
    """Sum of what saturation costs the smallest and the largest values of each channel."""
    below = np.maximum(spec.lo * scale[:, None] - low, 0.0)
    above = np.maximum(high - spec.hi * scale[:, None], 0.0)
    return np.asarray((below**_POWER).sum(1) + (above**_POWER).sum(1))
