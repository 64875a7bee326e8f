"""Lite0 and the plain residual network: ImageNet weights by order, and what the networks give."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from hdrq_deploy.errors import ModelError

pytest.importorskip("timm")

import timm

from hdrq_deploy import models
from hdrq_deploy.models.lite0 import imagenet_trunk


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    torch.manual_seed(3)
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    return network.eval()


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the package on the registry names them: other names, the same order and kinds."""
    return OrderedDict(
        (f"_layer{i:03}.{name.rpartition('.')[2]}", value)
        for i, (name, value) in enumerate(state.items())
    )


@pytest.mark.parametrize("names", ["timm", "package"])
def test_the_trunk_computes_as_timms_network(names: str, whole: nn.Module) -> None:
    state = whole.state_dict()
    network = models.lite0_pacs()
    network.load_imagenet(state if names == "timm" else renamed(state))
    network.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = whole.blocks[:5](whole.bn1(whole.conv_stem(x)))  # type: ignore[operator, index]
        assert torch.equal(network.blocks(network.bn1(network.conv_stem(x))), y)
        expected = y.mean((2, 3)) @ network.fc.weight.T + network.fc.bias
        assert torch.allclose(network(x), expected, atol=1e-5)
    assert sum(p.numel() for p in network.parameters()) == 701559


def test_weights_of_another_network_are_refused(whole: nn.Module) -> None:
    state = whole.state_dict()
    with pytest.raises(ModelError, match="found 1 tensors; needed the 247 of EfficientNet-Lite0"):
        imagenet_trunk({"weight": torch.zeros(3)})
    other = renamed(state)
    first = next(iter(other))
    other[first] = torch.zeros(16, 3, 3, 3)
    with pytest.raises(ModelError, match=r"found _layer000.weight \(16, 3, 3, 3\) in the place of"):
        imagenet_trunk(other)
    # The shapes of a BatchNorm's four tensors are equal; their kinds are not.
    names = list(state)
    at = names.index("bn1.running_mean")
    names[at], names[at + 1] = names[at + 1], names[at]
    swapped = renamed({name: state[name] for name in names})
    with pytest.raises(ModelError, match="running_var .* in the place of bn1.running_mean"):
        imagenet_trunk(swapped)


def test_the_segmenter_scores_a_quarter_of_the_pixels() -> None:
    network = models.lite0_camvid().eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 11, 16, 24)


def test_the_plain_network_has_no_depthwise_kernel() -> None:
    network = models.resnet_pacs().eval()
    assert all(m.groups == 1 for m in network.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 7)
