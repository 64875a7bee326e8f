"""The page that opens the evidence, README's table, and the plot of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.batchnorm import IN_FRONT, SOLVED
from evidence.camvid import streets_as_published, streets_by_singles
from evidence.merging import (
    BARRIERS,
    CURVATURES,
    PLANES,
    comparisons,
    digits_by_seed,
    digits_hdrq_less_qdrop,
    digits_less,
    digits_means,
    iterations_said,
    longer_iterations,
    lower_of,
    one_run_of_digits,
    streets_hdrq_less_qdrop,
)
from evidence.protocol import (
    PACS_TRAININGS,
    beside_qdrop,
    best_float_merges,
    by_singles,
    hdrq_less_qdrop,
    led,
    protocol_means,
    protocol_rows,
)
from evidence.records import METHOD_COLOURS, WIDTHS, listed, needed, table, with_spread

__all__ = ["headline", "plot_headline", "summary"]

_LATE = "rtn-corrected, 8 bits merged to 4"
_SOLVED = "regression-compensated"
# Trainings of CamVid by day and at dusk.
_STREETS = ("camvid", "camvid_second", "camvid_searched")
# Columns of the table of HDRQ beside QDrop, and their records.
_SEARCHED = "CamVid, searched rates"
_BESIDE = {
    "PACS": "pacs",
    "first training": "pacs_first",
    "second training": "pacs_wide",
    "earlier training, λ = 0.3": "pacs_earlier",
    "CamVid": "camvid",
    "CamVid, second training": "camvid_second",
    _SEARCHED: "camvid_searched",
    "digits": "digits",
}
# Lines of README's table: its name, method, bits, and the bits that the merge rounds to.
_HEADLINE = (
    ("float", "float", "", ""),
    ("rtn", "rtn", "w4a8", ""),
    ("rtn-corrected", "rtn-corrected", "w4a8", ""),
    ("brecq", "brecq", "w4a8", ""),
    ("qdrop", "qdrop", "w4a8", ""),
    ("hdrq", "hdrq", "w4a8", ""),
    (_LATE, "rtn-corrected", "w8a8", "-w4"),
)
# README's columns by data set and, on PACS, way of merging.
_COLUMNS = {
    ("digits", "mean"): "mean",
    ("digits", "regression"): "regression",
    ("PACS", "nearest"): "mean",
    ("PACS", "regression"): "regression",
    ("PACS", "renewed"): "regression, BatchNorm re-estimated",
    ("PACS", "fitted"): "regression, fitted",
    ("PACS", "guided"): "regression, fitted to float models (2 sweeps)",
}
# Ways of merging on digits by column, of float models and of bundles.
_DIGITS_WAYS = {
    "mean": (("float", "mean-folded"), "mean-nearest"),
    "regression": (("float-folded", "regression-nearest"), _SOLVED),
}


def _figures() -> dict[tuple[str, str, str], tuple[float, float]]:
    """Mean of pairs and triple of README's table, as rounded there, by line and column."""
    rows = needed("merge_statistics")["rows"]
    real = protocol_rows(needed("pacs"))
    found = {}
    for name, parents, bits, late in _HEADLINE:
        for task, way in _COLUMNS:
            if task == "PACS":
                both = protocol_means(real, parents, bits, f"{way}{late}")
            else:
                exact, merged = _DIGITS_WAYS[way]
                own, how = exact if parents == "float" else (parents, f"{merged}{late}")
                both = digits_means(rows, how, own, bits)
            if both is not None:
                found[name, task, way] = (round(both[0], 1), round(both[1], 1))
    return found


def headline() -> str:
    """README's table: merges of bundles to W4A8 beside merges of float models."""
    figures = _figures()
    return table(
        ["parents", *(f"{task}: {label}" for (task, _), label in _COLUMNS.items())],
        [
            [name, *(_both(figures.get((name, *column))) for column in _COLUMNS)]
            for name, *_ in _HEADLINE
        ],
    )


def _both(figures: tuple[float, float] | None) -> str:
    """The mean of pairs and the figure of all domains."""
    return f"{figures[0]:.1f} / {figures[1]:.1f}" if figures else "-"


