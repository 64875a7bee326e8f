"""How accurate merged bundles are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from evidence.protocol import protocol_means, protocol_rows
from evidence.records import GROUPS, NAMES, WIDTHS, listed, needed, not_run, table, with_spread

_SETTINGS_OF_DISTANCE = {
    "qdrop": "`qdrop`",
    "norm-0": "`hdrq`, no distance",
    "norm-0.005": "`hdrq`, λ = 0.005",
    "norm-0.01": "`hdrq`, λ = 0.01",
    "norm-0.05": "`hdrq`, λ = 0.05",
    "norm-0.1": "`hdrq`, λ = 0.1",
    "relative-0.1": "`hdrq`, relative distance, λ = 0.1",
    "relative-0.3": "`hdrq`, relative distance, λ = 0.3",
    "relative-1": "`hdrq`, relative distance, λ = 1",
    "noise-off": "`hdrq`, λ = 0.05, no noise",
    "noise-uniform": "`hdrq`, λ = 0.05, uniform noise",
    "per-image-max": "`hdrq`, λ = 0.05, first scales `per-image-max`",
}


def distance(record: Mapping[str, Any]) -> str:
    """The section on HDRQ's distance, its noise and its first activation scales."""
    rows = record["rows"]
    keys = [key for key in rows[0]["test"] if key != "single"]
    columns = ["setting", "single", *keys, "merged, calibration images"]
    lines = [
        "## Distance to the source, noise, and first activation scales",
        "",
        "`benchmarks/distance_ablation.py`: digits, ResNet-14, one scale per tensor, "
        f"{record['iterations_per_block']} iterations a block at the rates of the tables above; "
        "λ = 0.05 with empirical noise is the published method. Harmonic means of top-1 accuracies "
        "in %: of single models, and of merges to nearest and by regression with compensated "
        "rounding, the mean of pairs and the merge of all three"
        f"{_seeds_of_distance(rows)}. The last column is the mean of the four on calibration "
        f"images, by which settings may be chosen. {_calibrated_apart(rows)}",
        "",
        _distance_read(rows, keys),
        "",
        not_run(record["missing"]),
    ]
    for bits in ("w8a8", "w4a4", "w3a3"):
        found = []
        for setting, label in _SETTINGS_OF_DISTANCE.items():
            own = [r for r in rows if (r["setting"], r["bits"]) == (setting, bits)]
            if own:
                judged = [statistics.fmean(r["calibration"][key] for key in keys) for r in own]
                cells = [[r["test"][key] for r in own] for key in ("single", *keys)]
                found.append([label, *(with_spread(cell) for cell in (*cells, judged))])
        lines += ["", f"### {bits.upper()}", "", table(columns, found)]
    return "\n".join(lines)


def _seeds_of_distance(rows: Sequence[Mapping[str, Any]]) -> str:
    several = len({row["seed"] for row in rows}) > 1
    return "; mean and standard deviation over calibration seeds" if several else "; one seed"


