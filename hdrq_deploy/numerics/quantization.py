"""Codes and real values in NumPy: the arithmetic reference of the toolkit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SpecError
from .spec import QuantSpec

__all__ = ["along", "dequantize", "pack_int4", "quantize", "search_scale", "unpack_int4"]

Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.int8]


def along(scale: Floats, ndim: int, axis: int | None) -> Floats:
    """Reshape a per-channel scale (C,) so that it broadcasts along ``axis`` of ``ndim``."""
    if axis is None or scale.ndim == 0:
        return scale
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def quantize(x: Floats, scale: Floats, spec: QuantSpec) -> npt.NDArray[np.int16]:
    """Divide by the scale, round to the nearest code (ties to even), saturate.

    Args:
        x: Real values, any shape.
        scale: Real value of one code step, > 0; shape () per tensor,
            (x.shape[axis],) per channel.
        spec: Range of codes and axis.

    Returns:
        Codes, shape of ``x``; int16, because the grid ``paper`` reaches 255.

    Raises:
        SpecError: ``scale`` has another shape or is not > 0.

    Source:
        ONNX QuantizeLinear: onnx.ai/onnx/operators/onnx__QuantizeLinear.html

    >>> quantize(np.array([0.5, 1.5, -200]), np.array(1.0), QuantSpec.weight(8))
    array([   0,    2, -128], dtype=int16)
    """
    needed = () if spec.axis is None else (x.shape[spec.axis],)
    if scale.shape != needed or not (scale > 0).all():
        lowest = float(scale.min()) if scale.size else float("nan")
        raise SpecError(
            f"found a scale of shape {scale.shape} with minimum {lowest:g}; values of shape "
            f"{x.shape} on axis {spec.axis} need shape {needed}, all > 0: calibrate again"
        )
    rounded = np.rint(x / along(scale, x.ndim, spec.axis))
    return np.clip(rounded, spec.lo, spec.hi).astype(np.int16)


def dequantize(codes: npt.NDArray[Any], scale: Floats, axis: int | None) -> Floats:
    """Real values of ``codes``: scale * code, dtype of the scale."""
    real: Floats = codes.astype(scale.dtype) * along(scale, codes.ndim, axis)
    return real


def search_scale(
    x: Floats, spec: QuantSpec, candidates: int = 100, power: float = 2.4
) -> npt.NDArray[np.float32]:
    """One step for ``x`` that minimises mean |x_hat - x|^power over ``candidates`` ranges.

    Args:
        x: Real values, any shape.
        spec: Range of the codes; its axis is not looked at.
        candidates: Fractions 1/candidates, ... 1 of the largest magnitude are tried.
        power: Exponent of the error.

    Returns:
        A step > 0, shape ().

    Source:
        Initialisation of BRECQ and QDrop (Li et al., ICLR 2021; Wei et al., ICLR 2022).
    """
    widest = max(float(x.max()) / spec.hi, float(-x.min()) / -spec.lo if spec.lo else 0.0, 1e-30)
    steps = widest * np.arange(1, candidates + 1) / candidates
    flat = x.astype(np.float64).ravel()
    errors = [
        float((np.abs(np.clip(np.rint(flat / s), spec.lo, spec.hi) * s - flat) ** power).mean())
        for s in steps
    ]
    best = float(steps[int(np.argmin(errors))])
    # A tensor of zeros has no range; any normal step represents it.
    return np.array(best if best > 1e-20 else 1e-6, np.float32)


def pack_int4(codes: Codes) -> npt.NDArray[np.uint8]:
    """Pack codes in [-8, 7] two per byte, low nibble first; shape (ceil(n / 2),).

    Source:
        ONNX INT4 storage: onnx.ai/onnx/technical/int4.html

    >>> pack_int4(np.array([1, -1, 7], np.int8))
    array([241,   7], dtype=uint8)
    """
    if codes.size and (codes.min() < -8 or codes.max() > 7):
        raise SpecError(f"found codes {codes.min()} to {codes.max()}; 4 bits hold -8 to 7")
    nibbles = codes.reshape(-1).view(np.uint8) & np.uint8(0xF)
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    packed: npt.NDArray[np.uint8] = nibbles[0::2] | nibbles[1::2] << np.uint8(4)
    return packed


def unpack_int4(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Codes:
    """Undo :func:`pack_int4`; ``shape`` is that of the codes.

    >>> unpack_int4(np.array([241, 7], np.uint8), (3,))
    array([ 1, -1,  7], dtype=int8)
    """
    size = int(np.prod(shape))
    if packed.shape != ((size + 1) // 2,):
        raise SpecError(
            f"found {packed.shape} packed bytes; codes of shape {shape} need {(size + 1) // 2}"
        )
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)[:size]
    codes: Codes = ((nibbles ^ 8).astype(np.int8) - 8).reshape(shape)
    return codes