def plot_headline(target: Path) -> None:
    """Draw README's table: one panel a data set, one group of marks a way of merging.

    Filled marks are the mean of pairs, hollow ones the merge of all three domains, on PACS with its
    95% interval.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figures, spans = _figures(), _spans()
    with rc_context({"svg.hashsalt": "hdrq", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(11, 3.9), layout="constrained")
        panels = figure.subplots(1, 2, width_ratios=(2, 4))
        for axes, task in zip(panels, ("digits", "PACS"), strict=True):
            own = [column for column in _COLUMNS if column[0] == task]
            for place, (name, *_) in enumerate(_HEADLINE):
                there = [group for group, way in enumerate(own) if (name, *way) in figures]
                if not there:
                    continue
                pairs, triples = zip(
                    *(figures[(name, *own[group])] for group in there), strict=True
                )
                at = [group + 0.12 * (place - len(_HEADLINE) // 2) for group in there]
                colour = METHOD_COLOURS[name]
                axes.plot(at, pairs, "o", color=colour, ms=7, label=name)
                axes.plot(at, triples, "D", color="none", mec=colour, ms=6, mew=1.4)
                for x, group in zip(at, there, strict=True):
                    if limits := spans.get((name, *own[group])):
                        axes.plot([x, x], limits, color=colour, lw=1, alpha=0.7)
            names = [_COLUMNS[way].replace(", ", ",\n").replace(" (", "\n(") for way in own]
            axes.set_xticks(range(len(own)), names)
            axes.set_title(f"{task}, W4A8 bundles and float models merged")
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("harmonic mean accuracy, %")
        for mark, name in (("o", "mean of pairs"), ("D", "all three domains")):
            filled = "#1a202c" if mark == "o" else "none"
            panels[1].plot([], [], mark, color=filled, mec="#1a202c", ms=6, label=name)
        marks = panels[1].get_legend_handles_labels()
        figure.legend(*marks, frameon=False, fontsize=8, ncols=9, loc="outside lower center")
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, metadata=empty)


def _spans() -> dict[tuple[str, str, str], tuple[float, float]]:
    """95% intervals of the merges of all domains of PACS, by line and column of README's table."""
    rows = {
        (row["method"], row["bits"], row["way"]): row["figure"]
        for row in protocol_rows(needed("pacs"))
        if len(row["members"]) > 2 and "low" in row["figure"]
    }
    return {
        (name, task, way): (figure["low"], figure["high"])
        for name, parents, bits, late in _HEADLINE
        for task, way in _COLUMNS
        if task == "PACS" and (figure := rows.get((parents, bits, f"{way}{late}")))
    }


def _sentences() -> Iterator[tuple[str, tuple[str, ...]]]:
    """What was found, in five sentences, each with the records that carry it."""
    figures, real = _figures(), protocol_rows(needed("pacs"))
    alone, wide = (
        protocol_means(real, *of)
        for of in (("qdrop", "w4a8", "single"), ("rtn-corrected", "w8a8", "nearest"))
    )
    assert alone is not None and wide is not None
    averaged = {parents: figures[parents, "PACS", "nearest"][0] for parents in ("qdrop", "float")}
    assert abs(wide[0] - averaged["float"]) < 1 < averaged["float"] - averaged["qdrop"], (
        "the sentence says so"
    )
    yield (
        "Averaging bundles costs little at 8 bits and can break them at 4: on pairs of domains of "
        f"PACS bundles calibrated without learning average to {wide[0]:.1f}% at W8A8, float models "
        f"to {averaged['float']:.1f}%, and QDrop's W4A8 models, {alone[0]:.1f}% each, to "
        f"{averaged['qdrop']:.1f}%.",
        ("pacs",),
    )
    yield _without_images(figures)
    yield _fitted(figures, real)
    yield (
        _led(),
        (
            *PACS_TRAININGS,
            *("pacs_paper", "pacs_paper_singles", "camvid_paper", "camvid_paper_singles"),
            "camvid_searched",
        ),
    )
    cells = [
        row["times_quantize_static"]
        for model in needed("peers")["models"]
        for row in model["rows"]
        if row["engine"] == "ours ort" and row["times_quantize_static"]
    ]
    slower = sum(ratio < 1 for ratio in cells)
    yield (
        "ONNX Runtime runs, and TensorRT-RTX builds, in integers what was asked for, but for 4 of "
        "SegFormer's 88 layers with 4-bit weights in blocks; on CPUs our ONNX Runtime graphs are "
        f"slower than those of its own tool in {slower} of {len(cells)} cells (geometric mean "
        f"{statistics.geometric_mean(cells):.2f} times as fast), and no TensorRT engine has run on "
        "a GPU yet.",
        ("engines", "peers"),
    )


