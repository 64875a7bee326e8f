"""E4M3: the 8-bit floating-point numbers that FP8 kernels multiply.

A sign, 4 bits of exponent, 3 of mantissa; no infinity. The spacing of the numbers grows with their
size: 2^-9 below 2^-6, 32 at the largest, 448. A code of a tensor is such a number, and the real
value is scale * code as with integers. Where codes are counted or compared, each number has a
*place*: 0 for 0, then 1, 2, ... upwards and -1, -2, ... downwards, 126 for 448. Rounding to the
nearest number, ties to the even mantissa, is rounding to the nearest place, ties to the even one.

Source:
    Micikevicius et al., FP8 Formats for Deep Learning, 2022 (arXiv 2209.05433); ONNX calls it
    FLOAT8E4M3FN.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["DTYPE", "LARGEST", "MOST", "NAME", "nearest", "numbers", "places", "spacing"]

# Name of the type in manifests, in NumPy and in PyTorch.
NAME = "float8_e4m3fn"
DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)
# The largest number, and its place.
LARGEST, MOST = 448, 126
_MANTISSA, _SMALLEST_EXPONENT = 3, -6

Array = npt.NDArray[Any]


def nearest(x: Array) -> Array:
    """The nearest numbers, ties to the even mantissa, saturated; dtype of ``x``.

    >>> nearest(np.array([17.0, 19.0, -1000.0]))
    array([  16.,   20., -448.])
    """
    return np.clip(x, -LARGEST, LARGEST).astype(DTYPE).astype(x.dtype)


def places(codes: Array) -> npt.NDArray[np.int16]:
    """The places of numbers: of type :data:`DTYPE`, or real values that lie on the grid.

    >>> places(np.array([0.0, 2.0**-9, -2.0**-9, 448.0]))
    array([  0,   1,  -1, 126], dtype=int16)
    """
    bits = np.asarray(codes).astype(DTYPE).view(np.uint8)
    size = (bits & 0x7F).astype(np.int16)
    return np.where(bits & 0x80, -size, size).astype(np.int16)


def numbers(places: Array) -> npt.NDArray[np.float32]:
    """The numbers at places of -126 to 126, as float32.

    >>> numbers(np.array([1, 8, 126]))
    array([1.953125e-03, 1.562500e-02, 4.480000e+02], dtype=float32)
    """
    size = np.abs(places).astype(np.uint8).view(DTYPE).astype(np.float32)
    signed: npt.NDArray[np.float32] = np.where(np.asarray(places) < 0, -size, size)
    return signed


def spacing(x: Array) -> Array:
    """The distance of neighbouring numbers around real values ``x``; dtype of ``x``."""
    _, exponent = np.frexp(np.clip(x, -LARGEST, LARGEST))
    widths: Array = np.ldexp(
        np.ones_like(x), np.maximum(exponent - 1, _SMALLEST_EXPONENT) - _MANTISSA
    )
    return widths
