"""PACS, CamVid and ImageNet images."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from evidence.records import listed, load, needed, table
from hdrq_deploy.calibration.methods import METHODS

_PROTOCOL_WAYS = {
    "single": "a model per domain",
    "folded": "mean, BatchNorm folded",
    "regression-folded": "regression, BatchNorm folded",
    "nearest": "mean, nearest",
    "regression": "regression, compensated",
    "regression-w4": "the same, 8 bits to 4",
    "regression-w3": "the same, 8 bits to 3",
    "renewed": "regression, compensated, re-estimated",
    "renewed-w4": "the same, 8 bits to 4",
    "renewed-w3": "the same, 8 bits to 3",
    "auto": "regression, compensated, re-estimated, chosen weights",
    "fitted": "regression, compensated, fitted",
    "fitted-w4": "the same, 8 bits to 4",
    "fitted-w3": "the same, 8 bits to 3",
    "guided": "regression, compensated, fitted to the float models",
    "guided-mean": "regression, compensated, fitted to the mean of the float models",
    "guided-mean-w4": "the same, 8 bits to 4",
    "guided-mean-w3": "the same, 8 bits to 3",
}


# The rates of :func:`pacs_methods`.
_METHODS_RATES = "pacs_methods_tuning"
_METHODS = ("rtn", "rtn-corrected", "brecq", "qdrop", "latent", "hdrq")


def protocol_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of our setting in a ``results.json``, float models among them.

    A row has ``method``, ``bits``, ``way``, ``members`` and ``figure``: the summary of the harmonic
    mean, as :func:`hdrq_deploy.experiments.table.rows` gives it.
    """
    found = []
    for row in record["rows"]:
        if row["setting"] not in ("ours", "float"):
            continue
        keys = {name: row[name] for name in ("method", "bits", "members")}
        keys["bits"] = "" if row["method"] == "float" else row["bits"]
        found.append(
            {
                **keys,
                "way": _way_of(row),
                "figure": row["merged"]["harmonic mean"],
                "against": row["against"],
            }
        )
        if row["way"] == "nearest" and row["setting"] != "float":
            single = {"figure": row["single"]["harmonic mean"], "against": []}
            found.append({**keys, "way": "single", **single})
    return found


def _way_of(row: Mapping[str, Any]) -> str:
    """The way of a row, as ``_PROTOCOL_WAYS`` calls it; of no setting are folded float models."""
    if row["setting"] != "float":
        return str(row["way"])
    return "folded" if row["way"] == "nearest" else f"{row['way']}-folded"


def protocol_means(
    rows: Sequence[Mapping[str, Any]], method: str, bits: str, way: str
) -> tuple[float, float] | None:
    """The mean over pairs and the figure of all domains of one kind of rows; None without them."""
    own = [r for r in rows if (r["method"], r["bits"], r["way"]) == (method, bits, way)]
    pairs = [row["figure"]["mean"] for row in own if len(row["members"]) == 2]
    rest = [row["figure"]["mean"] for row in own if len(row["members"]) > 2]
    return (statistics.fmean(pairs), rest[0]) if pairs and rest else None


def learned_seeds(rows: Sequence[Mapping[str, Any]], bits: str) -> int:
    """Calibration seeds of the methods that learn at some bits; 0 where none of them was run.

    Merges at chosen weights, and those that are fitted to the float models, have fewer.
    """
    return min(
        (
            row["figure"].get("calibrations", 1)
            for row in rows
            if (row["bits"], row["method"]) in {(bits, "qdrop"), (bits, "hdrq")}
            and row["way"] not in ("auto", "guided")
        ),
        default=0,
    )


def way_label(method: str, way: str) -> str:
    """A way to merge in the words of the tables; float models are not rounded."""
    label = _PROTOCOL_WAYS[way]
    return (
        label.replace(", compensated", "").replace(", nearest", "") if method == "float" else label
    )


def with_interval(figure: Mapping[str, float]) -> str:
    """A mean and half of its interval, where it has one."""
    half = (figure["high"] - figure["low"]) / 2 if "low" in figure else None
    return f"{figure['mean']:.1f}" + ("" if half is None else f" ± {half:.1f}")