def _led() -> str:
    """The sentence on HDRQ beside QDrop: how often which of them leads."""
    (plain_ours, plain_theirs, plain), (ours, theirs, rest) = _leads()
    assert plain_ours > plain_theirs and theirs > ours, "the sentence says so"
    searched = [other for _, other in hdrq_less_qdrop("camvid_searched")]
    above, below = led(searched)
    assert {other["calibrations"] for other in searched} == {1}, "the sentence says one seed"
    paper = protocol_rows(needed("pacs_paper"), "paper")
    assert {row["figure"].get("calibrations", 1) for row in paper} == {1}, "the sentence says one"
    alone, averaged = (
        {m: both[1] for m in ("hdrq", "qdrop") if (both := protocol_means(paper, m, "w4a8", way))}
        for way in ("single", "nearest")
    )
    streets = streets_as_published()
    orders = [(found["hdrq"], found["qdrop"]) for found in (alone, averaged)]
    for found in (by_singles(), streets, streets_by_singles()):
        orders += [(found["hdrq"][place], found["qdrop"][place]) for place in (0, 1)]
    assert all(ours > theirs for ours, theirs in orders), "the sentences say so"
    return (
        "With one scale per tensor, as published, HDRQ leads QDrop on PACS and on CamVid, at rates "
        f"searched on each (W4A8, one seed): single models reach {alone['hdrq']:.1f} and "
        f"{alone['qdrop']:.1f}%, and {streets['hdrq'][0]:.1f} and {streets['qdrop'][0]:.1f} mIoU; "
        f"averages to nearest fail, at {averaged['hdrq']:.1f} and {averaged['qdrop']:.1f}% (a "
        f"guess {100 / 7:.1f}%), and {streets['hdrq'][1]:.1f} and {streets['qdrop'][1]:.1f} mIoU. "
        "Rates chosen by single models in place of averages leave that order. On digits [neither "
        "leads](aims-and-claims.md#the-papers-claims-on-what-was-run-here). With one scale per "
        "channel neither leads throughout on PACS: over three seeds on two trainings the interval "
        f"of HDRQ less QDrop is above zero in {plain_ours} and below it in {plain_theirs} of "
        f"{plain} averages, and in {ours} and {theirs} of {rest} other merges; on CamVid, at rates "
        f"searched on it, in {above} and {below} of {len(searched)} merges of one seed "
        "([below](#hdrq-beside-qdrop); not independent, not corrected for their number)."
    )


def _leads() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """How often the interval of HDRQ less QDrop, of several seeds, is above and below zero.

    Returns:
        Above, below, and of how many: of averages, and of all other merges of PACS.
    """
    every = [
        (name, row["way"] == "nearest", other)
        for name in PACS_TRAININGS
        for row, other in hdrq_less_qdrop(name)
        if other["calibrations"] > 1
    ]
    assert len({name for name, *_ in every}) == 2, "the sentence says two trainings"
    assert {other["calibrations"] for *_, other in every} == {3}, "the sentence says three seeds"

    def counts(average: bool) -> tuple[int, int, int]:
        own = [other for _, kind, other in every if kind is average]
        return (*led(own), len(own))

    return counts(True), counts(False)


