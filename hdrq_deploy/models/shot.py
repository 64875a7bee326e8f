"""SHOT's classifiers (Liang et al., ICML 2020): a ResNet, a bottleneck, a weight-normed head.

The head's weight is stored as weight norm leaves it, g * v / |v|: SHOT freezes the head while it
adapts, so nothing is lost, and a linear layer is what can be quantized.

Source:
    github.com/tim-learn/SHOT, object/network.py (netF, netB, netC).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError

__all__ = ["Shot", "shot_resnet50", "shot_resnet101"]


class Shot(nn.Module):
    """Features (netF), bottleneck with BatchNorm (netB), linear classifier (netC)."""

    def __init__(self, backbone: nn.Module, classes: int, bottleneck: int = 256) -> None:
        super().__init__()
        features = cast(nn.Linear, backbone.fc).in_features
        backbone.fc = nn.Identity()
        self.netF = backbone
        self.netB = nn.ModuleDict(
            {"bottleneck": nn.Linear(features, bottleneck), "bn": nn.BatchNorm1d(bottleneck)}
        )
        self.netC = nn.ModuleDict({"fc": nn.Linear(bottleneck, classes)})

    def features(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised as ImageNet's, to features (N, 256)."""
        return cast(Tensor, self.netB["bn"](self.netB["bottleneck"](self.netF(x))))

    def head(self, features: Tensor) -> Tensor:
        """Features to logits (N, classes)."""
        return cast(Tensor, self.netC["fc"](features))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised as ImageNet's, to logits (N, classes)."""
        return self.head(self.features(x))

    @staticmethod
    def map_checkpoint(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """SHOT's three files, joined as netF., netB. and netC., by our names."""
        mapped = dict(state)
        stem = "netC.fc.weight"
        forms = ((f"{stem}_g", f"{stem}_v"), (_NEW_NORM.format(0), _NEW_NORM.format(1)))
        for gain, direction in forms:
            if gain in mapped and direction in mapped:
                g, v = mapped.pop(gain), mapped.pop(direction)
                mapped[stem] = g * v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
        return mapped


# torch.nn.utils.parametrizations.weight_norm names gain and direction so.
_NEW_NORM = "netC.fc.parametrizations.weight.original{}"


def shot_resnet50(classes: int = 65) -> Shot:
    """ResNet-50 for Office-Home's 65 classes."""
    return _shot("resnet50", classes)


def shot_resnet101(classes: int = 12) -> Shot:
    """ResNet-101 for VisDA-C's 12 classes."""
    return _shot("resnet101", classes)


def _shot(name: str, classes: int) -> Shot:
    try:
        models: Any = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ModelError(
            f"SHOT's {name} is torchvision's: pip install 'hdrq-deploy[models]'"
        ) from error
    return Shot(getattr(models, name)(weights=None), classes)
