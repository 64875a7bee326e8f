"""A layer's weight as a matrix that its input rows are multiplied by, and back.

Calibration keeps second moments of rows x of ``features`` values, one matrix for every group. A
layer computes ``x @ W + bias`` with W of shape (groups, features, outputs of a group), whatever the
order of its weight's axes is. With ``bias`` as the last row of W, and 1 as the last value of x, the
bias is merged with the weight.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["LayerMatrix", "bias_of", "rows_of", "times_outputs", "weight_of", "with_bias"]

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


class LayerMatrix(Protocol):
    """How a weight's axes are made of outputs and features (:mod:`hdrq_deploy.formats.statistics`).

    ``layout`` is ``conv`` (outputs, inputs / groups, kernel...), ``linear`` (outputs, features),
    ``matmul`` (features, outputs) or ``transposed`` (inputs, outputs / groups, kernel...).
    """

    @property
    def layout(self) -> str:
        """The order of the axes."""

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1."""

    @property
    def features(self) -> int:
        """Length of the rows that one group multiplies."""


def rows_of(weight: Array, layer: LayerMatrix) -> Array:
    """(groups, features, outputs of a group), of the weight's dtype.

    >>> from types import SimpleNamespace
    >>> layer = SimpleNamespace(layout="linear", groups=1, features=3)
    >>> rows_of(np.zeros((5, 3)), layer).shape
    (1, 3, 5)
    """
    if layer.layout in {"conv", "linear"}:
        return weight.reshape(layer.groups, -1, layer.features).swapaxes(1, 2)
    return weight.reshape(layer.groups, layer.features, -1)


def weight_of(rows: Array, layer: LayerMatrix, shape: tuple[int, ...]) -> Array:
    """The weight of ``shape`` whose rows these are."""
    turned = rows.swapaxes(1, 2) if layer.layout in {"conv", "linear"} else rows
    return np.ascontiguousarray(turned).reshape(shape)


def with_bias(rows: Floats, bias: Array | None) -> Floats:
    """Rows with the bias (outputs,) as one more feature; None leaves them as they are."""
    if bias is None:
        return rows
    last = bias.astype(np.float64).reshape(rows.shape[0], 1, rows.shape[2])
    return np.concatenate([rows, last], axis=1)


def bias_of(rows: Floats) -> Floats:
    """The bias (outputs,) that is the last feature of ``rows``."""
    result: Floats = rows[:, -1].reshape(-1)
    return result


def times_outputs(rows: Floats, gain: Floats) -> Floats:
    """Rows whose outputs are multiplied by ``gain``, (outputs,)."""
    return np.asarray(rows * gain.reshape(rows.shape[0], 1, -1))