def _without_images(
    figures: Mapping[tuple[str, str, str], tuple[float, float]],
) -> tuple[str, tuple[str, ...]]:
    """The sentence on merges by the statistics in the bundles."""
    solved, average = figures["hdrq", "digits", "regression"], figures["float", "digits", "mean"]
    exact, plain = figures["float", "digits", "regression"], figures["hdrq", "digits", "mean"]
    assert exact[0] > solved[0] > average[0] > plain[0], "the sentence says so"
    assert exact[1] > solved[1] > plain[1] > average[1], "the sentence says so"
    drawn = needed("merge_statistics")["rows"]
    folded = one_run_of_digits(drawn, "mean-folded", "float")
    narrow = digits_by_seed(drawn, _SOLVED, "hdrq", "w3a3")
    below = [found[place] < folded[place] for found in narrow.values() for place in range(2)]
    assert below and all(below), "the sentence says so"
    wide = (digits_by_seed(drawn, way, "hdrq", "w4a8") for way in (_SOLVED, "mean-nearest"))
    whole = digits_less(*wide)[1]
    rivals = [row for row in needed("merge_rivals")["rows"] if row["task"] == "digits"]
    after = digits_means(rivals, "regression-first", "qdrop", "w4a8")
    assert after is not None
    assert after[0] > solved[0] and after[1] > solved[1], "the sentence says so"
    return (
        "Without images, regression on the statistics in the bundles lifts W4A8 merges of pairs of "
        f"HDRQ's models of digits from {plain[0]:.1f} to {solved[0]:.1f}%. Their float models "
        f"reach {average[0]:.1f}% averaged and {exact[0]:.1f}% by the same regression; quantized "
        f"to W4A8 by QDrop on images, this float merge reaches {after[0]:.1f}%. On all three "
        f"domains regression adds {with_spread(whole)} points; at W3A3 its merges stay below the "
        "float average.",
        ("merge_statistics", "merge_rivals"),
    )


def _fitted(
    figures: Mapping[tuple[str, str, str], tuple[float, float]], real: Sequence[Mapping[str, Any]]
) -> tuple[str, tuple[str, ...]]:
    """The sentence on merges that are fitted on images without labels."""
    better = ("rtn-corrected", "brecq", "qdrop", "hdrq")
    pairs = [figures[parents, "PACS", "fitted"][0] for parents in better]
    whole, late, plain = (figures[name, "PACS", "fitted"][0] for name in ("float", _LATE, "rtn"))
    unfitted = best_float_merges(real)[0]
    narrow = [protocol_means(real, m, "w4a4", "fitted") for m in better]
    assert whole > late > max(pairs) > min(pairs) > unfitted > plain, "the sentence says so"
    assert all(both is not None and both[0] < unfitted for both in narrow), "the sentence says so"
    streets = _moved_by_fits()
    return (
        "With 256 unlabelled images a domain W4A8 merges of pairs of PACS, fitted to bundles, "
        f"reach {min(pairs):.1f} to {late:.1f}%, between the best float merge without a fit "
        f"({unfitted:.1f}%) and with one ({whole:.1f}%). Bundles that were only rounded to nearest "
        f"({plain:.1f}%) and W4A4 merges fitted to their bundles stay below both. On streets "
        f"(CamVid, {len(_STREETS)} trainings, few frames) a fit to the bundles moves merges by "
        f"regression by {min(streets):+.1f} to {max(streets):+.1f} points.",
        ("pacs", *_STREETS),
    )


def _flatter() -> str:
    """In how many comparisons HDRQ's models lie on flatter ground."""
    record = needed("landscape")
    (traces, of_traces), (largest, of_largest) = (
        lower_of(record, [name for name in CURVATURES if name.startswith(figure)])
        for figure in ("trace", "largest")
    )
    barriers = [
        "{} of {} at {}".format(*lower_of(record, BARRIERS, [bits]), bits.upper())
        for bits in comparisons(record)
    ]
    curved, between = (lower_of(needed("landscape_pacs"), n) for n in (CURVATURES, BARRIERS))
    return (
        f"on digits the trace of the Hessian is lower for HDRQ in {traces} of {of_traces} "
        f"comparisons, its largest eigenvalue in {largest} of {of_largest}, the barrier in "
        f"{listed(barriers)}; on PACS (W4A4, one seed) its curvature in {curved[0]} of "
        f"{curved[1]}, its barrier in {between[0]} of {between[1]}. They are not independent"
    )


