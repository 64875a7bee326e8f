"""Rounding that compensates its own errors: each column's error is spread over the next ones.

Codes of a layer are rounded feature by feature. The error of those that are rounded already is
made up for, as well as their correlation with the rest allows, by those that are not: in the
measure ``sum over outputs of e^T H e``, H the covariance of the layer's inputs and e the error of
one output's weights, each feature is rounded to the code nearest to what is then best for it.

GPTQ computes this with the inverse of H. Here H = U^T U + diag(d) keeps its form: a block of
features needs the part of H that those behind it cannot make up for, which a matrix of the rank's
size carries from block to block, from the last to the first. No matrix of features x features is
written out where the rank is low.

Source:
    Frantar et al., GPTQ, ICLR 2023; Chen et al., The geometry of LLM quantization: GPTQ as Babai's
    nearest plane algorithm, 2025 (the form with a Cholesky factor of H itself).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .moments import Moments
from .spec import QuantSpec

__all__ = ["DAMPING", "compensated", "damped", "error_of", "with_damping"]

Floats = npt.NDArray[np.float64]
# Share of the mean diagonal that is added to it, as in GPTQ.
DAMPING = 0.01
# Features that are rounded between two updates of all others.
_BLOCK = 64
_FLOOR = 1e-12


def damped(moments: Moments, share: float = DAMPING) -> Moments:
    """With a share of each group's mean diagonal added to it; never zero."""
    raised = share * _mean_variance(moments.variances())
    return moments.raised(np.broadcast_to(raised, moments.diagonal.shape))


def with_damping(matrices: Floats, share: float = DAMPING) -> Floats:
    """The same for matrices that are written out, (groups, features, features)."""
    result = matrices.astype(np.float64)
    places = np.arange(result.shape[1])
    variances = result[:, places, places]
    result[:, places, places] = variances + share * _mean_variance(variances)
    return result


def _mean_variance(variances: Floats) -> Floats:
    """(groups, 1), never zero."""
    each = variances.mean(1, keepdims=True)
    result: Floats = np.maximum(each, max(1e-6 * float(each.mean()), _FLOOR))
    return result


def compensated(
    rows: Floats, moments: Moments | Floats, scale: Floats, spec: QuantSpec
) -> npt.NDArray[np.int8]:
    """Codes of ``rows``, features in order of falling variance.

    Args:
        rows: Real weights, (groups, features, outputs).
        moments: Damped covariance of the inputs (see :func:`damped`), or the matrices themselves,
            (groups, features, features).
        scale: (groups, 1, outputs), or what broadcasts to it.
        spec: Range of the codes.

    Returns:
        Codes, shape of ``rows``.
    """
    if isinstance(moments, Moments):
        order = np.argsort(-moments.variances(), axis=1, kind="stable")
        factor = np.take_along_axis(moments.factor, order[:, None, :], 2)
        turned: Moments | Floats = Moments(factor, np.take_along_axis(moments.diagonal, order, 1))
    else:
        order = np.argsort(-np.diagonal(moments, axis1=1, axis2=2), axis=1, kind="stable")
        turned = np.take_along_axis(moments, order[:, None, :], 2)
        turned = np.take_along_axis(turned, order[:, :, None], 1)
    real = np.take_along_axis(rows, order[:, :, None], 1) / scale
    rounded = _in_order(real, turned, spec)
    codes = np.empty(rows.shape, np.int8)
    np.put_along_axis(codes, order[:, :, None], rounded.astype(np.int8), 1)
    return codes


def error_of(errors: Floats, moments: Moments) -> float:
    """sum over groups and outputs of e^T H e; ``errors`` is (groups, features, outputs)."""
    low = moments.factor @ errors
    return float((low**2).sum() + (moments.diagonal[:, :, None] * errors**2).sum())


def _in_order(real: Floats, moments: Moments | Floats, spec: QuantSpec) -> Floats:
    """Codes of weights in units of their scale, features first to last."""
    codes, errors = np.empty_like(real), np.zeros_like(real)
    # U of a low rank: what it makes of the errors so far stands for them.
    factor = moments.factor if isinstance(moments, Moments) and moments.low_rank else None
    carried = errors
    if factor is not None:
        carried = np.zeros((len(real), factor.shape[1], real.shape[2]))
    for block in _blocks(moments):
        cut = block.cut
        before = carried if factor is not None else carried[:, : cut.start]
        wanted = real[:, cut] - block.links @ before
        for j in range(wanted.shape[1]):
            place = cut.start + j
            codes[:, place] = np.rint(wanted[:, j]).clip(spec.lo, spec.hi)
            errors[:, place] = codes[:, place] - real[:, place]
            # What this feature's error asks of those behind it in the block.
            wanted[:, j + 1 :] -= block.ties[:, j + 1 :, j, None] * errors[:, place][:, None, :]
        if factor is not None:
            carried += factor[:, :, cut] @ errors[:, cut]
    return codes


@dataclass
class _Block:
    """Some features, and what errors of others ask of them.

    Attributes:
        cut: Their places.
        ties: (groups, b, b) lower triangle: what an error of feature j asks of feature i.
        links: (groups, b, ...): the same for the errors before the block, or for U times these.
    """

    cut: slice
    ties: Floats
    links: Floats


def _blocks(moments: Moments | Floats) -> Iterator[_Block]:
    """Blocks in the order of their features."""
    if not isinstance(moments, Moments):
        yield from _dense_blocks(moments)
        return
    if not moments.low_rank:
        yield from _dense_blocks(moments.whole())
        return
    blocks = list(_low_rank_blocks(moments))
    yield from reversed(blocks)


def _cuts(count: int) -> list[slice]:
    return [slice(first, min(first + _BLOCK, count)) for first in range(0, count, _BLOCK)]


def _triangle(matrix: Floats) -> Floats:
    """Lower triangular R with R^T R = matrix: its row i holds no feature behind i."""
    turned = np.linalg.cholesky(matrix[:, ::-1, ::-1])[:, ::-1, ::-1]
    return np.asarray(turned, np.float64).swapaxes(1, 2)


def _dense_blocks(matrix: Floats) -> Iterator[_Block]:
    triangle = _triangle(matrix)
    scaled: Floats = triangle / np.diagonal(triangle, axis1=1, axis2=2)[:, :, None]
    for cut in _cuts(matrix.shape[1]):
        yield _Block(cut, scaled[:, cut, cut], scaled[:, cut, : cut.start])


def _low_rank_blocks(moments: Moments) -> Iterator[_Block]:
    """Blocks from the last to the first.

    ``rest`` is (I + sum of u u^T / d over the features behind)^-1: with it in the middle of
    U^T . U they have made up for what they can.
    """
    groups, rank, count = moments.factor.shape
    rest = np.broadcast_to(np.eye(rank), (groups, rank, rank)).copy()
    for cut in reversed(_cuts(count)):
        part = moments.factor[:, :, cut]
        seen = rest @ part
        matrix = part.swapaxes(1, 2) @ seen
        places = np.arange(matrix.shape[1])
        matrix[:, places, places] += moments.diagonal[:, cut]
        triangle = _triangle(matrix)
        scaled = triangle / np.diagonal(triangle, axis1=1, axis2=2)[:, :, None]
        # R^T x = seen^T: what linear terms of the features before ask of each of these.
        links = np.linalg.solve(triangle.swapaxes(1, 2), seen.swapaxes(1, 2))
        rest -= links.swapaxes(1, 2) @ links
        links = links / np.diagonal(triangle, axis1=1, axis2=2)[:, :, None]
        yield _Block(cut, scaled, links)
