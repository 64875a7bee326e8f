"""Paintings, cartoons and sketches: PACS."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.protocol import (
    PACS_TRAININGS,
    as_published,
    beside_floats,
    beside_qdrop,
    best_float_merges,
    by_singles,
    difference_told,
    groups_of,
    hdrq_less_qdrop,
    learned_bits,
    learned_options,
    moved_scales,
    paper_rates,
    paper_read,
    protocol_means,
    protocol_missing,
    protocol_rates,
    protocol_rows,
    protocol_table,
    quantized_ways,
    reproduce_command,
    tests_told,
    unadapted,
)
from evidence.records import listed, load, needed, table

__all__ = [
    "hdrq_beside_qdrop",
    "pacs",
    "pacs_earlier",
    "pacs_first",
    "pacs_paper",
    "pacs_resnet",
    "pacs_unlabelled",
    "pacs_wide",
]

_ON_PACS = "pacs --data PACS --pairs"
# The page of other trainings.
_MORE = "other-trainings.md"
_SEARCHED_ON = (
    "these checkpoints for `brecq`, for the others on checkpoints that the same command had "
    "trained before on another machine"
)


def pacs(record: Mapping[str, Any]) -> str:
    """The section on the grid that has most methods and seeds, all merged by this version."""
    rows, ways, tuning = protocol_rows(record), quantized_ways(record), needed("pacs_tuning")
    own = [row for row in record["rows"] if row["bits"]]
    options = learned_options(own)
    largest = max(record["rows"], key=lambda row: len(row["members"]))
    return "\n".join(
        [
            "## PACS in our setting",
            "",
            f"`{reproduce_command(_ON_PACS, own)} --ways {' '.join(ways)}`: EfficientNet-Lite0 cut "
            "after its 112-channel stage, 96x96, trained on photos from ImageNet weights and then "
            "on every domain with labels. Our setting: one scale per channel with BatchNorm in it, "
            f"a relative distance to the source for `hdrq` (λ = {options['distance']:g}), "
            f"{options['iters']} iterations a block on {options['images']} images a domain. "
            "Re-estimated merges see 64 unlabelled images a domain, fitted ones 256. A fit solves "
            "every layer so that it puts out what each domain's own model puts out on images of "
            "its domain. For a merge of bundles these models are the bundles; `--fit-to` takes the "
            "float models in their place (here in two sweeps, `--fit-sweeps 2`). Figures are "
            f"harmonic means of top-1 accuracies in % on the test images ({tests_told(largest)}), "
            "of ONNX Runtime engines, with half of the 95% interval over test images and "
            "calibration seeds (of one seed without the spread of calibrations). The images are "
            "not part of this project.",
            "",
            *beside_floats(rows, ways),
            "",
            protocol_missing(rows, _bits_of("pacs_wide")),
            "",
            *_late_rounding(record),
            *_trainings(rows),
            "",
            protocol_rates(tuning, _SEARCHED_ON),
            *_protocol_distances(tuning),
            *_sweeps(),
        ]
    )


def pacs_paper(record: Mapping[str, Any]) -> str:
    """The section on the paper's own setting, on the same checkpoints."""
    rows, tuning = protocol_rows(record, "paper"), needed("pacs_paper_tuning")
    assert record["checkpoints_sha256"] == needed("pacs")["checkpoints_sha256"], "one training"
    own = [row for row in record["rows"] if row["bits"]]
    return "\n".join(
        [
            "## PACS in the paper's setting",
            "",
            f"`{reproduce_command(_ON_PACS, own, rates=paper_rates('pacs'))}`: the checkpoints of "
            f"our setting, {as_published(learned_options(own))}. {paper_read(rows, 100 / 7)} "
            f"{moved_scales('pacs')}",
            "",
            "HDRQ's merges less QDrop's, in points:",
            "",
            beside_qdrop({"that of our setting": "pacs_paper"}, setting="paper"),
            "",
            protocol_table(rows),
            "",
            protocol_rates(tuning, "these checkpoints"),
            "",
            "Merges of these trials are near a guess, so that the search says little of merges. "
            "Single models depend on the rate: their cross entropy with the float experts on "
            f"held-out images, the mean of the domains, is {_tried_alone(tuning)} Every rate of "
            "`hdrq` is better than the best one of `qdrop`. At the rates that are best for single "
            f"models (`benchmarks/rates_by_singles.py`) W4A8 models reach {_by_singles()}: "
            "the order of the methods is the same.",
            "",
            protocol_missing(rows, paper=True),
        ]
    )


