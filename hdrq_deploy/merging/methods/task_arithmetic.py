"""Task arithmetic: theta_0 + scaling * sum_i w_i (theta_i - theta_0).

Source:
    Ilharco et al., Editing models with task arithmetic, ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import Floats, MergeMethod, MethodOptions

__all__ = ["TASK_ARITHMETIC"]


def _merge(
    tensors: Sequence[Floats],
    merge_weights: Sequence[float],
    base: Floats | None,
    options: MethodOptions,
) -> Floats:
    assert base is not None
    change = sum(w * (tensor - base) for w, tensor in zip(merge_weights, tensors, strict=True))
    merged: Floats = base + options.scaling * change
    return merged


TASK_ARITHMETIC = MergeMethod(
    _merge,
    "source plus the weighted sum of the task vectors",
    needs_base=True,
    options=("scaling",),
)
