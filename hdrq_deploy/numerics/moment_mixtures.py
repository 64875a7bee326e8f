"""Least squares on mixtures of the same moments, prepared once and solved at any mix.

Regression asks for ``W = A^-1 sum_i w_i A_i W_i`` with ``A = sum_i w_i A_i``. Written around the
weighted mean of the W_i, only what the parents' moments and weights do *not* share is left to
solve for, and that difference allows single precision where the whole system would not:

* low rank plus diagonal (:class:`LowRankMixture`): a system of the rank's size at every mix, and
  products U_i (W_i - W_j) that no mix changes;
* whole matrices of two parents (:class:`PairMixture`): ``X^T A_1 X = diag(t)`` and
  ``X^T A_2 X = diag(1 - t)`` at once, after which every mix is one product with X.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .moments import Moments, SingularError

__all__ = ["LowRankMixture", "PairMixture"]

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
# A smaller share of a feature's own diagonal and Woodbury's identity loses its digits.
_OWN_SHARE = 1e-8
# A smaller pivot of matrices that are scaled to a diagonal of 1 is what rounding left of nothing.
_PIVOT = 1e-7


class LowRankMixture:
    """Moments whose ranks together are low, with the weights that are merged by them.

    Held in single precision: the factors, the weights, and for every ordered pair of parents
    (groups, rank, outputs) products.

    Args:
        moments: One per parent.
        rows: The parents' weights, (groups, features, outputs).
    """

    def __init__(self, moments: Sequence[Moments], rows: Sequence[Floats]) -> None:
        self._factors: list[Singles] = [m.factor.astype(np.float32) for m in moments]
        self._own = [m.diagonal for m in moments]
        self._variances = [m.variances() for m in moments]
        self._rows: list[Singles] = [r.astype(np.float32) for r in rows]
        self._gaps: dict[tuple[int, int], Singles] = {
            (i, j): (moments[i].factor @ (rows[i] - rows[j])).astype(np.float32)
            for i in range(len(rows))
            for j in range(len(rows))
            if i != j
        }

    def solved(self, shares: Sequence[float], ridge: Floats) -> Floats:
        """The merged weights at a mix.

        Args:
            shares: One per parent, sum 1.
            ridge: What is added to the diagonal, (groups, features).

        Raises:
            SingularError: A feature's own diagonal is nothing beside its variance.
        """
        used = [i for i, share in enumerate(shares) if share > 0]
        mean = _total(shares, self._rows, used)
        diagonal = _total(shares, self._own, used) + ridge
        variances = _total(shares, self._variances, used) + ridge
        if not (diagonal > _OWN_SHARE * variances).all():
            raise SingularError("singular: an input is a sum of others")
        root = 1 / np.sqrt(diagonal)[:, :, None]
        # U D^-1/2 and D^-1/2 q: what is left after the weighted mean, in features of size 1.
        narrow = root.swapaxes(1, 2).astype(np.float32)
        factor = np.concatenate(
            [np.sqrt(np.float32(shares[i])) * self._factors[i] for i in used], 1
        )
        factor *= narrow
        rest = np.zeros(mean.shape, np.float32)
        for i in used:
            weight = (shares[i] * self._own[i][:, :, None] * root).astype(np.float32)
            rest += weight * (self._rows[i] - mean).astype(np.float32)
        wanted = np.concatenate([np.sqrt(shares[i]) * self._gap(i, shares) for i in used], 1)
        wide = factor.astype(np.float64)
        system = wide @ wide.swapaxes(1, 2)
        places = np.arange(system.shape[1])
        system[:, places, places] += 1.0
        inner = np.linalg.solve(system, wanted - factor @ rest)
        rest += factor.swapaxes(1, 2) @ inner.astype(np.float32)
        result: Floats = mean + root * rest
        return result

    def _gap(self, i: int, shares: Sequence[float]) -> Floats:
        """U_i (W_i - mean)."""
        others = [j for j, share in enumerate(shares) if share > 0 and j != i]
        total = np.zeros(self._factors[i].shape[:2] + self._rows[i].shape[2:])
        for j in others:
            total += shares[j] * self._gaps[i, j]
        return total


class PairMixture:
    """The whole matrices of two parents in the basis that makes both diagonal.

    With t the share of the first parent in each direction, the merged weights are
    ``mean + w_1 w_2 X diag(1 / (w_1 t + w_2 (1 - t))) X^T (M_1 - M_2) (W_1 - W_2)``. Held in
    single precision: X and the product behind it, and the weights.

    Args:
        moments: Two.
        rows: The parents' weights, (groups, features, outputs).
        ridges: What is added to each diagonal, (groups, features); at a mix, their weighted mean.

    Raises:
        SingularError: The sum of the matrices has no inverse that float64 can find.
    """

    def __init__(
        self, moments: Sequence[Moments], rows: Sequence[Floats], ridges: Sequence[Floats]
    ) -> None:
        one, other = (m.raised(ridge).whole() for m, ridge in zip(moments, ridges, strict=True))
        both = one + other
        size = np.sqrt(np.diagonal(both, axis1=1, axis2=2))[:, :, None]
        if not (size > 0).all():
            raise SingularError("singular: an input is always 0")
        scaled = both / size / size.swapaxes(1, 2)
        try:
            lower = np.linalg.cholesky(scaled)
        except np.linalg.LinAlgError as error:
            raise SingularError("singular") from error
        if not (np.diagonal(lower, axis1=1, axis2=2) ** 2 > _PIVOT).all():
            raise SingularError("badly conditioned")
        half = np.linalg.solve(lower, one / size / size.swapaxes(1, 2))
        share, turns = np.linalg.eigh(np.linalg.solve(lower, half.swapaxes(1, 2)))
        basis = np.linalg.solve(lower.swapaxes(1, 2), turns) / size
        gap = rows[0] - rows[1]
        product = moments[0].times(gap) - moments[1].times(gap)
        self._share = share.clip(0, 1)[:, :, None]
        self._basis: Singles = basis.astype(np.float32)
        self._product: Singles = (basis.swapaxes(1, 2) @ product).astype(np.float32)
        self._rows: list[Singles] = [r.astype(np.float32) for r in rows]

    def solved(self, shares: Sequence[float]) -> Floats:
        """The merged weights at a mix: two shares, sum 1."""
        one, other = shares
        mean = _total(shares, self._rows, [0, 1])
        if one * other == 0:
            return mean
        stretched = one * other / (one * self._share + other * (1 - self._share))
        result: Floats = mean + self._basis @ (stretched.astype(np.float32) * self._product)
        return result


def _total(
    shares: Sequence[float], parts: Sequence[npt.NDArray[Any]], used: Sequence[int]
) -> Floats:
    """The weighted sum of those that are used, float64."""
    total = np.zeros(parts[0].shape)
    for i in used:
        total += shares[i] * parts[i]
    return total
