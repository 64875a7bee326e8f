"""Figures of an earlier version."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.records import GROUPS, NAMES, table


class Quality:
    """Rows of merge_quality.json by setting, way and group; seeds pooled."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self._means: dict[tuple[str, str, tuple[str, ...]], list[float]] = defaultdict(list)
        for row in record["rows"]:
            key = (row["setting"], row["way"], tuple(row["members"]))
            self._means[key] += row["means"]

    def values(self, setting: str, way: str) -> list[float] | None:
        """Mean of the harmonic means in % for every group, where all were measured."""
        found = [self._means.get((setting, way, group)) for group in GROUPS]
        if any(not means for means in found):
            return None
        return [100 * statistics.fmean(means) for means in found if means]

    def row(self, label: str, setting: str, way: str) -> list[str] | None:
        """A line of a table: mean over seeds and draws, with its standard deviation."""
        cells = [label]
        for group in GROUPS:
            means = self._means.get((setting, way, group))
            if not means:
                return None
            spread = f" ± {100 * statistics.stdev(means):.1f}" if len(means) > 1 else ""
            cells.append(f"{100 * statistics.fmean(means):.1f}{spread}")
        return cells

    def table(self, rows: Sequence[tuple[str, str, str]]) -> str:
        """Those of ``rows`` that were measured."""
        header = ["harmonic mean, %", *("+".join(NAMES[d] for d in g) for g in GROUPS)]
        lines = [self.row(*row) for row in rows]
        return table(header, [line for line in lines if line is not None])


def merge_quality(record: Mapping[str, Any]) -> str:
    """The section on merging."""
    q = Quality(record)
    env = record["environment"]
    floats = [
        ("float, a model per domain", "float-w8a8-tensor", "single"),
        ("float merged, BatchNorm folded (paper)", "float-folded", "merged"),
        ("float merged, BatchNorm apart", "float-w8a8-tensor", "merged"),
    ]
    parts = [
        "## Earlier figures of merging",
        "",
        "Measured before noise left saturated elements alone, before learned roundings had a "
        "constant rate and before ties were those of whole numbers. QDrop's and BRECQ's rates were "
        "not tuned as HDRQ's was, so these rows compare additions of one method, not methods.",
        "",
        f"Digits benchmark, ResNet-14, {record['iterations_per_block']} iterations a block, "
        f"{record['rounding_seeds']} rounding seeds a merge; harmonic mean of the top-1 accuracies "
        "on the test splits, mean and standard deviation over calibration and rounding seeds. "
        f"{record['cells']} of the grid's {record['cells_in_grid']} bundles were there "
        f"(`benchmarks/merge_quality.py`; torch {env['torch']}, {env['cpu']}). How learning "
        "rate and criteria were chosen was not recorded.",
        "",
        "![merged harmonic means](merge_quality.svg)",
        "",
        q.table(floats),
    ]
    methods = ("rtn", "brecq", "qdrop", "hdrq")
    for bits in (4, 3):
        rows = []
        for method in methods:
            setting = f"{method}-w{bits}a{bits}-tensor"
            ways = ("single", "nearest", "noise", "advanced")
            rows += [(f"{method}, {way}", setting, way) for way in ways]
        parts += [
            "",
            f"### W{bits}A{bits} in the paper's setting (one step per tensor, BatchNorm folded)",
            "",
            q.table(rows),
        ]
    ablation = [
        (label, f"{name}-w3a3-tensor", "advanced")
        for label, name in (
            ("qdrop: learned rounding", "qdrop"),
            ("latent weights instead", "latent"),
            ("+ noise", "latent+noise"),
            ("+ distance: hdrq", "hdrq"),
        )
    ]
    parts += ["", "### Ablation, W3A3, advanced rounding", "", q.table(ablation)]
    for w, a in ((8, 8), (4, 8), (4, 4), (3, 3)):
        rows = []
        for steps, label in (("channel", "per channel"), ("fold", "per channel, fold in steps")):
            for method in ("qdrop", "hdrq"):
                setting = f"{method}-w{w}a{a}-{steps}"
                rows.append((f"{method}, {label}, single", setting, "single"))
                rows.append((f"{method}, {label}, merged", setting, "advanced"))
        best = f"hdrq-w{w}a{a}-fold"
        for way in (
            "re-estimated",
            "auto (entropy)",
            "auto (information)",
            "auto (agreement)",
            "auto + re-estimated",
        ):
            rows.append((f"hdrq, fold in steps, {way}", best, way))
        for method in ("qdrop", "hdrq"):
            setting = f"{method}-w{w}a{a}-channel"
            rows.append((f"merged in float first, then {method}", setting, "merged first"))
        parts += ["", f"### W{w}A{a}, one step per channel", "", q.table(rows)]
    float_ways = ("re-estimated", "auto (entropy)", "auto (information)", "auto (agreement)")
    rows = [(f"float, {w}", "float-w8a8-tensor", w) for w in (*float_ways, "auto + re-estimated")]
    parts += ["", "### The additions on float models", "", q.table(rows)]
    return "\n".join(parts)