def _protocol_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Methods, bits and ways down, every pair, their mean, and all domains across."""
    groups = sorted({tuple(row["members"]) for row in rows}, key=lambda g: (len(g), g))
    order = list(_PROTOCOL_WAYS)
    bits = sorted({row["bits"] for row in rows}, key=("", *_PROTOCOL_BITS).index)
    lines = []
    for width in bits:
        for method in dict.fromkeys(row["method"] for row in rows if row["bits"] == width):
            own = [r for r in rows if (r["method"], r["bits"]) == (method, width)]
            for way in sorted({row["way"] for row in own}, key=order.index):
                found = {tuple(r["members"]): r for r in own if r["way"] == way}
                cells = []
                for group in groups:
                    cells.append(with_interval(found[group]["figure"]) if group in found else "-")
                both = protocol_means(rows, method, width, way)
                cells.insert(-1, f"{both[0]:.1f}" if both else "-")
                lines.append([method, width.upper() or "FP32", way_label(method, way), *cells])
    header = ["parents", "bits", "merge", *(", ".join(group) for group in groups)]
    header.insert(-1, "mean of pairs")
    return table(header, lines)


def _protocol_read(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows say: merges less the best float merge, and methods beside each other."""
    best = best_float_merges(rows)
    fitted = protocol_means(rows, "float", "", "fitted")
    kinds = [(way, "best float merge", best) for way in ("renewed", "renewed-w4", "renewed-w3")]
    told = (
        f"The best merge of float models without a fit reaches {best[0]:.1f} on the mean of pairs "
        f"and {best[1]:.1f} on all domains."
    )
    if fitted is not None:
        told += (
            " Fitted merges (`hdrq-merge --fit`) go further: every layer is solved for what each "
            "domain's own model puts out on 256 unlabelled images of its domain, for float models "
            "the float model and for bundles the bundle. The float merge rises to "
            f"{fitted[0]:.1f} and {fitted[1]:.1f}. Bundles may be fitted to the float models "
            "instead, in two sweeps (`--fit-to`, `--fit-sweeps 2`)."
        )
        for way in ("fitted", "guided"):
            kinds += [(way, "best float merge", best), (way, "fitted float merge", fitted)]
    return "\n".join(
        [
            told,
            "",
            "Merges less those of the float models, in points (mean of pairs, all domains); the "
            "best float merge is the best that is not fitted:",
            "",
            _away_table(rows, kinds),
            "",
            *_beside_section(rows),
        ]
    )


