"""TIES: task vectors are trimmed, elect a sign, and those that agree with it are averaged.

Source:
    Yadav et al., TIES-Merging: resolving interference when merging models, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Floats, MergeMethod, MethodOptions

__all__ = ["TIES"]


def _merge(
    tensors: Sequence[Floats],
    merge_weights: Sequence[float],
    base: Floats | None,
    options: MethodOptions,
) -> Floats:
    assert base is not None
    trimmed = [_trimmed(tensor - base, options.density) for tensor in tensors]
    elected = np.sign(sum(w * v for w, v in zip(merge_weights, trimmed, strict=True)))
    total, share = np.zeros_like(base), np.zeros_like(base)
    for w, vector in zip(merge_weights, trimmed, strict=True):
        agrees = (np.sign(vector) == elected) & (vector != 0)
        total += np.where(agrees, w * vector, 0.0)
        share += np.where(agrees, w, 0.0)
    merged: Floats = base + options.scaling * (total / np.where(share > 0, share, 1.0))
    return merged


def _trimmed(vector: Floats, density: float) -> Floats:
    """The entries of largest size, a share of ``density``; zeros in place of the others."""
    size = np.abs(vector)
    count = max(1, round(density * vector.size))
    threshold = np.partition(size.ravel(), vector.size - count)[vector.size - count]
    return np.where(size >= threshold, vector, 0.0)


TIES = MergeMethod(
    _merge,
    "mean of the trimmed task vectors that agree in sign",
    needs_base=True,
    options=("scaling", "density"),
)
