"""The committed results as the pages of ``docs/evidence/`` and their plots.

    python benchmarks/tables.py

Reads ``benchmarks/results/*.json`` only; a test checks that the pages are theirs.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from evidence.claims import aims, claims
from evidence.costs import calibration_speed, harness, merge_speed, weight_search
from evidence.earlier import merge_quality, plot, protocol_digits, protocol_streetscape
from evidence.engines import (
    architectures,
    arm_emulated,
    engines,
    peers,
    protocol_models,
    same_codes,
)
from evidence.merging import distance, landscape, merge_statistics, statistics_weights
from evidence.mixing import adaptation, mixing
from evidence.real_images import (
    camvid,
    difference,
    learned_seeds,
    pacs,
    pacs_earlier,
    pacs_wide,
    protocol_means,
    protocol_rows,
    real_weights,
)
from evidence.records import ROOT, Section, load, needed, table
from evidence.rivals import merge_rivals, pacs_rivals


def headline() -> str:
    """README's table: merges of W4A8 parents beside merges of float models."""
    digits, photos = needed("merge_statistics"), needed("pacs")
    drawn = [r for r in digits["rows"] if r["task"] == "digits" and r["fold"] == "weights"]
    real = protocol_rows(photos)

    def on_digits(parents: str, way: str) -> str:
        means = []
        for size in (2, 3):
            values = [
                value
                for row in drawn
                if (row["parents"], row["way"], len(row["members"])) == (parents, way, size)
                and row["bits"] in {"", "w4a8"}
                for value in row["harmonic_means"]
            ]
            if not values:
                return "-"
            means.append(f"{statistics.fmean(values):.1f}")
        return " / ".join(means)

    def on_photos(parents: str, way: str) -> str:
        both = protocol_means(real, parents, "" if parents == "float" else "w4a8", way)
        return f"{both[0]:.1f} / {both[1]:.1f}" if both else "-"

    lines = []
    for parents in ("float", "rtn", "rtn-corrected", "qdrop", "hdrq"):
        exact = parents == "float"
        lines.append(
            [
                parents,
                on_digits(parents, "mean-folded" if exact else "mean-nearest"),
                on_digits(parents, "regression-nearest" if exact else "regression-compensated"),
                *(
                    on_photos(parents, way)
                    for way in ("nearest", "regression", "renewed", "fitted", "guided")
                ),
            ]
        )
    return table(
        [
            "parents",
            "digits: mean",
            "digits: regression",
            "PACS: mean",
            "PACS: regression",
            "PACS: regression, BatchNorm re-estimated",
            "PACS: regression, fitted",
            "PACS: regression, fitted to float models",
        ],
        lines,
    )


_HEADLINE_COLOURS = {
    "float": "#4a5568",
    "rtn": "#9aa5b1",
    "rtn-corrected": "#b7791f",
    "qdrop": "#2b6cb0",
    "hdrq": "#b83256",
}


