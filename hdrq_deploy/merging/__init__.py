"""Merging of calibrated bundles and of checkpoints; needs neither torch nor training."""

from __future__ import annotations

from .activation_scales import ACTIVATION_SCALES
from .bundles import Merger, merge
from .fitting import check_domains, check_guides, check_sweeps, fit
from .float_checkpoints import CHECKPOINT_METHODS, merge_checkpoints
from .merge_weights import check_different
from .methods import METHODS
from .re_estimate import re_estimate
from .rounding import ROUNDINGS
from .statistics_weights import weights_from_statistics
from .weight_search import CRITERIA, choose_weights

__all__ = [
    "ACTIVATION_SCALES",
    "CHECKPOINT_METHODS",
    "CRITERIA",
    "METHODS",
    "ROUNDINGS",
    "Merger",
    "check_different",
    "check_domains",
    "check_guides",
    "check_sweeps",
    "choose_weights",
    "fit",
    "merge",
    "merge_checkpoints",
    "re_estimate",
    "weights_from_statistics",
]
