"""Train the four checkpoints of the digits benchmark, which lie in ``checkpoints/``.

    python -m hdrq_deploy.calibration_data.digits.make_checkpoints --out DIR

The source model learns typeset digits. Each adapted model starts from it and is fine-tuned
on its own target domain. Weight averaging needs models that stay in one basin, so the
fine-tuning is short, at a low learning rate, and pulled towards the source weights (L2-SP,
Li et al., ICML 2018).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...typing import StepProgress
from ..models import ResNet14, resnet14
from ..training import CHECKPOINTS, BenchmarkTraining, command, fit, silent
from . import images as digits

__all__ = ["CHECKPOINTS", "RECIPES", "TRAINING", "accuracy", "load", "train"]

RECIPES = {
    "fonts": {"epochs": 10, "lr": 3e-3, "pull": 0.0},
    "handwriting": {"epochs": 3, "lr": 5e-4, "pull": 1e-2},
    "photo": {"epochs": 4, "lr": 7e-4, "pull": 1e-2},
    "night": {"epochs": 2, "lr": 4e-4, "pull": 1e-2},
}


def tensors(domain: str, split: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A split as the model reads it: (N, 3, 32, 32) float32 in [0, 1], and labels (N,)."""
    data = digits.make(domain, split, seed)
    pixels = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels).float() / 255, torch.from_numpy(data.labels)


def exposure(x: Tensor, generator: torch.Generator) -> Tensor:
    """Photograph (N, 3, H, W) images in [0, 1] again: darker, flatter, with read noise."""
    shape = (len(x), 1, 1, 1)
    gain = 0.15 + 0.85 * torch.rand(shape, generator=generator)
    offset = (1 - gain) * torch.rand(shape, generator=generator)
    noise = 0.06 * torch.rand(shape, generator=generator)
    return (x * gain + offset + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def accuracy(model: torch.nn.Module, domain: str, split: str = "test") -> float:
    """Top-1 accuracy of ``model`` on one split, 0 to 1."""
    x, y = tensors(domain, split)
    return float((model.eval()(x).argmax(1) == y).float().mean())


def load(domain: str) -> ResNet14:
    """The shipped checkpoint of ``domain``."""
    return TRAINING.load(CHECKPOINTS / f"{domain}.safetensors")


def train(
    domain: str, start: ResNet14 | None, seed: int = 0, report: StepProgress = silent
) -> ResNet14:
    """Train (``start`` None) or adapt a model to ``domain``; same seed, same model."""
    recipe = RECIPES[domain]
    torch.manual_seed(seed)
    model = resnet14()
    x, y = tensors(domain, "train", seed)
    steps = int(recipe["epochs"]) * (len(x) // 64)

    def losses() -> Iterator[Tensor]:
        order = torch.Generator().manual_seed(seed)
        for _ in range(int(recipe["epochs"])):
            for rows in torch.randperm(len(x), generator=order).split(64):  # type: ignore[no-untyped-call]
                if len(rows) == 64:
                    yield functional.cross_entropy(model(exposure(x[rows], order)), y[rows])

    return fit(model, start, recipe, steps, losses(), report)


TRAINING = BenchmarkTraining(
    CHECKPOINTS,
    RECIPES,
    resnet14,
    train,
    "accuracy",
    accuracy,
)


def main(argv: list[str] | None = None) -> int:
    """Train all four."""
    return command(TRAINING, str(__doc__), argv)


if __name__ == "__main__":
    raise SystemExit(main())
