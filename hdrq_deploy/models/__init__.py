"""The networks of the paper's experiments, with the names that their checkpoints have.

``--model hdrq_deploy.models:shot_resnet50``, ``:hrda_resnet101_conv1x1`` (as HDRQ was published
with it), ``:hrda_resnet101``, ``:hrda_mit_b5``. Each takes its public checkpoints as they are: a
module's ``map_checkpoint`` renames their keys.
"""

from __future__ import annotations

from .hrda import hrda_mit_b5, hrda_resnet101, hrda_resnet101_conv1x1
from .shot import shot_resnet50, shot_resnet101

__all__ = [
    "hrda_mit_b5",
    "hrda_resnet101",
    "hrda_resnet101_conv1x1",
    "shot_resnet50",
    "shot_resnet101",
]