def plot(record: Mapping[str, Any], target: Path) -> None:
    """Merged harmonic means of methods and settings, one panel a bit-width."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    q = Quality(record)
    labels = ["+".join(NAMES[d] for d in g) for g in GROUPS]
    lines = {
        "rtn": ("{b}-tensor", "advanced", "#9aa5b1", "v"),
        "brecq": ("{b}-tensor", "advanced", "#dd8a1b", "s"),
        "qdrop": ("{b}-tensor", "advanced", "#2b6cb0", "^"),
        "hdrq": ("{b}-tensor", "advanced", "#b83256", "o"),
    }
    with rc_context({"svg.hashsalt": "hdrq", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(9.5, 3.8), layout="constrained")
        for axes, bits in zip(figure.subplots(1, 2, sharey=True), (4, 3), strict=True):
            upper = q.values("float-w8a8-tensor", "merged")
            if upper:
                axes.plot(labels, upper, "k--", lw=1, label="float merged")
            for method, (_, way, colour, mark) in lines.items():
                found = q.values(f"{method}-w{bits}a{bits}-tensor", way)
                if found:
                    axes.plot(labels, found, mark + "-", color=colour, label=f"{method}, paper")
            for way, style in (("advanced", ":"), ("auto + re-estimated", "-.")):
                found = q.values(f"hdrq-w{bits}a{bits}-fold", way)
                if found:
                    name = "hdrq, fold in steps" + ("" if way == "advanced" else ", both additions")
                    axes.plot(labels, found, "D" + style, color="#3c8d5a", ms=4, label=name)
            axes.set_title(f"W{bits}A{bits} merged, advanced rounding")
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("harmonic mean accuracy, %")
        figure.axes[1].legend(frameon=False, fontsize=8)
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, metadata=empty)


def _protocol(record: Mapping[str, Any], title: str, about: str, images: str) -> list[str]:
    """Heading, text and table of one run of `hdrq reproduce`, of an earlier version."""
    about += " Measured by the version of the earlier figures of merging, above."
    domains = list(record["rows"][0]["members"])

    def figure(summary: Mapping[str, float]) -> str:
        spread = f" ± {summary['std']:.1f}" if summary["count"] > 1 else ""
        return f"{summary['mean']:.1f}{spread}"

    names = {
        ("float", "nearest"): "mean",
        ("float", "auto"): "mix from images",
        ("paper", "nearest"): "nearest",
        ("paper", "advanced"): "advanced",
        ("ours", "auto"): "advanced, mix from images",
    }
    cells = [
        [
            "float" if row["method"] == "float" else f"{row['method']} {row['bits'].upper()}",
            row["setting"] if row["method"] != "float" else "",
            figure(row["single"]["harmonic mean"]),
            names[row["setting"], row["way"]],
            *(f"{row['merged'][d]['mean']:.1f}" for d in domains),
            figure(row["merged"]["harmonic mean"]),
        ]
        for row in record["rows"]
    ]
    learning = {row["method"]: row["options"] for row in record["rows"]}
    recipe = "; ".join(
        f"{m} {learning[m]['iters']} iterations of {learning[m]['batch']} {images} a block at "
        f"{learning[m]['lr']:g}"
        for m in ("qdrop", "hdrq")
    )
    return [
        f"## {title}",
        "",
        f"{about} Harmonic means, mean and standard deviation over calibration seeds (two at W4A4 "
        f"and W3A3, one else) and three rounding seeds. {recipe}; how these rates "
        "were chosen was not recorded, so that the methods are not compared at equal tuning. "
        "`paper` is one step per tensor, BatchNorm folded, an equal mix; `ours` keeps BatchNorm in "
        "the steps, and chooses the mix and re-estimates BatchNorm on unlabelled calibration "
        f"{images}, as the second float row does.",
        "",
        table(["model", "setting", "single", "merge", *domains, "merged"], cells),
    ]


def protocol_streetscape(record: Mapping[str, Any]) -> str:
    """The section on the segmentation protocol."""
    about = (
        "`hdrq reproduce segmentation --made` (StreetNet, 760,962 parameters): mIoU of single and "
        "merged ONNX Runtime engines on 100 test scenes a domain."
    )
    lines = _protocol(record, "The segmentation protocol on drawn streets", about, "scenes")
    return "\n".join(
        [
            *lines,
            "",
            "Test scenes of the three domains, and what the merged engines find in them:",
            "",
            "![Image, labels, float merged, merged W4A4 engines](streetscape_w4a4.png)",
        ]
    )


def protocol_digits(record: Mapping[str, Any]) -> str:
    """The section on the classification protocol."""
    about = (
        "`hdrq reproduce office-home --made` (ResNet-14): accuracy of single and merged ONNX "
        "Runtime engines on 500 test images a domain."
    )
    return "\n".join(_protocol(record, "The classification protocol on digits", about, "images"))
