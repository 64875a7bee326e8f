"""The analysis as one HTML page that explains itself."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .html import document, svg, table_of

__all__ = ["page"]

_STYLE = """
body{line-height:1.55;max-width:62rem}h2{font-size:1.15rem;margin-top:2.2rem}
th,td{padding:.3rem .5rem}
@media print{body{margin:0}h2{break-after:avoid}}
"""


def page(result: Mapping[str, Any]) -> str:
    """The report of an analysis as one HTML text; plots are inside it."""
    scheme = result["scheme"]
    names = list(result["models"])
    title = "Merging " + ", ".join(names)
    bits = f"W{scheme['wbits']}A{scheme['abits']}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(scheme['model'])}, method {html.escape(scheme['method'])}, {bits}, "
        f"BatchNorm in the {html.escape(scheme['fold'])}; "
        + ", ".join(f"{n} images of {html.escape(d)}" for d, n in result["images"].items())
        + ". Losses are mean cross entropies, every domain counting the same.</p>",
        _verdict(result),
        "<h2>The models</h2>",
        _models(result),
        "<h2>Is there a barrier between them?</h2>",
        "<p>Walking in a straight line from one model (&lambda; = 0) to another (&lambda; = 1). "
        "A hill between the ends is a barrier: models in between are worse than both. "
        "<i>float</i> mixes the real weights and rounds nothing; <i>with noise</i> adds to both "
        "ends errors as large as rounding makes, which shows how steep the ground is; "
        "<i>quantized</i> rounds the mixture to codes, weights and activations.</p>",
        _svg(_plot_barriers, result),
        _barrier_table(result),
        "<h2>How sharp are the minima?</h2>",
        "<p>The Hessian's largest eigenvalue is the curvature in the steepest direction, its "
        "trace the sum over all directions. Flatter models lose less when their weights are "
        "rounded or averaged.</p>",
        _curvature(result),
        "<h2>How far apart are they?</h2>",
        "<p>Distance of the weights of each layer, relative to their length. Near models "
        "average well; the distance to the common source bounds the one between them.</p>",
        _svg(_plot_distances, result),
    ]
    if result["surface"]:
        body += [
            "<h2>The ground around them</h2>",
            "<p>Loss (real weights and activations) on a plane through the models. The two "
            "models lie on the horizontal axis; the vertical axis leads to the third point, "
            "drawn so that both axes have the same length per step. Rounding moves the merged "
            "model off the line between its parents.</p>",
            _svg(_plot_surface, result),
        ]
    body += [
        "<h2>Does it depend on the draw?</h2>",
        "<p>Where the codes of the parents add up to an odd number, either neighbour is as "
        "near. <i>nearest</i> always breaks such ties the same way, <i>noise</i> tosses, and "
        "<i>advanced</i> keeps the toss that points best towards the midpoint. Each dot is one "
        "seed.</p>",
        _svg(_plot_rounding, result),
        "<h2>Where are codes ambiguous?</h2>",
        "<p>Share of the codes of each layer whose rounding is a toss-up.</p>",
        _svg(_plot_ambiguous, result),
        "<footer>Made by hdrq analyze; the numbers behind the plots are in report.json. "
        "Method: Shin et al., ICML 2025.</footer>",
    ]
    return document(title, body, "hdrq analyze", _STYLE)


def _verdict(result: Mapping[str, Any]) -> str:
    """One paragraph that sums up the numbers."""
    worst = max(result["barriers"], key=lambda b: float(b["barrier"]["quantized"]))
    rounding = result["rounding"]
    best = max(rounding, key=lambda name: float(rounding[name]["mean"]))
    own = [
        model["accuracy"][name]
        for name, model in result["models"].items()
        if name in model["accuracy"]
    ]
    alone = len(own) / sum(1 / v for v in own) if own and min(own) > 0 else None
    reference = f" A model for each domain reaches {100 * alone:.1f}%." if alone else ""
    return (
        f"<p><b>Merged evenly, {best} rounding serves best: harmonic mean accuracy "
        f"{100 * rounding[best]['mean']:.1f}% &plusmn; "
        f"{100 * rounding[best]['standard_deviation']:.1f}.</b>{reference} The highest quantized "
        f"barrier, {worst['barrier']['quantized']:.3f} nats, lies between "
        f"{html.escape(' and '.join(worst['between']))}; without rounding it is "
        f"{worst['barrier']['float']:.3f}.</p>"
    )


def _models(result: Mapping[str, Any]) -> str:
    domains = list(result["images"])
    rows = [
        [name, *(f"{100 * m['accuracy'][d]:.1f}" for d in domains),
         *(f"{m['loss'][d]:.3f}" for d in domains)]
        for name, m in result["models"].items()
    ]  # fmt: skip
    header = ["model", *(f"{d}, %" for d in domains), *(f"{d}, loss" for d in domains)]
    return table_of(header, rows)


def _barrier_table(result: Mapping[str, Any]) -> str:
    rows = [
        [" - ".join(b["between"]), *(f"{b['barrier'][k]:.4f}" for k in _CURVES)]
        for b in result["barriers"]
    ]
    return table_of(["barrier in nats", *_CURVES.values()], rows)


def _curvature(result: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{c['top_eigenvalue']:.3g}", f"{c['trace']:.3g}"]
        for name, c in result["curvature"].items()
    ]
    return table_of(["model", "top eigenvalue", "trace"], rows)


def _svg(draw: Callable[[Any, Mapping[str, Any]], None], result: Mapping[str, Any]) -> str:
    """A plot of the result, without the frame's upper and right side."""

    def draw_all(figure: Any) -> None:
        draw(figure, result)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)

    text = svg(draw_all, {"font.size": 9, "svg.fonttype": "path"})
    # Its colours are those of paper, in a dark scheme too.
    return f'<div class="drawn">{text[text.index("<svg") :]}</div>'


