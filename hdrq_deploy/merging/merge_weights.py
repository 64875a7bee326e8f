"""Merge weights and parents, as every merge checks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import MergeError

__all__ = ["check_different", "check_merge_weights"]


def check_merge_weights(weights: Sequence[float] | None, count: int, what: str) -> list[float]:
    """Weights as given, or equal ones.

    Args:
        weights: One per parent, >= 0, sum 1; None for equal weights.
        count: Number of parents.
        what: What an error calls a parent, in the singular.

    Raises:
        MergeError: Fewer than two parents, or not one weight >= 0 for each with sum 1.
    """
    if count < 2:
        raise MergeError(f"found {count} {what}; a merge needs two or more")
    if weights is None:
        return [1 / count] * count
    checked = [float(w) for w in weights]
    if len(checked) != count:
        raise MergeError(f"found {len(checked)} weights for {count} {what}s; give one for each")
    if not all(w >= 0 for w in checked) or abs(sum(checked) - 1) > 1e-6:
        raise MergeError(
            f"found weights {' '.join(map(str, checked))} with sum {sum(checked):g}; "
            "needed weights >= 0 with sum 1"
        )
    return checked


def check_different(paths: Sequence[Path]) -> None:
    """Refuse a merge of one thing with itself, which is what a typing error asks for.

    Raises:
        MergeError: A path is named twice.
    """
    seen = set()
    for path in paths:
        if path.resolve() in seen:
            raise MergeError(
                f"found {path} twice; name every parent once, and give its share in `weights`"
            )
        seen.add(path.resolve())
