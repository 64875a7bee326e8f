"""The two settings of a calibration, one row each: the paper's and ours.

A setting names keys of a recipe: the codes of weights and activations, and how they are learned
whatever the method. ``hdrq-calibrate`` takes one as a preset, ``hdrq reproduce`` runs its grid in
one or both. What a setting leaves out is the method's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .methods import METHODS

__all__ = ["SETTINGS", "Setting"]


@dataclass(frozen=True)
class Setting:
    """A row of the table of settings.

    Attributes:
        summary: What it is, for help texts.
        codes: How weights and activations are quantized, by keys of a recipe.
        learning: Options of every method, by keys of a recipe.
        distance: Options of methods that stay close to the source model, beside ``learning``.
        pairs: Whether all pairs of domains are merged beside all domains together.
        pair_ways: How ``hdrq reproduce`` merges two models, by names of its table of ways
            (:mod:`..experiments.ways`).
        ways: How it merges more than two.
    """

    summary: str
    codes: Mapping[str, Any]
    learning: Mapping[str, Any]
    pairs: bool
    pair_ways: tuple[str, ...]
    ways: tuple[str, ...]
    distance: Mapping[str, Any] = field(default_factory=dict)

    def options(self, method: str) -> dict[str, Any]:
        """Options of a row of :data:`.methods.METHODS` that it sets; none of an unknown one."""
        row = METHODS.get(method)
        pulls = row is not None and row.options.distance > 0
        return {**self.learning, **(self.distance if pulls else {})}

    def recipe(self, method: str) -> dict[str, Any]:
        """All keys of a recipe of this method that it sets."""
        return {**self.codes, **self.options(method)}


_EVERY_WAY = (
    "nearest",
    "regression",
    "regression-w4",
    "regression-w3",
    "renewed",
    "renewed-w4",
    "renewed-w3",
    "fitted",
    "fitted-w4",
    "fitted-w3",
    "guided",
    "guided-mean",
    "guided-mean-w4",
    "guided-mean-w3",
    "auto",
)

SETTINGS: dict[str, Setting] = {
    "paper": Setting(
        "as published: one scale per tensor, BatchNorm folded into the weights, codes of "
        "non-negative activations to 255, quantizers and blocks in the paper's places, published "
        "rates scaled to the iterations",
        codes={
            "grid": "paper",
            "per_channel": False,
            "fold": "weights",
            "placement": "paper",
            "blocks": "unit",
        },
        learning={
            "scale_rates": True,
            "keep_best": False,
            "step_change": 0.0,
            "act_init": "per-image-max",
            "distance_form": "norm",
        },
        # Two models at equal weights have ties; three at equal thirds have none.
        pairs=True,
        pair_ways=("nearest", "advanced"),
        ways=("nearest",),
    ),
    "ours": Setting(
        "BatchNorm folded into per-channel scales, a relative distance to the source model",
        codes={"grid": "int8", "fold": "steps"},
        learning={},
        pairs=False,
        pair_ways=_EVERY_WAY,
        ways=_EVERY_WAY,
        # The best relative distance on calibration images of the digits and of PACS at W4A4
        # (benchmarks/distance_ablation.py, pacs_distance.py); 0.3 costs accuracy at 4 and 3 bits.
        distance={"distance_form": "relative", "distance": 0.1},
    ),
}
