"""Draw the figures of ``docs/concepts/``.

    python docs/figures.py

Every curve is computed, by NumPy or by this package; nothing is drawn by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
INK, FIRST, SECOND, GOOD = "#2d3748", "#2b6cb0", "#dd8a1b", "#b83256"


def ties(figure: Any) -> None:
    """Share of tied codes, and the bias of rounding all ties up, by bits."""
    rng = np.random.default_rng(0)
    source = rng.normal(size=200_000)
    parents = [source + 0.3 * rng.normal(size=source.size) for _ in range(2)]
    bits = np.arange(2, 9)
    share, up, drawn = [], [], []
    for width in bits:
        lowest, highest = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        scale = 3.0 / highest
        codes = [np.clip(np.rint(p / scale), lowest, highest) for p in parents]
        total = codes[0] + codes[1]
        tied = total % 2 != 0
        share.append(100 * tied.mean())
        up.append(scale * (np.floor(total / 2 + 0.5) - total / 2).mean())
        choice = np.where(rng.random(total.size) < 0.5, 0.5, -0.5)
        drawn.append(scale * np.where(tied, choice, 0).mean())
    left, right = figure.subplots(1, 2)
    left.bar(bits, share, color=FIRST)
    left.set(xlabel="bits", ylabel="tied codes, %", title="codes of two models whose sum is odd")
    right.plot(bits, up, "o-", color=GOOD, label="ties always up")
    right.plot(bits, drawn, "s-", color=FIRST, label="ties drawn")
    right.axhline(0, color=INK, lw=0.8)
    right.set(xlabel="bits", ylabel="mean error of a merged weight", title="bias of the merge")
    right.legend(frameon=False)


def regression(figure: Any) -> None:
    """Two layers with different inputs: their average, and the weights that fit both."""
    moments = [np.array([[4.0, 1.2], [1.2, 0.5]]), np.array([[0.4, -0.9], [-0.9, 4.0]])]
    weights = [np.array([1.0, 0.2]), np.array([-0.6, 1.4])]
    mean = (weights[0] + weights[1]) / 2
    fit = np.linalg.solve(sum(moments), sum(g @ w for g, w in zip(moments, weights, strict=True)))
    x, y = np.meshgrid(np.linspace(-1.6, 2.0, 200), np.linspace(-0.8, 2.4, 200))
    grid = np.stack([x, y], -1)
    axes = figure.subplots()
    for g, w, colour, name in zip(moments, weights, (FIRST, SECOND), ("night", "day"), strict=True):
        away = grid - w
        error = np.einsum("...i,ij,...j", away, g, away)
        axes.contour(x, y, error, levels=[0.1, 0.5, 1.5, 3], colors=colour, linewidths=1)
        axes.plot(*w, "o", color=colour, ms=8, label=f"{name}: weights, lines of equal error")
    for point, mark, name in ((mean, "s", "average"), (fit, "*", "regression")):
        total = sum((point - w) @ g @ (point - w) for g, w in zip(moments, weights, strict=True))
        axes.plot(
            *point, mark, color=GOOD if mark == "*" else INK, ms=12,
            label=f"{name}: error {total:.1f} in all",
        )  # fmt: skip
    axes.set(xlabel="first weight", ylabel="second weight")
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)


def grid(figure: Any) -> None:
    """The search of an activation's scale: little saturates, little is rounded away."""
    rng = np.random.default_rng(1)
    values = np.maximum(rng.normal(size=50_000), 0) * rng.gamma(2.0, 0.5, size=50_000)
    left, right = figure.subplots(1, 2)
    for bits, colour in ((4, FIRST), (3, GOOD)):
        highest = 2**bits - 1
        ranges = np.linspace(0.05, 1, 100) * values.max()
        errors = []
        for top in ranges:
            scale = top / highest
            error = values - scale * np.clip(np.rint(values / scale), 0, highest)
            errors.append(np.mean(np.abs(error) ** 2.4))
        best = ranges[int(np.argmin(errors))]
        left.semilogy(ranges, errors, color=colour, label=f"{bits} bits")
        left.plot(best, min(errors), "o", color=colour)
        right.axvline(best, color=colour, lw=1.2)
        at = best / highest * np.arange(highest + 1)
        right.plot(at, np.full(at.size, -0.04 * (bits - 2)), "|", color=colour, ms=9)
    left.set(xlabel="range that codes cover", ylabel="mean |error|^2.4", title="search of a scale")
    left.legend(frameon=False)
    right.hist(values[values > 0], bins=120, density=True, color="#cbd5e0")
    right.set(xlabel="activation", ylabel="density", title="codes (ticks) and where they end",
              xlim=(0, values.max() * 0.8))  # fmt: skip


def noise(figure: Any) -> None:
    """What learning sees with rounding noise: the mean of the loss over a code's width."""
    weight = np.linspace(-2, 2, 1601)

    def loss(x: Any) -> Any:
        return 0.25 * x**2 + 0.35 * np.exp(-((x - 0.4) ** 2) / 0.01) + 0.3

    shifts = np.linspace(-0.5, 0.5, 201)
    smooth = np.mean([loss(weight + s) for s in shifts], axis=0)
    axes = figure.subplots()
    axes.plot(weight, loss(weight), color="#a0aec0", label="loss at the real weight")
    axes.plot(weight, loss(np.rint(weight)), color=FIRST, label="loss at the rounded weight")
    axes.plot(weight, smooth, color=GOOD, lw=2, label="mean loss with rounding noise")
    axes.set(xlabel="weight / scale", ylabel="loss", title="one weight, codes of width 1")
    axes.legend(frameon=False, fontsize=8)


FIGURES: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
    "ties": (ties, (8.5, 3.2)),
    "regression": (regression, (6.0, 4.2)),
    "grid": (grid, (8.5, 3.2)),
    "noise": (noise, (6.0, 3.4)),
}


def draw(folder: Path) -> None:
    """Write every figure into a folder."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    style = {"svg.hashsalt": "hdrq", "svg.fonttype": "path", "font.size": 9,
             "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with rc_context(style):
        for name, (function, size) in FIGURES.items():
            figure = Figure(figsize=size, layout="constrained", facecolor="white")
            function(figure)
            empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(folder / f"{name}.svg", metadata=empty)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Draw the figures of docs/concepts/.")
    parser.add_argument("--out", type=Path, default=HERE / "concepts" / "figures")
    draw(parser.parse_args().out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