def _tried_alone(tuning: Mapping[str, Any]) -> str:
    """How far single models are from their float models, at all rates and at the chosen one."""
    told, spans = [], {}
    chosen = {search["method"]: search["chosen"] for search in tuning["searches"]}
    for search in needed("pacs_paper_singles_tuning")["searches"]:
        means = {trial["rate"]: trial["score"] for trial in search["tried"]}
        low, high = spans[search["method"]] = (min(means.values()), max(means.values()))
        told.append(
            f"{low:.2f} to {high:.2f} nats for `{search['method']}` "
            f"({means[chosen[search['method']]]:.2f} at the rate that was chosen)"
        )
    assert spans["hdrq"][1] < spans["qdrop"][0], "the next sentence says so"
    return f"{listed(told)}."


def _by_singles() -> str:
    """What both methods reach at rates that were chosen by single models."""
    found = by_singles()
    assert found["hdrq"][0] > 2 * found["qdrop"][0] and found["hdrq"][1] > found["qdrop"][1], (
        "the sentence says so"
    )
    return " and ".join(
        f"{alone:.1f}% alone and {averaged:.1f}% averaged over all domains by `{method}` "
        f"(rate {rate:.3g})"
        for method, (alone, averaged, rate) in found.items()
    )


def pacs_first(record: Mapping[str, Any]) -> str:
    """The section on the first training of the checkpoints."""
    rows = protocol_rows(record)
    return "\n".join(
        [
            "## PACS on the first training of the checkpoints",
            "",
            f"`{_command_of(record)}`, as [PACS in our setting]"
            "(pacs.md#pacs-in-our-setting) but on checkpoints of another training by the same "
            "command, so that its rows stand beside its own float rows only. Merges at "
            "weights that were chosen on the calibration images were run as well, which the other "
            "trainings lack.",
            "",
            *beside_floats(rows, quantized_ways(record)),
            "",
            protocol_missing(rows, _bits_of("pacs_wide")),
        ]
    )


def _command_of(record: Mapping[str, Any]) -> str:
    """The command of the bits at which methods that learn were run on PACS."""
    bits = learned_bits(record["rows"])
    return reproduce_command(_ON_PACS, [r for r in record["rows"] if r["bits"] in bits])