def _calibrated_apart(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far figures of one method, rate and seed are from those of the tables above."""
    others, apart = needed("merge_statistics")["rows"], list[float]()
    for row in rows:
        method = {"qdrop": "qdrop", "norm-0.05": "hdrq"}.get(row["setting"])
        if method is not None:
            for way, name in (
                ("mean-nearest", "nearest"),
                ("regression-compensated", "compensated"),
            ):
                both = digits_by_seed(others, way, method, row["bits"])[row["seed"]]
                own = (row["test"][f"{name} {size}"] for size in ("pairs", "triple"))
                apart += [abs(a - b) for a, b in zip(own, both, strict=True)]
    return (
        "These bundles were calibrated apart from those of the tables above, by an earlier "
        "version: figures of the same method, rate and seed differ by "
        f"{statistics.fmean(apart):.1f} points on average and by up to {max(apart):.1f}."
    )


def _distance_read(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """What the rows say: the mean of the merged figures by setting."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        mean = statistics.fmean(row["test"][key] for key in keys)
        found.setdefault((row["bits"], row["setting"]), []).append(mean)
    means = {place: statistics.fmean(values) for place, values in found.items()}
    told = []
    for bits in ("w8a8", "w4a4", "w3a3"):
        published = [
            mean
            for (width, setting), mean in means.items()
            if width == bits and setting.startswith(("norm-", "noise-"))
        ]
        relative = ", ".join(
            f"{means[bits, setting]:.1f} at λ = {setting.rpartition('-')[2]}"
            for setting in _SETTINGS_OF_DISTANCE
            if setting.startswith("relative-") and (bits, setting) in means
        )
        told.append(
            f"{bits.upper()}: {min(published):.1f} to {max(published):.1f}, relative {relative}, "
            f"`qdrop` {means[bits, 'qdrop']:.1f}"
        )
    seeds = len({row["seed"] for row in rows})
    spreads = spread_of_four()
    effects = ", ".join(
        f"{bits.upper()} {means[bits, 'norm-0.05'] - means[bits, 'norm-0']:+.1f} (seeds alone: "
        f"{spreads[bits]:.2f})"
        for bits in ("w8a8", "w4a4", "w3a3")
    )
    return (
        "The mean of the four merged figures, over λ from 0 to 0.1 and all kinds of noise, and "
        f"with the relative distance: {'; '.join(told)} ({seeds} calibration seed"
        f"{'s' * (seeds > 1)}). The published distance (λ = 0.05) less none: {effects}; the "
        "standard deviation of the same figure over three calibration seeds in brackets. A strong "
        "relative distance costs accuracy at narrow widths."
    )


def spread_of_four() -> dict[str, float]:
    """Standard deviation over seeds of the mean of HDRQ's four merged figures on digits, by bits.

    The figures are those of the distance's section: pairs and triple, to nearest and by regression
    with compensated rounding.
    """
    rows = needed("merge_statistics")["rows"]
    found = {}
    for bits in ("w8a8", "w4a4", "w3a3"):
        nearest, solved = (
            digits_by_seed(rows, way, "hdrq", bits)
            for way in ("mean-nearest", "regression-compensated")
        )
        seeds = nearest.keys() & solved.keys()
        means = [statistics.fmean((*nearest[seed], *solved[seed])) for seed in seeds]
        found[bits] = statistics.stdev(means)
    return found


_WAYS = {
    "single": "a model per domain",
    "mean-nearest": "mean, nearest",
    "mean-advanced": "mean, advanced",
    "mean-compensated": "mean, compensated",
    "regression-nearest": "regression, nearest",
    "regression-compensated": "regression, compensated",
    "mean-nearest-renewed": "mean, nearest, re-estimated",
    "mean-compensated-renewed": "mean, compensated, re-estimated",
    "regression-compensated-renewed": "regression, compensated, re-estimated",
    "regression-compensated-max": "regression, compensated, largest activation scales",
    "regression-compensated-statistics": "regression, compensated, searched activation scales",
    "regression-compensated-fitted-parents": "regression, compensated, fitted in two sweeps",
    "regression-compensated-fitted-floats": (
        "regression, compensated, fitted to the float models in two sweeps"
    ),
}


def merge_statistics(record: Mapping[str, Any]) -> str:
    """The section on merges with the statistics of calibration."""
    rows = record["rows"]
    lines = [
        "## Merging with what calibration saw",
        "",
        f"`benchmarks/merge_statistics.py`: {record['iterations_per_block']} iterations a block, "
        "one scale per tensor, BatchNorm folded into the weights, equal merge weights, statistics "
        "of the default rank (no larger than the codes at 8 bits), no images at the merge but for "
        "re-estimated rows. "
        "Harmonic means in % on test images, mean and standard deviation over calibration seeds "
        f"(`advanced`: each the mean of {record['rounding_seeds']} rounding seeds). Rates of both "
        "methods on digits are the best of five, each about three times the next, by how little "
        "nearest merges at W4A4 differ from the float models on calibration images (`rates_tried` "
        "in `merge_statistics.json`). `W8 to W3` is `hdrq-merge --wbits 3` of parents at 8 bits. "
        "Spreads stand where there is more than one calibration seed. Three models at equal "
        "weights have no ties, so that `advanced` and `nearest` merge all three domains alike. "
        f"{_solved_in_front()}",
        "",
        _merges_read(rows),
        "",
        not_run(record["missing"])
        + " Three calibration seeds have the grid's four widths by `hdrq` and `qdrop`; BatchNorm "
        "in the scales, 3 and 4-bit activations beside 8-bit weights, and what learns nothing have "
        "one.",
    ]
    for task, title in (("digits", "Digits, ResNet-14"), ("streets", "Drawn streets, StreetNet")):
        own = [row for row in rows if row["task"] == task]
        if own and task == "streets":
            tried = [row for row in record["rates_tried"] if row["task"] == task]
            lines += ["", f"### {title}", "", _streets_read(own, tried), "", _merges_table(own)]
        elif own:
            usual = [row for row in own if not _iterations(row)]
            longer = _longer(own, record["iterations_per_block"])
            lines += ["", f"### {title}", "", *longer, _merges_table(usual)]
    return "\n".join(lines)


def _solved_in_front() -> str:
    """Which rows an earlier regression merged, and what this one makes of float models."""
    both = protocol_means(protocol_rows(needed("digits")), "float", "", "regression")
    assert both is not None
    return (
        "Regression with BatchNorm apart or in the scales (`fold steps`) was solved in front of "
        "BatchNorm here, as versions before this one did; with this one float models with "
        f"BatchNorm apart reach {both[0]:.1f} and {both[1]:.1f} by it (`digits.json`)."
    )


def _longer(rows: Sequence[Mapping[str, Any]], usual: int) -> Iterator[str]:
    """Parents that learned longer, beside those of the same seed with the ``usual`` iterations."""
    long = [row for row in rows if _iterations(row)]
    if not long:
        return
    ((bits, seed),) = {(row["bits"], row["seed"]) for row in long}
    own = [row for row in rows if (row["bits"], row["seed"]) == (bits, seed)]
    counts = sorted({_iterations(row) for row in long}, key=_number)
    suffixes = {f"{usual}": "", **{count: f" ({count} iterations)" for count in counts}}
    groups = {
        count: {tuple(r["members"]) for r in long if _iterations(r) == count} for count in counts
    }
    whole = [f"{usual}", *(count for count in counts if groups[count] == set(GROUPS))]
    lines = list[list[str]]()
    for count in whole:
        lines += _longer_lines(own, count, suffixes[count], GROUPS)
    for part in dict.fromkeys(tuple(sorted(groups[c])) for c in counts if c not in whole):
        for count in suffixes:
            lines += _longer_lines(own, count, suffixes[count], part)
    ways = (_WAYS[way] for way in _LONGER_WAYS)
    yield (
        f"At {bits.upper()} bundles of one calibration seed also learned longer, at the searched "
        "rates, smaller in proportion to the iterations. That seed's figures, of all domains "
        "the mean of pairs / the merge of all three:"
    )
    yield ""
    yield table(["parents", "iterations a block", "domains", *ways], lines)
    yield ""


_LONGER_WAYS = ("single", "mean-nearest", "mean-advanced", "regression-compensated")


def _longer_lines(
    rows: Sequence[Mapping[str, Any]],
    count: str,
    suffix: str,
    groups: Sequence[tuple[str, ...]],
) -> Iterator[list[str]]:
    """Lines of both methods and of their difference: means over groups of as many domains."""
    figures = {}
    for method in ("qdrop", "hdrq"):
        figures[method] = [
            _means_by_size(_digits_rows(rows, way, method + suffix), groups) for way in _LONGER_WAYS
        ]
    domains = "all" if groups == GROUPS else "; ".join(", ".join(group) for group in groups)
    for method, found in figures.items():
        cells = (" / ".join(f"{value:.1f}" for value in values) for values in found)
        yield [f"`{method}`", count, domains, *cells]
    less = (
        " / ".join(f"{a - b:+.1f}" for a, b in zip(*both, strict=True))
        for both in zip(figures["hdrq"], figures["qdrop"], strict=True)
    )
    yield ["`hdrq` less `qdrop`, points", count, domains, *less]


def iterations_said() -> str:
    """How many iterations a block the figures of all pages are of."""
    record = needed("merge_statistics")
    said = f"figures are of {record['iterations_per_block']} iterations a block"
    longer = longer_iterations()
    return said + (f", but for comparisons on digits of {listed(longer)}" if longer else "")


def longer_iterations() -> list[str]:
    """Iterations a block of parents of the digits that learned longer: ``2,000``, ``20,000``."""
    rows = needed("merge_statistics")["rows"]
    return sorted({_iterations(row) for row in rows} - {""}, key=_number)


def _number(count: str) -> int:
    return int(count.replace(",", ""))


def _iterations(row: Mapping[str, Any]) -> str:
    """How many iterations a row's parents learned where that is not the record's number, or ``""``.

    Their label says so: ``hdrq (2,000 iterations)``.
    """
    name = str(row["parents"])
    return name.split("(")[1].split()[0] if name.endswith(" iterations)") else ""


def streets_by_seed(
    rows: Sequence[Mapping[str, Any]],
    way: str,
    method: str,
    bits: str = "w4a4",
    fold: str = "weights",
    members: int = 3,
) -> dict[int, float]:
    """The merge of all domains of the streets, or the mean of its pairs, for every seed.

    A seed counts where all groups of so many ``members`` were merged.
    """
    own = [row for row in rows if row["task"] == "streets" and len(row["members"]) == members]
    groups = {tuple(row["members"]) for row in own}
    wanted = (method, "" if method.startswith("float") else bits, fold, way)
    found: dict[int, list[float]] = {}
    for row in own:
        if (row["parents"], row["bits"], row["fold"], row["way"]) == wanted:
            found.setdefault(row["seed"], []).append(statistics.fmean(row["harmonic_means"]))
    return {s: statistics.fmean(f) for s, f in sorted(found.items()) if len(f) == len(groups)}


def less_seed_by_seed(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Differences of two methods' figures, over the seeds that both have."""
    return [first[seed] - second[seed] for seed in first if seed in second]


def digits_less(
    first: Mapping[int, tuple[float, float]], second: Mapping[int, tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Differences of pairs and of triples of :func:`digits_by_seed`, over the seeds of both."""
    pairs, triples = (
        less_seed_by_seed(
            *({seed: both[place] for seed, both in of.items()} for of in (first, second))
        )
        for place in range(2)
    )
    return pairs, triples


def digits_hdrq_less_qdrop(
    rows: Sequence[Mapping[str, Any]], way: str, bits: str
) -> tuple[list[float], list[float]]:
    """HDRQ's figures on the digits less QDrop's, seed by seed: mean of pairs, and triple."""
    return digits_less(*(digits_by_seed(rows, way, m, bits) for m in ("hdrq", "qdrop")))


def streets_hdrq_less_qdrop(
    rows: Sequence[Mapping[str, Any]], way: str, bits: str, members: int = 3
) -> list[float]:
    """HDRQ's figure of the streets less QDrop's, over the seeds that both have."""
    return less_seed_by_seed(
        *(streets_by_seed(rows, way, m, bits, members=members) for m in ("hdrq", "qdrop"))
    )


def _streets_read(rows: Sequence[Mapping[str, Any]], tried: Sequence[Mapping[str, Any]]) -> str:
    """What the streets' rows say of all domains, and how the rates were found."""
    merged = "regression-compensated"
    scaled, fitted = f"{merged}-statistics", f"{merged}-fitted-floats"

    def told(parents: str, way: str, fold: str = "weights") -> str:
        found = list(streets_by_seed(rows, way, parents, fold=fold).values())
        return with_spread(found) if found else "not run"

    def each(way: str) -> str:
        """The figures of all methods that were merged in this way."""
        methods = ("hdrq", "qdrop", "rtn", "rtn-corrected")
        return ", ".join(
            f"`{name}` {told(name, way)}" for name in methods if streets_by_seed(rows, way, name)
        )

    def less_qdrop(way: str) -> str:
        """HDRQ's figure less QDrop's, seed by seed."""
        return with_spread(streets_hdrq_less_qdrop(rows, way, "w4a4"), "+")

    domains: Sequence[str] = max((row["members"] for row in rows), key=len)
    searched = "; ".join(_rates_of(method, tried) for method in ("qdrop", "hdrq") if tried)
    return (
        f"Mean intersection over union, harmonic mean over {', '.join(domains)}, with the standard "
        "deviation over calibration seeds; methods that learn nothing have one. Float models "
        "merged by regression reach "
        f"{told('float-folded', 'regression-nearest')} with BatchNorm in the weights, as in the "
        "bundles. Merges by regression with "
        "compensated rounding at W4A4, BatchNorm in the weights, from bundles alone: "
        f"{each(merged)}; with searched activation scales {each(scaled)}. HDRQ's with BatchNorm in "
        "the scales, by the earlier regression: "
        f"{told('hdrq', merged, fold='steps')}, re-estimated on 16 images a domain "
        f"{told('hdrq', f'{merged}-renewed', fold='steps')}. With BatchNorm in the weights and "
        "every layer fitted on 32 images a domain to the float models, in two sweeps: "
        f"{each(fitted)}. "
        f"HDRQ's less QDrop's, seed by seed: {less_qdrop(merged)}, with searched activation scales "
        f"{less_qdrop(scaled)}, fitted {less_qdrop(fitted)}."
        + "\n\nBy regression with compensated rounding, from bundles alone, at all widths:\n\n"
        + _streets_by_bits(rows, merged)
        + (
            "\n\nRates were searched by the protocol of `hdrq reproduce --tune` on calibration "
            f"images, at W4A4. Rates and nats: {searched}."
            if searched
            else ""
        )
    )


def _streets_by_bits(rows: Sequence[Mapping[str, Any]], way: str) -> str:
    """Bits down and methods across, of all domains and of the mean of their pairs."""
    methods = ("hdrq", "qdrop", "rtn", "rtn-corrected")
    widths = [(bits, "") for bits in WIDTHS]
    widths[1:1] = [("w8a8", "-w4"), ("w8a8", "-w3")]
    lines = []
    for members, name in ((3, "all three"), (2, "mean of pairs")):
        for bits, narrowed in widths:
            found = [
                streets_by_seed(rows, way + narrowed, m, bits, members=members) for m in methods
            ]
            less = streets_hdrq_less_qdrop(rows, way + narrowed, bits, members)
            shown = bits.upper() + narrowed.replace("-w", ", rounded to W")
            figures = [with_spread(list(seeds.values())) for seeds in found]
            lines.append([shown, name, *figures, with_spread(less, "+")])
    heads = [f"`{method}`" for method in methods]
    return table(["bits", "merged", *heads, "HDRQ less QDrop, seed by seed"], lines)


def _rates_of(method: str, tried: Sequence[Mapping[str, Any]]) -> str:
    """The rates of one method that a search tried, what each scored, and the one it chose."""
    own = sorted((row for row in tried if row["method"] == method), key=lambda row: row["rate"])
    told = ", ".join(f"{row['rate']:.3g} ({row['score']:.3f})" for row in own)
    chosen = next(row for row in own if row["chosen"])
    edge = ", the last that was tried" if chosen["is_at_edge"] else ""
    return f"`{method}` {told}, chosen {chosen['rate']:.3g}{edge}"


def digits_by_seed(
    rows: Sequence[Mapping[str, Any]], way: str, method: str, bits: str
) -> dict[int, tuple[float, float]]:
    """Mean of the pairs and the triple of the digits, by calibration seed."""
    own = [row for row in _digits_rows(rows, way, method) if row["bits"] == bits]
    found = {}
    for seed in sorted({row["seed"] for row in own}):
        pairs, triple = _means_by_size([row for row in own if row["seed"] == seed], GROUPS)
        found[seed] = (pairs, triple)
    return found


def digits_means(
    rows: Sequence[Mapping[str, Any]], way: str, method: str, bits: str
) -> tuple[float, float] | None:
    """The means over seeds of :func:`digits_by_seed`; None without any."""
    found = digits_by_seed(rows, way, method, bits).values()
    if not found:
        return None
    pairs, triples = (statistics.fmean(both) for both in zip(*found, strict=True))
    return pairs, triples


def one_run_of_digits(
    rows: Sequence[Mapping[str, Any]], way: str, method: str
) -> tuple[float, float]:
    """Mean of the pairs and the triple of the digits of float models, which have no seeds.

    Raises:
        ValueError: There is another number of runs than one.
    """
    (both,) = digits_by_seed(rows, way, method, "").values()
    return both


def _digits_rows(
    rows: Sequence[Mapping[str, Any]], way: str, method: str
) -> list[Mapping[str, Any]]:
    """Rows of the digits of one method and one way, BatchNorm in the weights."""
    wanted = ("digits", method, "weights", way)
    return [r for r in rows if (r["task"], r["parents"], r["fold"], r["way"]) == wanted]


def _means_by_size(
    rows: Sequence[Mapping[str, Any]], groups: Sequence[tuple[str, ...]]
) -> list[float]:
    """The mean over the merges of as many domains, for every size among ``groups``."""
    return [
        statistics.fmean(
            statistics.fmean(row["harmonic_means"])
            for row in rows
            if tuple(row["members"]) in groups and len(row["members"]) == size
        )
        for size in sorted({len(group) for group in groups})
    ]


def _merges_read(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the digits' rows say: gains over the float average, and HDRQ beside QDrop."""
    best = "regression-compensated"

    def seeds(way: str, method: str, bits: str) -> dict[int, tuple[float, float]]:
        return digits_by_seed(rows, way, method, bits)

    def gains(
        first: Mapping[int, tuple[float, float]], second: Mapping[int, tuple[float, float]]
    ) -> str:
        """Differences on pairs and triple, over the seeds of both."""
        return " and ".join(with_spread(column, "+") for column in digits_less(first, second))

    # Float models have no seeds: one run stands beside every seed of the bundles.
    every = range(max(row["seed"] for row in rows) + 1)
    average = dict.fromkeys(every, one_run_of_digits(rows, "mean-folded", "float"))
    exact = dict.fromkeys(every, one_run_of_digits(rows, "regression-nearest", "float-folded"))
    full = seeds(best, "hdrq (full statistics)", "w4a8")
    whole = f", {gains(full, average)} with whole covariances (`--statistics full`)" if full else ""

    def less(other: Callable[[str], Mapping[int, tuple[float, float]]], w4a8: str = "") -> str:
        """HDRQ's merges less others, at every width."""
        return "; ".join(
            f"{bits.upper()} {gains(seeds(best, 'hdrq', bits), other(bits))}"
            + (w4a8 if bits == "w4a8" else "")
            for bits in WIDTHS
        )

    return (
        "Differences in points on the digits, mean of pairs and merge of all three domains, with "
        "the standard deviation over calibration seeds. HDRQ's bundles merged by regression with "
        f"compensated rounding, less the folded float average: {less(lambda _: average, whole)}. "
        "Less float models merged by the same regression, with the same rank and BatchNorm folded: "
        f"{less(lambda _: exact)}. Less the published merge (mean, `advanced`): "
        f"{less(lambda bits: seeds('mean-advanced', 'hdrq', bits))}. Less QDrop's bundles merged "
        f"in the same way: {less(lambda bits: seeds(best, 'qdrop', bits))}."
    )


def _merges_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Methods, bits and ways down, pairs and triple across."""
    groups = list(dict.fromkeys(tuple(row["members"]) for row in rows))
    groups.sort(key=len)
    cells: dict[tuple[str, str, str], dict[tuple[str, ...], dict[int, float]]] = {}
    for row in rows:
        parents = row["parents"] + (" (fold steps)" if row["fold"] == "steps" else "")
        bits = row["bits"].upper() or "float"
        way = row["way"]
        if way == "mean-folded":
            way, parents = "mean of folded weights", "float"
        elif parents.startswith("float-folded"):
            way, parents = "regression of folded weights", parents.replace("-folded", "")
        for narrow in ("3", "4"):
            if way.endswith(f"-w{narrow}"):
                way, bits = way.removesuffix(f"-w{narrow}"), f"{bits}, W8 to W{narrow}"
        cell = cells.setdefault((parents, bits, way), {})
        # Rounding seeds of one calibration are no calibrations: their mean is one figure.
        mean = statistics.fmean(row["harmonic_means"])
        cell.setdefault(tuple(row["members"]), {})[row["seed"]] = mean
    lines = []
    for (parents, bits, way), values in sorted(cells.items(), key=_order):
        figures = [list(values.get(group, {}).values()) for group in groups]
        text = [with_spread(figure) for figure in figures]
        if len(groups) > 1:
            pairs = [statistics.fmean(f) for f in figures[:-1] if f]
            text.insert(-1, f"{statistics.fmean(pairs):.1f}" if pairs else "")
        lines.append([parents, bits, _WAYS.get(way, way.replace("-", ", ")), *text])
    heads = ["+".join(NAMES.get(name, name) for name in group) for group in groups]
    if len(groups) > 1:
        heads.insert(-1, "mean of pairs")
    return table(["parents", "bits", "merge", *heads], lines)


def _order(item: tuple[tuple[str, str, str], Any]) -> tuple[Any, ...]:
    """Float first, then by bits, parents and way."""
    parents, bits, way = item[0]
    ways = list(_WAYS)
    return (
        bits != "float",
        bits,
        parents,
        ways.index(way) if way in ways else -1,
    )


_RULE = "last half, mean"


def statistics_weights(record: Mapping[str, Any]) -> str:
    """The section on merge weights that statistics choose."""
    rows, cost = record["rows"], record["cost"]
    lines = []
    for row in rows:
        chosen = row["rules"][_RULE]
        cells = [f"{row['equal']:.1f}"]
        for found in (chosen, row["images"], row["best"]):
            mix = " ".join(f"{share:.2g}" for share in found["weights"])
            cells.append(f"{found['reached']:.1f} ({mix})")
        lines.append([row["case"], ", ".join(row["members"]), *cells])
    digits = [row for row in rows if row["case"].startswith("digits")]
    tried = []
    for name in rows[0]["rules"]:
        own = [row["rules"][name] for row in digits]
        judged = statistics.fmean(found["gain_on_calibration_images"] for found in own)
        reached = [row["rules"][name]["reached"] - row["equal"] for row in digits]
        agrees = statistics.fmean(found["rank_correlation"] for found in own)
        tried.append(
            f"{name} {judged:+.1f}, {statistics.fmean(reached):+.1f} ({min(reached):+.1f} to "
            f"{max(reached):+.1f}), {agrees:.2f}"
        )
    later = [row for row in rows if row not in digits]
    elsewhere = "; ".join(
        f"{name} {statistics.fmean(reached):+.1f} ({min(reached):+.1f} to {max(reached):+.1f})"
        for name in rows[0]["rules"]
        if (reached := [row["rules"][name]["reached"] - row["equal"] for row in later])
    )
    best = [
        max(
            rows[0]["rules"],
            key=lambda name: statistics.fmean(
                row["rules"][name]["reached"] - row["equal"] for row in some
            ),
        )
        for some in (digits, later)
    ]
    gains = {
        kind: statistics.fmean(
            (row["rules"][_RULE] if kind == "statistics" else row["images"])["reached"]
            - row["equal"]
            for row in digits
        )
        for kind in ("statistics", "images")
    }
    return "\n".join(
        [
            "## Merge weights without images",
            "",
            "`benchmarks/weights_from_statistics.py`: merges by regression with compensated "
            "rounding at every mix of the grid of `--weights auto`, measured on test images "
            "(harmonic means in %). A rule makes one number for every mix from the errors that the "
            "statistics predict for the layers' outputs, and takes the mix of the lowest. Rules on "
            "the digits, by their mean gain over equal merge weights on calibration images, on "
            "test images (and its range), in points, and by the mean rank correlation of rule and "
            f"test accuracy over the mixes: {'; '.join(tried)}. The rule `{_RULE}` is "
            "`hdrq-merge --weights statistics`; it was chosen on these calibration images. On test "
            f"images of the digits it brings {gains['statistics']:+.1f} points on average, images "
            f"(`--weights auto`, 256 a domain) {gains['images']:+.1f}. "
            f"On PACS, measured after the choice, the rules bring on test images: {elsewhere}. "
            f"The best rule there is `{best[1]}`, on the digits `{best[0]}`. One calibration seed. "
            f"For a pair of ResNet-50's size the choice takes {cost['cpu_seconds']:.0f} s of CPU "
            f"({cost['mixes']} mixes, {cost['layers']} layers).",
            "",
            table(
                ["bundles", "domains", "equal", "statistics", "images", "best of the grid"], lines
            ),
        ]
    )


# Figures of a row of ``landscape.json`` by domain, or by pair of domains.
_COMPARED: dict[str, Callable[[Mapping[str, Any]], dict[Any, float]]] = {
    "largest eigenvalue": lambda row: {
        d: c["top_eigenvalue"] for d, c in row["own_curvature"].items()
    },
    "largest eigenvalue over all domains": lambda row: {
        d: c["top_eigenvalue"] for d, c in row["curvature"].items()
    },
    "trace": lambda row: {d: c["trace"] for d, c in row["own_curvature"].items()},
    "trace over all domains": lambda row: {d: c["trace"] for d, c in row["curvature"].items()},
    "barrier before rounding": lambda row: _barriers(row, "float"),
    "barrier of rounded merges": lambda row: _barriers(row, "quantized"),
}


def _barriers(row: Mapping[str, Any], kind: str) -> dict[Any, float]:
    return {tuple(part["between"]): part["barrier"][kind] for part in row["barriers"]}


def comparisons(record: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, int]]]:
    """In how many of how many comparisons HDRQ's figure is the lower one, by bits and figure."""
    rows = {(row["bits"], row["method"], row["seed"]): row for row in record["rows"]}
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for bits in dict.fromkeys(row["bits"] for row in record["rows"]):
        seeds = sorted({seed for its, method, seed in rows if (its, method) == (bits, "hdrq")})
        for name, of in _COMPARED.items():
            both = [(of(rows[bits, "hdrq", seed]), of(rows[bits, "qdrop", seed])) for seed in seeds]
            lower = [ours[at] < theirs[at] for ours, theirs in both for at in ours]
            found.setdefault(bits, {})[name] = (sum(lower), len(lower))
    return found


CURVATURES = (
    "trace",
    "trace over all domains",
    "largest eigenvalue",
    "largest eigenvalue over all domains",
)
BARRIERS = ("barrier before rounding", "barrier of rounded merges")
PLANES = "Barriers, roundings and planes of QDrop's and HDRQ's models"


def lower_of(
    record: Mapping[str, Any], names: Sequence[str], bits: Sequence[str] = ()
) -> tuple[int, int]:
    """In how many of how many :func:`comparisons` of some figures HDRQ's is the lower one.

    Without ``bits`` those of all widths count.
    """
    found = comparisons(record)
    own = [found[width][name] for width in bits or found for name in names]
    return sum(lower for lower, _ in own), sum(every for _, every in own)


def _lower(record: Mapping[str, Any]) -> str:
    """The comparisons in words."""
    return "; ".join(
        f"{bits.upper()}, {', '.join(f'{name} {a} of {b}' for name, (a, b) in counts.items())}"
        for bits, counts in comparisons(record).items()
    )


def landscape(record: Mapping[str, Any]) -> str:
    """The section on curvature and barriers of models of the digits."""
    searched = needed("merge_statistics")
    assert searched["iterations_per_block"] == 200, "the sentence says so"
    rates = [f"`{name}` at {rate:g}" for name, rate in searched["rates"]["digits"].items()]
    return "\n".join(
        [
            "## Is the ground flatter?",
            "",
            f"`benchmarks/landscape.py digits`: {_measured(record, 'the digits')} "
            "The models are those of [merges by statistics](#merging-with-what-calibration-saw) "
            f"({listed(rates)}, searched there; 200 iterations a block).",
            "",
            _ground(record),
            "",
            "Over all domains and seeds the figures of the two methods overlap, because domains "
            f"differ more than methods do. {_compared(record)}",
            "",
            "The picture shows rounded merges on the left, their mean and the range over pairs and "
            "seeds (pairs in the order hw and photo, hw and night, photo and night); then the "
            "merges of one pair over rounding seeds, a point each, of calibration seed 0; and on "
            "the right the plane of the three parents of calibration seed 0.",
            "",
            f"![{PLANES}](landscape.svg)",
        ]
    )


def landscape_pacs(record: Mapping[str, Any]) -> str:
    """The section on curvature and barriers of models of PACS."""
    return "\n".join(
        [
            "## Is the ground flatter on PACS?",
            "",
            f"`benchmarks/landscape.py pacs`: {_measured(record, 'PACS')} The models are those of "
            "[PACS in our setting](pacs.md#pacs-in-our-setting); merges are "
            "averages, as everywhere in this section.",
            "",
            _ground(record),
            "",
            _compared(record),
            "",
            "The picture is as above (pairs in the order art painting and cartoon, art painting "
            "and sketch, cartoon and sketch).",
            "",
            f"![{PLANES}, PACS](landscape_pacs.svg)",
        ]
    )


def _measured(record: Mapping[str, Any], what: str) -> str:
    """What was measured, on how much of what."""
    seeds = len({row["seed"] for row in record["rows"]})
    count = f"{seeds} calibration seed{'s' * (seeds > 1)}"
    return (
        f"Hessian of the loss at every parent, on its own domain and on all three of {what}, and "
        f"barriers between every two ({record['images_per_domain']} test images a domain, {count}; "
        "mean and standard deviation over models or pairs and seeds). The last columns are "
        f"harmonic means of a pair's merges over {record['spread']['seeds']} rounding seeds, of "
        "calibration seed 0."
    )


def _ground(record: Mapping[str, Any]) -> str:
    """The table of curvatures and barriers."""
    lines = []
    for bits in dict.fromkeys(row["bits"] for row in record["rows"]):
        for method in dict.fromkeys(row["method"] for row in record["rows"]):
            own = [r for r in record["rows"] if (r["bits"], r["method"]) == (bits, method)]
            curvature = {
                kind: [c for row in own for c in row[kind].values()]
                for kind in ("own_curvature", "curvature")
            }
            barriers = [b["barrier"] for row in own for b in row["barriers"]]
            rounding = next(row["rounding"] for row in own if "rounding" in row)
            lines.append(
                [
                    bits.upper(),
                    method,
                    *(
                        with_spread([c[figure] for c in curvature[kind]])
                        for kind in curvature
                        for figure in ("top_eigenvalue", "trace")
                    ),
                    *(
                        f"{statistics.fmean(b[kind] for b in barriers):.3f} ± "
                        f"{statistics.stdev(b[kind] for b in barriers):.3f}"
                        for kind in ("float", "quantized")
                    ),
                    *(
                        f"{100 * rounding[way]['mean']:.1f} ± "
                        f"{100 * rounding[way]['standard_deviation']:.2f}"
                        for way in ("noise", "advanced")
                    ),
                ]
            )
    header = ["bits", "parents", "largest eigenvalue", "trace", "largest, all domains"]
    header += ["trace, all domains", "barrier, not rounded, nats", "barrier, rounded, nats"]
    spread = record["spread"]
    header += [f"{'+'.join(spread['pair'])}, `{way}`, %" for way in ("noise", "advanced")]
    return table(header, lines)


def _compared(record: Mapping[str, Any]) -> str:
    """How the methods compare in the figures of :func:`_ground`."""
    return (
        "Compared domain by domain (or pair by pair) and seed by seed, which are not independent, "
        f"HDRQ's figure is the lower one in: {_lower(record)}. Losses are means over all three "
        "domains, so a merge can lie below both of its parents."
    )