def plot_headline(target: Path) -> None:
    """Draw README's table: one panel a data set, one group of marks a way of merging.

    Filled marks are the mean of pairs, hollow ones the merge of all three domains.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    header, _, *lines = headline().splitlines()
    ways = [cell.strip() for cell in header.strip("|").split("|")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    with rc_context({"svg.hashsalt": "hdrq", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, width_ratios=(2, 4))
        for axes, task in zip(panels, ("digits", "PACS"), strict=True):
            own = [index for index, way in enumerate(ways) if way.startswith(f"{task}: ")]
            for place, (parents, *cells) in enumerate(rows):
                there = [group for group, index in enumerate(own) if cells[index] != "-"]
                if not there:
                    continue
                pairs, triples = zip(
                    *(map(float, cells[own[group]].split(" / ")) for group in there), strict=True
                )
                at = [group + 0.16 * (place - 2) for group in there]
                colour = _HEADLINE_COLOURS[parents]
                axes.plot(at, pairs, "o", color=colour, ms=7, label=parents)
                axes.plot(at, triples, "D", color="none", mec=colour, ms=6, mew=1.4)
            names = [ways[index].partition(": ")[2].replace(", ", ",\n") for index in own]
            axes.set_xticks(range(len(own)), names)
            axes.set_title(f"{task}, W4A8 bundles and float models merged")
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("harmonic mean accuracy, %")
        panels[1].legend(frameon=False, fontsize=8, loc="lower right")
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, metadata=empty)


# Pages of docs/evidence/ in the order of its navigation: title, what it answers, its sections.
PAGES: dict[str, tuple[str, str, tuple[Section, ...]]] = {
    "aims-and-claims": (
        "Aims and claims",
        "What was aimed at, what was reached and what bounds the rest; and how the paper's claims "
        "fare on what was run here.",
        (
            Section(
                "merge_statistics",
                aims,
                ("merge_speed", "weight_search", "pacs", "pacs_wide", "camvid"),
            ),
            Section("landscape", claims, ("merge_statistics", "distance", "pacs")),
        ),
    ),
    "merging": (
        "Merging",
        "How accurate merged bundles are, by method, bits and rounding, and what the distance to "
        "the source and the noise do.",
        (
            Section("merge_statistics", merge_statistics),
            Section("weights_from_statistics", statistics_weights),
            Section("distance", distance),
            Section("landscape", landscape),
        ),
    ),
    "real-images": (
        "Real images",
        "Merges and single models on paintings, cartoons and sketches (PACS) and on streets "
        "(CamVid); single models on photographs (ImageNet).",
        (
            Section("pacs", pacs, ("pacs_tuning", "pacs_distance", "fit_sweeps")),
            Section("pacs_wide", pacs_wide),
            Section("camvid", camvid),
            Section("real_weights", real_weights),
        ),
    ),
    "rivals": (
        "Rivals",
        "The other order: merging float models first, and quantizing the merge.",
        (
            Section("merge_rivals", merge_rivals, ("merge_statistics",)),
            Section("pacs_rivals", pacs_rivals, ("pacs",)),
        ),
    ),
    "engines": (
        "Engines",
        "What engines execute, how fast they are, and which architectures pass through.",
        (
            Section("engines", engines),
            Section("peers", peers),
            Section("same_codes", same_codes),
            Section("arm_emulated", arm_emulated),
            Section("architectures", architectures),
            Section("protocol_models", protocol_models),
        ),
    ),
    "costs": (
        "Costs",
        "Time and memory of calibrating, merging, searching merge weights, and measuring.",
        (
            Section("calibration_speed", calibration_speed),
            Section("merge_speed", merge_speed),
            Section("weight_search", weight_search),
            Section("harness", harness),
        ),
    ),
    "mixing-and-adapting": (
        "Mixing and adapting",
        "Domains that are mixed while a camera runs, and models adapted without labels.",
        (
            Section("mixing", mixing),
            Section("adaptation", adaptation),
        ),
    ),
    "earlier-figures": (
        "Earlier figures",
        "Measured by an earlier version, and kept because they cover settings that were not run "
        "again.",
        (
            Section("merge_quality", merge_quality),
            Section("pacs_earlier", pacs_earlier),
            Section("protocol_streetscape", protocol_streetscape),
            Section("protocol_digits", protocol_digits),
        ),
    ),
}
_MADE = "Made by `python benchmarks/tables.py` from the JSON in `benchmarks/results/`."


def _headline_figures() -> dict[tuple[str, str], tuple[float, float]]:
    """The cells of README's table: mean of pairs and triple, by parents and column."""
    header, _, *lines = headline().splitlines()
    ways = [cell.strip() for cell in header.strip("|").split("|")][1:]
    found = {}
    for line in lines:
        parents, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for way, cell in zip(ways, cells, strict=True):
            if cell != "-":
                pairs, triple = map(float, cell.split(" / "))
                found[parents, way] = (pairs, triple)
    return found


def _fits_on_streets() -> str:
    """By how much a fit moves the harmonic mean of a merge by regression, on CamVid."""
    record = needed("camvid")
    means = {
        (row["method"], row["bits"], row["way"]): row["merged"]["harmonic mean"]["mean"]
        for row in record["rows"]
    }
    told = []
    for (method, bits, way), value in means.items():
        if way == "fitted":
            parents = f"{method} {bits.upper()}".strip()
            told.append(f"{value - means[method, bits, 'regression']:+.1f} ({parents})")
    return ", ".join(told)


