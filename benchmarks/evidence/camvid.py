"""Street scenes by day, at dusk, in fog and in snow: CamVid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evidence.protocol import (
    BITS,
    RATES,
    WAY_LABELS,
    as_published,
    beside_section,
    learned_options,
    methods_of,
    moved_scales,
    paper_rates,
    protocol_missing,
    protocol_rates,
    protocol_rows,
    quantized_ways,
    reproduce_command,
    tests_told,
    unadapted,
    way_in_full,
    way_label,
    way_of,
    with_end,
    with_interval,
)
from evidence.records import listed, needed, table

# Records by what their rates were chosen by: of the paper's setting, and of ours.
_AVERAGES, _SINGLES, _ELSEWHERE = (
    "averages on CamVid",
    "single models on CamVid",
    "averages on PACS, at W4A4",
)
_PAPER = {
    _AVERAGES: "camvid_paper",
    _SINGLES: "camvid_paper_singles",
    _ELSEWHERE: "camvid_paper_pacs_rates",
}
_OURS = {_AVERAGES: "camvid_searched", _ELSEWHERE: "camvid_searched_pacs_rates"}
_SEARCHED = " --rates benchmarks/results/camvid_tuning.json"

__all__ = [
    "camvid",
    "camvid_paper",
    "camvid_searched",
    "camvid_second",
    "camvid_unlabelled",
    "camvid_weather",
    "streets_as_published",
    "streets_away",
    "streets_by_singles",
]


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
            "## CamVid by day and at dusk",
            "",
            f"`{_on_camvid(own, names)}`: {record['form']}, trained by "
            f"day from ImageNet weights and then at dusk with labels; {how}. Mean "
            "intersection over union in % on contiguous stretches of the drives that no training "
            f"saw ({tests_told(own[0])}), of ONNX Runtime engines; harmonic means with half of "
            "the 95% interval. Neighbouring frames are alike, and all those of dusk are "
            "one stretch of one drive: the intervals, those of differences too, are of these "
            "frames, not of other drives, and no p is shown. The images are not part of this "
            "project.",
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
            f"`{_on_camvid(own, names)}`: as [by day and at dusk](#camvid-by-day-and-at-dusk), on "
            "checkpoints of a third training, the weather made by `corrupt-tta` (ImageNet-C's fog "
            "and snow, severity 3) from frames by day, in training and in test "
            f"({tests_told(own[0])}).",
            "",
            *_camvid_figures(record, own, names),
        ]
    )


def camvid_second(record: Mapping[str, Any]) -> str:
    """The section on checkpoints of another training by day and at dusk."""
    own, names = _camvid_rows(record)
    return "\n".join(
        [
            "## CamVid on a second training of the checkpoints",
            "",
            f"`{_on_camvid(own, names)} --ways {' '.join(quantized_ways(record))}`: as "
            "[by day and at dusk](#camvid-by-day-and-at-dusk) on checkpoints of another "
            "training, so that its rows stand beside its own float rows only; all regression "
            "solved behind BatchNorm. One calibration seed. The mean was chosen as a target of "
            "fits after the float models' rows on these test images were seen; a user needs a few "
            "labels to choose it.",
            "",
            *_camvid_figures(record, own, names),
        ]
    )


def camvid_searched(record: Mapping[str, Any]) -> str:
    """The section on rates that were searched on CamVid in our setting."""
    own, names = _camvid_rows(record)
    tuning = needed("camvid_tuning")
    return "\n".join(
        [
            "## CamVid at rates searched on it",
            "",
            f"`{_on_camvid(own, names, _SEARCHED)} --ways {' '.join(quantized_ways(record))}`: as "
            "[the second training](#camvid-on-a-second-training-of-the-checkpoints), on "
            "checkpoints of a fourth one, at rates that were searched on them. One calibration "
            "seed. The mean of the float models as an aim of fits was chosen on the second, before "
            "this one.",
            "",
            f"{protocol_rates(tuning, 'these checkpoints')} {_few_held_out(tuning)}",
            "",
            *_searched_compared(),
            "",
            *_camvid_figures(record, own, names),
        ]
    )


def camvid_unlabelled(record: Mapping[str, Any]) -> str:
    """The section on a model that was adapted to dusk without labels."""
    own, names = _camvid_rows(record)
    command = _on_camvid(own, names, adapted=f" --adaptation {record['adaptation']}")
    return "\n".join(
        [
            "## CamVid adapted without labels",
            "",
            f"`{command} --ways {' '.join(quantized_ways(record))}`: as [at rates searched on it]"
            "(#camvid-at-rates-searched-on-it), from the same source checkpoint, but `hdrq adapt` "
            f"sees the images of dusk without labels. {_labels_missed(record, own)}",
            "",
            *_camvid_figures(record, own, names),
        ]
    )


def _labels_missed(record: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> str:
    """What the source reaches at dusk, beside models that were adapted without and with labels."""
    labelled = needed("camvid_searched")
    before = unadapted("camvid", record, labelled)
    without, with_labels = (
        next(row["single"]["dusk"]["mean"] for row in rows if row["method"] == "float")
        for rows in (own, _camvid_rows(labelled)[0])
    )
    return (
        f"At dusk the source reaches {before['domains']['dusk']:.1f} mIoU "
        f"(`benchmarks/source_models.py`), the model that was adapted to it {without:.1f}, with "
        f"labels {with_labels:.1f}."
    )


def camvid_paper(record: Mapping[str, Any]) -> str:
    """The section on the paper's own setting, on the checkpoints of the second training."""
    assert record["checkpoints_sha256"] == needed("camvid_second")["checkpoints_sha256"]
    own, names = _camvid_rows(record, "paper")
    options = learned_options([row for row in own if row["bits"]])
    return "\n".join(
        [
            "## CamVid in the paper's setting",
            "",
            f"`{_on_camvid(own, names, paper_rates('camvid'))}`: the checkpoints of "
            "[the second training]"
            f"(#camvid-on-a-second-training-of-the-checkpoints), {as_published(options)}. One "
            "calibration seed. Single models, and averages to nearest, in "
            f"mIoU (harmonic mean of {listed(names)}): {_alone_and_averaged(own)}.",
            "",
            *with_end(beside_section(own, tested=False)),
            _camvid_table(own, names, ("nearest", "folded")),
            "",
            *_rates_compared(),
            "",
            protocol_missing(protocol_rows(record, "paper"), paper=True),
        ]
    )


