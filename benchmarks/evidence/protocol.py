"""What sections on the protocols of real images share: rows, differences, tables."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from evidence.records import listed, needed, table
from hdrq_deploy.calibration.methods import METHODS

__all__ = [
    "BITS",
    "METHOD_ORDER",
    "PACS_TRAININGS",
    "RATES",
    "WAY_LABELS",
    "as_published",
    "away_table",
    "beside_floats",
    "beside_qdrop",
    "beside_section",
    "best_float_merges",
    "by_singles",
    "difference_told",
    "groups_of",
    "hdrq_less_qdrop",
    "learned_bits",
    "learned_options",
    "learned_seeds",
    "led",
    "methods_of",
    "moved_scales",
    "paper_rates",
    "paper_read",
    "protocol_means",
    "protocol_missing",
    "protocol_rates",
    "protocol_rows",
    "protocol_table",
    "quantized_ways",
    "reproduce_command",
    "tests_told",
    "unadapted",
    "way_in_full",
    "way_label",
    "way_of",
    "with_end",
    "with_interval",
]

WAY_LABELS = {
    "single": "a model per domain",
    "folded": "mean, BatchNorm folded",
    "regression-folded": "regression, BatchNorm folded",
    "nearest": "mean, nearest",
    "advanced": "mean, advanced",
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
METHOD_ORDER = ("rtn", "rtn-corrected", "brecq", "qdrop", "latent", "latent-noise", "hdrq")
# Methods of the grid; `rtn-corrected` and `latent` stand beside them where they were run.
_ASKED = ("rtn", "brecq", "qdrop", "hdrq")
# Bits at which three calibration seeds are wanted; elsewhere one.
_SEVERAL = ("w4a8", "w4a4", "w3a3")
# Where the rates of methods that learn are read in our setting.
RATES = " --rates benchmarks/results/pacs_tuning.json"
BITS = ("w8a8", "w8a4", "w6a6", "w4a8", "w4a4", "w3a3")
# Records of PACS in our setting as it is, one a training of the checkpoints.
PACS_TRAININGS = ("pacs", "pacs_first", "pacs_wide")


def protocol_rows(record: Mapping[str, Any], setting: str = "ours") -> list[dict[str, Any]]:
    """Rows of one setting in a ``results.json``, float models among them.

    The float models of the paper's setting are those of no setting, folded.

    A row has ``method``, ``bits``, ``way``, ``members`` and ``figure``: the summary of the harmonic
    mean, as :func:`hdrq_deploy.experiments.table.rows` gives it.
    """
    found = []
    for row in record["rows"]:
        if row["setting"] not in (setting, "float"):
            continue
        keys = {name: row[name] for name in ("method", "bits", "members")}
        keys["bits"] = "" if row["method"] == "float" else row["bits"]
        found.append(
            {
                **keys,
                "way": way_of(row),
                "figure": row["merged"]["harmonic mean"],
                "against": row["against"],
            }
        )
        if row["way"] == "nearest" and (row["setting"] != "float" or setting == "paper"):
            single = {"figure": row["single"]["harmonic mean"], "against": []}
            found.append({**keys, "way": "single", **single})
    return found


def way_of(row: Mapping[str, Any]) -> str:
    """The way of a row, as ``WAY_LABELS`` calls it; of no setting are folded float models."""
    if row["setting"] != "float":
        return str(row["way"])
    return "folded" if row["way"] == "nearest" else f"{row['way']}-folded"


def protocol_means(
    rows: Sequence[Mapping[str, Any]], method: str, bits: str, way: str
) -> tuple[float, float] | None:
    """The mean over pairs and the figure of all domains of one kind of rows.

    None where they do not have every pair, and all domains, that some of ``rows`` have.
    """
    groups = groups_of(row["members"] for row in rows)
    found = {
        tuple(row["members"]): row["figure"]["mean"]
        for row in rows
        if (row["method"], row["bits"], row["way"]) == (method, bits, way)
    }
    pairs = [found.get(group) for group in groups if len(group) == 2]
    whole = found.get(groups[-1])
    if not pairs or None in pairs or whole is None or len(groups[-1]) < 3:
        return None
    return statistics.fmean(pair for pair in pairs if pair is not None), whole


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


def learned_bits(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Bits of the methods that learn."""
    return {row["bits"] for row in rows if row["method"] in ("qdrop", "hdrq")}


