"""Merging of calibrated bundles and of checkpoints; needs neither torch nor training."""

from __future__ import annotations

from .activation_scales import ACTIVATION_SCALES
from .bundles import Merger, merge
from .float_checkpoints import CHECKPOINT_METHODS, merge_checkpoints
from .merge_weights import check_different
from .methods import METHODS
from .re_estimate import re_estimate
from .rounding import ROUNDINGS
from .weight_search import CRITERIA, choose_weights

__all__ = [
    "ACTIVATION_SCALES",
    "CHECKPOINT_METHODS",
    "CRITERIA",
    "METHODS",
    "ROUNDINGS",
    "Merger",
    "check_different",
    "choose_weights",
    "merge",
    "merge_checkpoints",
    "re_estimate",
]