def _rates_compared() -> list[str]:
    """How the rates were searched, and what both methods reach at those of other searches."""
    tuning, found = needed("camvid_paper_tuning"), _published_by_rates()
    methods = [search["method"] for search in tuning["searches"]]
    lines = [
        [about, *(part for method in methods for part in _at_a_rate(*by_method[method]))]
        for about, by_method in found.items()
    ]
    head = [f"`{m}`: {what}" for m in methods for what in ("rate", "alone", "averaged")]
    return [
        f"{protocol_rates(tuning, 'these checkpoints')} {_few_held_out(tuning)}",
        "",
        "W4A8 in mIoU (harmonic mean), at rates of this search, of the same trials judged by their "
        "single models (`benchmarks/rates_by_singles.py`), and of the search on PACS:",
        "",
        table(["rates chosen by", *head], lines),
        "",
        f"{_rates_read(found)} {moved_scales('camvid')}",
    ]


def _few_held_out(tuning: Mapping[str, Any]) -> str:
    """How many images judge the trials of a search."""
    held = [f"{n['held_out']} of {name}" for name, n in tuning["searches"][0]["images"].items()]
    return f"So few images judge: {listed(held)}."


def _searched_compared() -> list[str]:
    """What both methods reach in our setting at rates of this search and of that on PACS."""
    found, lines = _by_rates(_OURS, "ours", "w4a4"), []
    ways = [way for way in WAY_LABELS if any(way in of["hdrq"][1] for of in found.values())]
    for about, of in found.items():
        for method, (rate, means) in of.items():
            cells = [f"{means[way]:.1f}" if way in means else "-" for way in ways]
            lines.append([about, f"`{method}`", f"{rate:g}", *cells])
    return [
        f"Rates of PACS lose little in our setting: {_carried_over()}. W4A4 in mIoU (harmonic "
        "mean) at both:",
        "",
        table(["rates chosen by", "parents", "rate", *map(way_in_full, ways)], lines),
    ]


