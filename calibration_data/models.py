"""The small networks of the digits and street-scene benchmarks."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BasicBlock", "ResNet14", "StreetNet", "resnet14", "streetnet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip (He et al., 2016, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return cast(Tensor, self.relu(y + self.downsample(x)))


class ResNet14(nn.Module):
    """A stem, six residual blocks of 16, 32 and 64 channels, a head: 175,258 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32), RGB in [0, 1], to logits (N, classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(Tensor, self.fc(torch.flatten(self.avgpool(x), 1)))


def resnet14() -> ResNet14:
    """The factory for ``--model hdrq_deploy.calibration_data.models:resnet14``."""
    return ResNet14()


class StreetNet(nn.Module):
    """An encoder of residual blocks and a decoder that adds its levels up again (FPN).

    Convolutions, sums and nearest resizing only, so that every layer that holds weights can run
    in integers. 760,962 parameters.
    """

    WIDTHS = (24, 48, 80, 112)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        first, *others = self.WIDTHS
        self.conv1 = nn.Conv2d(3, first, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.levels = nn.ModuleList([BasicBlock(first, first, 1)])
        for inputs, outputs in zip((first, *others), others, strict=False):
            block = nn.Sequential(BasicBlock(inputs, outputs, 2), BasicBlock(outputs, outputs, 1))
            self.levels.append(block)
        inner = 48
        self.lateral = nn.ModuleList(nn.Conv2d(width, inner, 1) for width in self.WIDTHS)
        self.smooth = nn.Conv2d(inner, inner, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.head = nn.Conv2d(inner, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), RGB in [0, 1], to scores (N, classes, H / 2, W / 2)."""
        x = self.relu(self.bn1(self.conv1(x)))
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        y = self.lateral[-1](features[-1])
        for skip, lateral in zip(features[-2::-1], list(self.lateral)[-2::-1], strict=True):
            y = lateral(skip) + functional.interpolate(y, scale_factor=2.0, mode="nearest")
        return cast(Tensor, self.head(self.relu(self.bn2(self.smooth(y)))))


def streetnet() -> StreetNet:
    """The factory for ``--model hdrq_deploy.calibration_data.models:streetnet``."""
    return StreetNet()
