"""Moments of a layer's inputs in the form low rank plus diagonal: sums, products, solutions.

``factor^T factor + diag(diagonal)`` stands for a matrix of (features, features) that is never
written out where its rank is low: a system of thousands of features is then solved by one of a
few hundred unknowns (Woodbury's identity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .layer_statistics import InputStatistics

__all__ = ["Moments", "SingularError", "covariance", "mean_of", "mixed", "second_moments"]

Floats = npt.NDArray[np.float64]
# Features are scaled to size 1 first. A smaller pivot is what single precision left of nothing.
_PIVOT = 1e-7
# A feature this much weaker than the strongest of its group is always 0 but for rounding errors.
_DEAD = 1e-14
# A smaller share of a feature's own diagonal and Woodbury's identity loses its digits.
_OWN_SHARE = 1e-8
# A rank above this share of the features: the whole matrix costs less.
_DENSE = 0.5


class SingularError(ValueError):
    """A system without one solution that float64 can find."""


@dataclass(frozen=True)
class Moments:
    """``factor^T factor + diag(diagonal)`` of every group.

    Attributes:
        factor: (groups, rank, features) float64.
        diagonal: (groups, features) float64, >= 0.
    """

    factor: Floats
    diagonal: Floats

    @property
    def low_rank(self) -> bool:
        """Whether the form saves work; the whole matrix serves otherwise."""
        return bool(self.factor.shape[1] < _DENSE * self.factor.shape[2])

    def variances(self) -> Floats:
        """The diagonal of the whole matrices, (groups, features)."""
        result: Floats = np.einsum("grf,grf->gf", self.factor, self.factor) + self.diagonal
        return result

    def whole(self) -> Floats:
        """The matrices, (groups, features, features)."""
        matrix: Floats = self.factor.swapaxes(1, 2) @ self.factor
        places = np.arange(matrix.shape[1])
        matrix[:, places, places] += self.diagonal
        return matrix

    def times(self, rows: Floats) -> Floats:
        """The matrices times ``rows`` (groups, features, outputs)."""
        result: Floats = self.factor.swapaxes(1, 2) @ (self.factor @ rows)
        result += self.diagonal[:, :, None] * rows
        return result

    def raised(self, by: Floats) -> Moments:
        """With ``by`` (groups, features) added to the diagonal."""
        return Moments(self.factor, self.diagonal + by)

    def solved(self, target: Floats) -> Floats:
        """The rows (groups, features, outputs) that :meth:`times` maps to ``target``.

        Raises:
            SingularError: There is no such solution in float64.
        """
        variances = self.variances()
        if not (variances > _DEAD * variances.max(1, keepdims=True)).all():
            raise SingularError("singular: an input is always 0")
        if self.low_rank and (self.diagonal > _OWN_SHARE * variances).all():
            return self._by_rank(target)
        return self._by_elimination(target, np.sqrt(variances)[:, :, None])

    def _by_rank(self, target: Floats) -> Floats:
        """Woodbury: D^-1 (B - U^T (I + U D^-1 U^T)^-1 U D^-1 B)."""
        scaled = self.factor / self.diagonal[:, None, :]
        small = scaled @ self.factor.swapaxes(1, 2)
        places = np.arange(small.shape[1])
        small[:, places, places] += 1.0
        inner = np.linalg.solve(small, scaled @ target)
        result: Floats = target / self.diagonal[:, :, None] - scaled.swapaxes(1, 2) @ inner
        return result

    def _by_elimination(self, target: Floats, size: Floats) -> Floats:
        matrix = self.whole()
        matrix /= size
        matrix /= size.swapaxes(1, 2)
        try:
            pivots = np.diagonal(np.linalg.cholesky(matrix), axis1=1, axis2=2)
        except np.linalg.LinAlgError as error:
            raise SingularError("singular") from error
        if not (pivots**2 > _PIVOT).all():
            raise SingularError(f"badly conditioned: a pivot of {float(pivots.min()) ** 2:.0e}")
        result: Floats = np.linalg.solve(matrix, target / size) / size
        return result


def second_moments(statistics: InputStatistics, alpha: float, bias: bool) -> Moments:
    """alpha G + (1 - alpha) diag(G), G the second moments E[x x^T] of the inputs.

    Args:
        statistics: Of one parent's layer.
        alpha: What is kept of the products of different features, 0 to 1.
        bias: Let x end with a 1, for the bias.
    """
    mean = statistics.mean.astype(np.float64)[:, None]
    factor = statistics.factor.astype(np.float64)
    rest = statistics.diagonal.astype(np.float64)
    if bias:
        mean = np.concatenate([mean, np.ones_like(mean[:, :, :1])], 2)
        factor = np.concatenate([factor, np.zeros_like(factor[:, :, :1])], 2)
        rest = np.concatenate([rest, np.zeros_like(rest[:, :1])], 1)
    whole = Moments(np.concatenate([factor, mean], 1), rest)
    return Moments(np.sqrt(alpha) * whole.factor, alpha * rest + (1 - alpha) * whole.variances())


def mixed(parts: Sequence[Moments], shares: Sequence[float]) -> Moments:
    """sum_i w_i M_i."""
    used = [(part, share) for part, share in zip(parts, shares, strict=True) if share > 0]
    return Moments(
        np.concatenate([np.sqrt(share) * part.factor for part, share in used], 1),
        np.asarray(sum(share * part.diagonal for part, share in used)),
    )


def mean_of(parts: Sequence[InputStatistics], shares: Sequence[float]) -> Floats:
    """The mean input of the mixture, (groups, features)."""
    return np.asarray(
        sum(w * p.mean.astype(np.float64) for p, w in zip(parts, shares, strict=True))
    )


def covariance(parts: Sequence[InputStatistics], shares: Sequence[float]) -> Moments:
    """The covariance of the mixture's inputs, exactly: the ranks add up."""
    mean = mean_of(parts, shares)
    own = [
        Moments(
            np.concatenate(
                [part.factor.astype(np.float64), (part.mean.astype(np.float64) - mean)[:, None]], 1
            ),
            part.diagonal.astype(np.float64),
        )
        for part in parts
    ]
    return mixed(own, shares)
