"""How a model is adapted; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import SpecError

__all__ = ["AdaptationOptions"]


@dataclass(frozen=True)
class AdaptationOptions:
    """How a model is adapted.

    Attributes:
        epochs: Passes over the images.
        batch: Images per iteration.
        lr: Learning rate of SGD; layers in front of the classifier's bottleneck use a tenth.
        pseudo: Weight of the pseudo-labels beside information maximisation (classifiers).
        share: Share of the pixels of every class that is labelled, in the first and the last
            epoch (segmentation).
        flip: Mirror half of the images.
        pull: Weight of the squared distance to the source weights (L2-SP, Li et al., ICML 2018):
            models that stay close to their source merge better.
    """

    epochs: int = 15
    batch: int = 64
    lr: float = 1e-2
    pseudo: float = 0.3
    share: tuple[float, float] = (0.2, 0.5)
    flip: bool = True
    pull: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise SpecError(f"found epochs={self.epochs}; needed 1 or more")
        if self.batch < 2:
            raise SpecError(f"found batch={self.batch}; needed 2 or more")
        first, last = self.share
        if not 0 < first <= last <= 1:
            raise SpecError(f"found share {first} {last}; needed 0 < FIRST <= LAST <= 1")
        for name in ("lr", "pseudo", "pull"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SpecError(f"found {name}={value}; needed a number >= 0")
