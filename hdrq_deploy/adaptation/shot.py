"""SHOT: adaptation of a classifier whose last linear layer stays as it is.

Features are trained so that predictions are sure one by one and diverse together (information
maximisation), and agree with pseudo-labels, the nearest of class centroids found anew every
epoch.

Source:
    Liang et al., ICML 2020; github.com/tim-learn/SHOT, object/image_target.py (losses, rates,
    centroids).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..calibration.capture import single_output
from ..errors import ModelError
from .options import AdaptationOptions
from .training import Training

__all__ = ["ShotTraining", "centroid_labels", "information", "shifted"]


class ShotTraining(Training[AdaptationOptions]):
    """SHOT on one model and one domain."""

    method = "SHOT"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._head = last_linear(self.model, self.x[:2].to(self.device))

    def _frozen(self) -> list[nn.Module]:
        return [self._head]

    def _loss(self, rows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        x = shifted(self.x[rows], self.options.flip, generator)
        scores = self._scores(x.to(self.device))
        chosen = labels[rows].to(self.device)
        loss = information(scores)
        loss = loss + self.options.pseudo * functional.cross_entropy(scores, chosen)
        return loss + self._pull()

    def _pseudo_labels(self, epoch: int) -> Tensor:
        features: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(
            lambda _, inputs: features.append(inputs[0].flatten(1).cpu())
        )
        try:
            scores = torch.cat(list(self._batches()))
        finally:
            hook.remove()
        return centroid_labels(torch.cat(features), scores)


def information(scores: Tensor) -> Tensor:
    """Mean entropy of predictions less the entropy of their mean, in nats.

    Args:
        scores: Logits (N, classes).

    Source:
        Liang et al., ICML 2020, eq. 2 and 3.
    """
    share = scores.softmax(1)
    entropy = -(share * scores.log_softmax(1)).sum(1).mean()
    mean = share.mean(0)
    return entropy + (mean * (mean + 1e-5).log()).sum()


def centroid_labels(features: Tensor, scores: Tensor) -> Tensor:
    """Class of the nearest centroid by cosine, (N,).

    Args:
        features: What the last layer reads, (N, D).
        scores: Logits (N, classes); they weigh the first centroids, the labels the second.

    Source:
        Liang et al., ICML 2020, eq. 4 to 6; classes that nobody is predicted as get no centroid.
    """
    points = torch.cat([features, torch.ones(len(features), 1)], 1)
    points = functional.normalize(points)
    share, labels = scores.softmax(1), scores.argmax(1)
    for _ in range(2):
        centroids = functional.normalize(share.T @ points, dim=1)
        present = torch.bincount(labels, minlength=scores.shape[1]) > 0
        likeness = (points @ centroids.T).masked_fill(~present, -2.0)
        labels = likeness.argmax(1)
        share = functional.one_hot(labels, scores.shape[1]).float()
    return labels


def shifted(x: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Images shifted by up to a sixteenth of their sides, half of them mirrored.

    As SHOT's crop of 224 out of 256, edges repeated.
    """
    height, width = x.shape[2] // 16, x.shape[3] // 16
    padded = functional.pad(x, (width, width, height, height), mode="replicate")
    rows = []
    for image in padded:
        top = int(torch.randint(2 * height + 1, (), generator=generator))
        left = int(torch.randint(2 * width + 1, (), generator=generator))
        part = image[:, top : top + x.shape[2], left : left + x.shape[3]]
        mirrored = flip and bool(torch.rand((), generator=generator) < 0.5)
        rows.append(part.flip(2) if mirrored else part)
    return torch.stack(rows)


def last_linear(model: nn.Module, example: Tensor) -> nn.Linear:
    """The linear layer that gives the model's output."""
    calls: list[tuple[nn.Linear, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda layer, _, output: calls.append((layer, output)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            output = model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
    scores = single_output(output)
    if not calls or calls[-1][1].shape != scores.shape:
        raise ModelError(
            "found no linear layer that gives the model's scores; SHOT keeps the classifier fixed "
            "and needs one"
        )
    return calls[-1][0]
