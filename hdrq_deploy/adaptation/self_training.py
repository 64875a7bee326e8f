"""Class-balanced self-training: adaptation of a segmentation model without source images.

Every epoch the model labels the pixels it is surest of, the same share of every class and a
growing one, and learns them on images with other contrast and brightness.

Source:
    Zou et al., ECCV 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..calibration_data.readers.street_scenes import IGNORE
from .options import AdaptationOptions
from .training import Training

__all__ = ["SelfTraining", "changed_photos", "confident_labels"]


class SelfTraining(Training[AdaptationOptions]):
    """Self-training on one model and one domain."""

    method = "class-balanced self-training"

    def _loss(self, rows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        x, chosen = changed_photos(self.x[rows], labels[rows], self.options.flip, generator)
        scores = self._scores(x.to(self.device))
        wanted = chosen.to(self.device).long()
        if not (wanted != IGNORE).any():
            return scores.sum() * 0
        return functional.cross_entropy(scores, wanted, ignore_index=IGNORE) + self._pull()

    def _pseudo_labels(self, epoch: int) -> Tensor:
        first, last = self.options.share
        share = first + (last - first) * epoch / max(self.options.epochs - 1, 1)
        return confident_labels(self._batches, share)


def confident_labels(batches: Callable[[], Iterator[Tensor]], share: float) -> Tensor:
    """Labels (N, h, w) uint8 of the surest ``share`` of the pixels of every class, else IGNORE.

    Args:
        batches: Gives the logits (n, classes, h, w) of all images, batch after batch.
        share: 0 to 1.

    Source:
        Zou et al., ECCV 2018, section 4 (class-balanced thresholds).
    """
    labels, sureness = [], []
    for scores in batches():
        sure, label = scores.softmax(1).max(1)
        labels.append(label.to(torch.uint8))
        sureness.append(sure.half())
    chosen, sure = torch.cat(labels), torch.cat(sureness)
    result = torch.full_like(chosen, IGNORE)
    for label in torch.unique(chosen).tolist():
        of_class = chosen == label
        values = sure[of_class].float().numpy()
        least = np.quantile(values, 1 - share)
        result[of_class & (sure.float() >= float(least))] = label
    return result


def changed_photos(
    x: Tensor, labels: Tensor, flip: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images with other contrast and brightness, half of them mirrored with their labels."""
    shape = (len(x), 1, 1, 1)
    gain = 0.8 + 0.4 * torch.rand(shape, generator=generator)
    offset = 0.2 * x.std() * (2 * torch.rand(shape, generator=generator) - 1)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * gain + middle + offset
    mirrored = torch.rand(len(x), generator=generator) < (0.5 if flip else 0.0)
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    labels = torch.where(mirrored[:, None, None], labels.flip(2), labels)
    return x, labels
