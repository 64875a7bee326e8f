"""Train the four checkpoints of the street-scene benchmark, which lie in ``checkpoints/street``.

    python -m hdrq_deploy.calibration_data.streets.make_checkpoints --out DIR

The source model learns clean scenes; each adapted model starts from it and is fine-tuned on its
own domain, for a short while, at a low rate and pulled towards the source weights (L2-SP, Li et
al., ICML 2018), because weight averaging needs models that stay in one basin.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...typing import StepProgress
from .. import training
from ..models import StreetNet, streetnet
from ..training import BenchmarkTraining, command, fit, silent
from . import drawing

__all__ = ["CHECKPOINTS", "RECIPES", "TRAINING", "load", "mean_iou", "train"]

CHECKPOINTS = training.CHECKPOINTS / "street"
RECIPES = {
    "clean": {"steps": 800, "lr": 4e-3, "pull": 0.0},
    "dusk": {"steps": 240, "lr": 1e-3, "pull": 3e-3},
    "fog": {"steps": 200, "lr": 8e-4, "pull": 3e-3},
    "brick": {"steps": 240, "lr": 2.6e-3, "pull": 1e-3},
}
_BATCH, _CROP = 10, 128


def tensors(domain: str, split: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A split as the model reads it: (N, 3, 128, 256) uint8, and labels (N, 128, 256) uint8."""
    data = drawing.make(domain, split, seed)
    images = torch.from_numpy(np.ascontiguousarray(data.images.transpose(0, 3, 1, 2)))
    return images, torch.from_numpy(data.labels)


def exposure(x: Tensor, generator: torch.Generator) -> Tensor:
    """Photograph (N, 3, H, W) images in [0, 1] again: darker, flatter, tinted, noisy."""
    shape = (len(x), 1, 1, 1)
    gain = 0.3 + 0.7 * torch.rand(shape, generator=generator)
    offset = (1 - gain) * torch.rand(shape, generator=generator)
    tint = 1 + 0.2 * (torch.rand((len(x), 3, 1, 1), generator=generator) - 0.5)
    noise = 0.03 * torch.rand(shape, generator=generator)
    grain = noise * torch.randn(x.shape, generator=generator)
    return (x * gain * tint + offset + grain).clamp(0, 1)


@torch.no_grad()
def mean_iou(model: torch.nn.Module, domain: str, split: str = "test") -> float:
    """Mean intersection over union of the ten classes, 0 to 1."""
    images, labels = tensors(domain, split)
    count = len(drawing.CLASSES)
    table = torch.zeros(count * count, dtype=torch.long)
    model.eval()
    for x, y in zip(images.split(20), labels.split(20), strict=True):  # type: ignore[no-untyped-call]
        scores = functional.interpolate(
            model(x.float() / 255), scale_factor=2.0, mode="bilinear", align_corners=False
        )
        pairs = y.long() * count + scores.argmax(1)
        table += torch.bincount(pairs.flatten(), minlength=count * count)
    square = table.reshape(count, count).double()
    hits = square.diag()
    return float((hits / (square.sum(0) + square.sum(1) - hits)).mean())


def load(domain: str) -> StreetNet:
    """The shipped checkpoint of ``domain``."""
    return TRAINING.load(CHECKPOINTS / f"{domain}.safetensors")


def train(
    domain: str, start: StreetNet | None, seed: int = 0, report: StepProgress = silent
) -> StreetNet:
    """Train (``start`` None) or adapt a model to ``domain``; same seed, same model."""
    recipe = RECIPES[domain]
    torch.manual_seed(seed)
    model = streetnet()
    images, labels = tensors(domain, "train", seed)
    steps = int(recipe["steps"])
    # Small things count: road and houses would drown people and signs.
    share = torch.bincount(labels.flatten().long(), minlength=len(drawing.CLASSES)).float()
    weight = (share.sum() / share.clamp(min=1)) ** 0.35
    weight = weight / weight.mean()

    def losses() -> Iterator[Tensor]:
        order = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = torch.randint(len(images), (_BATCH,), generator=order)
            left = int(torch.randint(drawing.WIDTH - _CROP + 1, (), generator=order))
            across = slice(left, left + _CROP)
            x, y = images[rows][..., across].float() / 255, labels[rows][..., across].long()
            if torch.rand((), generator=order) < 0.5:
                x, y = x.flip(3), y.flip(2)
            yield functional.cross_entropy(model(exposure(x, order)), y[:, ::2, ::2], weight)

    return fit(model, start, recipe, steps, losses(), report)


TRAINING = BenchmarkTraining(CHECKPOINTS, RECIPES, streetnet, train, "mean_iou", mean_iou)


def main(argv: list[str] | None = None) -> int:
    """Train all four."""
    return command(TRAINING, str(__doc__), argv)


if __name__ == "__main__":
    raise SystemExit(main())
