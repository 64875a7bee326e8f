"""Blocks by residual unit, by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.blocks import find_blocks, find_units
from hdrq_deploy.calibration.capture import Capture, capture
from hdrq_deploy.calibration.fold_batch_norm import fold_batch_norm, fold_constants
from hdrq_deploy.calibration.nodes import module_path
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration_data.models import resnet14, streetnet
from hdrq_deploy.calibration_data.readers import ImageSet

RESNET50 = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}


def folded(model: nn.Module, side: int) -> Capture:
    torch.manual_seed(0)
    found = capture(model.eval(), torch.rand(2, 3, side, side))
    fold_constants(found)
    fold_batch_norm(found)
    return found


def names(found: Capture, **options: Any) -> list[list[str]]:
    blocks = find_units(found, **options)
    inside = [node for block in blocks for node in block.nodes]
    computed = [n for n in found.graph.nodes if n.op not in {"placeholder", "output", "get_attr"}]
    assert inside == computed  # every node once, in order
    return [[module_path(node) for node in block.heavy] for block in blocks]


def test_the_units_of_resnet50_are_those_of_brecq() -> None:
    models = pytest.importorskip("torchvision.models")
    found = folded(models.resnet50(weights=None), 32)
    expected = [["conv1"]]
    for layer, count in RESNET50.items():
        for i in range(count):
            unit = [f"{layer}.{i}.conv{j}" for j in (1, 2, 3)]
            expected.append([*unit, f"{layer}.{i}.downsample.0"] if i == 0 else unit)
    assert names(found) == [*expected, ["fc"]]
    assert [b.nodes for b in find_units(found)] == [b.nodes for b in find_blocks(found)]


def test_a_resnet_is_cut_the_same_way_by_liveness() -> None:
    found = folded(resnet14(), 32)
    assert [b.nodes for b in find_units(found)] == [b.nodes for b in find_blocks(found)]
    assert len(find_units(found)) == 8


def test_an_encoder_decoder_has_its_units_too() -> None:
    """By liveness two units and a level of the decoder are one block here."""
    found = folded(streetnet(), 32)
    expected = [["conv1"], ["levels.0.conv1", "levels.0.conv2"]]
    for level in (1, 2, 3):
        unit = [f"levels.{level}.0.conv1", f"levels.{level}.0.conv2"]
        expected.append([*unit, f"levels.{level}.0.downsample.0"])
        expected.append([f"levels.{level}.1.conv1", f"levels.{level}.1.conv2"])
    expected += [[f"lateral.{level}"] for level in (3, 2, 1, 0)]
    assert names(found) == [*expected, ["smooth"], ["head"]]
    assert len(find_blocks(found)) == 8
    # The units hand on the skips that are alive beside them.
    assert max(len(block.inputs) for block in find_units(found)) == 2


class Net(nn.Module):
    """Four convolutions of one width, joined by ``join``."""

    def __init__(self, join: Callable[[Tensor, Sequence[nn.Module]], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.c = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.relu(self.stem(x)), list(self.c))


def branches(x: Tensor, c: Sequence[nn.Module]) -> Tensor:
    """x + a(x) + b(x), then two layers."""
    y = torch.relu(x + c[0](x) + c[1](x))
    return c[3](torch.relu(c[2](y)))


def nested(x: Tensor, c: Sequence[nn.Module]) -> Tensor:
    """A skip around a unit."""
    y = torch.relu(c[0](x))
    y = y + c[2](torch.relu(c[1](y)))
    return x + c[3](torch.relu(y))


def joined(x: Tensor, c: Sequence[nn.Module]) -> Tensor:
    """A skip that is joined by a concatenation closes no unit."""
    y = c[1](torch.relu(c[0](x)))
    return torch.cat([c[2](torch.relu(y)), c[3](x)], 1)


def gated(x: Tensor, c: Sequence[nn.Module]) -> Tensor:
    """A gate is no sum; the sum with a constant is no skip."""
    y = c[0](x) * torch.sigmoid(c[1](x)) + 3
    return y - c[3](torch.relu(c[2](y)))


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        (branches, [["c.0", "c.1"], ["c.2"], ["c.3"]]),
        (nested, [["c.0"], ["c.1", "c.2"], ["c.3"]]),
        (joined, [["c.0"], ["c.1"], ["c.2"], ["c.3"]]),
        (gated, [["c.0"], ["c.1"], ["c.2", "c.3"]]),
    ],
)
def test_a_unit_is_the_smallest_region_that_a_sum_closes(join: Any, expected: Any) -> None:
    assert names(folded(Net(join), 8)) == [["stem"], *expected]


def test_a_region_of_many_layers_is_no_unit() -> None:
    found = folded(Net(lambda x, c: x + c[3](c[2](c[1](c[0](x))))), 8)
    assert names(found) == [["stem"], ["c.0", "c.1", "c.2", "c.3"]]
    assert names(found, most_heavy=3) == [["stem"], ["c.0"], ["c.1"], ["c.2"], ["c.3"]]


def skipped() -> Net:
    torch.manual_seed(0)
    return Net(nested)


def test_units_are_what_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "units", sys.modules[__name__])
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    torch.save(skipped().state_dict(), tmp_path / "w.pt")
    bundle = calibrate(
        "units:skipped", ImageSet(x, None, None, None), "d", tmp_path / "unit.hdrq",
        tmp_path / "w.pt", tmp_path / "w.pt", blocks="unit",
        options=Options.of("hdrq", iters=2, batch=2),
    )  # fmt: skip
    assert bundle.manifest.options["blocks"] == "unit"
    learned = bundle.manifest.metrics["blocks"]
    assert len(find_blocks(folded(skipped(), 8))) == 2 and len(learned) == 4
    assert all(block["loss_after"] <= block["loss_before"] for block in learned)
