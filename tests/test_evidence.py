"""Means and differences that the pages of the evidence show, by hand."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle
from hdrq_deploy.errors import SpecError

CORPUS = Path(__file__).parent / "corpus" / "schema-1"
PAIRS = (("handwriting", "photo"), ("handwriting", "night"), ("photo", "night"))
WHOLE = ("handwriting", "photo", "night")
# Modules of ``benchmarks`` that tests import.
_OURS = (
    *("evidence", "learned_scales", "measured"),
    *("mended_stages", "rates_by_singles", "real_weights"),
)


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of ``benchmarks/evidence``, and forgets it behind the test."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    before = set(sys.modules)
    yield lambda name: importlib.import_module(f"evidence.{name}")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in _OURS:
            del sys.modules[name]


def drawn(method: str, seed: int, figures: list[list[float]], **other: Any) -> list[dict[str, Any]]:
    """Rows of ``merge_statistics.json`` of all groups of the digits."""
    return [
        {
            "task": "digits",
            "parents": method,
            "bits": "w4a4",
            "fold": "weights",
            "way": "mean-advanced",
            "seed": seed,
            "members": list(members),
            "harmonic_means": means,
            **other,
        }
        for members, means in zip((*PAIRS, WHOLE), figures, strict=True)
    ]


def test_seeds_are_paired_by_their_numbers(evidence: Any) -> None:
    merging = evidence("merging")
    flat = lambda value: [[value]] * 4  # noqa: E731
    rows = [row for seed in (0, 1, 2) for row in drawn("hdrq", seed, flat(80.0 + seed))]
    rows += [row for seed in (0, 2, 3) for row in drawn("qdrop", seed, flat(70.0 + seed))]
    assert merging.digits_by_seed(rows, "mean-advanced", "hdrq", "w4a4")[2] == (82, 82)
    pairs, triples = merging.digits_hdrq_less_qdrop(rows, "mean-advanced", "w4a4")
    assert pairs == triples == [10, 10]
    with pytest.raises(ValueError, match="too many values"):
        merging.one_run_of_digits([{**r, "bits": ""} for r in rows], "mean-advanced", "hdrq")


def test_rounding_seeds_are_no_calibration_seeds(evidence: Any) -> None:
    merging = evidence("merging")
    one = drawn("rtn", 0, [[80.0, 90.0], [70.0, 70.0], [60.0, 62.0], [50.0, 50.0]])
    two = drawn("hdrq", 0, [[80.0, 90.0]] * 4) + drawn("hdrq", 1, [[85.0, 81.0]] * 4)
    first, second = merging._merges_table(one + two).splitlines()[2:]
    figures = " | ".join(["84.0 ± 1.4"] * 3 + ["84.0", "84.0 ± 1.4"])
    assert first == f"| hdrq | W4A4 | mean, advanced | {figures} |"
    assert second == "| rtn | W4A4 | mean, advanced | 85.0 | 70.0 | 61.0 | 72.0 | 50.0 |"


def figure(members: tuple[str, ...], mean: float, way: str = "nearest") -> dict[str, Any]:
    """A row as ``protocol_rows`` gives it."""
    return {
        "method": "hdrq",
        "bits": "w4a4",
        "way": way,
        "members": list(members),
        "figure": {"mean": mean},
        "against": [],
    }


def test_a_mean_of_pairs_is_of_all_pairs(evidence: Any) -> None:
    protocol = evidence("protocol")
    rows = [figure(pair, 60.0 + n) for n, pair in enumerate(PAIRS)] + [figure(WHOLE, 50)]
    of = ("hdrq", "w4a4", "nearest")
    assert protocol.protocol_means(rows, *of) == (61, 50)
    other = [figure(pair, 1, "regression") for pair in PAIRS]
    assert protocol.protocol_means(rows[1:] + other, *of) is None
    assert protocol.protocol_means([*rows[:3], figure(WHOLE, 1, "regression")], *of) is None


def test_a_difference_of_pairs_is_none_of_all_domains(
    evidence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = evidence("protocol")
    gap = {"method": "qdrop", "difference": 4.0, "low": 1.0, "high": 7.0, "calibrations": 3}

    def record(*members: tuple[str, ...]) -> dict[str, Any]:
        rows = [
            {
                **{name: row[name] for name in ("method", "bits", "way", "members")},
                "setting": "ours",
                "merged": {"harmonic mean": {"mean": 1.0}},
                "single": {"harmonic mean": {"mean": 1.0}},
                "against": [gap] if group in members else [],
            }
            for group in (*PAIRS, WHOLE)
            for row in [figure(group, 1)]
        ]
        return {"rows": rows}

    records = {"whole": record(*PAIRS, WHOLE), "pairs": record(*PAIRS)}
    monkeypatch.setattr(protocol, "needed", records.__getitem__)
    table = protocol.beside_qdrop({"A": "whole", "B": "pairs"}, together=True)
    line = "| W4A4 | mean, nearest | **+4.0 (+1.0 to +7.0), 3 seeds** | - |"
    assert table.splitlines()[2:] == [line]


def test_a_trial_that_failed_is_told(evidence: Any) -> None:
    protocol = evidence("protocol")
    tried = [{"rate": 0.1, "score": 1.5}, {"rate": 0.3, "score": None}, {"rate": 1, "score": 1.2}]
    search = {"method": "hdrq", "bits": "w4a4", "tried": tried, "chosen": 1, "is_at_edge": True}
    names = {"rates_at_first": 5, "factor": 3.16, "criterion": "nats", "held_out": "some"}
    told = protocol.protocol_rates({"searches": [search], "protocol": names}, "these")
    assert "0.1 (1.500), 0.3 (failed), 1 (1.200), chosen 1" in told
    assert "At the end of its search: hdrq" in told


def test_records_that_are_read_are_named(evidence: Any) -> None:
    records = evidence("records")
    with records.names_read() as names:
        records.needed("pacs")
        assert records.load("none of ours") is None
        records.needed("digits")
    records.needed("camvid")
    assert list(names) == ["pacs", "digits"]


@pytest.mark.usefixtures("evidence")
def test_rows_that_are_kept_keep_what_they_were_measured_with() -> None:
    """A row of another machine, or of other versions, says so; its record goes on as it was."""
    row_with_environment = importlib.import_module("measured").row_with_environment
    first, later = ({"cpu": "A", "torch": v, "load_1min": 0.1} for v in ("2.14.0", "2.14.1"))
    assert row_with_environment({"rows": []}, {"model": "a"}, first) == (first, {"model": "a"})
    known, busy = {"environment": first}, {**first, "load_1min": 1.7}
    assert row_with_environment(known, {"model": "b"}, busy) == (first, {"model": "b"})
    for other in (later, {**first, "cpu": "B"}, {**first, "timm": "1.0"}):
        row = {"model": "c", "environment": other}
        assert row_with_environment(known, {"model": "c"}, other) == (first, row)


@pytest.mark.usefixtures("evidence")
def test_rows_are_collected_with_what_they_were_measured_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of two machines, collected on a third: no row gets the environment of that one."""
    measured = importlib.import_module("measured")
    places = iter(({"cpu": "A", "load_1min": 0.1}, {"cpu": "A", "load_1min": 2.0}, {"cpu": "B"}))
    monkeypatch.setattr(measured, "current_environment", lambda _: next(places, {"cpu": "C"}))
    rows = [measured.measured_here({"row": place}) for place in range(3)]
    assert measured.gathered([{"row": "old"}, *rows]) == {
        "environment": {"cpu": "A", "load_1min": 0.1},
        "rows": [{"row": "old"}, {"row": 0}, {"row": 1}, {"row": 2, "environment": {"cpu": "B"}}],
    }
    assert measured.gathered([{"row": "old"}])["environment"] == {"cpu": "C"}
    assert rows[0] == {"row": 0, "environment": {"cpu": "A", "load_1min": 0.1}}


