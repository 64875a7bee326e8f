"""A layer solved for given outputs: least squares on its inputs, held near weights that it has.

    minimise  E ||y - W x - b||^2  +  anchor m ||W - W_0||^2

x are the layer's inputs, y the outputs that it is to give, m is the mean variance of x, so that
``anchor`` has no unit, and b is free. Inputs that hardly vary leave the weights where they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..typing import Array

__all__ = [
    "ANCHORS",
    "GuidedLayer",
    "RowSums",
    "SplitMoments",
    "convolution_rows",
    "some_rows",
]

# Anchors that are tried, from loose to tight.
ANCHORS = (1e-3, 1e-2, 1e-1, 1.0)

# Share of the mean variance that keeps a system without an anchor solvable, and the least of it.
_RIDGE, _FLOOR = 1e-6, 1e-12
# Rows of one product: sums of so many are exact enough in single precision.
_AT_ONCE = 1 << 12
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GuidedLayer:
    """Moments of a layer's inputs x and of the outputs y that it is to give.

    They are those around the means: E[x x^T] less the means' product is no covariance where an
    input hardly varies, because what is left is what both were rounded by.

    Attributes:
        covariance: Of x, (groups, features, features), positive semi-definite.
        products: Covariance of x and y, (groups, features, outputs of a group).
        mean: E[x], (groups, features).
        target: E[y], (groups, outputs of a group).
    """

    covariance: Floats
    products: Floats
    mean: Floats
    target: Floats

    @classmethod
    def mixed(cls, parts: Sequence[GuidedLayer], shares: Sequence[float]) -> GuidedLayer:
        """Moments of a mixture of rows.

        Args:
            parts: Moments of its parts.
            shares: Their shares, which add up to 1.

        Source:
            Chan, Golub and LeVeque, The American Statistician 37(3), 1983, formula 2.1 for
            products.
        """
        # From the first on, so that what all parts agree on stays as it is, to the last bit.
        mean, target = parts[0].mean.copy(), parts[0].target.copy()
        for share, part in zip(shares, parts, strict=True):
            mean += share * (part.mean - parts[0].mean)
            target += share * (part.target - parts[0].target)
        covariance, products = np.zeros_like(parts[0].covariance), np.zeros_like(parts[0].products)
        for share, part in zip(shares, parts, strict=True):
            away = (part.mean - mean)[:, :, None]
            covariance += share * (part.covariance + away * away.swapaxes(1, 2))
            products += share * (part.products + away * (part.target - target)[:, None, :])
        return cls(covariance, products, mean, target)

    @cached_property
    def inputs(self) -> Floats:
        """E[x x^T]."""
        result: Floats = self.covariance + self.mean[:, :, None] * self.mean[:, None, :]
        return result

    def solved(self, start: Floats, anchor: float, centred: bool) -> Floats:
        """The rows of least squares, (groups, features, outputs of a group).

        Args:
            start: Rows that they are held near, of the same shape.
            anchor: Strength of the hold, >= 0; ``start`` itself where it is infinite.
            centred: A bias takes care of the means.
        """
        if math.isinf(anchor):
            return start
        matrix, products = self._system(centred)
        size = np.diagonal(matrix, axis1=1, axis2=2).mean(1)
        held = np.maximum(anchor * size, _RIDGE * size + _FLOOR)[:, None, None]
        eye = np.eye(matrix.shape[1])
        change = np.linalg.solve(matrix + held * eye, products - matrix @ start)
        result: Floats = start + change
        return result

    def error(self, rows: Floats, centred: bool) -> float:
        """E ||y - W x - b||^2 but for what no rows change, the bias the best of these moments.

        Args:
            rows: (groups, features, outputs of a group).
            centred: There is a bias.
        """
        matrix, products = self._system(centred)
        return float(np.sum(rows * (matrix @ rows - 2 * products)))

    def _system(self, centred: bool) -> tuple[Floats, Floats]:
        """The matrix and the right side of least squares without an anchor."""
        if centred:
            return self.covariance, self.products
        return self.inputs, self.products + self.mean[:, :, None] * self.target[:, None, :]

    def bias(self, rows: Floats) -> Floats:
        """The bias (groups, outputs of a group) that gives ``rows`` the mean of the targets."""
        result: Floats = self.target - np.einsum("gf,gfo->go", self.mean, rows)
        return result

    def output_moments(self, rows: Floats) -> tuple[Floats, Floats]:
        """Mean and variance of what ``rows`` make of the inputs, without a bias, (outputs,)."""
        mean = np.einsum("gf,gfo->go", self.mean, rows)
        variance = np.einsum("gfo,gfo->go", self.covariance @ rows, rows)
        return mean.reshape(-1), np.maximum(variance, 0.0).reshape(-1)


@dataclass(frozen=True)
class SplitMoments:
    """Moments on all rows, on those that an anchor is tried on, and on those held out of that.

    The parts are None where no anchor is to be chosen.
    """

    whole: GuidedLayer
    learned: GuidedLayer | None = None
    held: GuidedLayer | None = None

    def best_anchor(self, start: Floats, centred: bool) -> float:
        """The one of :data:`ANCHORS` that is best on rows held out; infinite where none helps.

        Args:
            start, centred: As of :meth:`GuidedLayer.solved`.
        """
        assert self.learned is not None and self.held is not None
        errors = {math.inf: self.held.error(start, centred)}
        for anchor in ANCHORS:
            rows = self.learned.solved(start, anchor, centred)
            errors[anchor] = self.held.error(rows, centred)
        return min(errors, key=lambda anchor: errors[anchor])


class RowSums:
    """Moments over rows x and targets y, batch by batch.

    Args:
        groups: Groups of a convolution, else 1.
        features: Length of the rows that one group multiplies.
        outputs: Outputs of one group.
    """

    def __init__(self, groups: int, features: int, outputs: int) -> None:
        self._layer = GuidedLayer(
            covariance=np.zeros((groups, features, features)),
            products=np.zeros((groups, features, outputs)),
            mean=np.zeros((groups, features)),
            target=np.zeros((groups, outputs)),
        )
        self._count = 0

    def add(self, x: Array, y: Array) -> None:
        """Take rows (groups, n, features) and targets (groups, n, outputs) in, float32."""
        for first in range(0, x.shape[1], _AT_ONCE):
            parts = [rows[:, first : first + _AT_ONCE] for rows in (x, y)]
            mean, target = (part.mean(1, dtype=np.float64) for part in parts)
            a, b = (
                part - centre[:, None].astype(np.float32)
                for part, centre in zip(parts, (mean, target), strict=True)
            )
            turned, count = a.swapaxes(1, 2), a.shape[1]
            covariance, products = ((turned @ near).astype(np.float64) / count for near in (a, b))
            self._join(count, GuidedLayer(covariance, products, mean, target))

    def _join(self, count: int, layer: GuidedLayer) -> None:
        """Take in the moments of other rows."""
        both = self._count + count
        if count:
            shares = self._count / both, count / both
            self._layer = GuidedLayer.mixed((self._layer, layer), shares)
        self._count = both

    def with_rows_of(self, other: RowSums) -> RowSums:
        """The moments over the rows of both."""
        both = copy.copy(self)
        both._join(other._count, other._layer)
        return both

    def layer(self) -> GuidedLayer:
        """The moments of all rows."""
        return self._layer


def convolution_rows(
    x: Array,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> Array:
    """A view of a convolution's input, (N, output sizes..., C, kernel...); padding is zeros.

    Args:
        x: (N, C, sizes...).
        kernel, strides, dilations: One number for every size.
        pads: Zeros before every size, then behind every size, as ONNX orders them.

    >>> rows = convolution_rows(np.arange(4.0).reshape(1, 1, 4), [3], [1], [1], [1, 1])
    >>> rows[0, :, 0]
    array([[0., 0., 1.],
           [0., 1., 2.],
           [1., 2., 3.],
           [2., 3., 0.]])
    """
    rank = len(kernel)
    sides = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    x = np.ascontiguousarray(np.pad(x, sides))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    places = tuple(range(2, 2 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, places)
    steps = [slice(None, None, s) for s in strides]
    apart = [slice(None, None, d) for d in dilations]
    chosen = windows[(slice(None), slice(None), *steps, *apart)]
    return np.moveaxis(chosen, 1, 1 + rank)


def some_rows(
    view: Array, leading: int, groups: int, most: int, draws: np.random.Generator
) -> Array:
    """About ``most`` rows of a view at most, (groups, rows, features of a group), float32.

    One row comes of every stretch of equal length, so that they are even over images and over
    positions.

    Args:
        view: Its first axes count rows; the others make the features of all groups.
        leading: The number of axes that count rows.
        groups: What the features are divided into.
        most: Rows wanted.
        draws: Where in its stretch a row lies.
    """
    sizes = view.shape[:leading]
    count = math.prod(sizes)
    if count > most:
        index = ((np.arange(most) + draws.random(most)) * (count / most)).astype(np.int64)
        view, count = view[np.unravel_index(index, sizes)], most
    rows = view.reshape(count, groups, -1).swapaxes(0, 1)
    return np.ascontiguousarray(rows, np.float32)
