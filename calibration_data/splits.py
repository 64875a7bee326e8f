"""A split of a made benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """Images and labels.

    Attributes:
        images: (N, H, W, 3) uint8 RGB.
        labels: Classes, (N,) int64; or (N, H, W) uint8, one for every pixel.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]