def test_a_part_measured_later_leaves_the_environment_of_others(evidence: Any) -> None:
    environments, put_part = (
        evidence("records").environments,
        importlib.import_module("measured").put_part,
    )
    first, later = {"cpu": "A"}, {"cpu": "B"}
    record = {"environment": first, "noise": [1], "speed": [2]}
    put_part(record, ("noise", "speed", "memory"), "speed", [3], later)
    assert record == {
        "environment": first, "noise": [1], "speed": [3], "environment_of": {"speed": later},
    }  # fmt: skip
    assert environments(record) == [first, later]
    environment_of = evidence("records").environment_of
    assert (environment_of(record, "noise"), environment_of(record, "speed")) == (first, later)
    put_part(record, ("noise", "speed", "memory"), "noise", [4], later)
    assert environments(record) == [later, later]


@pytest.mark.usefixtures("evidence")
def test_rows_that_learned_with_other_options_are_refused() -> None:
    refuse_other_options = importlib.import_module("measured").refuse_other_options
    bundle = CORPUS / "night.hdrq"
    options = Bundle.open(bundle).manifest.options
    rate, iters = options["lr"], options["iters"]
    refuse_other_options(bundle, lr=rate, iters=iters)
    refuse_other_options(bundle)
    with pytest.raises(SpecError, match=f"found lr {rate}; needed one that learned with lr"):
        refuse_other_options(bundle, iters=iters, lr=2 * rate)
    with pytest.raises(SpecError, match=f"found iters {iters}; needed one that learned with iters"):
        refuse_other_options(bundle, lr=rate, iters=2 * iters)
    refuse_other_options(CORPUS / "gone.hdrq")
    with pytest.raises(SpecError, match="found no bundle; needed one"):
        refuse_other_options(CORPUS / "gone.hdrq", lr=rate)