def best_float_merges(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The best merges of float models that are not fitted: mean of pairs, and all domains."""
    ways = [way for way in _PROTOCOL_WAYS if way not in ("single", "fitted", "guided")]
    merged = [m for way in ways if (m := protocol_means(rows, "float", "", way))]
    return max(m[0] for m in merged), max(m[1] for m in merged)


def way_in_full(way: str) -> str:
    """A way to merge in words that need no row above them."""
    whole, _, narrowed = way.partition("-w")
    return f"{_PROTOCOL_WAYS[whole]}, 8 bits to {narrowed}" if narrowed else _PROTOCOL_WAYS[way]


def _away_table(
    rows: Sequence[Mapping[str, Any]], kinds: Sequence[tuple[str, str, tuple[float, float]]]
) -> str:
    """Bits and ways down, methods across: figures of pairs and of all domains less two others.

    ``kinds`` are ways, what is taken off in words, and its two figures.
    """
    lines, methods = [], _methods_of(rows)
    for bits in dict.fromkeys(row["bits"] for row in rows if row["bits"]):
        for way, less, best in kinds:
            cells = [protocol_means(rows, method, bits, way) for method in methods]
            if any(cells):
                away = (
                    f"{cell[0] - best[0]:+.1f}, {cell[1] - best[1]:+.1f}" if cell else "-"
                    for cell in cells
                )
                lines.append([bits.upper(), way_in_full(way), less, *away])
    return table(["bits", "merge", "less the", *methods], lines)


def _methods_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods that quantize, in the order of the tables."""
    there = {row["method"] for row in rows}
    return [method for method in _METHODS if method in there]


def _beside_section(rows: Sequence[Mapping[str, Any]], tested: bool = True) -> list[str]:
    """Merges of all domains from bundles of ``hdrq``, less those of the other methods.

    Without ``tested`` no test is shown: frames of one drive are no independent samples.
    """
    every, lines = max(len(row["members"]) for row in rows), list[list[str]]()
    own = [r for r in rows if r["method"] == "hdrq" and len(r["members"]) == every]
    for row in own:
        for other in row["against"]:
            lines.append(
                [
                    row["bits"].upper(),
                    way_in_full(row["way"]),
                    f"`{other['method']}`",
                    f"{other['difference']:+.1f}",
                    f"{other['low']:+.1f} to {other['high']:+.1f}",
                    *([f"{other['p']:.2g}"] if tested else []),
                    str(other["calibrations"]),
                ]
            )
    if not lines:
        return []
    test = ["p"] if tested else []
    head = ["bits", "merge", "`hdrq` less", "points", "95% interval", *test, "seeds of the fewer"]
    return [
        "Merges of all domains from bundles of `hdrq` less those from bundles of the other "
        "methods, on the same images:",
        "",
        table(head, lines),
    ]


def _with_end(lines: Sequence[str]) -> list[str]:
    """The lines and, where there are any, an empty one behind them."""
    return [*lines, ""] if lines else []


_PROTOCOL_BITS = ("w8a8", "w8a4", "w6a6", "w4a8", "w4a4", "w3a3")


def _protocol_missing(rows: Sequence[Mapping[str, Any]], elsewhere: Collection[str] = ()) -> str:
    """Bits, ways and seeds that were not run; some bits are in another record."""
    there = {row["bits"] for row in rows}
    missing = [bits.upper() for bits in _PROTOCOL_BITS if bits not in {*there, *elsewhere}]
    chosen = [row for row in rows if row["way"] == "auto"]
    pairs = any(len(row["members"]) == 2 for row in chosen)
    if not pairs:
        missing.append(
            "merges of pairs at chosen weights" if chosen else "merges at chosen weights"
        )
    for bits in (bits for bits in _PROTOCOL_BITS if bits in there):
        seeds = learned_seeds(rows, bits)
        if not seeds:
            missing.append(f"{bits.upper()} by methods that learn")
        elif seeds < 3:
            missing.append(f"calibration seeds beyond {seeds} of {bits.upper()}")
    guided = {
        (row["bits"].upper(), len(row["members"])): row["figure"].get("calibrations", 1)
        for row in rows
        if row["way"] == "guided" and row["method"] in ("qdrop", "hdrq")
    }
    for (bits, members), count in guided.items():
        if count < 3:
            of = "pairs" if members == 2 else "all domains"
            missing.append(f"seeds beyond {count} of {bits} fitted to the float models ({of})")
    return f"Not run yet: {', '.join(missing)}." if missing else "The whole grid was run."


def _protocol_rates(record: Mapping[str, Any], on: str) -> str:
    """How learning rates were searched, from a ``tuning.json``; ``on`` which checkpoints."""
    searches, steps = [], list[float]()
    for search in record["searches"]:
        tried = ", ".join(f"{t['rate']:.3g} ({t['score']:.3f})" for t in search["tried"])
        searches.append(f"`{search['method']}` {tried}, chosen {search['chosen']:.3g}")
        scores = [trial["score"] for trial in search["tried"]]
        steps += [abs(a - b) for a, b in pairwise(scores)]
    protocol, bits = record["protocol"], record["searches"][0]["bits"].upper()
    edges = [search["method"] for search in record["searches"] if search["is_at_edge"]]
    return (
        f"Learning rates were searched in the same way for every method (`--tune w4a4`, on {on}): "
        f"{protocol['rates_at_first']} rates, each {protocol['factor']:.2f} times the next, more "
        f"of them while the best is the last one; at {bits}, by {protocol['criterion']} "
        f"({protocol['held_out']}). Rates and nats: {'; '.join(searches)}. Neighbouring rates are "
        f"{min(steps):.2f} to {max(steps):.2f} nats apart and do not rise and fall smoothly: a "
        "trial is one merge of one calibration seed."
        + (f" At the end of its search: {', '.join(edges)}." if edges else "")
    )


def _protocol_distances(tuning: Mapping[str, Any]) -> list[str]:
    """What other distances score at the rate that the search chose for ``hdrq``."""
    record = load("pacs_distance")
    if record is None:
        return []
    rest = [search for search in tuning["searches"] if search["method"] != "hdrq"]
    beside = ", ".join(
        f"`{s['method']}` at its best {min(t['score'] for t in s['tried']):.3f}" for s in rest
    )
    names = {"relative": "relative", "norm": "as published"}
    tried = ", ".join(
        f"{names[row['distance_form']]}, λ = {row['distance']:g}: {row['score']:.3f}"
        for row in record["rows"]
    )
    return [
        "",
        "That search ran with the distance that was our setting's then (relative, λ = 0.3). At the "
        f"rate that it chose, `hdrq` scores on the same held-out images {tried} ({beside}; "
        "`benchmarks/pacs_distance.py`); the rows below have the best of these"
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
            "pacs_wide",
            "[another training](#pacs-on-another-training-of-the-checkpoints)",
            protocol_rows,
        ),
        (
            "pacs_methods",
            "[a third one](#pacs-by-more-methods-all-merged-behind-batchnorm)",
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
    return [
        "",
        f"The checkpoints are one training of each domain. {which} by the same command on other "
        f"machines ({listed(places)}) gave "
        f"single float models whose harmonic means are within {max(single):.1f} points of these, "
        f"and merges of float models up to {max(merged):.1f} points away: more than lies between "
        "the methods. No interval below has this spread in it; what counts are differences on the "
        "same checkpoints.",
    ]


def _earlier_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the earlier version, whose float models of no setting were not folded."""
    return [row for row in protocol_rows(record) if row["way"] != "folded"]


def _command(
    protocol: str,
    rows: Sequence[Mapping[str, Any]],
    weights: str = " --weights lite0.pth",
    rates: str = " --rates benchmarks/results/pacs_tuning.json",
) -> str:
    """The command that makes ``rows``, all with the seeds that some of them have.

    ``protocol`` is its name with the data and the domains; ``rates`` are those of methods that
    learn.
    """
    methods, bits = (dict.fromkeys(row[key] for row in rows) for key in ("method", "bits"))
    seeds = max(row["merged"]["harmonic mean"].get("calibrations", 1) for row in rows)
    return (
        f"hdrq reproduce {protocol}{weights} --out OUT --methods {' '.join(methods)} "
        f"--bits {' '.join(bits)} --seeds {' '.join(map(str, range(seeds)))}"
        + (rates if any(METHODS[name].options.iterates for name in methods) else "")
    )


def _on_pacs(record: Mapping[str, Any]) -> str:
    """The command of the bits at which methods that learn were run on PACS."""
    bits = _learned_bits(record["rows"])
    return _command("pacs --data PACS --pairs", [r for r in record["rows"] if r["bits"] in bits])


def _learned_bits(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Bits of the methods that learn."""
    return {row["bits"] for row in rows if row["method"] in ("qdrop", "hdrq")}


def against_qdrop(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row's difference to QDrop's, where both were run."""
    return next((other for other in row["against"] if other["method"] == "qdrop"), None)


def difference_told(other: Mapping[str, Any]) -> str:
    """A difference in points and its interval."""
    return f"{other['difference']:+.1f} ({other['low']:+.1f} to {other['high']:+.1f})"


def pacs(record: Mapping[str, Any]) -> str:
    """The section on real images."""
    rows, tuning = protocol_rows(record), needed("pacs_tuning")
    options = next(r["options"] for r in record["rows"] if r["method"] == "hdrq")
    (distance,) = {r["options"]["distance"] for r in record["rows"] if r["method"] == "hdrq"}
    largest = max(record["rows"], key=lambda row: len(row["members"]))
    return "\n".join(
        [
            "## Real images: PACS",
            "",
            f"`{_on_pacs(record)}`: EfficientNet-Lite0 cut after "
            "its 112-channel stage, 96x96, trained on photos from ImageNet weights and then on "
            "every domain with labels. "
            "Our setting: one scale per channel with BatchNorm in it, a relative distance to the "
            f"source for `hdrq` (λ = {distance:g}), {options['iters']} iterations a block on "
            f"{options['images']} images a domain; re-estimated merges see 64 unlabelled images a "
            "domain, fitted ones 256. Harmonic means of top-1 accuracies in % on the "
            f"test images ({_tests(largest)}), of ONNX Runtime engines, with half of the 95% "
            "interval over test images and calibration seeds (of one seed without the spread of "
            "calibrations). The images are not part of this project.",
            "",
            _protocol_read(rows),
            *_trainings(rows),
            "",
            _protocol_rates(
                tuning, "checkpoints that the same command had trained before on another machine"
            ),
            *_protocol_distances(tuning),
            *_sweeps(),
            "",
            _protocol_table(rows),
            "",
            _protocol_missing(rows, _bits_of("pacs_wide")),
        ]
    )


def _bits_of(name: str) -> set[str]:
    """Bits of the methods that learn in a record, none where there is no record."""
    record = load(name)
    return _learned_bits(record["rows"]) if record else set()


def _only_rounded(rows: Sequence[Mapping[str, Any]]) -> str:
    """Methods and bits without a method that learns beside them."""
    told = []
    for bits in sorted({row["bits"] for row in rows if row["bits"]} - _learned_bits(rows)):
        methods = dict.fromkeys(f"`{row['method']}`" for row in rows if row["bits"] == bits)
        told.append(f" At {bits.upper()} {', '.join(methods)} alone was run here.")
    return "".join(told)


def pacs_wide(record: Mapping[str, Any]) -> str:
    """The section on bundles of checkpoints of another training."""
    rows = protocol_rows(record)
    ways = _quantized_ways(record)
    return "\n".join(
        [
            "## PACS on another training of the checkpoints",
            "",
            f"`{_on_pacs(record)} --ways {' '.join(ways)}`, as the table above but on "
            "checkpoints of another training by the same command, so that its rows stand beside "
            "its own float rows only. One calibration seed; rates are those that were searched at "
            f"W4A4.{_only_rounded(rows)}{_rounded_by_the_merge(rows)}",
            "",
            *_beside_floats(rows, ways),
        ]
    )


def pacs_methods(record: Mapping[str, Any]) -> str:
    """The section on checkpoints of a third training, with BRECQ and with fits."""
    rows, ways, tuning = protocol_rows(record), _quantized_ways(record), needed(_METHODS_RATES)
    own = [row for row in record["rows"] if row["bits"]]
    rates = f" --rates benchmarks/results/{_METHODS_RATES}.json"
    elsewhere = [s["method"] for s in needed("pacs_tuning")["searches"]]
    here = [s for s in tuning["searches"] if s["method"] not in elsewhere]
    return "\n".join(
        [
            "## PACS by more methods, all merged behind BatchNorm",
            "",
            f"`{_command('pacs --data PACS --pairs', own, rates=rates)} --ways {' '.join(ways)}`, "
            "as the first table but on checkpoints of a third training by the same command. One "
            f"calibration seed; a dash was not run. The rates of {_quoted(elsewhere)} are those of "
            f"the search above, that of {_quoted([s['method'] for s in here])} was searched here.",
            "",
            *_late_rounding(record),
            *_beside_floats(rows, ways),
            "",
            _protocol_rates({**tuning, "searches": here}, "these checkpoints"),
        ]
    )


def _late_rounding(record: Mapping[str, Any]) -> list[str]:
    """Merges that round 8-bit bundles to 4 bits less those of 4-bit bundles, all of them fitted."""
    found = needed("late_rounding")
    assert found["checkpoints_sha256"] == record["checkpoints_sha256"], "records of one training"
    groups = sorted({tuple(row["members"]) for row in found["rows"]}, key=lambda g: (len(g), g))
    cells: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for row in found["rows"]:
        points = {name: 100 * row[name] for name in ("value", "low", "high")}
        key = tuple(
            f"{row[when][name]}" for when in ("late", "early") for name in ("method", "bits")
        )
        cells.setdefault(key, {})[tuple(row["members"])] = difference_told(
            {**points, "difference": points["value"]}
        )
    lines = [
        [f"`{late}` {wide.upper()}", f"`{early}` {narrow.upper()}", *(own[g] for g in groups)]
        for (late, wide, early, narrow), own in cells.items()
    ]
    return [
        "The merge may round to 4 bits what was calibrated at 8, and the fit then makes up for "
        "most of it: less merges of bundles that were calibrated with 4-bit weights, fitted to "
        "the bundles on the same images, in points with 95% intervals over the test images "
        "(`benchmarks/late_rounding.py`):",
        "",
        table(["merged to 4 bits", "less", *(", ".join(group) for group in groups)], lines),
        "",
    ]


def _quoted(names: Sequence[str]) -> str:
    """``a`` and ``b``."""
    return listed([f"`{name}`" for name in names])


def pacs_resnet(record: Mapping[str, Any]) -> str:
    """The section on a network without depthwise kernels, whose checkpoints start at random."""
    rows, ways, tuning = protocol_rows(record), _quantized_ways(record), load("pacs_resnet_tuning")
    own = [row for row in record["rows"] if row["bits"]]
    command = _command(
        "pacs --data PACS --model resnet --pairs", own, weights="", rates=" --tune w4a4"
    )
    latent = any(row["method"] == "latent" for row in rows)
    return "\n".join(
        [
            "## PACS with a plain residual network",
            "",
            f"`{command} --ways {' '.join(ways)}`: {record['form']}, trained on photos and then on "
            "every domain with labels; all else as for the network above. One calibration seed."
            + (" `latent` is `hdrq` without noise and without distance." if latent else ""),
            "",
            *([_protocol_rates(tuning, "the same checkpoints"), ""] if tuning else []),
            _resnet_read(rows),
            "",
            *_beside_floats(rows, ways),
            "",
            _protocol_missing(rows),
        ]
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
        f"the float ones (harmonic mean {real:.1f}): this network, which has no depthwise kernels "
        "and never saw ImageNet, loses nothing of what the one above loses when it is rounded to "
        "nearest at 4 bits. Its merges lose more than there, in float already. A regression with "
        "BatchNorm folded into the weights solves for the same outputs as one with BatchNorm apart "
        "does; merged float models differ by "
        f"{within[0] - apart[0]:+.1f} points on pairs and {within[1] - apart[1]:+.1f} on all "
        "domains, where a regression [in front of BatchNorm]"
        "(#regression-in-front-of-batchnorm-and-behind-it) is far behind."
    )


def _quantized_ways(record: Mapping[str, Any]) -> list[str]:
    """In which ways bundles of quantized models were merged."""
    return list(dict.fromkeys(row["way"] for row in record["rows"] if row["bits"]))


def _beside_floats(rows: Sequence[Mapping[str, Any]], ways: Sequence[str]) -> list[str]:
    """Merges less the best one of float models, methods beside each other, and all figures."""
    best = best_float_merges(rows)
    alone = protocol_means(rows, "float", "", "single")
    fitted = protocol_means(rows, "float", "", "fitted")
    assert alone is not None
    own = [way for way in ways if way.startswith(("renewed", "fitted", "guided"))]
    merged = [(way, "best float merge", best) for way in own]
    return [
        f"The best merge of float models{' without a fit' if fitted else ''} reaches "
        f"{best[0]:.1f} on the mean of pairs and {best[1]:.1f} on all domains"
        + (f", and fitted {fitted[0]:.1f} and {fitted[1]:.1f}" if fitted else "")
        + f". Merges less {'the first' if fitted else 'it'}, and single models less the float "
        "ones, in points (mean of pairs, all domains):",
        "",
        _away_table(rows, [("single", "float models", alone), *merged]),
        "",
        *_with_end(_beside_section(rows)),
        _protocol_table(rows),
    ]


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


def parents(record: Mapping[str, Any]) -> str:
    """The section on what averages of quantized models lose, layer by layer."""
    rows = record["rows"]
    (real,) = (row for row in rows if row["method"] == "float")
    lines = []
    for row in rows:
        moved = f"{100 * statistics.fmean(row['moved']):.1f}" if row["moved"] else "-"
        between = [f"{statistics.fmean(row[name]):.2f}" for name in ("distance", "correlation")]
        errors = [_errors(row["single"])]
        for way in ("nearest", "regression"):
            errors += [_errors(_merge_errors(row, way, count)) for count in (2, 3)]
        lines.append([row["method"], row["bits"].upper() or "FP32", moved, *between, *errors])
    ways = ("averaged", "averaged, all", "regression", "regression, all")
    header = ["models", "bits", "moved codes, %", "distance", "correlation", "alone", *ways]
    return "\n".join(
        [
            "## What averaging breaks, layer by layer",
            "",
            "`benchmarks/parents.py`, on PACS, checkpoints of the section above, calibration seed "
            "0. *Moved codes* are not those nearest to the float weights. *Distance* is that of "
            "two models over that of their float models, *correlation* that of two models' errors: "
            "an average halves independent ones. The last columns are noise / shift, in % of the "
            "variance of a layer's outputs: the variance, and the square of the mean, of the "
            "difference to the domain's own float layer, on what that layer sees of its domain. "
            "Medians over layers; means over models, pairs, and domains.",
            "",
            table(header, lines),
            "",
            _parents_read(real, [row for row in rows if row["method"] != "float"]),
        ]
    )


def _merge_errors(row: Mapping[str, Any], way: str, count: int) -> dict[str, float]:
    """Noise and shift of a row's merges of ``count`` models, the mean over them."""
    own = [m for m in row["merges"] if m["way"] == way and len(m["members"]) == count]
    return {name: statistics.fmean(m[name] for m in own) for name in ("noise", "shift")}


def _errors(found: Mapping[str, float]) -> str:
    return f"{100 * found['noise']:.2f} / {100 * found['shift']:.2f}"


def _parents_read(real: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table says."""
    averaged = _merge_errors(real, "nearest", 2)
    told, both, further, closer = [], [], [], []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        own = {row["method"]: row for row in rows if row["bits"] == bits}
        times = []
        for method, row in own.items():
            plain, solved = (_merge_errors(row, way, 2) for way in ("nearest", "regression"))
            times.append(
                f"`{method}` noise {plain['noise'] / averaged['noise']:.1f}, "
                f"shift {plain['shift'] / averaged['shift']:.1f} "
                f"(by regression {solved['shift'] / averaged['shift']:.1f})"
            )
        told.append(f"{bits.upper()} {', '.join(times)}")
        if {"qdrop", "hdrq"} <= own.keys():
            names = ("moved", "correlation", "distance")
            pairs = [[statistics.fmean(own[m][n]) for m in ("hdrq", "qdrop")] for n in names]
            assert pairs[1][0] > pairs[1][1], "the last sentence says so"
            (moved, shared, apart) = (f"{a:.2f} and {b:.2f}" for a, b in pairs)
            both.append(f"{bits.upper()} {moved}, {shared}, {apart}")
            further += [bits.upper()] if pairs[0][0] > pairs[0][1] else []
            closer += [bits.upper()] if pairs[2][0] < pairs[2][1] else []
    return (
        f"Averaged pairs, as multiples of the float average's noise and shift: {'; '.join(told)}. "
        "What fewer bits add is above all a shift of the layers' mean outputs. A regression with "
        "corrected biases takes it back in part, and new BatchNorm moments for all domains "
        "together: merges that averages had broken are near those of float models then. "
        "HDRQ and QDrop, share of moved codes, correlation and distance: "
        f"{'; '.join(both)}. The errors of HDRQ's models are more alike than those of QDrop's at "
        f"all of these bits; more of their codes are moved at {listed(further)}, and they are "
        f"closer to each other at {listed(closer)}."
    )


def pacs_earlier(record: Mapping[str, Any]) -> str:
    """Rows at W4A4 of an earlier training of the checkpoints, and its float models."""
    rows = [row for row in _earlier_rows(record) if row["bits"] in ("", "w4a4")]
    return "\n".join(
        [
            "## PACS at W4A4",
            "",
            "`hdrq reproduce pacs --tune w4a4 ...`, as the table of [PACS](real-images.md) but on "
            "checkpoints of an earlier training, those of the search of rates, and with the "
            "distance that was our setting's then (relative, λ = 0.3). One calibration seed.",
            "",
            _protocol_table(rows),
        ]
    )


def camvid(record: Mapping[str, Any]) -> str:
    """The section on street scenes by day and at dusk: one pair of domains, each by itself."""
    own, names = _camvid_rows(record)
    learned = next((r["options"] for r in own if r["method"] in ("hdrq", "qdrop")), None)
    how = (
        f"`qdrop` and `hdrq` learn {learned['iters']} iterations of {learned['batch']} images a "
        "block, at the rates that were searched on PACS"
        if learned
        else "rounded to nearest; methods that learn were not run"
    )
    return "\n".join(
        [
            "## Real images: CamVid",
            "",
            f"`{_on_camvid(own, names)}`: {record['form']}, trained by "
            f"day from ImageNet weights and then at dusk with labels; {how}. Mean "
            "intersection over union in % on contiguous stretches of the drives that no training "
            f"saw ({_tests(own[0])}), of ONNX Runtime engines; harmonic means with half of the 95% "
            "interval as above. Neighbouring frames are alike, and all those of dusk are one "
            "stretch of one drive: the intervals are of these frames, not of other drives, and no "
            "test between methods is shown. The images are not part of this project.",
            "",
            *_camvid_figures(record, own, names),
        ]
    )


def camvid_weather(record: Mapping[str, Any]) -> str:
    """The section on the same streets by day, in fog and in snow: three domains, one merge."""
    own, names = _camvid_rows(record)
    return "\n".join(
        [
            "## CamVid in fog and snow",
            "",
            f"`{_on_camvid(own, names)}`: as above on checkpoints of another training, the weather "
            "made by `corrupt-tta` (ImageNet-C's fog and snow, severity 3) from frames by day, in "
            f"training and in test ({_tests(own[0])}).",
            "",
            *_camvid_figures(record, own, names),
        ]
    )


def camvid_eight_bits(record: Mapping[str, Any]) -> str:
    """The section on bundles of 8 bits by day and at dusk, whose merge has 4."""
    own, names = _camvid_rows(record)
    return "\n".join(
        [
            "## CamVid, 8-bit bundles merged to 4 bits",
            "",
            f"`{_on_camvid(own, names)} --ways {' '.join(_quantized_ways(record))}`: as "
            "[by day and at dusk](#real-images-camvid) on checkpoints of another training, all "
            "regression solved behind BatchNorm. One calibration seed. That the mean is the float "
            "merge to be fitted to here was seen on these test images, in the rows of the float "
            "models; a user needs a few labels to know it.",
            "",
            *_camvid_figures(record, own, names),
        ]
    )


def _camvid_rows(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of our setting with folded float models first; domains."""
    folded = [{**row, "way": _way_of(row)} for row in record["rows"] if row["setting"] == "float"]
    own = [*folded, *(row for row in record["rows"] if row["setting"] == "ours")]
    return own, own[0]["members"]


def _camvid_figures(
    record: Mapping[str, Any], own: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[str]:
    """What the rows of :func:`_camvid_rows` say, all of them, and what is missing."""
    lines = []
    for row in sorted(own, key=lambda r: ("", *_PROTOCOL_BITS).index(r["bits"])):
        kinds = {"single": row["single"]} if row["way"] == "nearest" else {}
        for way, figures in {**kinds, row["way"]: row["merged"]}.items():
            cells = [f"{figures[name]['mean']:.1f}" for name in names]
            cells.append(with_interval(figures["harmonic mean"]))
            head = [row["method"], row["bits"].upper() or "FP32", way_label(row["method"], way)]
            lines.append([*head, *cells])
    return [
        *_camvid_read(own, names),
        table(["parents", "bits", "merge", *names, "harmonic mean"], lines),
        "",
        _protocol_missing(protocol_rows(record)),
    ]


def _on_camvid(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The command of the rows."""
    return _command(
        f"camvid --data CamVid --targets {' '.join(names)}", [row for row in rows if row["bits"]]
    )


def streets_away(name: str) -> tuple[dict[tuple[str, str, str], list[float]], list[float]]:
    """Figures by method, bits and way less the best float merge, by domain; the fitted float one.

    A single model, way ``single``, is compared with the float model of its domain.
    """
    rows = [row for row in needed(name)["rows"] if row["setting"] == "ours"]
    floats = [r for r in rows if r["method"] == "float" and r["way"] not in ("fitted", "guided")]
    best = max(floats, key=lambda row: row["merged"]["harmonic mean"]["mean"])
    found = {}
    for row in rows:
        kinds = {"single": "single"} if row["way"] == "nearest" else {}
        for way, kind in {**kinds, row["way"]: "merged"}.items():
            found[row["method"], row["bits"], way] = [
                row[kind][name]["mean"] - best[kind][name]["mean"] for name in row["members"]
            ]
    (fit,) = (both for key, both in found.items() if (key[0], key[2]) == ("float", "fitted"))
    return found, fit


def _tests(row: Mapping[str, Any]) -> str:
    """How many test images of every domain a row has."""
    return ", ".join(f"{count} of {name}" for name, count in row["images"].items())


def _camvid_read(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Merges less the best float merge, and single models less their float models, by domain."""
    floats = [row for row in rows if row["method"] == "float"]
    plain = [row for row in floats if row["way"] not in ("fitted", "guided")]
    best = max(plain, key=lambda row: row["merged"]["harmonic mean"]["mean"])
    seen = {
        "renewed": " on 16 images a domain",
        "fitted": " on 32 images a domain (20 of dusk)",
        "guided": " on the same images",
    }
    ways = [way for way in _PROTOCOL_WAYS if way.startswith(("regression", *seen))]
    kinds = {"nearest": ("single", "single models, less the float ones")} | {
        way: ("merged", way_in_full(way) + seen.get(way, "")) for way in ways
    }
    best_of = listed([f"{best['merged'][name]['mean']:.1f}" for name in names])
    lines = []
    for bits in (bits for bits in ("", *_PROTOCOL_BITS) if any(r["bits"] == bits for r in rows)):
        for way, (kind, what) in kinds.items():
            own = {r["method"]: r[kind] for r in rows if (r["bits"], r["way"]) == (bits, way)}
            if not own or (not bits and way != "fitted"):
                continue
            cells = (
                ", ".join(f"{own[m][n]['mean'] - best[kind][n]['mean']:+.1f}" for n in names)
                if m in own
                else "-"
                for m in ("float", *_methods_of(rows))
            )
            shown = what if bits else what.replace(", compensated", "")
            lines.append([bits.upper() or "FP32", shown, *cells])
    return [
        f"The best merge of float models reaches {best_of} ({listed(names)}). Merges less "
        f"it, in points ({', '.join(names)}):",
        "",
        table(["bits", "merge", "float", *_methods_of(rows)], lines),
        "",
        *_with_end(_beside_section(rows, tested=False)),
    ]


def real_weights(record: Mapping[str, Any]) -> str:
    """EfficientNet-Lite0 with its ImageNet weights."""
    images, learned = record["images"], record["methods"].get("hdrq", {})
    order = [*dict.fromkeys(row["scheme"] for row in record["rows"])]
    methods = [
        "float",
        "rtn",
        "rtn-corrected",
        "hdrq",
        "quantize_static defaults",
        "quantize_static best",
    ]
    lines = []
    for row in sorted(
        record["rows"],
        key=lambda row: (
            order.index(row["scheme"]),
            methods.index(row["method"]) if row["method"] in methods else len(methods),
        ),
    ):
        clean = row["domains"]["clean"]
        low, high = clean["interval"]
        lines.append(
            [
                row["method"],
                row["scheme"],
                row["engine"],
                f"{clean['top1']:.1f} ({low:.1f} to {high:.1f})",
                *(f"{row['domains'][name]['top1']:.1f}" for name in ("fog", "snow")),
                *(f"{row['domains'][name]['changed']:.1f}" for name in ("clean", "fog", "snow")),
            ]
        )
    return "\n".join(
        [
            "## Real weights: EfficientNet-Lite0 on ImageNet",
            "",
            f"`benchmarks/real_weights.py`: calibrated on {images['calibration']} images, tested "
            f"on {images['test']} others, as they are and in fog and snow of ImageNet-C (severity "
            "3). The weights were trained on all of them, so that top-1 is higher than on new "
            "images; what counts is the difference to FP32. Changed decisions are those that the "
            "float model does not make, in %. Intervals are of the test images (95%, Wilson); "
            f"`hdrq` learns {learned.get('iters', 0)} iterations of {learned.get('batch', 0)} "
            "images a block, with the published distance, at the rate that the search on PACS "
            "chose; nothing was tuned here. With one scale per tensor at W8A8 rounding to nearest "
            "loses most; BatchNorm in the scales, or learning, avoids it. 4-bit weights with float "
            "activations have no row: engines take them for linear layers only, and this network "
            "has one.",
            "",
            table(
                [
                    "method",
                    "scheme",
                    "engine",
                    "top-1",
                    "fog",
                    "snow",
                    "changed",
                    "in fog",
                    "in snow",
                ],
                lines,
            ),
        ]
    )
