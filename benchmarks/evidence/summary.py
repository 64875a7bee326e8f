"""The page that opens the evidence, README's table, and the plot of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.batchnorm import in_front
from evidence.merging import (
    digits_by_seed,
    digits_hdrq_less_qdrop,
    iterations_said,
    longer_iterations,
    streets_hdrq_less_qdrop,
)
from evidence.real_images import (
    against_qdrop,
    difference_told,
    protocol_means,
    protocol_rows,
    streets_away,
    way_label,
)
from evidence.records import METHOD_COLOURS, needed, table, with_spread

__all__ = ["headline", "plot_headline", "summary"]


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
                on_digits("float-folded", "regression-nearest")
                if exact
                else on_digits(parents, "regression-compensated"),
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
                colour = METHOD_COLOURS[parents]
                axes.plot(at, pairs, "o", color=colour, ms=7, label=parents)
                axes.plot(at, triples, "D", color="none", mec=colour, ms=6, mew=1.4)
            names = [ways[index].partition(": ")[2].replace(", ", ",\n") for index in own]
            axes.set_xticks(range(len(own)), names)
            axes.set_title(f"{task}, W4A8 bundles and float models merged")
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("harmonic mean accuracy, %")
        for mark, name in (("o", "mean of pairs"), ("D", "all three domains")):
            filled = "#1a202c" if mark == "o" else "none"
            panels[1].plot([], [], mark, color=filled, mec="#1a202c", ms=6, label=name)
        panels[1].legend(frameon=False, fontsize=8, loc="lower right")
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, metadata=empty)


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


def _sentences() -> Iterator[tuple[str, tuple[str, ...]]]:
    """What was found, in five sentences, each with the records that carry it."""
    figures, real = _headline_figures(), protocol_rows(needed("pacs"))
    alone, apart = (
        protocol_means(real, *of, "single") for of in (("qdrop", "w4a8"), ("float", ""))
    )
    assert alone is not None and apart is not None
    averaged = {parents: figures[parents, "PACS: mean"][0] for parents in ("qdrop", "float")}
    yield (
        "Averaging models that were quantized one by one can break them: on paintings, cartoons "
        f"and sketches (PACS, pairs of domains, W4A8) QDrop's models reach {alone[0]:.1f}% each "
        f"and {averaged['qdrop']:.1f}% averaged, float models {apart[0]:.1f}% and "
        f"{averaged['float']:.1f}%.",
        ("pacs",),
    )
    solved, average = figures["hdrq", "digits: regression"], figures["float", "digits: mean"]
    exact = figures["float", "digits: regression"]
    assert exact[0] > solved[0] > average[0], "the sentence says so"
    assert exact[1] > solved[1] > average[1], "the sentence says so"
    drawn = needed("merge_statistics")["rows"]
    (folded,) = digits_by_seed(drawn, "mean-folded", "float", "")
    behind = {
        bits: [
            statistics.fmean(found[place] for found in own) < folded[place] for place in range(2)
        ]
        for bits in ("w4a4", "w3a3")
        if (own := digits_by_seed(drawn, "regression-compensated", "hdrq", bits))
    }
    assert behind == {"w4a4": [False, True], "w3a3": [True, True]}, "the sentence says so"
    yield (
        "On digits the statistics that calibration stores let W4A8 merges pass the float average "
        f"without images, on pairs ({solved[0]:.1f}% against {average[0]:.1f}%) and on all three "
        f"domains ({solved[1]:.1f}% against {average[1]:.1f}%, where averaging the integers "
        f"reaches {figures['hdrq', 'digits: mean'][1]:.1f}% too); at W4A4 they stay behind it on "
        "all three domains, at W3A3 everywhere; float models merged by the same regression are "
        f"ahead of all of them ({exact[0]:.1f}% and {exact[1]:.1f}%).",
        ("merge_statistics",),
    )
    fits = {
        parents: figures[parents, "PACS: regression, fitted"][0]
        for parents in ("float", "qdrop", "hdrq")
    }
    moved = _moved_by_fits("fitted")
    guided = _moved_by_fits("guided", "w4a8")
    assert max(moved) < 0.05 < min(guided), "the sentence says so"
    streets = _behind_the_mean()
    assert -1 < min(streets) < 0, "the sentence says so"
    more = protocol_rows(needed("pacs_methods"))
    late = protocol_means(more, "rtn-corrected", "w8a8", "fitted-w4")
    early = [protocol_means(more, m, "w4a8", "fitted") for m in ("brecq", "qdrop", "hdrq")]
    pairs = [both[0] for both in early if both is not None]
    assert late is not None and late[0] > max(pairs), "the sentence says so"
    yield (
        "With unlabelled images W4A8 merges come near float merges on PACS: on pairs "
        f"{fits['qdrop']:.1f}% (QDrop) and {fits['hdrq']:.1f}% (HDRQ) against "
        f"{fits['float']:.1f}%, all fitted on 256 images a domain; at W4A4 they stay behind. "
        "Bundles of 8 bits that learned nothing do not fall behind: rounded to 4 bits by a fitted "
        f"merge they reach {late[0]:.1f}% on another training of the models, where bundles that "
        f"learned at W4A8 reach {min(pairs):.1f} to {max(pairs):.1f}%, fitted too. On "
        "street scenes (CamVid) a fit to the bundles helps no merge, and one to the float models "
        f"brings W4A8 merges {min(guided):.1f} to {max(guided):.1f} points; the mean of the float "
        "models loses little there, and 8-bit bundles of another training, merged to 4 bits and "
        f"fitted to it, are within {-min(streets):.1f} points of it.",
        ("pacs", "pacs_methods", "camvid", "camvid_eight_bits"),
    )
    yield (
        "Neither HDRQ's nor QDrop's models merge better throughout at learning rates that one "
        "search found for both: which of them leads changes with bits, way of merging and domains "
        "([below](#hdrq-beside-qdrop)), and all of PACS in the first table is one training of the "
        "checkpoints.",
        ("merge_statistics", "pacs", "pacs_wide", "pacs_methods", "pacs_earlier", "camvid"),
    )
    yield (
        "ONNX Runtime runs and TensorRT-RTX builds in INT8 what was asked for in the measured "
        "networks, but for 4 of SegFormer's 88 layers with 4-bit weights in blocks; speed was "
        "measured on CPUs only, and no TensorRT engine has run on a GPU yet.",
        ("engines", "peers", "same_codes"),
    )


def _behind_the_mean() -> list[float]:
    """8-bit bundles of CamVid, merged to 4 bits and fitted to the float mean, less it; by light."""
    away, _ = streets_away("camvid_eight_bits")
    mean, late = away["float", "", "nearest"], away["rtn-corrected", "w8a8", "guided-mean-w4"]
    return [own - other for own, other in zip(late, mean, strict=True)]


def _moved_by_fits(fit: str, width: str = "") -> list[float]:
    """By how much a fit moves the harmonic mean of each merge by regression, on CamVid."""
    means = {
        (row["method"], row["bits"], row["way"]): row["merged"]["harmonic mean"]["mean"]
        for row in needed("camvid")["rows"]
    }
    return [
        value - means[method, bits, "regression"]
        for (method, bits, way), value in means.items()
        if way == fit and width in ("", bits)
    ]


def _intervals() -> str:
    """How wide the intervals on PACS are, which the picture leaves out."""
    half: dict[str, float] = {}
    for row in protocol_rows(needed("pacs")):
        figure = row["figure"]
        if row["bits"] in ("", "w4a8") and "low" in figure:
            wide = (figure["high"] - figure["low"]) / 2
            half[row["way"]] = max(wide, half.get(row["way"], 0))
    images = max(half[way] for way in ("renewed", "fitted", "guided"))
    return (
        "The picture has no intervals: half of a 95% interval on PACS is up to "
        f"{half['nearest']:.0f} points where models are averaged, {half['regression']:.0f} by "
        f"regression, and {images:.0f} with images"
    )


def _against_qdrop(row: Mapping[str, Any]) -> str:
    """HDRQ's merges less QDrop's, bold where the interval of several seeds leaves out zero."""
    other = against_qdrop(row)
    if other is None:
        return "-"
    text = difference_told(other)
    bold = other["calibrations"] > 1 and not other["low"] <= 0 <= other["high"]
    return f"**{text}**" if bold else text


def _beside_qdrop() -> Iterator[str]:
    """Two tables: differences with intervals on real images, with spreads on drawn ones."""
    groups: list[tuple[str, ...]] = []
    lines = []
    for name, about in (
        ("pacs", "PACS"),
        ("pacs_wide", "PACS, another training"),
        ("pacs_methods", "PACS, a third one"),
        ("pacs_earlier", "PACS, an earlier one, λ = 0.3"),
        ("camvid", "CamVid"),
    ):
        found: dict[tuple[str, str], dict[tuple[str, ...], str]] = {}
        seeds: dict[tuple[str, str], set[int]] = {}
        for row in protocol_rows(needed(name)):
            if row["method"] == "hdrq" and row["way"] != "single":
                cell = found.setdefault((row["bits"], row["way"]), {})
                cell[tuple(row["members"])] = _against_qdrop(row)
                counts = seeds.setdefault((row["bits"], row["way"]), set())
                if other := against_qdrop(row):
                    counts.add(other["calibrations"])
        if name == "pacs":
            groups = sorted({g for cell in found.values() for g in cell}, key=lambda g: (len(g), g))
        for (bits, way), cell in found.items():
            cells = [cell.get(group, "-") for group in groups]
            if name == "camvid":
                cells = [*["-"] * (len(groups) - 1), *cell.values()]
            if set(cells) != {"-"}:
                count = " or ".join(map(str, sorted(seeds[bits, way])))
                lines.append([about, bits.upper(), way_label("hdrq", way), count, *cells])
    header = [", ".join(group).replace("art_painting", "art") for group in groups]
    yield table(["images", "bits", "merge", "seeds", *header[:-1], "all domains"], lines)
    yield ""
    rows, drawn = needed("merge_statistics")["rows"], []
    for way, label in (
        ("mean-advanced", "mean, advanced"),
        ("regression-compensated", "regression, compensated"),
    ):
        for bits in ("w8a8", "w4a8", "w4a4", "w3a3"):
            cells = [with_spread(d, "+") for d in digits_hdrq_less_qdrop(rows, way, bits)]
            streets = streets_hdrq_less_qdrop(rows, way, bits)
            drawn.append([bits.upper(), label, *cells, with_spread(streets, "+") or "-"])
    header = ["bits", "merge", "digits, pairs", "digits, all domains", "streets, all domains"]
    yield table(header, drawn)


def _with_images() -> str:
    """PACS at W4A8 and W4A4: what every way of merging reaches, pairs and all domains."""
    rows = protocol_rows(needed("pacs"))
    ways = ("single", "nearest", "regression", "renewed", "fitted", "guided")
    lines = []
    for bits in ("", "w4a8", "w4a4"):
        for method in ("float", "rtn", "rtn-corrected", "qdrop", "hdrq"):
            both = [protocol_means(rows, method, bits, way) for way in ways]
            if any(both):
                cells = [f"{cell[0]:.1f} / {cell[1]:.1f}" if cell else "-" for cell in both]
                lines.append([method, bits.upper() or "FP32", *cells])
    heads = ["alone", "averaged", "regression", "re-estimated", "fitted", "fitted to floats"]
    return table(["models", "bits", *heads], lines)


def _not_run() -> str:
    """What no record has; an entry leaves the list when its record comes."""
    photos, streets = needed("pacs")["rows"], needed("camvid")["rows"]
    wide, more, plain, weather = (
        needed(name)["rows"]
        for name in ("pacs_wide", "pacs_methods", "pacs_resnet", "camvid_weather")
    )
    every = [*photos, *wide, *more]

    def there(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> bool:
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in rows)

    on_more = " on more than a pair of digits" if "20,000" in longer_iterations() else ""
    candidates = {
        "the paper's own data sets and networks": False,
        f"20,000 iterations a block{on_more} ({iterations_said()})": False,
        "PACS and CamVid in the setting `paper`": there([*every, *streets], setting="paper"),
        "BRECQ on PACS": there(every, method="brecq"),
        "BRECQ on CamVid": there(streets, method="brecq"),
        "PACS at W8A4": there(every, bits="w8a4"),
        "PACS at W6A6": there(every, bits="w6a6"),
        "`rtn-corrected` on PACS at W4A4": there(every, method="rtn-corrected", bits="w4a4"),
        "methods that learn on CamVid at W8A8": there(streets, method="qdrop", bits="w8a8"),
        "methods that learn on CamVid at W4A4": there(streets, method="qdrop", bits="w4a4"),
        "methods that learn on CamVid in fog and snow": there(weather, method="qdrop"),
        "methods that learn on the residual network on PACS": there(plain, method="qdrop"),
        "noise and distance of HDRQ one by one on PACS (they were on digits)": False,
        "any engine on a GPU": False,
    }
    return "Not run: " + "; ".join(what for what, is_run in candidates.items() if not is_run) + "."


def summary(pages: Mapping[str, tuple[str, str]], made: str) -> str:
    """``docs/evidence/index.md``: five sentences, plots, tables, and what is on which page.

    Args:
        pages: Title of every other page and what it answers, by file name.
        made: The sentence that says what made the page.
    """
    parts = ["# Evidence", ""]
    for number, (sentence, names) in enumerate(_sentences(), 1):
        parts.append(f"{number}. {sentence} ({', '.join(f'`{name}.json`' for name in names)})")
    parts += [
        "",
        "A *bundle* is one quantized model with what a merge needs. *Regression* merges layers by "
        "the statistics in the bundles; *re-estimated* merges have measured BatchNorm again on a "
        "few unlabelled images; *fitted* ones have solved every layer for what the bundles, or the "
        "float models, put out on 256 of them ([how](../how-to/merge.md)).",
        "",
        "![Merged harmonic means on digits and PACS](headline.svg)",
        "",
        f"{_intervals()} ([tables](real-images.md)).",
        "",
        "Accuracy, model size and speed of one network beside the other are on the page on "
        "[engines](engines.md). How flat the loss is around the models of QDrop and HDRQ, and what "
        "lies between them, is on the page on [merging](merging.md#is-the-ground-flatter); on the "
        "left, on digits, the mean and the range over pairs of domains and seeds:",
        "",
        "![Barriers and planes of QDrop's and HDRQ's models](landscape.svg)",
        "",
        "## PACS, merged with and without images",
        "",
        "Harmonic means of top-1 accuracies in %, mean of pairs / all three domains; `qdrop` and "
        "`hdrq` are means of three calibration seeds (fitted to the float models: one on pairs), "
        "the others one run. Intervals are on the page on [real images](real-images.md). "
        f"{in_front('real-images.md')}",
        "",
        _with_images(),
        "",
        "## HDRQ beside QDrop",
        "",
        "HDRQ's merges less QDrop's, in points. On real images with 95% intervals over test "
        "images and, where several were run, calibration seeds; bold where the interval of several "
        "seeds leaves out zero. With one seed an interval says nothing of what another seed would "
        "give. Intervals are not corrected for their number: of so many, some leave out zero by "
        "chance. No training of the checkpoints but the one at hand is in them, and the frames of "
        "CamVid are of a few drives. On PACS the rates of both were searched by five trials each, "
        "at W4A4; HDRQ's distance to the source was then chosen among three, QDrop has none. "
        "CamVid takes the rates of PACS.",
        "",
        *_beside_qdrop(),
        "",
        "On drawn images the mean and standard deviation over three calibration seeds. On digits "
        "five rates were tried for each method, on the streets five for QDrop and eight for HDRQ.",
        "",
        "## What was not run",
        "",
        f"{_not_run()} Each page names the cells of its grids that are missing.",
        "",
        "## Pages",
        "",
        table(
            ["page", "what it answers"],
            [[f"[{title}]({name}.md)", about] for name, (title, about) in pages.items()],
        ),
        "",
        f"{made} Sections name their script and their record.",
    ]
    return "\n".join(parts) + "\n"
