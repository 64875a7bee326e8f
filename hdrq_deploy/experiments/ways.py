"""How a protocol merges the bundles of a run: one row each."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        fits: Whether every layer is fitted on them, to what the parents put out.
        fits_floats: Whether it is fitted to what the float models put out instead.
        fits_mean: Whether, in place of each domain's own float model, the mean of all of them
            puts it out.
        sweeps: How often a fit goes over all layers.
        wbits: Bits that the merge rounds 8-bit weights to; None for the parents' own.
    """

    summary: str
    method: str = "mean"
    rounding: str = "nearest"
    renews: bool = False
    chooses: bool = False
    wbits: int | None = None
    fits: bool = False
    fits_floats: bool = False
    fits_mean: bool = False
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
        fits=True,
    ),
    "guided": Way(
        "as fitted, in two sweeps, to what the float models put out",
        "regression",
        "compensated",
        fits=True,
        fits_floats=True,
        sweeps=2,
    ),
    "guided-mean": Way(
        "as fitted, to what the mean of the float models puts out",
        "regression",
        "compensated",
        fits=True,
        fits_floats=True,
        fits_mean=True,
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