def _trainings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far float models of other trainings by the same command are from these."""

    def floats(some: Sequence[Mapping[str, Any]]) -> dict[Any, float]:
        return {
            (tuple(row["members"]), row["way"]): row["figure"]["mean"]
            for row in some
            if row["method"] == "float"
        }

    here, single, merged, places = floats(rows), list[float](), list[float](), []
    for name, place, read in (
        ("pacs_earlier", "[earlier figures](earlier-figures.md)", _earlier_rows),
        (
            "pacs_first",
            f"[the first training]({_MORE}#pacs-on-the-first-training-of-the-checkpoints)",
            protocol_rows,
        ),
        (
            "pacs_wide",
            f"[the second one]({_MORE}#pacs-on-the-second-training-of-the-checkpoints)",
            protocol_rows,
        ),
    ):
        record = load(name)
        if record is None:
            continue
        places.append(place)
        there = floats(read(record))
        for key in here.keys() & there.keys():
            (single if key[1] == "single" else merged).append(abs(here[key] - there[key]))
    if not places:
        return []
    which = "Another training" if len(places) == 1 else "Other trainings"
    apart = [o["difference"] for name in PACS_TRAININGS for _, o in hdrq_less_qdrop(name)]
    smaller = sum(abs(points) < max(merged) for points in apart)
    return [
        "",
        f"The checkpoints are one training of each domain. {which} by the same command on other "
        f"machines ({listed(places)}) gave "
        f"single float models whose harmonic means are within {max(single):.1f} points of these, "
        f"and merges of float models up to {max(merged):.1f} points away; {smaller} of the "
        f"{len(apart)} differences between HDRQ and QDrop on PACS are smaller than that. No "
        "interval here has this spread in it; what counts are differences on the same checkpoints.",
    ]


def _protocol_distances(tuning: Mapping[str, Any]) -> list[str]:
    """What other distances score at the rate that the search chose for ``hdrq``."""
    record = load("pacs_distance")
    if record is None:
        return []
    # Scores of other checkpoints, which the search of brecq had, do not stand beside these.
    (rival,) = (search for search in tuning["searches"] if search["method"] == "qdrop")
    beside = f"`qdrop` at its best {min(trial['score'] for trial in rival['tried']):.3f}"
    names = {"relative": "relative", "norm": "as published"}
    scores = [row["score"] for row in record["rows"]]
    span = max(scores) - min(scores)
    tried = ", ".join(
        f"{names[row['distance_form']]}, λ = {row['distance']:g}: {row['score']:.3f}"
        for row in record["rows"]
    )
    return [
        "",
        "That search ran with the distance that was our setting's then (relative, λ = 0.3). At the "
        f"rate that it chose, `hdrq` scores on the same held-out images {tried} ({beside}; "
        f"`benchmarks/pacs_distance.py`). These scores are {span:.2f} nats apart; the rows above "
        "have the best of these distances"
        f"{', the smallest relative one that was tried' if _is_smallest(record) else ''}.",
    ]


def _is_smallest(record: Mapping[str, Any]) -> bool:
    """Whether the best relative distance is at the lower edge of those that were tried."""
    own = [row for row in record["rows"] if row["distance_form"] == "relative" and row["distance"]]
    best = min(record["rows"], key=lambda row: row["score"])
    return bool(best["distance"] == min(row["distance"] for row in own))


def _sweeps() -> list[str]:
    """How near fits come to the float models, by their targets and sweeps."""
    record = load("fit_sweeps")
    if record is None:
        return []
    counts = sorted({row["sweeps"] for row in record["rows"] if row["targets"]})
    kinds = [("", 0, "not fitted")]
    for targets, name in (("parents", "bundles"), ("floats", "float models")):
        kinds += [(targets, n, f"to the {name}, {n} sweep{'s' * (n > 1)}") for n in counts]
    lines = []
    for method in dict.fromkeys(row["parents"] for row in record["rows"]):
        found = {
            (row["targets"], row["sweeps"]): _near(row["score"], row["decisions"])
            for row in record["rows"]
            if row["parents"] == method
        }
        lines.append([f"`{method}`", *(found.get(kind[:2], "-") for kind in kinds)])
    return [
        "",
        "To whose outputs merges are fitted, and how often all layers, was tried on every fourth "
        "calibration image, held out of the fit: cross entropy with each domain's float model in "
        "nats, and decisions that are that model's (`benchmarks/fit_sweeps.py`; W4A4, all domains, "
        "calibration seed 0):",
        "",
        table(["parents", *(name for *_, name in kinds)], lines),
    ]


def _near(score: float, decisions: Mapping[str, float]) -> str:
    return f"{score:.3f} ({100 * statistics.fmean(decisions.values()):.1f}%)"


def _bits_of(name: str) -> set[str]:
    """Bits of the methods that learn in a record, none where there is no record."""
    record = load(name)
    return learned_bits(record["rows"]) if record else set()


def pacs_wide(record: Mapping[str, Any]) -> str:
    """The section on bundles of checkpoints of another training."""
    rows = protocol_rows(record)
    ways = quantized_ways(record)
    return "\n".join(
        [
            "## PACS on the second training of the checkpoints",
            "",
            f"`{_command_of(record)} --ways {' '.join(ways)}`, as [PACS in our setting]"
            "(pacs.md#pacs-in-our-setting) but on checkpoints of "
            "another training by the same command, so that its rows stand beside its own float "
            "rows only. One calibration seed; rates are those that were searched at "
            f"W4A4.{_only_rounded(rows)}{_rounded_by_the_merge(rows)}",
            "",
            *beside_floats(rows, ways),
            "",
            protocol_missing(rows, learned_bits(needed("pacs")["rows"])),
        ]
    )


def hdrq_beside_qdrop(_: Mapping[str, Any]) -> str:
    """The section on HDRQ beside QDrop on every training and group of domains."""
    return "\n".join(
        [
            "## HDRQ beside QDrop on PACS",
            "",
            "HDRQ's merges less QDrop's, in points, as in the [table that opens the evidence]"
            "(index.md#hdrq-beside-qdrop), with pairs of domains: of the training of "
            "[our setting](#pacs-in-our-setting), of the "
            f"[first]({_MORE}#pacs-on-the-first-training-of-the-checkpoints) and the "
            f"[second]({_MORE}#pacs-on-the-second-training-of-the-checkpoints) one, and of an "
            "[earlier one](earlier-figures.md#pacs-at-w4a4) on which the rates were searched, with "
            "the distance that was our setting's then (λ = 0.3). Bold is a difference of "
            "several calibration seeds whose interval leaves out zero.",
            "",
            beside_qdrop(
                {
                    "our setting": "pacs",
                    "first": "pacs_first",
                    "second": "pacs_wide",
                    "earlier, λ = 0.3": "pacs_earlier",
                }
            ),
        ]
    )


def _only_rounded(rows: Sequence[Mapping[str, Any]]) -> str:
    """Methods and bits without a method that learns beside them."""
    told = []
    for bits in sorted({row["bits"] for row in rows if row["bits"]} - learned_bits(rows)):
        methods = dict.fromkeys(f"`{row['method']}`" for row in rows if row["bits"] == bits)
        told.append(f" At {bits.upper()} {', '.join(methods)} alone was run here.")
    return "".join(told)


def _rounded_by_the_merge(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bundles of 8-bit weights whose merge has 4 bits, less bundles calibrated with 4."""
    told = []
    for method in ("qdrop", "hdrq"):
        late = protocol_means(rows, method, "w8a8", "renewed-w4")
        early = protocol_means(rows, method, "w4a8", "renewed")
        if late and early:
            told.append(f"`{method}` {late[0] - early[0]:+.1f} and {late[1] - early[1]:+.1f}")
    if not told:
        return ""
    return (
        " Re-estimated merges with 4-bit weights of bundles calibrated at W8A8, less those of "
        f"bundles calibrated at W4A8, in points (mean of pairs, all domains): {', '.join(told)}."
    )


