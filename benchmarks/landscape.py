"""Is the ground around HDRQ's models flatter than around QDrop's, and do merges show it?

    python benchmarks/landscape.py --cells build/merge_statistics --results benchmarks/results

Analyses (``hdrq analyze``) the parents that ``benchmarks/merge_statistics.py`` calibrated on the
digits with both methods, on test images, and draws ``docs/evidence/landscape.svg`` out of the
committed figures (``--draw`` draws only).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.records import METHOD_COLOURS, write_record

from hdrq_deploy import Bundle
from hdrq_deploy.analysis import Settings, analyze
from hdrq_deploy.analysis.landscape import Landscape, real_weights, top_eigenvalue, trace
from hdrq_deploy.runtime.bench.environment import environment

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("handwriting", "photo", "night")
METHODS = ("qdrop", "hdrq")
BITS = ("w4a4", "w3a3")
SEEDS = (0, 1, 2)
IMAGES = 250
# The plane and the spread over rounding seeds once; barriers and curvature for every seed. Three
# models at equal thirds have no ties to draw, so the spread is that of a pair.
WHOLE = Settings(points=11, noises=3, grid=13, seeds=2, candidates=1, products=20)
BRIEF = Settings(points=11, noises=3, grid=0, seeds=2, candidates=1, products=20)
SPREAD = Settings(points=3, noises=1, grid=0, seeds=32, candidates=30, products=2)
SPREAD_PAIR = ("photo", "night")


def analysis(cells: Path, method: str, bits: str, seed: int) -> dict[str, Any]:
    """The analysis of the three parents of one method."""
    from hdrq_deploy.calibration_data import digits

    bundles = {
        domain: Bundle.open(cells / f"digits-{method}-{bits}-weights-s{seed}-{domain}.hdrq")
        for domain in DOMAINS
    }
    data = {}
    for domain in DOMAINS:
        split = digits.make(domain, "test")
        pixels = np.ascontiguousarray(split.images.transpose(0, 3, 1, 2))
        data[domain] = (pixels[:IMAGES].astype(np.float32) / 255, split.labels[:IMAGES])
    is_first = seed == SEEDS[0]
    found = analyze(list(bundles.values()), data, None, WHOLE if is_first else BRIEF)
    kept = ("barriers", "curvature", "surface")
    row = {"method": method, "bits": bits, "seed": seed, **{key: found[key] for key in kept}}
    row["own_curvature"] = {
        domain: own_curvature(bundles[domain], data[domain], domain) for domain in DOMAINS
    }
    if is_first:
        pair = [bundles[domain] for domain in SPREAD_PAIR]
        shown = {domain: data[domain] for domain in SPREAD_PAIR}
        row["rounding"] = analyze(pair, shown, None, SPREAD)["rounding"]
    return row


def own_curvature(bundle: Bundle, data: tuple[Any, Any], domain: str) -> dict[str, float]:
    """The Hessian of the loss on a parent's own domain, at its dequantized weights."""
    codes = sorted(n for n, entry in bundle.manifest.tensors.items() if entry.role == "codes")
    loss = Landscape(bundle, {domain: data}).loss
    common = (loss, real_weights(bundle), codes, WHOLE.products, WHOLE.seed)
    return {"top_eigenvalue": top_eigenvalue(*common), "trace": trace(*common)}


def draw(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Barriers, curvature and the plane of both methods as one picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = {method: METHOD_COLOURS[method] for method in METHODS}
    with rc_context({"svg.hashsalt": "hdrq", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        axes = figure.subplots(2, 3)
        for line, bits in zip(axes, BITS, strict=True):
            own = [row for row in rows if row["bits"] == bits]
            _barriers(line[0], own, colours)
            line[0].set_title(f"{bits.upper()}: loss between two parents")
            for axis, method in zip(line[1:], METHODS, strict=True):
                row = next(r for r in own if r["method"] == method and r["surface"])
                filled = _surface(axis, row["surface"])
                axis.set_title(f"{bits.upper()}, {method} (star: the merge)")
            figure.colorbar(filled, ax=line[2], label="log10 of the loss in nats")
        figure.savefig(target, metadata={"Date": None})


def _barriers(axis: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Mean over pairs and seeds of the loss along the line, less that of the ends."""
    for method, colour in colours.items():
        curves = []
        for row in rows:
            for barrier in row["barriers"] if row["method"] == method else ():
                loss = np.array(barrier["loss"]["quantized"])
                ends = np.linspace(loss[0], loss[-1], len(loss))
                curves.append(loss - ends)
        place = np.linspace(0, 1, len(curves[0]))
        axis.fill_between(place, np.min(curves, 0), np.max(curves, 0), color=colour, alpha=0.15)
        axis.plot(place, np.mean(curves, 0), color=colour, label=method)
    axis.set_xlabel("share of the second of two models")
    axis.set_ylabel("nats above the line between the ends")
    axis.legend(frameon=False, loc="upper left")


def _surface(axis: Any, surface: Mapping[str, Any]) -> Any:
    """The loss on the plane, the parents and their merge (a star); what a colour bar shows."""
    x, y = np.array(surface["x"]), np.array(surface["y"])
    loss = np.log10(np.array(surface["loss"]))
    filled = axis.contourf(x, y, loss, levels=np.linspace(-1, 1, 17), extend="both", cmap="viridis")
    for name, (a, b) in surface["points"].items():
        is_merge = name.startswith("merged")
        axis.plot(a, b, "w*" if is_merge else "ro", markersize=7 if is_merge else 4)
        if not is_merge:
            axis.annotate(
                name, (a, b), (0, 5), textcoords="offset points", ha="center", color="white"
            )
    axis.set_xticks([])
    axis.set_yticks([])
    return filled


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse, write JSON, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=Path, default=Path("build/merge_statistics"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--draw", action="store_true", help="draw the committed figures, no more")
    args = parser.parse_args(argv)
    target = args.results / "landscape.json"
    if not args.draw:
        rows = []
        for seed in SEEDS:
            for bits in BITS:
                for method in METHODS:
                    rows.append(analysis(args.cells / "cells", method, bits, seed))
                    print(method, bits, seed, rows[-1]["own_curvature"], flush=True)
        record = {
            "schema_version": 1,
            "images_per_domain": IMAGES,
            "spread": {"pair": SPREAD_PAIR, "seeds": SPREAD.seeds},
            "environment": environment(),
            "rows": rows,
        }
        write_record(target, record)
    draw(json.loads(target.read_text())["rows"], ROOT / "docs" / "evidence" / "landscape.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
