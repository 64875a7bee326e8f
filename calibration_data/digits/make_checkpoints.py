"""Train the four checkpoints of the digits benchmark that ship in ``checkpoints/``.

    python -m hdrq_deploy.calibration_data.digits.make_checkpoints --out DIR

The source model learns typeset digits. Each adapted model starts from it and is fine-tuned
on its own target domain. Weight averaging needs models that stay in one basin, so the
fine-tuning is short, at a low learning rate, and pulled towards the source weights (L2-SP,
Li et al., ICML 2018).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ..models import ResNet14, resnet14
from . import images as digits

__all__ = ["CHECKPOINTS", "RECIPES", "accuracy", "fit", "load", "publish", "train"]

Model = TypeVar("Model", bound=torch.nn.Module)

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
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
    model = resnet14()
    model.load_state_dict(load_file(CHECKPOINTS / f"{domain}.safetensors"))
    return model.eval()


def train(domain: str, start: ResNet14 | None, seed: int = 0) -> ResNet14:
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

    return fit(model, start, recipe, steps, losses())


def fit(
    model: Model,
    start: Model | None,
    recipe: Mapping[str, float],
    steps: int,
    losses: Iterator[Tensor],
) -> Model:
    """Train a model, from ``start`` and pulled towards its weights where there is one.

    Args:
        model: What is trained.
        start: The source model.
        recipe: ``lr`` of the one-cycle schedule and ``pull``.
        steps: How many losses there are.
        losses: Computes the next one with the model as it is then.
    """
    if start is not None:
        model.load_state_dict(start.state_dict())
    source = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], steps)
    model.train()
    for loss in losses:
        if start is not None:
            pairs = zip(model.parameters(), source, strict=True)
            away = torch.stack([(p - s).square().sum() for p, s in pairs]).sum()
            loss = loss + recipe["pull"] * away
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


def publish(
    out: Path,
    seed: int,
    domains: Sequence[str],
    recipes: Mapping[str, Mapping[str, float]],
    learn: Callable[[str, Model | None, int], Model],
    metric: str,
    measure: Callable[[Model, str], float],
) -> None:
    """Train a source model and those adapted from it; write them and ``checkpoints.json``.

    Args:
        out: Folder.
        seed: Of the training.
        domains: The source first.
        recipes: What ``checkpoints.json`` says of the training of each.
        learn: Trains one domain, from the source model or from nothing.
        metric: Name of what ``measure`` measures on every domain's test split.
    """
    out.mkdir(parents=True, exist_ok=True)
    source: Model | None = None
    record: dict[str, Any] = {}
    for domain in domains:
        began = time.monotonic()
        model = learn(domain, source, seed)
        source = source or model
        path = out / f"{domain}.safetensors"
        save_file(model.state_dict(), path)
        record[domain] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "seed": seed,
            "recipe": recipes[domain],
            metric: {name: measure(model, name) for name in domains},
        }
        print(f"{domain} {time.monotonic() - began:.0f} s {record[domain][metric]}", flush=True)
    (out / "checkpoints.json").write_text(json.dumps(record, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Train all four."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKPOINTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    publish(args.out, args.seed, digits.DOMAINS, RECIPES, train, "accuracy", accuracy)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