def _moved_by_fits() -> list[float]:
    """By how much a fit moves the harmonic mean of each merge by regression, on CamVid."""
    moved = []
    for name in _STREETS:
        means = {
            (row["method"], row["bits"], row["way"]): row["merged"]["harmonic mean"]["mean"]
            for row in needed(name)["rows"]
            if row["setting"] == "ours"
        }
        for (method, bits, way), value in means.items():
            solved = means.get((method, bits, way.replace("fitted", "regression")))
            if way.startswith("fitted") and solved is not None:
                moved.append(value - solved)
    return moved


def _trials() -> str:
    """How many rates were tried for digits in our setting."""
    searches = {
        search["method"]: len(search["tried"])
        for search in needed("digits_tuning")["searches"]
        if search["setting"] == "ours"
    }
    both = listed(
        [f"{searches[m]} trials for {name}" for m, name in (("qdrop", "QDrop"), ("hdrq", "HDRQ"))]
    )
    return f"on the same checkpoints ({both})"


def _drawn_beside_qdrop() -> str:
    """HDRQ's merges less QDrop's on drawn images, with spreads over calibration seeds."""
    rows, drawn = needed("merge_statistics")["rows"], []
    for way, label in (
        ("mean-advanced", "mean, advanced"),
        ("regression-compensated", "regression, compensated"),
    ):
        for bits in WIDTHS:
            cells = [with_spread(d, "+") for d in digits_hdrq_less_qdrop(rows, way, bits)]
            streets = streets_hdrq_less_qdrop(rows, way, bits)
            drawn.append([bits.upper(), label, *cells, with_spread(streets, "+") or "-"])
    header = ["bits", "merge", "digits, pairs", "digits, all domains", "streets, all domains"]
    return table(header, drawn)


def _with_images() -> str:
    """PACS at 4 and 3 bits: what every way of merging reaches, pairs and all domains."""
    rows = protocol_rows(needed("pacs"))
    ways = ("single", "nearest", "regression", "renewed", "fitted", "guided")
    kinds: list[tuple[str, str, str, str, tuple[str, ...]]] = []
    for bits in ("", "w4a8", "w4a4", "w3a3"):
        for method in ("float", "rtn", "rtn-corrected", "brecq", "qdrop", "hdrq"):
            kinds.append((method, bits, method, bits, ways))
        if bits == "w4a8":
            late = tuple(f"{way}-w4" for way in ways)
            kinds.append((_LATE, bits, "rtn-corrected", "w8a8", late))
    lines = []
    for name, bits, method, own, these in kinds:
        both = [protocol_means(rows, method, own, way) for way in these]
        if any(both):
            seeds = _seeds_of(rows, method, own, these)
            lines.append([name, bits.upper() or "FP32", seeds, *map(_both, both)])
    heads = ["alone", "averaged", "regression", "re-estimated", "fitted"]
    heads.append("fitted to floats, 2 sweeps")
    return table(["models", "bits", "seeds", *heads], lines)


def _seeds_of(
    rows: Sequence[Mapping[str, Any]], method: str, bits: str, ways: Sequence[str]
) -> str:
    """How many calibration seeds figures are the mean of; fits to float models say it apart."""
    if method == "float":
        return "-"
    counts = {
        (row["way"] == "guided" and len(row["members"]) == 2, row["figure"].get("calibrations", 1))
        for row in rows
        if (row["method"], row["bits"]) == (method, bits) and row["way"] in ways
    }
    assert {count for guided, count in counts if guided} <= {1}, "the page says so"
    return " or ".join(str(count) for count in sorted({c for guided, c in counts if not guided}))


