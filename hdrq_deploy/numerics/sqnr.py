"""Signal to quantization noise."""

from __future__ import annotations

import math

__all__ = ["decibels"]

# An output of zeros has no signal; any noise is then far more than it.
_SMALLEST_SIGNAL = 1e-30


def decibels(signal: float, noise: float) -> float | None:
    """Ratio of two sums of squares in dB, two decimals; None where there is no noise.

    >>> decibels(200.0, 2.0), decibels(1.0, 0.0)
    (20.0, None)
    """
    if noise == 0:
        return None
    return round(10 * math.log10(max(signal, _SMALLEST_SIGNAL) / noise), 2)