def learned_options(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Options of ``hdrq`` in rows of a ``results.json``."""
    options: Mapping[str, Any] = next(row["options"] for row in rows if row["method"] == "hdrq")
    return options


def quantized_ways(record: Mapping[str, Any]) -> list[str]:
    """In which ways bundles of quantized models were merged."""
    return list(dict.fromkeys(row["way"] for row in record["rows"] if row["bits"]))


def way_label(method: str, way: str) -> str:
    """A way to merge in the words of the tables; float models are not rounded."""
    label = WAY_LABELS[way]
    return (
        label.replace(", compensated", "").replace(", nearest", "") if method == "float" else label
    )


def way_in_full(way: str) -> str:
    """A way to merge in words that need no row above them."""
    whole, _, narrowed = way.partition("-w")
    return f"{WAY_LABELS[whole]}, 8 bits to {narrowed}" if narrowed else WAY_LABELS[way]


def with_interval(figure: Mapping[str, float]) -> str:
    """A mean and half of its interval, where it has one."""
    half = (figure["high"] - figure["low"]) / 2 if "low" in figure else None
    return f"{figure['mean']:.1f}" + ("" if half is None else f" ± {half:.1f}")


def best_float_merges(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The best merges of float models that are not fitted: mean of pairs, and all domains."""
    ways = [way for way in WAY_LABELS if way not in ("single", "fitted", "guided")]
    merged = [m for way in ways if (m := protocol_means(rows, "float", "", way))]
    return max(m[0] for m in merged), max(m[1] for m in merged)


def hdrq_less_qdrop(
    name: str, setting: str = "ours"
) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """HDRQ's rows of a record, with their differences to QDrop's, where both were run."""
    for row in protocol_rows(needed(name), setting):
        for other in row["against"]:
            if (row["method"], other["method"]) == ("hdrq", "qdrop"):
                yield row, other


def groups_of(members: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Groups of domains, each once, the smallest first."""
    return sorted(set(map(tuple, members)), key=lambda group: (len(group), group))


def led(differences: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """How many intervals of differences lie above zero, and how many below it."""
    limits = [(other["low"], other["high"]) for other in differences]
    return sum(low > 0 for low, _ in limits), sum(high < 0 for _, high in limits)


def unadapted(task: str, *adapted: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the source model of a task reaches, from which the models of these records started."""
    record = needed(f"{task}_source")
    sources = {some["checkpoints_sha256"]["source"] for some in (record, *adapted)}
    assert len(sources) == 1, "one source"
    (row,) = record["rows"]
    return dict(row)


def difference_told(other: Mapping[str, Any]) -> str:
    """A difference in points and its interval."""
    return f"{other['difference']:+.1f} ({other['low']:+.1f} to {other['high']:+.1f})"


def beside_qdrop(records: Mapping[str, str], together: bool = False, setting: str = "ours") -> str:
    """HDRQ's merges less QDrop's, a line for every width and way of merging.

    Args:
        records: Names of records by what the table says of them.
        together: Show merges of all domains alone, with a column a record; else a record has lines
            of its own, and the table a column for every group of domains.
        setting: Rows of this setting.

    Returns:
        A table; bold where the interval of several calibration seeds leaves out zero. Differences
        of several seeds say how many they are.
    """
    found: dict[tuple[str, str, str], dict[tuple[str, ...], Mapping[str, Any]]] = {}
    for about, name in records.items():
        for row, other in hdrq_less_qdrop(name, setting):
            cell = found.setdefault((about, row["bits"], row["way"]), {})
            cell[tuple(row["members"])] = other
    if together:
        whole = {
            about: groups_of(row["members"] for row in protocol_rows(needed(name), setting))[-1]
            for about, name in records.items()
        }
        last = {key: cell[whole[key[0]]] for key, cell in found.items() if whole[key[0]] in cell}
        bits = sorted({key[1] for key in found}, key=BITS.index)
        lines = [
            [b.upper(), way_in_full(way), *(_bold(last.get((a, b, way)), True) for a in records)]
            for b in bits
            for way in WAY_LABELS
            if any((about, b, way) in last for about in records)
        ]
        return table(["bits", "merge", *records], lines)
    groups = groups_of(group for cell in found.values() for group in cell)
    lines = [
        [
            about,
            bits.upper(),
            way_in_full(way),
            " or ".join(sorted({str(other["calibrations"]) for other in cell.values()})),
            *(_bold(cell.get(group)) for group in groups),
        ]
        for (about, bits, way), cell in found.items()
    ]
    header = [", ".join(group).replace("art_painting", "art") for group in groups]
    return table(["training", "bits", "merge", "seeds", *header[:-1], "all domains"], lines)


def _bold(other: Mapping[str, Any] | None, seeds: bool = False) -> str:
    """A difference, bold where the interval of several seeds leaves out zero.

    With ``seeds`` it says how many they are.
    """
    if other is None:
        return "-"
    several = other["calibrations"] > 1
    text = difference_told(other) + f", {other['calibrations']} seeds" * (seeds and several)
    bold = several and not other["low"] <= 0 <= other["high"]
    return f"**{text}**" if bold else text


def methods_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods that quantize, in the order of the tables."""
    there = {row["method"] for row in rows}
    return [method for method in METHOD_ORDER if method in there]


def protocol_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Methods, bits and ways down, every pair, their mean, and all domains across."""
    groups = groups_of(row["members"] for row in rows)
    order = list(WAY_LABELS)
    bits = sorted({row["bits"] for row in rows}, key=("", *BITS).index)
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


def away_table(
    rows: Sequence[Mapping[str, Any]], kinds: Sequence[tuple[str, str, tuple[float, float]]]
) -> str:
    """Bits and ways down, methods across: figures of pairs and of all domains less two others.

    ``kinds`` are ways, what is taken off in words, and its two figures.
    """
    lines, methods = [], methods_of(rows)
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


def beside_section(rows: Sequence[Mapping[str, Any]], tested: bool = True) -> list[str]:
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
                    *([_tested(other)] if tested else []),
                    str(other["calibrations"]),
                ]
            )
    if not lines:
        return []
    test = ["p"] if tested else []
    head = [
        "bits",
        "merge",
        "`hdrq` less",
        "points",
        "95% interval",
        *test,
        "seeds, the smaller count",
    ]
    return [
        "Merges of all domains from bundles of `hdrq` less those from bundles of the other "
        "methods, on the same images:",
        "",
        table(head, lines),
    ]


