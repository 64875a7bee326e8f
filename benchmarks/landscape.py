"""Is the ground around HDRQ's models flatter than around QDrop's, and do merges show it?

    python benchmarks/landscape.py digits --run build/merge_statistics
    python benchmarks/landscape.py pacs --run build/pacs --data PACS/ --weights lite0.pth

Analyses (``hdrq analyze``) the parents that ``benchmarks/merge_statistics.py`` calibrated on the
digits with both methods, or ``hdrq reproduce pacs`` on PACS, on test images, and draws
``docs/evidence/landscape.svg`` or ``landscape_pacs.svg`` out of the committed figures (``--draw``
draws only). Every pair of a method and a bit-width leaves a file in ``RUN/landscape``; those that
are there are not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from evidence.records import METHOD_COLOURS
from measured import keep_row
from pacs_run import arguments, task_of, write

from hdrq_deploy import Bundle
from hdrq_deploy.analysis import Settings, analyze
from hdrq_deploy.analysis.landscape import Landscape, real_weights, top_eigenvalue, trace
from hdrq_deploy.calibration_data.readers import read
from hdrq_deploy.formats.atomic_files import make_directory

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("qdrop", "hdrq")
BITS = ("w4a4", "w3a3")
SEEDS = (0, 1, 2)
ROUNDINGS = ("noise", "advanced")
Images = dict[str, tuple[Any, Any]]
# The plane and the spread over rounding seeds once; barriers and curvature for every seed. Three
# models at equal thirds have no ties to draw, so the spread is that of a pair.
WHOLE = Settings(points=11, noises=3, grid=13, seeds=2, candidates=1, products=20)
SPREAD = Settings(points=3, noises=1, grid=0, seeds=32, candidates=30, products=2)


@dataclass(frozen=True)
class Parents:
    """Whose models are analysed.

    Attributes:
        domains: In the order of the merge; the first two span the plane.
        pair: Domains whose merge is rounded again and again.
        images: Test images of every domain.
        noises: Draws of noise at every point of a barrier.
        name: Name of a bundle in ``RUN/cells``, by method, bits, seed and domain.
        record: Name of the record and of the picture.
        read: Images and labels, by domain.
    """

    domains: tuple[str, ...]
    pair: tuple[str, str]
    images: int
    noises: int
    name: str
    record: str
    read: Callable[[Any, Parents], Images]


def _digits(_: Any, of: Parents) -> Images:
    from hdrq_deploy.calibration_data import digits

    data = {}
    for domain in of.domains:
        split = digits.make(domain, "test")
        pixels = np.ascontiguousarray(split.images.transpose(0, 3, 1, 2))
        data[domain] = (pixels[: of.images].astype(np.float32) / 255, split.labels[: of.images])
    return data


def _paintings(args: Any, of: Parents) -> Images:
    task = task_of(args)
    data = {}
    for domain in task.domains:
        found = read(domain.test, task.wanted)
        # They come sorted by class.
        chosen = np.random.default_rng(0).permutation(len(found))[: of.images]
        assert found.y is not None
        data[domain.name] = (found.x[chosen], found.y[chosen])
    return data


ANALYSED = {
    "digits": Parents(
        domains=("handwriting", "photo", "night"),
        pair=("photo", "night"),
        images=250,
        noises=3,
        name="digits-{}-{}-weights-s{}-{}.hdrq",
        record="landscape",
        read=_digits,
    ),
    "pacs": Parents(
        domains=("art_painting", "cartoon", "sketch"),
        pair=("art_painting", "sketch"),
        images=100,
        noises=1,
        name="ours-{}-{}-s{}-{}.hdrq",
        record="landscape_pacs",
        read=_paintings,
    ),
}


def analysis(
    of: Parents, data: Images, cells: Path, method: str, bits: str, seed: int
) -> dict[str, Any]:
    """The analysis of the three parents of one method."""
    bundles = {
        domain: Bundle.open(cells / of.name.format(method, bits, seed, domain))
        for domain in of.domains
    }
    is_first = seed == SEEDS[0]
    settings = replace(WHOLE, noises=of.noises, grid=WHOLE.grid if is_first else 0)
    found = analyze(list(bundles.values()), data, None, settings)
    kept = ("barriers", "curvature", "surface")
    row = {"method": method, "bits": bits, "seed": seed, **{key: found[key] for key in kept}}
    row["own_curvature"] = {
        domain: own_curvature(bundles[domain], data[domain], domain) for domain in of.domains
    }
    if is_first:
        pair = [bundles[domain] for domain in of.pair]
        shown = {domain: data[domain] for domain in of.pair}
        row["rounding"] = analyze(pair, shown, None, SPREAD)["rounding"]
    return row


def own_curvature(bundle: Bundle, data: tuple[Any, Any], domain: str) -> dict[str, float]:
    """The Hessian of the loss on a parent's own domain, at its dequantized weights."""
    codes = sorted(n for n, entry in bundle.manifest.tensors.items() if entry.role == "codes")
    loss = Landscape(bundle, {domain: data}).loss
    common = (loss, real_weights(bundle), codes, WHOLE.products, WHOLE.seed)
    return {"top_eigenvalue": top_eigenvalue(*common), "trace": trace(*common)}