def summary() -> str:
    """``docs/evidence/index.md``: five sentences, two plots, and what is on which page."""
    figures, photos = _headline_figures(), needed("pacs")
    real = protocol_rows(photos)
    apart = protocol_means(real, "float", "", "single")
    seeds = ("no seed", "one seed", "two seeds", "three seeds")[learned_seeds(real, "w4a8")]
    assert apart is not None
    renewed = "PACS: regression, BatchNorm re-estimated"
    float_best = figures["float", renewed]
    float_mean = figures["float", "PACS: mean"]
    ours, qdrop, rtn, corrected = (
        figures[parents, renewed] for parents in ("hdrq", "qdrop", "rtn", "rtn-corrected")
    )
    plain = {parents: figures[parents, "PACS: mean"] for parents in ("hdrq", "qdrop")}
    best = max(ours, qdrop, rtn)
    rivals = needed("pacs_rivals")
    experts = max(
        row["harmonic_mean"]
        for row in rivals["rows"]
        if row["method"] == "experts" and len(row["members"]) == 3
    )
    fits = {
        parents: figures[parents, "PACS: regression, fitted"]
        for parents in ("float", "qdrop", "hdrq")
    }
    alone = protocol_means(real, "qdrop", "w4a8", "single")
    narrow = [protocol_means(real, parents, "w4a4", "guided") for parents in ("qdrop", "hdrq")]
    assert alone is not None and narrow[0] is not None and narrow[1] is not None
    guided = {
        parents: figures[parents, "PACS: regression, fitted to float models"]
        for parents in ("qdrop", "hdrq")
    }
    solved = {
        parents: figures[parents, "PACS: regression"]
        for parents in ("rtn", "rtn-corrected", "qdrop", "hdrq")
    }
    on_streets = needed("camvid")
    streets = on_streets["rows"]

    def single(method: str, bits: str) -> tuple[float, float]:
        """The models of a method that are not merged: mean of pairs, and all domains."""
        both = protocol_means(real, method, bits, "single")
        assert both is not None
        return both

    def told(both: tuple[float, float]) -> str:
        return f"{both[0]:.1f}% and {both[1]:.1f}%"

    digits_mean = figures["float", "digits: mean"]
    losses = sorted(
        digits_mean[0] - figures[parents, "digits: mean"][0] for parents in ("rtn", "qdrop", "hdrq")
    )
    digits_best = figures["hdrq", "digits: regression"]
    sentences = [
        "Averaging separately quantized models can break them: on paintings, cartoons and sketches "
        f"(PACS) at W4A8, QDrop's bundles reach {alone[0]:.1f}% by themselves, float models "
        f"{apart[0]:.1f}%, but their averages {plain['qdrop'][0]:.1f}% on the mean of pairs, where "
        f"averages of the float models reach {float_mean[0]:.1f}%. On digits averages of W4A8 "
        f"bundles lose {losses[0]:.1f} to {losses[-1]:.1f} points on pairs, and none on all three "
        "domains.",
        "The statistics that calibration stores in a bundle need no image at the merge: on digits "
        f"merged W4A8 bundles reach {digits_best[0]:.1f}% (pairs) and {digits_best[1]:.1f}% (all "
        f"three domains), the float average {digits_mean[0]:.1f}% and {digits_mean[1]:.1f}%; at "
        "W4A4 the merge is behind the float average on all three domains, at W3A3 on pairs too. On "
        "PACS they recover a part where the bundles are good by themselves: on pairs "
        f"{solved['qdrop'][0]:.1f}% (QDrop), {solved['hdrq'][0]:.1f}% (HDRQ) and "
        f"{solved['rtn-corrected'][0]:.1f}% (rounded to nearest, biases corrected), but "
        f"{solved['rtn'][0]:.1f}% without the correction.",
        "With images without labels, merges of bundles on PACS are about as good as merges of the "
        "float models: at W4A8 with BatchNorm re-estimated on 64 images a domain "
        f"{best[0]:.1f}% on pairs (best float merge without a fit {float_best[0]:.1f}%); fitted on "
        f"256 images to the bundles' own outputs {told(fits['qdrop'])} with QDrop's bundles "
        f"({seeds}; HDRQ's {told(fits['hdrq'])}), and to the float models' outputs "
        f"{told(guided['qdrop'])} (HDRQ's {told(guided['hdrq'])}; one seed on pairs), where the "
        f"float merge, fitted in the same way, reaches {told(fits['float'])} and a float merge "
        f"that is quantized towards the float models' outputs {experts:.1f}% on all three domains. "
        f"At W4A4 merges that are fitted to the float models reach {told(narrow[0])} (HDRQ's "
        f"{told(narrow[1])}), and the models that were merged {told(single('qdrop', 'w4a4'))} "
        f"(HDRQ's {told(single('hdrq', 'w4a4'))}). On CamVid, with 32 frames of day and 20 of "
        f"dusk, a fit changes merges by {_fits_on_streets()} points.",
        "Neither HDRQ's nor QDrop's bundles merge better throughout, once both learning rates were "
        "searched alike: on digits at W4A8 they are within about a point of each other (three "
        f"seeds); on all three domains of PACS ({seeds}) HDRQ's merges less QDrop's are "
        f"{difference(real, 'w4a8', 'renewed', 3)} points at W4A8 and "
        f"{difference(real, 'w4a4', 'renewed', 3)} at W4A4 with BatchNorm re-estimated, "
        f"{difference(real, 'w4a8', 'nearest', 3)} and {difference(real, 'w4a4', 'nearest', 3)} "
        "where bundles are only averaged; on CamVid at W4A8 (one calibration) "
        f"{difference(streets, 'w4a8', 'renewed', 2)} re-estimated and "
        f"{difference(streets, 'w4a8', 'fitted', 2)} fitted. In brackets are 95% intervals; they "
        "are not corrected for their number. Rounding to nearest with corrected biases (one seed) "
        "is not far behind at W4A8: its single models reach "
        f"{told(single('rtn-corrected', 'w4a8'))} on PACS (without the correction "
        f"{told(single('rtn', 'w4a8'))}; QDrop's {told(single('qdrop', 'w4a8'))}), its merges "
        f"{told(corrected)} with BatchNorm re-estimated (QDrop's {told(qdrop)}, HDRQ's "
        f"{told(ours)}).",
        "All layers of the measured networks that were asked for INT8 run in INT8 on ONNX Runtime "
        "and TensorRT-RTX as the engines report it, but for 4 of SegFormer's 88 with 4-bit weights "
        "in blocks, and speed was measured on CPUs only: no "
        "TensorRT engine has run on a GPU yet, and the paper's own data sets have not been run.",
    ]
    parts = ["# Evidence", ""]
    records = [
        ("pacs", "merge_statistics"),
        ("merge_statistics", "pacs"),
        ("pacs", "pacs_rivals", "camvid"),
        ("merge_statistics", "pacs", "camvid"),
        ("engines", "peers", "same_codes"),
    ]
    for number, (sentence, names) in enumerate(zip(sentences, records, strict=True), 1):
        parts.append(f"{number}. {sentence} ({', '.join(f'`{name}.json`' for name in names)})")
    parts += [
        "",
        "Merges of W4A8 bundles and of float models (`float`), harmonic means over domains: "
        "filled marks are the mean over pairs of domains, hollow ones the merge of all three.",
        "",
        "![Merged harmonic means on digits and PACS](headline.svg)",
        "",
        "Accuracy, model size and speed of one network beside the other are on the page on "
        "[engines](engines.md). How flat the loss is around the models of QDrop and HDRQ, and what "
        "lies between them, is on the page on [merging](merging.md#is-the-ground-flatter):",
        "",
        "![Barriers and planes of QDrop's and HDRQ's models](landscape.svg)",
        "",
        "## Pages",
        "",
        table(
            ["page", "what it answers"],
            [[f"[{title}]({name}.md)", about] for name, (title, about, _) in PAGES.items()],
        ),
        "",
        f"{_MADE} Sections name their script and their record.",
    ]
    return "\n".join(parts) + "\n"


