"""How a protocol merges the bundles of a run: one row each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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
        renews: Whether unlabelled images give BatchNorm and the activation scales new values.
        chooses: Whether they choose the merge weights too; else the merge weights are equal.
        fits: Whose outputs every layer is fitted to on them, if any: those of each domain's own
            bundle (``"parents"``) or float model (``"floats"``), or of the mean of all float models
            (``"mean"``).
        sweeps: How often a fit goes over all layers.
        wbits: Bits that the merge rounds 8-bit weights to; None for the parents' own.
    """

    summary: str
    method: str = "mean"
    rounding: str = "nearest"
    renews: bool = False
    chooses: bool = False
    wbits: int | None = None
    fits: Literal["parents", "floats", "mean"] | None = None
    sweeps: int = 1

    @property
    def needs_statistics(self) -> bool:
        """Whether the bundles need statistics of their layers' inputs."""
        rounding = ROUNDINGS[self.rounding]
        return method_of(self.method).needs_statistics or rounding.needs_statistics

    @property
    def tosses(self) -> bool:
        """Whether another rounding seed gives another merge."""
        return ROUNDINGS[self.rounding].tosses

    @property
    def reads_floats(self) -> bool:
        """Whether the merge reads the float models of its members."""
        return self.fits in ("floats", "mean")


_OWN_BITS = {
    "nearest": Way("the mean, rounded to nearest"),
    "advanced": Way("the mean, the best of 30 draws of the ties", rounding="advanced"),
    "compensated": Way("the mean, rounding compensated by statistics", rounding="compensated"),
    "regression": Way("regression, compensated rounding", "regression", "compensated"),
    "renewed": Way(
        "as regression, with BatchNorm and activation scales measured again on unlabelled images",
        "regression",
        "compensated",
        renews=True,
    ),
    "fitted": Way(
        "as regression, and every layer fitted to what the parents put out on unlabelled images",
        "regression",
        "compensated",
        fits="parents",
    ),
    "guided": Way(
        "as fitted, in two sweeps, to what the float models put out",
        "regression",
        "compensated",
        fits="floats",
        sweeps=2,
    ),
    "guided-mean": Way(
        "as fitted, to what the mean of the float models puts out",
        "regression",
        "compensated",
        fits="mean",
    ),
    "auto": Way(
        "as renewed; the unlabelled images choose the merge weights, too",
        "regression",
        "compensated",
        renews=True,
        chooses=True,
    ),
}
WAYS = _OWN_BITS | {
    f"{name}-w{wbits}": replace(
        _OWN_BITS[name],
        summary=f"as {name}, of parents with 8-bit weights, rounded to {wbits} bits by the merge",
        wbits=wbits,
    )
    for name in ("regression", "renewed", "fitted", "guided-mean")
    for wbits in (4, 3)
}
