"""Codes and real values in NumPy: the arithmetic reference of the toolkit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SpecError
from . import e4m3
from .spec import QuantSpec

__all__ = ["along", "dequantize", "quantize", "rounded", "search_scale", "some_values"]

Floats = npt.NDArray[np.floating[Any]]


def along(scale: Floats, ndim: int, axis: int | None) -> Floats:
    """Reshape a per-channel scale (C,) so that it broadcasts along ``axis`` of ``ndim``."""
    if axis is None or scale.ndim == 0:
        return scale
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def rounded(units: Floats, spec: QuantSpec) -> Floats:
    """Values in units of the scale on the nearest codes (ties to even), saturated; same dtype."""
    if spec.floating:
        return e4m3.nearest(units)
    return np.rint(units).clip(spec.lo, spec.hi)


def quantize(x: Floats, scale: Floats, spec: QuantSpec) -> npt.NDArray[Any]:
    """Divide by the scale, round to the nearest code (ties to even), saturate.

    Args:
        x: Real values, any shape.
        scale: Real value of one code, > 0; shape () per tensor,
            (x.shape[axis],) per channel.
        spec: Range of codes and axis.

    Returns:
        Codes, shape of ``x``: int16, because the grid ``paper`` reaches 255, or E4M3.

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
    codes = rounded(x / along(scale, x.ndim, spec.axis), spec)
    return codes.astype(e4m3.DTYPE if spec.floating else np.int16)


def dequantize(codes: npt.NDArray[Any], scale: Floats, axis: int | None) -> Floats:
    """Real values of ``codes``: scale * code, dtype of the scale."""
    real: Floats = codes.astype(scale.dtype) * along(scale, codes.ndim, axis)
    return real


def search_scale(
    x: Floats, spec: QuantSpec, candidates: int = 100, power: float = 2.4
) -> npt.NDArray[np.float32]:
    """One scale for ``x`` that minimises mean |x_hat - x|^power over ``candidates`` ranges.

    Args:
        x: Real values, any shape.
        spec: Range of the codes; its axis is not looked at.
        candidates: Fractions 1/candidates, ... 1 of the largest magnitude are tried.
        power: Exponent of the error.

    Returns:
        A scale > 0, shape ().

    Source:
        Initialisation of BRECQ and QDrop (Li et al., ICLR 2021; Wei et al., ICLR 2022).
    """
    widest = max(float(x.max()) / spec.hi, float(-x.min()) / -spec.lo if spec.lo else 0.0, 1e-30)
    scales = widest * np.arange(1, candidates + 1) / candidates
    flat = x.astype(np.float64).ravel()
    errors = [float((np.abs(rounded(flat / s, spec) * s - flat) ** power).mean()) for s in scales]
    best = float(scales[int(np.argmin(errors))])
    # A tensor of zeros has no range; any normal scale represents it.
    return np.array(best if best > 1e-20 else 1e-6, np.float32)


def some_values(x: Floats, count: int, draws: np.random.Generator) -> Floats:
    """About ``count`` values of ``x`` to search a scale on, the least and the largest among them.

    Args:
        x: Real values, any shape.
        count: Values that are drawn, if there are so many.
        draws: Which ones.
    """
    flat = x.ravel()
    some = draws.integers(len(flat), size=min(count, len(flat)))
    return np.concatenate([flat[some], [flat.min(), flat.max()]])
