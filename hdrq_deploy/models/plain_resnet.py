"""A plain residual network (He et al., CVPR 2016) for PACS, without depthwise kernels.

It is trained from random weights: no public ones are needed.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ..calibration_data.models import BasicBlock

__all__ = ["PlainResNet", "resnet_pacs"]


class PlainResNet(nn.Module):
    """A stem to a quarter of the sides, eight residual blocks of 32 to 256 channels, a head."""

    WIDTHS = (32, 64, 128, 256)

    def __init__(self, classes: int) -> None:
        super().__init__()
        first, *others = self.WIDTHS
        self.conv1 = nn.Conv2d(3, first, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layers = nn.Sequential(BasicBlock(first, first, 1), BasicBlock(first, first, 1))
        for inputs, outputs in zip((first, *others), others, strict=False):
            self.layers.extend([BasicBlock(inputs, outputs, 2), BasicBlock(outputs, outputs, 1)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to logits (N, classes)."""
        y = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return cast(Tensor, self.fc(self.pool(y).flatten(1)))


def resnet_pacs() -> PlainResNet:
    """The plain residual network for PACS' 7 classes: 2,796,839 parameters."""
    return PlainResNet(7)
