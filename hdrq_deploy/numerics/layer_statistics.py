"""Mean and covariance of a layer's inputs, kept in little room, and their mixtures.

A convolution multiplies rows of its unfolded input, a linear layer its input vectors: a row x
holds ``features`` values, for every group of a convolution its own. Of all rows calibration keeps
the mean and the covariance, the latter as *rank r plus diagonal*: the largest eigenvectors, and
beside them exactly what is left of the diagonal. The second moments that regression needs are
``E[x x^T] = covariance + mean mean^T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["InputStatistics", "mixture"]

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
# A share of the features above which all eigenvectors are computed, not some.
_MANY = 1 / 3
_OVERSAMPLED, _PASSES = 16, 3


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the rows that one layer multiplies.

    Attributes:
        rows: Number of rows that were seen (of each group).
        mean: (groups, features).
        diagonal: (groups, features), >= 0: what ``factor`` leaves of the covariance's diagonal.
        factor: (groups, rank, features): covariance = factor^T factor + diag(diagonal).
    """

    rows: float
    mean: Singles
    diagonal: Singles
    factor: Singles

    @property
    def groups(self) -> int:
        """Number of groups; each has its own mean and covariance."""
        return int(self.mean.shape[0])

    @property
    def features(self) -> int:
        """Length of a row."""
        return int(self.mean.shape[1])

    @property
    def rank(self) -> int:
        """Number of eigenvectors that are kept of each group."""
        return int(self.factor.shape[1])

    def covariance(self, group: int) -> Floats:
        """The covariance matrix of a group, (features, features)."""
        factor = self.factor[group].astype(np.float64)
        matrix: Floats = factor.T @ factor
        matrix[np.diag_indices(self.features)] += self.diagonal[group]
        return matrix

    @classmethod
    def of(cls, rows: float, mean: Floats, covariance: Floats, rank: int) -> InputStatistics:
        """Statistics of rank ``rank`` at most.

        Args:
            rows: Number of rows.
            mean: (groups, features).
            covariance: (groups, features, features), symmetric and positive semi-definite.
            rank: Eigenvectors kept of each group; all of them where it is ``features`` or more.
        """
        factor = np.stack([_factor(c, min(rank, len(c))) for c in covariance])
        variances = np.diagonal(covariance, axis1=1, axis2=2)
        return cls.of_factor(rows, mean, variances, factor)

    @classmethod
    def of_factor(
        cls, rows: float, mean: Floats, variances: Floats, factor: Floats
    ) -> InputStatistics:
        """Statistics whose diagonal is what a factor leaves of the variances.

        Args:
            rows: Number of rows.
            mean, variances: (groups, features).
            factor: (groups, rank, features).
        """
        kept = factor.astype(np.float32)
        rest = np.maximum(variances - (kept.astype(np.float64) ** 2).sum(1), 0.0)
        return cls(float(rows), mean.astype(np.float32), rest.astype(np.float32), kept)


def mixture(
    parts: Sequence[InputStatistics], shares: Sequence[float], rank: int | None = None
) -> InputStatistics:
    """Statistics of rows that come from every part with its share.

    Args:
        parts: One per parent, of equal groups and features.
        shares: >= 0, sum 1.
        rank: Rank of the result; by default the largest of the parts.

    Returns:
        Mean sum_i w_i mean_i; covariance sum_i w_i (covariance_i + (mean_i - mean)(...)^T).
    """
    mean = sum(w * p.mean.astype(np.float64) for w, p in zip(shares, parts, strict=True))
    assert not isinstance(mean, int)
    variances, stacked = np.zeros_like(mean), []
    for share, part in zip(shares, parts, strict=True):
        away = part.mean.astype(np.float64) - mean
        factor = np.concatenate([part.factor.astype(np.float64), away[:, None]], 1)
        variances += share * (part.diagonal + (factor**2).sum(1))
        stacked.append(np.sqrt(share) * factor)
    whole = np.concatenate(stacked, 1)
    most = max(p.rank for p in parts) if rank is None else rank
    factor = np.stack([_narrowed(f, min(most, f.shape[1])) for f in whole])
    rows = sum(p.rows for p in parts)
    return InputStatistics.of_factor(rows, mean, variances, factor)


def _factor(covariance: Floats, rank: int) -> Floats:
    """(rank, features): the largest eigenvectors, each times the root of its eigenvalue."""
    size = len(covariance)
    if rank > size * _MANY:
        values, vectors = np.linalg.eigh(covariance)
    else:
        # Subspace iteration: a few products instead of all eigenvectors.
        start = np.random.default_rng(0).standard_normal((size, min(size, rank + _OVERSAMPLED)))
        basis = np.linalg.qr(covariance @ start)[0]
        for _ in range(_PASSES):
            basis = np.linalg.qr(covariance @ basis)[0]
        values, small = np.linalg.eigh(basis.T @ covariance @ basis)
        vectors = basis @ small
    return _scaled(values, vectors, rank)


def _narrowed(factor: Floats, rank: int) -> Floats:
    """(rank, features) whose product with itself is nearest to that of a longer factor."""
    if factor.shape[0] <= factor.shape[1]:
        values, turns = np.linalg.eigh(factor @ factor.T)
        largest = np.argsort(values)[::-1][:rank]
        result: Floats = turns[:, largest].T @ factor
        return result
    values, vectors = np.linalg.eigh(factor.T @ factor)
    return _scaled(values, vectors, rank)


def _scaled(values: Floats, vectors: Floats, rank: int) -> Floats:
    largest = np.argsort(values)[::-1][:rank]
    result: Floats = (vectors[:, largest] * np.sqrt(np.maximum(values[largest], 0.0))).T
    return result
