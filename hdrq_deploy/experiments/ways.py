"""How a protocol merges the bundles of a run: one row each."""

from __future__ import annotations

from dataclasses import dataclass

from ..merging.methods import method_of
from ..merging.rounding import ROUNDINGS

__all__ = ["WAYS", "Way"]


@dataclass(frozen=True)
class Way:
    """A row of the table of ways to merge.

    Attributes:
        summary: What it is, for help texts.
        method: Name of one of :data:`..merging.methods.METHODS`.
        rounding: Name of one of :data:`..merging.rounding.ROUNDINGS`.
        chooses: Whether unlabelled images choose the merge weights and give BatchNorm and the
            activation scales new values; else the merge weights are equal.
    """

    summary: str
    method: str = "mean"
    rounding: str = "nearest"
    chooses: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Whether the bundles need statistics of their layers' inputs."""
        rounding = ROUNDINGS[self.rounding]
        return method_of(self.method).needs_statistics or rounding.needs_statistics

    @property
    def tosses(self) -> bool:
        """Whether another rounding seed gives another merge."""
        return ROUNDINGS[self.rounding].tosses


WAYS = {
    "nearest": Way("the mean, rounded to nearest"),
    "advanced": Way("the mean, the best of 30 draws of the ties", rounding="advanced"),
    "compensated": Way("the mean, rounding compensated by statistics", rounding="compensated"),
    "regression": Way("regression, compensated rounding", "regression", "compensated"),
    "auto": Way(
        "as regression; unlabelled images choose the merge weights, and BatchNorm and the "
        "activation scales are measured again",
        "regression",
        "compensated",
        chooses=True,
    ),
}
