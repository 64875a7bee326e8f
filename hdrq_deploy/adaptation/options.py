"""How a model is adapted; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import SpecError

__all__ = ["FEWEST", "AdaptationOptions", "FineTuningOptions"]

# Images that an adaptation needs of a domain.
FEWEST = 2


@dataclass(frozen=True)
class AdaptationOptions:
    """How a model is adapted.

    Attributes:
        epochs: Passes over the images.
        batch: Images per iteration; all of them where there are fewer.
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
        _check_counts(self.epochs, self.batch)
        first, last = self.share
        if not 0 < first <= last <= 1:
            raise SpecError(f"found share {first} {last}; needed 0 < FIRST <= LAST <= 1")
        _check_numbers(lr=self.lr, pseudo=self.pseudo, pull=self.pull)


@dataclass(frozen=True)
class FineTuningOptions:
    """How a model is trained with labels.

    Attributes:
        epochs: Passes over the images.
        batch: Images per iteration.
        lr: Highest learning rate of SGD, in one cycle.
        smoothing: Share of every label that is spread over all classes (Szegedy et al., CVPR
            2016).
        balance: Classes of pixels weigh as the inverse of their share to this power.
        flip: Mirror half of the images.
        pull: As that of :class:`AdaptationOptions`.
    """

    epochs: int = 8
    batch: int = 32
    lr: float = 2e-2
    smoothing: float = 0.1
    balance: float = 0.35
    flip: bool = True
    pull: float = 0.0

    def __post_init__(self) -> None:
        _check_counts(self.epochs, self.batch)
        if not 0 <= self.smoothing < 1:
            raise SpecError(f"found smoothing={self.smoothing}; needed 0 or more, below 1")
        _check_numbers(lr=self.lr, balance=self.balance, pull=self.pull)


def _check_counts(epochs: int, batch: int) -> None:
    if epochs < 1:
        raise SpecError(f"found epochs={epochs}; needed 1 or more")
    if batch < 2:
        raise SpecError(f"found batch={batch}; needed 2 or more")


def _check_numbers(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise SpecError(f"found {name}={value}; needed a number >= 0")