def _rates_read(found: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> str:
    """HDRQ's figures less QDrop's, by what the rates were chosen by."""
    less = {
        about: tuple(ours - theirs for ours, theirs in zip(of["hdrq"], of["qdrop"], strict=True))
        for about, of in found.items()
    }
    (alone, averaged, _), (singly, too, _) = less[_AVERAGES], less[_SINGLES]
    elsewhere = less[_ELSEWHERE][0]
    assert min(alone, averaged, singly, too) > 0 > elsewhere, "the sentences say so"
    return (
        f"At rates chosen on CamVid HDRQ's single models lead QDrop's by {alone:.1f} and "
        f"{singly:.1f} mIoU and its averages by {averaged:.1f} and {too:.1f}, all far below float. "
        f"At the rates of PACS they fall {-elsewhere:.1f} behind: in this setting a rate does not "
        "carry over from one network to another. In our setting [little changes]"
        f"(#camvid-at-rates-searched-on-it): {_carried_over()}."
    )


def _carried_over() -> str:
    """What a search on CamVid changes of the rates of PACS in our setting."""
    found = _by_rates(_OURS, "ours", "w4a4")
    same, told = [], []
    for method, (rate, means) in found[_AVERAGES].items():
        before, others = found[_ELSEWHERE][method]
        if rate == before:
            same.append(f"`{method}`")
            continue
        alone, *merged = (means[way] - others[way] for way in WAY_LABELS if way in means)
        assert max(map(abs, (alone, *merged))) < 2, "the pages say that little changes"
        told.append(
            f"for `{method}` {rate:g} in place of {before:g}, which moves its single models by "
            f"{alone:+.1f} mIoU and its merges by {min(merged):+.1f} to {max(merged):+.1f}"
        )
    return f"a search on CamVid chooses the same rate for {listed(same)}, and {listed(told)} (W4A4)"


def _at_a_rate(alone: float, averaged: float, rate: float) -> list[str]:
    return [f"{rate:g}", f"{alone:.1f}", f"{averaged:.1f}"]


def _alone_and_averaged(rows: Sequence[Mapping[str, Any]]) -> str:
    """The harmonic means of single models and of averages, by bits and method."""
    told = []
    for bits in ("", *BITS):
        for row in rows:
            if row["bits"] == bits and row["way"] in ("nearest", "folded"):
                name = f"{bits.upper()} `{row['method']}`" if bits else "float models"
                alone, merged = (
                    row[kind]["harmonic mean"]["mean"] for kind in ("single", "merged")
                )
                told.append(f"{name} {alone:.1f} and {merged:.1f}")
    return "; ".join(told)


def _camvid_rows(
    record: Mapping[str, Any], setting: str = "ours"
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a setting with folded float models first; domains."""
    folded = [{**row, "way": way_of(row)} for row in record["rows"] if row["setting"] == "float"]
    own = [*folded, *(row for row in record["rows"] if row["setting"] == setting)]
    return own, own[0]["members"]


def _camvid_figures(
    record: Mapping[str, Any], own: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[str]:
    """What the rows of :func:`_camvid_rows` say, all of them, and what is missing."""
    return [
        *_camvid_read(own, names),
        _camvid_table(own, names),
        "",
        protocol_missing(protocol_rows(record)),
    ]


def _camvid_table(
    own: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    with_single: Sequence[str] = ("nearest",),
) -> str:
    """The rows of a setting; those of the ways ``with_single`` tell single models, too."""
    lines = []
    for row in sorted(own, key=lambda r: ("", *BITS).index(r["bits"])):
        kinds = {"single": row["single"]} if row["way"] in with_single else {}
        for way, figures in {**kinds, row["way"]: row["merged"]}.items():
            cells = [f"{figures[name]['mean']:.1f}" for name in names]
            cells.append(with_interval(figures["harmonic mean"]))
            head = [row["method"], row["bits"].upper() or "FP32", way_label(row["method"], way)]
            lines.append([*head, *cells])
    return table(["parents", "bits", "merge", *names, "harmonic mean"], lines)


def _on_camvid(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], rates: str = RATES, adapted: str = ""
) -> str:
    """The command of the rows; ``rates`` are those of methods that learn."""
    quantized = [row for row in rows if row["bits"]]
    return reproduce_command(
        f"camvid --data CamVid --targets {' '.join(names)}{adapted}", quantized, rates=rates
    )


def _best_float_merge(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the best merge of float models that is not fitted."""
    plain = [r for r in rows if r["method"] == "float" and r["way"] not in ("fitted", "guided")]
    return max(plain, key=lambda row: float(row["merged"]["harmonic mean"]["mean"]))


def _camvid_read(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Merges less the best float merge, and single models less their float models, by domain."""
    best = _best_float_merge(rows)
    seen = {
        "renewed": " on 16 images a domain",
        "fitted": " on 32 images a domain (20 of dusk)",
        "guided": " on the same images",
    }
    ways = [way for way in WAY_LABELS if way.startswith(("regression", *seen))]
    kinds = {"nearest": ("single", "single models, less the float ones")} | {
        way: ("merged", way_in_full(way) + seen.get(way, "")) for way in ways
    }
    best_of = listed([f"{best['merged'][name]['mean']:.1f}" for name in names])
    lines = []
    for bits in (bits for bits in ("", *BITS) if any(r["bits"] == bits for r in rows)):
        for way, (kind, what) in kinds.items():
            own = {r["method"]: r[kind] for r in rows if (r["bits"], r["way"]) == (bits, way)}
            if not own or (not bits and way != "fitted"):
                continue
            cells = (
                ", ".join(f"{own[m][n]['mean'] - best[kind][n]['mean']:+.1f}" for n in names)
                if m in own
                else "-"
                for m in ("float", *methods_of(rows))
            )
            shown = what if bits else what.replace(", compensated", "")
            lines.append([bits.upper() or "FP32", shown, *cells])
    return [
        f"The best merge of float models reaches {best_of} ({listed(names)}). Merges less "
        f"it, in points ({', '.join(names)}):",
        "",
        table(["bits", "merge", "float", *methods_of(rows)], lines),
        "",
        *with_end(beside_section(rows, tested=False)),
    ]


def streets_as_published() -> dict[str, tuple[float, float, float]]:
    """QDrop and HDRQ at the rates that are best for averages of CamVid."""
    return _published_by_rates()[_AVERAGES]


def streets_by_singles() -> dict[str, tuple[float, float, float]]:
    """QDrop and HDRQ at rates that are best for single models of CamVid."""
    return _published_by_rates()[_SINGLES]


def _published_by_rates() -> dict[str, dict[str, tuple[float, float, float]]]:
    """QDrop and HDRQ at W4A8 in the paper's setting, by what their rates were chosen by.

    Returns:
        By choice and method: single models and averages to nearest, in mIoU, and the rate.
    """
    return {
        about: {
            method: (means["single"], means["nearest"], rate)
            for method, (rate, means) in of.items()
        }
        for about, of in _by_rates(_PAPER, "paper", "w4a8").items()
    }


def _by_rates(
    records: Mapping[str, str], setting: str, bits: str
) -> dict[str, dict[str, tuple[float, dict[str, float]]]]:
    """Methods that learn on one training, by what their rates were chosen by.

    Args:
        records: Names of records by what their rates were chosen by.
        setting: Of these rows.
        bits: Of these rows.

    Returns:
        By choice and method: the rate, and harmonic means in mIoU by way (``single``, alone).
    """
    found, trained = {}, needed(next(iter(records.values())))["checkpoints_sha256"]
    for about, name in records.items():
        record = needed(name)
        assert record["checkpoints_sha256"] == trained, "one training"
        means = dict[str, dict[str, float]]()
        for row in protocol_rows(record, setting):
            if row["bits"] == bits:
                means.setdefault(row["method"], {})[row["way"]] = row["figure"]["mean"]
        rates = {key.split("-")[1]: rate for key, rate in record["rates"].items()}
        found[about] = {
            method: (rate, means[method]) for method, rate in rates.items() if method in means
        }
    return found


def streets_away(name: str) -> tuple[dict[tuple[str, str, str], list[float]], list[float]]:
    """Figures by method, bits and way less the best float merge, by domain; the fitted float one.

    A single model, way ``single``, is compared with the float model of its domain.
    """
    rows, _ = _camvid_rows(needed(name))
    best = _best_float_merge(rows)
    found = {}
    for row in rows:
        kinds = {"single": "single"} if row["way"] == "nearest" else {}
        for way, kind in {**kinds, row["way"]: "merged"}.items():
            found[row["method"], row["bits"], way] = [
                row[kind][name]["mean"] - best[kind][name]["mean"] for name in row["members"]
            ]
    (fit,) = (both for key, both in found.items() if (key[0], key[2]) == ("float", "fitted"))
    return found, fit
