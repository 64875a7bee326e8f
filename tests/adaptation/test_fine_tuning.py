"""Training with labels: its rates and weights by hand, its effect, its resuming."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from hdrq_deploy.adaptation.fine_tuning import FineTuning, fine_tune, labelled_images
from hdrq_deploy.adaptation.options import FineTuningOptions
from hdrq_deploy.calibration_data.readers import Wanted
from hdrq_deploy.errors import DataError, ModelError, SpecError

MODULE = '''
from torch import nn


def small():
    """Classes by colour, or by place with its BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )


def pixels():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
'''
WANTED = Wanted((16, 16), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "fine_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fine_models", raising=False)
    return "fine_models"


def coloured(root: Path, count: int = 24) -> Path:
    """Three classes: red, green, blue, with noise."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a", "b", "c")):
        (root / name).mkdir(parents=True)
        for n in range(count):
            image = rng.integers(0, 120, (16, 16, 3)).astype(np.uint8)
            image[..., i] += 100
            Image.fromarray(image).save(root / name / f"{n:02}.png")
    return root


def scenes(root: Path) -> Path:
    """Columns of the three colours, labelled by colour; a frame that nobody labels."""
    rng = np.random.default_rng(1)
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for n in range(12):
        labels = rng.permutation(3).repeat(8)[None, :].repeat(16, 0).astype(np.uint8)
        image = rng.integers(0, 120, (16, 24, 3)).astype(np.uint8)
        np.put_along_axis(image, labels[..., None].astype(np.int64), 220, 2)
        labels[0] = 255
        Image.fromarray(image).save(root / "images" / f"{n}.png")
        Image.fromarray(labels).save(root / "labels" / f"{n}.png")
    return root


def test_classes_are_learned_and_a_stopped_run_goes_on(models: str, tmp_path: Path) -> None:
    data, options = coloured(tmp_path / "data"), FineTuningOptions(epochs=4, batch=12, lr=0.1)
    model = f"{models}:small"
    whole = fine_tune(model, data, tmp_path / "whole.safetensors", None, None, options, WANTED)
    network = __import__(models).small().eval()
    network.load_state_dict(load_file(whole))
    images, y = labelled_images(data, WANTED)
    with torch.no_grad():
        right = (network(torch.from_numpy(images.x)).argmax(1) == y).float().mean()
    assert right > 0.9

    def stop(done: int, total: int, what: str) -> None:
        if done == 13:  # in the third epoch
            raise KeyboardInterrupt

    target = tmp_path / "stopped.safetensors"
    arguments = (model, data, target, None, None, options, WANTED)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(*arguments, progress=stop)
    assert not target.exists() and target.with_name(f"{target.name}.partial").is_file()
    other = FineTuningOptions(epochs=4, batch=12, lr=0.05)
    with pytest.raises(SpecError, match="found a run of other options"):
        fine_tune(*arguments[:5], other, WANTED, resume=True)
    steps: list[int] = []
    fine_tune(*arguments, resume=True, progress=lambda done, total, what: steps.append(done))
    assert steps[0] == 13 and len(steps) == 12
    assert target.read_bytes() == whole.read_bytes()
    assert not target.with_name(f"{target.name}.partial").exists()


def test_pixels_are_learned_and_255_is_left_out(models: str, tmp_path: Path) -> None:
    data, wanted = scenes(tmp_path / "scenes"), Wanted((16, 24), (0.5,) * 3, (0.5,) * 3)
    options = FineTuningOptions(epochs=12, batch=4, lr=0.2, smoothing=0.0)
    output = tmp_path / "pixels.safetensors"
    fine_tune(f"{models}:pixels", data, output, None, None, options, wanted)
    network = __import__(models).pixels().eval()
    network.load_state_dict(load_file(output))
    images, y = labelled_images(data, wanted)
    assert y.dtype == torch.uint8 and bool((y[:, 0] == 255).all())
    with torch.no_grad():
        scores = network(torch.from_numpy(images.x))
    right = (scores.argmax(1) == y[:, ::2, ::2])[:, 1:].float().mean()
    assert right > 0.9


def training(y: torch.Tensor, balance: float = 0.5) -> FineTuning:
    options = FineTuningOptions(balance=balance)
    return FineTuning(
        nn.Conv2d(3, 3, 1), torch.zeros(2, 3, 4, 4), y, options, 0, torch.device("cpu")
    )


def test_rare_classes_of_pixels_weigh_more() -> None:
    y = torch.full((2, 4, 4), 255)
    y[0, 0, :] = 0
    y[1, 0, 0] = 1
    # Shares 4 to 1, to the power of a half; the absent class weighs nothing.
    weight = training(y)._weight
    assert weight is not None
    assert weight.tolist() == pytest.approx([2 / 3, 4 / 3, 0])


def test_the_rate_rises_in_a_fifth_and_falls_to_nothing() -> None:
    rates = training(torch.zeros(2, 4, 4))._share_of_rate
    assert rates(0) == pytest.approx(0.04) and rates(0.2) == pytest.approx(1)
    assert rates(0.6) == pytest.approx(0.5) and rates(1) == pytest.approx(0)


def test_what_does_not_fit(models: str, tmp_path: Path) -> None:
    data = coloured(tmp_path / "data", 4)
    options, output = FineTuningOptions(epochs=1, batch=4), tmp_path / "out.safetensors"
    model = f"{models}:small"
    with pytest.raises(DataError, match="found 12 images; needed 32 or more"):
        fine_tune(model, data, output, None, None, None, WANTED)
    with pytest.raises(ModelError, match="found ImageNet weights for .*:small.*leave them out"):
        fine_tune(model, data, output, None, tmp_path / "imagenet.pth", options, WANTED)
    with pytest.raises(SpecError, match="needed a .safetensors file"):
        fine_tune(model, data, tmp_path / "out.pt", None, None, options, WANTED)
    (data / "d").mkdir()
    (data / "a" / "00.png").rename(data / "d" / "00.png")
    with pytest.raises(DataError, match="found label 3; needed labels below 3"):
        fine_tune(model, data, output, None, None, options, WANTED)
    with pytest.raises(DataError, match="found no folder of a class"):
        labelled_images(data / "a", WANTED)
    with pytest.raises(SpecError, match="found smoothing=1"):
        FineTuningOptions(smoothing=1)
    assert not output.exists()
