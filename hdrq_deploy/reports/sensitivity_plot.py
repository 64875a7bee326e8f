"""The plot of a sensitivity analysis."""

from __future__ import annotations

import math
from typing import Any

from ..checks.sensitivity import Sensitivity
from .html import svg

__all__ = ["plot"]

_MOST_LAYERS = 40


def plot(sensitivity: Sensitivity) -> str:
    """SQNR in dB of the most harmful layers, the most harmful on top, as the text of an SVG file.

    Layers that change nothing have an infinite SQNR and are left out.
    """
    finite = [row for row in sensitivity.layers if math.isfinite(row.sqnr_db)]
    rows = finite[:_MOST_LAYERS][::-1]

    def draw(figure: Any) -> None:
        figure.set_size_inches(7, 1.2 + 0.2 * len(rows))
        axes = figure.add_subplot()
        axes.barh([row.module for row in rows], [row.sqnr_db for row in rows], color="#3b6ea8")
        axes.axvline(sensitivity.full_sqnr_db, color="#b5432a", linewidth=1)
        axes.annotate(
            "all layers",
            (sensitivity.full_sqnr_db, len(rows) - 0.5),
            xytext=(3, 4),
            textcoords="offset points",
            color="#b5432a",
        )
        axes.set_ylim(-0.8, len(rows) + 0.4)
        axes.set_xlabel("SQNR of the output with this layer alone in codes (dB, longer is better)")

    return svg(draw, {"svg.fonttype": "none", "font.size": 8}, {"Date": None})
