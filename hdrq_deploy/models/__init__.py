"""The networks of the experiments, with the names that their checkpoints have.

``--model hdrq_deploy.models:shot_resnet50``, ``:hrda_resnet101_conv1x1`` (as HDRQ was published
with it), ``:hrda_resnet101``, ``:hrda_mit_b5``. Each takes its public checkpoints as they are: a
module's ``map_checkpoint`` renames their keys.

Those of real images that are no part of the paper: ``:lite0_pacs``, ``:resnet_pacs`` and
``:lite0_camvid``, whose checkpoints ``hdrq reproduce`` trains.
"""

from __future__ import annotations

from .hrda import hrda_mit_b5, hrda_resnet101, hrda_resnet101_conv1x1
from .lite0 import lite0_camvid, lite0_pacs
from .plain_resnet import resnet_pacs
from .shot import shot_resnet50, shot_resnet101

__all__ = [
    "hrda_mit_b5",
    "hrda_resnet101",
    "hrda_resnet101_conv1x1",
    "lite0_camvid",
    "lite0_pacs",
    "resnet_pacs",
    "shot_resnet50",
    "shot_resnet101",
]