def _late_rounding(record: Mapping[str, Any]) -> list[str]:
    """Merges that round 8-bit bundles to 4 bits less those of 4-bit bundles, all of them fitted."""
    found = needed("late_rounding")
    assert found["checkpoints_sha256"] == record["checkpoints_sha256"], "records of one training"
    groups = groups_of(row["members"] for row in found["rows"])
    cells: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    seeds: dict[tuple[str, ...], set[int]] = {}
    for row in found["rows"]:
        points = {name: 100 * row[name] for name in ("value", "low", "high")}
        key = tuple(
            f"{row[when][name]}" for when in ("late", "early") for name in ("method", "bits")
        )
        cells.setdefault(key, {})[tuple(row["members"])] = difference_told(
            {**points, "difference": points["value"]}
        )
        seeds.setdefault(key, set()).add(row["calibrations"])
    lines = [
        [
            f"`{late}` {wide.upper()}",
            f"`{early}` {narrow.upper()}",
            str(min(seeds[late, wide, early, narrow])),
            *(own[g] for g in groups),
        ]
        for (late, wide, early, narrow), own in cells.items()
    ]
    return [
        "The merge may round to 4 bits what was calibrated at 8. Fitted merges that do so, less "
        "fitted merges of bundles that were calibrated with 4-bit weights, in points with 95% "
        "intervals over test images and, where both have several, calibration seeds "
        "(`benchmarks/late_rounding.py`):",
        "",
        table(
            ["merged to 4 bits", "less", "seeds", *(", ".join(group) for group in groups)], lines
        ),
    ]


def pacs_resnet(record: Mapping[str, Any]) -> str:
    """The section on a network without depthwise kernels, whose checkpoints start at random."""
    rows, ways, tuning = protocol_rows(record), quantized_ways(record), load("pacs_resnet_tuning")
    own = [row for row in record["rows"] if row["bits"]]
    command = reproduce_command(
        "pacs --data PACS --model resnet --pairs", own, weights="", rates=" --tune w4a4"
    )
    latent = any(row["method"] == "latent" for row in rows)
    return "\n".join(
        [
            "## PACS with a plain residual network",
            "",
            f"`{command} --ways {' '.join(ways)}`: {record['form']}, trained on photos and then on "
            "every domain with labels; all else as in [PACS in our setting]"
            "(pacs.md#pacs-in-our-setting). One calibration seed."
            + (" `latent` is `hdrq` without noise and without distance." if latent else ""),
            "",
            *([protocol_rates(tuning, "the same checkpoints"), ""] if tuning else []),
            _resnet_read(rows),
            "",
            *beside_floats(rows, ways),
            "",
            protocol_missing(rows),
        ]
    )


def pacs_unlabelled(record: Mapping[str, Any]) -> str:
    """The section on models that were adapted to their domains without labels."""
    rows, ways = protocol_rows(record), quantized_ways(record)
    own = [row for row in record["rows"] if row["bits"]]
    command = reproduce_command(f"{_ON_PACS} --adaptation {record['adaptation']}", own)
    return "\n".join(
        [
            "## PACS adapted without labels",
            "",
            f"`{command} --ways {' '.join(ways)}`: as [PACS in our setting]"
            "(pacs.md#pacs-in-our-setting), from the same source checkpoint, but `hdrq adapt` sees "
            f"the images of a domain without labels. {_labels_missed(record, rows)}",
            "",
            *beside_floats(rows, ways),
            "",
            protocol_missing(rows),
        ]
    )


