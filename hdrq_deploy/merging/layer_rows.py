"""A layer's weight as a matrix that its input rows are multiplied by, and back.

Calibration keeps second moments of rows x of ``features`` values, one matrix for every group. A
layer computes ``x @ W + bias`` with W of shape (groups, features, outputs of a group), whatever the
order of its weight's axes is. With ``bias`` as the last row of W, and 1 as the last value of x, the
bias is merged with the weight.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..formats.statistics import LayerRecord
from ..typing import Array

__all__ = ["bias_of", "rows_of", "weight_of", "with_bias"]

Floats = npt.NDArray[np.float64]


def rows_of(weight: Array, layer: LayerRecord) -> Array:
    """(groups, features, outputs of a group), of the weight's dtype.

    >>> record = LayerRecord(
    ...     weight="w", bias=None, layout="linear", groups=1, features=3, rank=0, rows=1
    ... )
    >>> rows_of(np.zeros((5, 3)), record).shape
    (1, 3, 5)
    """
    if layer.layout in {"conv", "linear"}:
        return weight.reshape(layer.groups, -1, layer.features).swapaxes(1, 2)
    return weight.reshape(layer.groups, layer.features, -1)


def weight_of(rows: Array, layer: LayerRecord, shape: tuple[int, ...]) -> Array:
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