_CURVES = {"float": "float", "noise": "with noise", "quantized": "quantized"}
_COLOURS = {"float": "#2b6cb0", "noise": "#dd8a1b", "quantized": "#b83256"}


def _plot_barriers(figure: Any, result: Mapping[str, Any]) -> None:
    barriers = result["barriers"]
    figure.set_size_inches(4.2 * max(2, len(barriers)), 3.2)
    for axes, barrier in zip(
        figure.subplots(1, len(barriers), squeeze=False)[0], barriers, strict=True
    ):
        for key, label in _CURVES.items():
            axes.plot(
                barrier["lambda"], barrier["loss"][key], "o-", ms=3, label=label,
                color=_COLOURS[key],
            )  # fmt: skip
        axes.set_xlabel(f"λ: {barrier['between'][0]} (0) to {barrier['between'][1]} (1)")
        axes.set_ylabel("loss, nats")
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False)


def _plot_distances(figure: Any, result: Mapping[str, Any]) -> None:
    rows = result["distances"]
    figure.set_size_inches(9, 3.6)
    axes = figure.subplots()
    x = np.arange(len(rows))
    for key in rows[0]["between"]:
        axes.plot(x, [row["between"][key] for row in rows], "o-", ms=3, label=key)
    for name in rows[0].get("to_source", {}):
        values = [row.get("to_source", {}).get(name, np.nan) for row in rows]
        axes.plot(x, values, "s--", ms=3, lw=1, label=f"{name} - source")
    _layer_axis(axes, [row["layer"] for row in rows])
    axes.set_ylabel("relative distance")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=2)


def _plot_surface(figure: Any, result: Mapping[str, Any]) -> None:
    surface = result["surface"]
    figure.set_size_inches(7, 4.6)
    axes = figure.subplots()
    loss = np.array(surface["loss"])
    lowest, highest = loss.min(), np.percentile(loss, 92)
    levels = np.linspace(lowest, max(highest, lowest + 1e-9), 18)
    shown = axes.contourf(surface["x"], surface["y"], loss, levels, cmap="viridis", extend="max")
    figure.colorbar(shown, ax=axes, label="loss, nats")
    marks = "osD^vP*X"
    for i, (name, (x, y)) in enumerate(surface["points"].items()):
        axes.plot(
            x, y, marks[i % len(marks)], ms=8, label=name, mec="black", mfc=f"C{i + 1}", ls=""
        )
    axes.set_xlabel("towards the second model")
    axes.set_ylabel("towards the third point")
    axes.legend(frameon=True, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def _plot_rounding(figure: Any, result: Mapping[str, Any]) -> None:
    figure.set_size_inches(6.5, 3)
    axes = figure.subplots()
    rounding = result["rounding"]
    rng = np.random.default_rng(0)
    for i, figures in enumerate(rounding.values()):
        values = 100 * np.array(figures["harmonic_means"])
        axes.plot(i + rng.uniform(-0.12, 0.12, len(values)), values, "o", ms=4, alpha=0.6)
        axes.plot([i - 0.25, i + 0.25], [values.mean()] * 2, color="black", lw=1.5)
    axes.set_xticks(range(len(rounding)), list(rounding))
    axes.set_ylabel("harmonic mean accuracy, %")


def _plot_ambiguous(figure: Any, result: Mapping[str, Any]) -> None:
    rows = result["layers"]
    figure.set_size_inches(9, 3.2)
    axes = figure.subplots()
    axes.bar(np.arange(len(rows)), [100 * row["ambiguous"] for row in rows], color="#2b6cb0")
    _layer_axis(axes, [row["layer"] for row in rows])
    axes.set_ylabel("ambiguous codes, %")


def _layer_axis(axes: Any, names: Sequence[str]) -> None:
    short = [name.removesuffix(".weight") for name in names]
    step = max(1, len(short) // 30)
    axes.set_xticks(range(0, len(short), step), short[::step], rotation=60, ha="right", fontsize=7)