def _tested(other: Mapping[str, Any]) -> str:
    """The p of a difference; of one seed it would say nothing of calibrations."""
    return f"{other['p']:.2g}" if other["calibrations"] > 1 else "-"


def with_end(lines: Sequence[str]) -> list[str]:
    """The lines and, where there are any, an empty one behind them."""
    return [*lines, ""] if lines else []


def beside_floats(rows: Sequence[Mapping[str, Any]], ways: Sequence[str]) -> list[str]:
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
        away_table(rows, [("single", "float models", alone), *merged]),
        "",
        *with_end(beside_section(rows)),
        protocol_table(rows),
    ]


def as_published(options: Mapping[str, Any]) -> str:
    """What the paper's setting is, with the ``options`` of ``hdrq`` in it."""
    return (
        "as published: one scale per tensor, BatchNorm folded into the weights, the paper's "
        f"quantizers and blocks, λ = {options['distance']:g} of its own form, averages alone; but "
        f"{options['iters']} iterations a block"
    )


def paper_rates(task: str) -> str:
    """Flags of the paper's setting, at the rates that were searched in it on a task."""
    return f" --rates benchmarks/results/{task}_paper_tuning.json --settings paper"


def paper_read(rows: Sequence[Mapping[str, Any]], chance: float) -> str:
    """What the published setting costs, alone and averaged; ``chance`` is the accuracy of a guess.

    Args:
        rows: Of that setting, as :func:`protocol_rows` gives them.
        chance: In %.
    """
    real, merged = (protocol_means(rows, "float", "", way) for way in ("single", "folded"))
    assert real is not None and merged is not None
    told = []
    for bits in BITS:
        for method in methods_of([row for row in rows if row["bits"] == bits]):
            alone, averaged = (protocol_means(rows, method, bits, w) for w in ("single", "nearest"))
            if alone and averaged:
                told.append(
                    f"{bits.upper()} `{method}` {alone[1] - real[1]:+.1f}, "
                    f"{averaged[0]:.1f} and {averaged[1]:.1f}"
                )
    return (
        f"Float models reach {real[1]:.1f} each and {merged[0]:.1f} and {merged[1]:.1f} averaged "
        f"(mean of pairs, all domains; a guess {chance:.1f}). Single models less the float ones, "
        f"in points, and averages to nearest: {'; '.join(told)}."
    )


def by_singles(bits: str = "w4a8") -> dict[str, tuple[float, float, float]]:
    """Methods in the paper's setting on PACS, at the rates that are best for single models.

    Returns:
        Single models and averages to nearest of all domains, in %, and the learning rate.
    """
    record = needed("pacs_paper_singles")
    assert record["checkpoints_sha256"] == needed("pacs_paper")["checkpoints_sha256"]
    rows = protocol_rows(record, "paper")
    rates = {s["method"]: s["chosen"] for s in needed("pacs_paper_singles_tuning")["searches"]}
    found = {}
    for method, rate in rates.items():
        alone, averaged = (protocol_means(rows, method, bits, w) for w in ("single", "nearest"))
        assert alone is not None and averaged is not None
        found[method] = (alone[1], averaged[1], rate)
    return found


