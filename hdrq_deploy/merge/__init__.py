"""Merging of calibrated bundles and of checkpoints; needs neither torch nor training."""

from __future__ import annotations

from .bundles import Merger, merge
from .rounding import ROUNDINGS

__all__ = ["ROUNDINGS", "Merger", "merge"]