def test_readme_gives_the_figures_of_the_papers_setting(evidence: Any) -> None:
    record = evidence("records").needed("pacs_paper")
    whole = {
        row["method"]: row["single"]["harmonic mean"]["mean"]
        for row in record["rows"]
        if (row["setting"], row["bits"], row["way"]) == ("paper", "w4a8", "nearest")
        and len(row["members"]) == 3
    }
    streets = evidence("camvid").streets_as_published()
    said = (
        f"HDRQ's models of PACS reach {whole['hdrq']:.1f}% each and QDrop's {whole['qdrop']:.1f}%, "
        f"those of CamVid {streets['hdrq'][0]:.1f} and {streets['qdrop'][0]:.1f} mIoU"
    )
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert said in " ".join(readme.split())


def test_a_page_names_every_environment_of_its_record(evidence: Any) -> None:
    first, other = {"cpu": "A"}, {"cpu": "B"}
    rows = [{"model": "a"}, {"model": "b", "environment": other}]
    environments = evidence("records").environments
    for kept in (rows, {row["model"]: row for row in rows}):
        assert environments({"environment": first, "rows": kept}) == [first, other]
    assert environments({"environment": first, "models": rows}) == [first, other]
    assert environments([1, 2]) == []


def test_learned_scales_are_those_of_the_layer_that_moved_most(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = importlib.import_module("learned_scales")
    rounded = {"a.weight_scale": np.ones(2), "b.weight_scale": np.ones(())}
    learned = {"a.weight_scale": np.array([0.5, 0.7]), "b.weight_scale": np.array(9.0)}
    found = {"hdrq": learned, "rtn": rounded}

    class Opened:
        def __init__(self, path: Path) -> None:
            self.tensors = lambda: found[path.name.split("-")[1]]
            self.manifest = SimpleNamespace(
                options={"lr": 1e-4, "iters": 200, "scale_rates": True, "batch": 8}
            )

    monkeypatch.setattr(scales, "Bundle", type("Bundle", (), {"open": Opened}))
    cells = tmp_path / "cells"
    (cells / "paper-hdrq-w4a8-s0-day.hdrq").mkdir(parents=True)
    (cells / "paper-hdrq-w4a8-s0-day+dusk-nearest-r0.hdrq").mkdir()
    with pytest.raises(SpecError, match="found no paper-rtn-w4a8-s0-day.hdrq beside it"):
        list(scales.rows_of("camvid", tmp_path))
    (cells / "paper-rtn-w4a8-s0-day.hdrq").mkdir()
    (row,) = scales.rows_of("camvid", tmp_path)
    assert (row["layer"], row["times_rtn"], row["bits"]) == ("b", 9.0, "w4a8")
    assert row["rate"] == 0.01
    assert row["median_times_rtn"] == pytest.approx(4.85)
    with pytest.raises(SpecError, match="found no bundles of hdrq"):
        list(scales.rows_of("camvid", tmp_path / "other"))


def test_scales_of_two_trainings_are_refused(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = importlib.import_module("learned_scales")
    monkeypatch.setattr(scales, "rows_of", lambda task, out: [{"task": task, "out": out.name}])
    for name, trained in (
        ("first", {"day": "1"}),
        ("again", {"day": "1"}),
        ("other", {"day": "2"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"checkpoints_sha256": trained}))
    results = ["--results", str(tmp_path)]
    first, again, other = (f"--run=camvid={tmp_path / n}" for n in ("first", "again", "other"))
    assert scales.main([first, again, *results]) == 0
    found = json.loads((tmp_path / "learned_scales.json").read_text())
    assert [row["out"] for row in found["rows"]] == ["first", "again"]
    with pytest.raises(SpecError, match="found bundles of other checkpoints than an earlier --run"):
        scales.main([first, other, *results])


def test_a_search_is_called_smooth_where_its_scores_have_one_valley(evidence: Any) -> None:
    smooth = evidence("protocol")._has_one_valley
    assert smooth([5.6, 2.6, 2.2, 2.3, 2.4]) and smooth([1, 2, 3]) and smooth([3, 2, 1])
    assert not smooth([3.6, 5.5, 3.5, 4.0]) and not smooth([3.6, 3.5, 5.5, 5.4])


def test_a_part_is_compared_with_the_method_before_it(evidence: Any) -> None:
    """Merges of all domains alone, each against the method that lacks that part alone."""
    parts = evidence("parts")
    every, pair = ["art_painting", "cartoon", "sketch"], ["art_painting", "cartoon"]

    def row(method: str, members: list[str], **against: tuple[float, float, float]) -> Any:
        names = ("difference", "low", "high")
        other = [
            {"method": name.replace("_", "-"), **dict(zip(names, figures, strict=True))}
            for name, figures in against.items()
        ]
        kind = {"bits": "w4a8", "way": "nearest", "figure": {"mean": 50.0}}
        return {**kind, "method": method, "members": members, "against": other}

    rows = [
        row("qdrop", every),
        row("latent", every, qdrop=(9, 2, 16)),
        row("latent", pair, qdrop=(-9, -16, -2)),
        row("latent-noise", every, qdrop=(8, 1, 15), latent=(-1, -8, 6)),
        row("hdrq", every, qdrop=(5, -2, 12), latent=(-4, -9, 1), latent_noise=(-3, -5, -1)),
    ]
    assert parts._read(rows) == (
        "Beyond its interval each raises and lowers so many merges: learned weights and scales 1 "
        "and 0 of 1; noise 0 and 0 of 1; distance 0 and 1 of 1; noise and distance 0 and 0 of 1."
    )
    assert parts._added_table(rows).splitlines()[-1] == (
        "| W4A8 | mean, nearest | +9.0 (+2.0 to +16.0) | -1.0 (-8.0 to +6.0) | "
        "-3.0 (-5.0 to -1.0) | -4.0 (-9.0 to +1.0) |"
    )
    some = [row for row in rows if row["method"] != "latent-noise"]
    for row in some:
        row["against"] = [o for o in row["against"] if o["method"] != "latent-noise"]
    assert parts._added_table(some).splitlines()[0] == (
        "| bits | merge | learned weights and scales | noise and distance |"
    )


def test_stages_are_mended_alone_and_with_all_before(evidence: Any) -> None:
    stages = importlib.import_module("mended_stages")
    named = {"conv_stem": "stem", "bn1.act": "stem", "blocks.10.1.conv_dw": "blocks.10"}
    named |= {"conv_head": "head", "bn2.act": "head", "classifier": "head"}
    assert {name: stages.stage_of(name) for name in named} == named
    few, many = np.array([[8], [-9]], np.int8), np.array([[-127]], np.int8)
    weights = {"conv_stem.w": few, "blocks.0.w": many, "blocks.0.act": np.array(0)}
    layers = [
        SimpleNamespace(module=name, weight=f"{name}.w") for name in ("conv_stem", "blocks.0")
    ]
    blocks = [
        {"name": name, "loss_before": 2.0, "loss_after": after}
        for name, after in (("conv_stem", 1.0), ("blocks.0", 2.0))
    ]

    def bundle(add: int) -> Any:
        manifest = SimpleNamespace(layers=layers, metrics={"blocks": blocks})
        found = {name: value + add for name, value in weights.items()}
        return SimpleNamespace(manifest=manifest, path=Path("x"), tensors=lambda: found)

    def measure(tensors: Any) -> dict[str, Any]:
        return {name: int((value != weights[name]).all()) for name, value in tensors.items()}

    stem, block = stages.rows_of(bundle(0), bundle(1), measure)
    assert stem["alone"] == stem["with_all_before"] == dict(zip(weights, (1, 0, 0), strict=True))
    assert block["alone"] == dict(zip(weights, (0, 1, 1), strict=True))
    assert block["with_all_before"] == dict(zip(weights, (1, 1, 1), strict=True))
    assert (stem["channels"], stem["channels_of_few_codes"], stem["loss_after"]) == (2, 1, 1.0)
    assert (block["channels"], block["channels_of_few_codes"]) == (1, 0)


@pytest.mark.usefixtures("evidence")
def test_rates_are_chosen_anew_by_single_models() -> None:
    chosen_anew = importlib.import_module("rates_by_singles").chosen_anew
    tried = [
        {"rate": 0.1, "score": 3.0, "single": {"a": 2.0, "b": 1.0}},
        {"rate": 0.3, "score": 2.0, "single": {"a": 2.0, "b": 2.0}},
        {"rate": 1.0, "score": 4.0, "single": {"a": 0.5, "b": 3.0}},
    ]
    search = {"method": "qdrop", "tried": tried, "chosen": 0.3, "is_at_edge": False}
    record = {"kind": "hdrq-tuning", "protocol": {"criterion": "merged"}, "searches": [search]}
    found = chosen_anew(record)
    (anew,) = found["searches"]
    assert (anew["chosen"], anew["is_at_edge"]) == (0.1, True)
    assert [trial["score"] for trial in anew["tried"]] == [1.5, 2.0, 1.75]
    assert found["protocol"]["criterion"].startswith("cross entropy of each single model")
    assert record["protocol"]["criterion"] == "merged" and search["chosen"] == 0.3


def test_records_of_searches_that_hold_others_agree_with_them(evidence: Any) -> None:
    """Both stand beside their sources because ``--rates`` takes one file."""
    needed = evidence("records").needed
    chosen_anew = importlib.import_module("rates_by_singles").chosen_anew
    for task in ("pacs", "camvid"):
        searched = needed(f"{task}_paper_tuning")
        assert needed(f"{task}_paper_singles_tuning") == chosen_anew(searched)
    searched = {row["method"]: row for row in needed("pacs_tuning")["searches"]}
    held = {row["method"]: row for row in needed("pacs_parts_tuning")["searches"]}
    assert list(held) == ["qdrop", "latent", "latent-noise", "hdrq"]
    assert all(held[method] == searched[method] for method in ("qdrop", "hdrq"))