def moved_scales(task: str) -> str:
    """How far HDRQ's learning moved the scales of weights in the paper's setting, rate by rate."""
    found = needed("learned_scales")
    trained = needed(f"{task}_paper")["checkpoints_sha256"]
    assert found["checkpoints_sha256"][task] == trained, "one training"
    rows = [row for row in found["rows"] if row["task"] == task]
    layers = listed([f"`{name}`" for name in sorted({row["layer"] for row in rows})])
    others = [row["median_times_rtn"] for row in rows]
    low, high = (f"{end(others):.1f}" for end in (min, max))
    rates = sorted({row["rate"] for row in rows})
    told = []
    for rate in rates:
        times = [row["times_rtn"] for row in rows if row["rate"] == rate]
        assert min(times) > 1 > max(others), "the sentence says so"
        of_rate = f" at the rate {rate:g}" if len(rates) > 1 else ""
        told.append(f"{min(times):.0f} to {max(times):.0f} times{of_rate}")
    return (
        f"Over domains and bits, HDRQ's largest scale beside rounding to nearest, that of {layers},"
        f" ends at {listed(told)}; the median of a bundle's layers is at "
        f"{low if low == high else f'{low} to {high}'} times (`benchmarks/learned_scales.py`). "
        "Published rates are absolute; our setting bounds every update relative to the scale."
    )


def protocol_missing(
    rows: Sequence[Mapping[str, Any]], elsewhere: Collection[str] = (), paper: bool = False
) -> str:
    """Bits, methods, ways and seeds that were not run.

    Args:
        rows: Of one setting, as :func:`protocol_rows` gives them.
        elsewhere: Bits that are in another record.
        paper: The rows are of the paper's setting, which has no chosen weights.
    """
    there = {row["bits"] for row in rows}
    missing = [bits.upper() for bits in BITS if bits not in {*there, *elsewhere}]
    if not paper:
        chosen = [row for row in rows if row["way"] == "auto"]
        if not any(len(row["members"]) == 2 for row in chosen):
            missing.append(f"merges {'of pairs ' if chosen else ''}at chosen weights")
    for bits in (bits for bits in BITS if bits in there):
        own = {row["method"] for row in rows if row["bits"] == bits}
        learned = {"brecq", "qdrop", "hdrq"}
        if not own & learned:
            missing.append(f"{bits.upper()} by methods that learn")
        else:
            named = [f"`{method}`" for method in _ASKED if method not in own]
            missing += [f"{bits.upper()} by {listed(named)}"] if named else []
        seeds = learned_seeds(rows, bits)
        if 0 < seeds < 3 and bits in _SEVERAL:
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


def protocol_rates(record: Mapping[str, Any], on: str) -> str:
    """How learning rates were searched, from a ``tuning.json``; ``on`` which checkpoints."""
    searches, steps, smooth = [], list[float](), True
    for search in record["searches"]:
        tried = ", ".join(f"{t['rate']:.3g} ({_score_told(t)})" for t in search["tried"])
        searches.append(f"`{search['method']}` {tried}, chosen {search['chosen']:.3g}")
        scores = [trial["score"] for trial in search["tried"] if trial["score"] is not None]
        steps += [abs(a - b) for a, b in pairwise(scores)]
        smooth &= _has_one_valley(scores)
    protocol, bits = record["protocol"], record["searches"][0]["bits"]
    edges = [search["method"] for search in record["searches"] if search["is_at_edge"]]
    return (
        "Learning rates were searched in the same way for every method "
        f"(`--tune {bits}`, on {on}): "
        f"{protocol['rates_at_first']} rates, each {protocol['factor']:.2f} times the one before; "
        "while the best is the lowest or the highest, one more beyond it; "
        f"at {bits.upper()}, by {protocol['criterion']} ({protocol['held_out']}). Rates and "
        f"nats: {'; '.join(searches)}. Neighbouring rates are {min(steps):.2f} to "
        f"{max(steps):.2f} nats apart{'' if smooth else ' and do not rise and fall smoothly'}: a "
        "trial is one merge of one calibration seed."
        + (f" At the end of its search: {', '.join(edges)}." if edges else "")
    )


def _has_one_valley(scores: Sequence[float]) -> bool:
    """Whether scores fall up to the lowest one, and rise from there."""
    lowest = min(range(len(scores)), key=scores.__getitem__)
    before, behind = scores[: lowest + 1], scores[lowest:]
    return before == sorted(before, reverse=True) and behind == sorted(behind)


def _score_told(trial: Mapping[str, Any]) -> str:
    return "failed" if trial["score"] is None else f"{trial['score']:.3f}"


def reproduce_command(
    protocol: str,
    rows: Sequence[Mapping[str, Any]],
    weights: str = " --weights lite0.pth",
    rates: str = RATES,
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


def tests_told(row: Mapping[str, Any]) -> str:
    """How many test images of every domain a row has."""
    return ", ".join(f"{count} of {name}" for name, count in row["images"].items())