_SOFTWARE = ("hdrq-deploy", "torch", "onnxruntime", "openvino")


def _record_of(section: Section, record: Any) -> str:
    """Where the figures of a section stand, and what they were measured with."""
    files = ", ".join(f"`{name}.json`" for name in (section.record, *section.beside))
    found = record.get("environment", {}) if isinstance(record, dict) else {}
    versions = [f"{name} {found[name]}" for name in _SOFTWARE if found.get(name)]
    made_with = "; ".join(part for part in (", ".join(versions), found.get("cpu")) if part)
    return f"Record: {files}" + (f" ({made_with})." if made_with else ".")


def pages() -> dict[str, str]:
    """Every page of ``docs/evidence/`` by its file name."""
    found = {"index.md": summary()}
    for name, (title, about, sections) in PAGES.items():
        parts = [f"# {title}", "", about, "", _MADE]
        for section in sections:
            record = load(section.record)
            if record is not None:
                parts += ["", section.text(record), "", _record_of(section, record)]
        found[f"{name}.md"] = "\n".join(parts) + "\n"
    return found


def main() -> int:
    """Write the pages and their plots."""
    folder = ROOT / "docs" / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
    plot_headline(folder / "headline.svg")
    record = load("merge_quality")
    if record is not None:
        plot(record, folder / "merge_quality.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