def draw(of: Parents, rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Barriers, the spread over rounding seeds and the plane of both methods as one picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = {method: METHOD_COLOURS[method] for method in METHODS}
    with rc_context({"svg.hashsalt": "hdrq", "svg.fonttype": "path", "font.size": 9}):
        widths = [bits for bits in BITS if any(row["bits"] == bits for row in rows)]
        figure = Figure(figsize=(13, 3.2 * len(widths)), layout="constrained")
        axes = figure.subplots(len(widths), 4, width_ratios=(3, 2, 3, 3), squeeze=False)
        for line, bits in zip(axes, widths, strict=True):
            own = [row for row in rows if row["bits"] == bits]
            _barriers(line[0], own, colours)
            line[0].set_title(f"{bits.upper()}: loss between two parents")
            _spread(line[1], own, colours)
            line[1].set_xlabel(f"merges of {' and '.join(of.pair)}")
            line[1].set_title(f"{bits.upper()}: {SPREAD.seeds} roundings")
            for axis, method in zip(line[2:], METHODS, strict=True):
                row = next(r for r in own if r["method"] == method and r["surface"])
                filled = _surface(axis, row["surface"])
                axis.set_title(f"{bits.upper()}, {method} (star: the merge)")
            figure.colorbar(filled, ax=line[3], label="log10 of the loss in nats")
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


def _spread(axis: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Harmonic means of one pair's merge, a point for every rounding seed and a bar for the mean.

    Points of equal height would hide each other and are moved aside, in the order of the seeds.
    """
    drawn = {row["method"]: row["rounding"] for row in rows if "rounding" in row}
    for place, rounding in enumerate(ROUNDINGS):
        for side, (method, colour) in enumerate(colours.items()):
            means = 100 * np.array(drawn[method][rounding]["harmonic_means"])
            centre = place + 0.4 * (side - (len(colours) - 1) / 2)
            aside = 0.24 * (np.arange(len(means)) / max(len(means) - 1, 1) - 0.5)
            axis.plot(centre + aside, means, ".", color=colour, markersize=4)
            axis.hlines(means.mean(), centre - 0.16, centre + 0.16, color=colour, linewidth=2)
    axis.set_xticks(range(len(ROUNDINGS)), ROUNDINGS)
    axis.set_ylabel("harmonic mean, %")


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
    parser = arguments(__doc__, needed=False)
    parser.add_argument("of", choices=list(ANALYSED))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="analyse these alone"
    )
    parser.add_argument("--draw", action="store_true", help="draw the committed figures, no more")
    args = parser.parse_args(argv)
    of = ANALYSED[args.of]
    target = args.results / f"{of.record}.json"
    if not args.draw:
        run = args.run.absolute()
        make_directory(run / "landscape")
        data = {} if args.collect else of.read(args, of)
        rows = []
        for seed in SEEDS:
            for bits in BITS:
                for method in METHODS:
                    place = run / "landscape" / f"{method}-{bits}-s{seed}.json"
                    if not (args.collect or place.exists()) and method in args.methods:
                        row = analysis(of, data, run / "cells", method, bits, seed)
                        keep_row(row, place)
                        print(method, bits, seed, row["own_curvature"], flush=True)
                    if place.exists():
                        rows.append(json.loads(place.read_text()))
        about = {
            "images_per_domain": of.images,
            "noises": of.noises,
            "spread": {"pair": of.pair, "seeds": SPREAD.seeds},
        }
        write(target, rows, about)
    picture = ROOT / "docs" / "evidence" / f"{of.record}.svg"
    draw(of, json.loads(target.read_text())["rows"], picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