def _not_run() -> str:
    """What no record has; an entry leaves the list when its record comes."""
    photos = needed("pacs")["rows"]
    streets = [row for name in (*_STREETS, "camvid_paper") for row in needed(name)["rows"]]
    first, wide, plain, weather = (
        needed(name)["rows"]
        for name in ("pacs_first", "pacs_wide", "pacs_resnet", "camvid_weather")
    )
    every = [*photos, *first, *wide]

    def there(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> bool:
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in rows)

    on_more = " on more than a pair of digits" if "20,000" in longer_iterations() else ""
    candidates = {
        "the paper's own data sets and networks": False,
        f"20,000 iterations a block{on_more} ({iterations_said()})": False,
        "PACS in the setting `paper`": there(needed("pacs_paper")["rows"], setting="paper"),
        "CamVid in the setting `paper`": there(streets, setting="paper"),
        "BRECQ on PACS": there(every, method="brecq"),
        "BRECQ on PACS with more than one calibration seed": any(
            row["method"] == "brecq" and row["merged"]["harmonic mean"].get("calibrations", 1) > 1
            for row in photos
        ),
        "fits at W3A3 on PACS": there(every, bits="w3a3", way="fitted"),
        "`qdrop` after a float merge on PACS": there(needed("pacs_rivals")["rows"], method="qdrop"),
        "BRECQ on CamVid": there(streets, method="brecq"),
        "PACS at W8A4": there(every, bits="w8a4"),
        "PACS at W6A6": there(every, bits="w6a6"),
        "`rtn-corrected` on PACS at W4A4": there(every, method="rtn-corrected", bits="w4a4"),
        **{
            f"{name} on CamVid at W8A8": there(streets, method=name.lower(), bits="w8a8")
            for name in ("QDrop", "HDRQ")
        },
        "methods that learn on CamVid at W4A4": there(streets, method="qdrop", bits="w4a4"),
        "methods that learn on CamVid in fog and snow": there(weather, method="qdrop"),
        "methods that learn on the residual network on PACS": there(plain, method="qdrop"),
        "HDRQ's noise and distance one by one on PACS at W4A4, or with more seeds than one": False,
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
    in_front = [f'"{about}"' for about, name in _BESIDE.items() if name in IN_FRONT]
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
        "Bars are 95% intervals over test images and calibration seeds, of merges of all three "
        "domains of PACS; digits and means of pairs have none here ([tables](pacs.md)).",
        "",
        "The page on [merging](merging.md#is-the-ground-flatter) measures how flat the loss is "
        "around the models of QDrop and HDRQ, and what lies between them: "
        f"{_flatter()}. The left panel shows the loss between two models of digits, rounded (the "
        "mean and the range over pairs of domains and seeds), the next one the accuracy of one "
        "pair's merges (a point for every rounding seed), and the others the loss in the plane of "
        "three models:",
        "",
        f"![{PLANES}](landscape.svg)",
        "",
        "## PACS, merged with and without images",
        "",
        "Harmonic means of top-1 accuracies in %, mean of pairs / all three domains. "
        "A figure is the mean of so many calibration seeds; in the last column pairs are of one. "
        "Rates were searched by five trials a method for averages at W4A4: those of `qdrop` and "
        "`hdrq` on another training, those of `brecq` on this one. Intervals are on the page on "
        "[PACS](pacs.md).",
        "",
        _with_images(),
        "",
        "## HDRQ beside QDrop",
        "",
        "HDRQ's merges of all domains less QDrop's, in points, with 95% intervals over test images "
        "and, where several were run, calibration seeds; all others are of one seed. Bold is a "
        "difference of several seeds whose interval leaves out zero. An interval of one seed says "
        "nothing of what another seed would give. No interval covers the differences between "
        "trainings; compare the columns for those. Intervals are not corrected for their number, "
        "and the frames of CamVid are of a few drives. On PACS the rates of both methods were "
        "searched by five trials each, for averages at W4A4 on the earlier training; other widths, "
        "ways and trainings of PACS, and the first two of CamVid, take them unsearched, and HDRQ's "
        "distance to the source was chosen in addition, among three. In the column "
        f'"{_SEARCHED}" rates were searched by as many trials on its own checkpoints. '
        f"On digits rates were searched {_trials()}. "
        f"Regression was solved [in front of BatchNorm]({SOLVED}) in {listed(in_front)}, behind it "
        "in the others. [Pairs of domains](pacs.md#hdrq-beside-qdrop-on-pacs) are on the page on "
        "PACS.",
        "",
        beside_qdrop(_BESIDE, together=True),
        "",
        "On drawn images, the mean and standard deviation over three calibration seeds, without an "
        "interval over test images:",
        "",
        _drawn_beside_qdrop(),
        "",
        "Figures of this second table are of an older run (`merge_statistics.json`): on digits "
        "five rates were tried for each method, on streets five for QDrop and eight for HDRQ.",
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
        f"{made} On the other pages every section names its script and its record.",
    ]
    return "\n".join(parts) + "\n"
