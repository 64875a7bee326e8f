"""Merging of calibrated bundles and of checkpoints; needs neither torch nor training."""

from __future__ import annotations

from ..callable import make_callable
from .bundles import Merger, check_different, merge
from .checkpoints import CHECKPOINT_METHODS, merge_checkpoints
from .mixing import CRITERIA, choose_weights
from .reestimate import re_estimate
from .rounding import ROUNDINGS

__all__ = [
    "CHECKPOINT_METHODS",
    "CRITERIA",
    "ROUNDINGS",
    "Merger",
    "check_different",
    "choose_weights",
    "merge",
    "merge_checkpoints",
    "re_estimate",
]

make_callable(__name__, merge)