def _labels_missed(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What float models reach, alone and in their best merge, beside those adapted with labels."""
    labelled = needed("pacs")
    before = unadapted("pacs", record, labelled)
    alone, best = [], []
    for some in (rows, protocol_rows(labelled)):
        single = protocol_means(some, "float", "", "single")
        assert single is not None
        alone.append(single[1])
        best.append(best_float_merges(some)[1])
    lost = [single - merged for single, merged in zip(alone, best, strict=True)]
    return (
        f"The source reaches {before['harmonic_mean']:.1f}% on the three domains "
        f"(`benchmarks/source_models.py`), models that were adapted to them {alone[0]:.1f}% each, "
        f"with labels {alone[1]:.1f}%. The best float merge of all domains that is not fitted is "
        f"{lost[0]:.1f} points below its single models, with labels {lost[1]:.1f}."
    )


def _resnet_read(rows: Sequence[Mapping[str, Any]]) -> str:
    """What rounding costs this network alone, and where BatchNorm is best while it is merged."""
    alone = {
        (row["method"], row["bits"]): row["figure"]["mean"]
        for row in rows
        if row["way"] == "single" and len(row["members"]) > 2
    }
    real = alone.pop(("float", ""))
    worst = min(value - real for value in alone.values())
    within, apart = (
        protocol_means(rows, "float", "", way) for way in ("regression-folded", "regression")
    )
    assert within is not None and apart is not None
    return (
        f"Single models of every method and bit-width here are at most {-worst:.1f} points below "
        f"the float ones (harmonic mean {real:.1f}), where EfficientNet-Lite0 [loses]"
        "(pacs.md#pacs-in-our-setting) "
        f"{_lost_to_rounding():.0f} when it is rounded to nearest at W4A8. Two things differ: this "
        f"one has no depthwise kernels, and it never saw ImageNet. {_lost_in_float(rows)} A "
        "regression with BatchNorm folded into the weights solves for the same outputs as one with "
        "BatchNorm apart does; merged float models differ by "
        f"{within[0] - apart[0]:+.1f} points on pairs and {within[1] - apart[1]:+.1f} on all "
        "domains, where a regression [in front of BatchNorm]"
        "(#regression-in-front-of-batchnorm-and-behind-it) is far behind."
    )


def _lost_in_float(rows: Sequence[Mapping[str, Any]]) -> str:
    """What merging costs float models of this network and of EfficientNet-Lite0, in points."""
    there = protocol_rows(needed("pacs"))
    lost = {}
    for way in ("nearest", "regression"):
        for network, own in (("here", rows), ("there", there)):
            alone, merged = (protocol_means(own, "float", "", w) for w in ("single", way))
            assert alone is not None and merged is not None
            lost[network, way] = tuple(a - b for a, b in zip(alone, merged, strict=True))
    told = {key: " and ".join(f"{points:.1f}" for points in lost[key]) for key in lost}
    averaged = zip(lost["here", "nearest"], lost["there", "nearest"], strict=True)
    assert all(here > there + 5 for here, there in averaged), "the sentence says so"
    solved = zip(lost["here", "regression"], lost["there", "regression"], strict=True)
    assert all(abs(here - there) < 2 for here, there in solved), "the sentence says so"
    return (
        f"Float models lose more here when they are averaged ({told['here', 'nearest']} points, "
        f"mean of pairs and all domains) than there ({told['there', 'nearest']}), and about as "
        f"much by regression ({told['here', 'regression']}, there {told['there', 'regression']})."
    )


def _lost_to_rounding() -> float:
    """What `rtn` at W4A8 costs single models of EfficientNet-Lite0, in points."""
    rows = protocol_rows(needed("pacs"))
    real, rounded = (protocol_means(rows, *of, "single") for of in (("float", ""), ("rtn", "w4a8")))
    assert real is not None and rounded is not None
    return real[1] - rounded[1]


def pacs_earlier(record: Mapping[str, Any]) -> str:
    """Rows at W4A4 of an earlier training of the checkpoints, and its float models."""
    rows = [row for row in _earlier_rows(record) if row["bits"] in ("", "w4a4")]
    return "\n".join(
        [
            "## PACS at W4A4",
            "",
            "`hdrq reproduce pacs --tune w4a4 ...`, as the table of [PACS](pacs.md) but on "
            "checkpoints of an earlier training, those of the search of rates, and with the "
            "distance that was our setting's then (relative, λ = 0.3). One calibration seed.",
            "",
            protocol_table(rows),
        ]
    )


def _earlier_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the earlier version, whose float models of no setting were not folded."""
    return [row for row in protocol_rows(record) if row["way"] != "folded"]
