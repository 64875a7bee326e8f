"""The search of learning rates: one protocol for all methods, on calibration images alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.calibration.methods import METHODS
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.errors import DataError, SpecError
from hdrq_deploy.experiments import rate_search, tuning
from hdrq_deploy.experiments.cells import CellContext, calibrate_cell
from hdrq_deploy.experiments.grid import Grid, Run, bundle_path
from hdrq_deploy.experiments.rate_search import FACTOR, MOST, START, RateSearch, hold_out
from hdrq_deploy.experiments.table import markdown, notes
from hdrq_deploy.experiments.tasks import Domain, Task
from hdrq_deploy.experiments.tuning import (
    TUNING,
    Trial,
    chosen_rates,
    known_search,
    searched_on,
    trial_path,
    try_rate,
    tune,
)
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.jobs.job import Job
from hdrq_deploy.jobs.pool import open_pool


def searched(score: Callable[[int], float]) -> tuple[RateSearch, dict[int, float]]:
    """A search to its end, on a known curve."""
    search, scores = RateSearch(1e-3), dict[int, float]()
    while places := search.waiting(scores):
        assert not scores.keys() & set(places)
        scores |= {place: score(place) for place in places}
    return search, scores


def test_every_method_begins_with_as_many_rates_as_the_others() -> None:
    learners = [name for name, row in METHODS.items() if row.options.iterates]
    assert {"brecq", "qdrop", "latent", "hdrq"} <= set(learners)
    for name in learners:
        search = RateSearch.of(name, 200)
        rates = [search.rate(place) for place in search.waiting({})]
        assert len(rates) == START
        assert rates[START // 2] == pytest.approx(100 * METHODS[name].options.lr)
        assert np.diff(np.log(rates)) == pytest.approx(math.log(FACTOR), rel=1e-2)
    with pytest.raises(SpecError, match="found method rtn, which learns nothing"):
        RateSearch.of("rtn", 200)


@pytest.mark.parametrize("lowest", [-4, -3, -2, 0, 2, 4])
def test_a_search_widens_until_the_best_rate_lies_inside(lowest: int) -> None:
    search, scores = searched(lambda place: abs(place - lowest))
    assert search.best(scores) == lowest
    assert not search.is_at_edge(scores)
    assert len(scores) == START + max(0, abs(lowest) - 1)


def test_a_search_without_an_optimum_stops_and_says_so() -> None:
    search, scores = searched(lambda place: -place)
    assert len(scores) == MOST and search.is_at_edge(scores)
    # Rates that diverge are the worst ones, whatever side they lie on.
    search, scores = searched(lambda place: math.nan if place > 0 else -place)
    assert search.best(scores) == 0 and not search.is_at_edge(scores)


def test_judges_are_held_out() -> None:
    x = np.arange(11, dtype=np.float32).reshape(11, 1, 1, 1)
    learned, judges = hold_out(ImageSet(x, np.arange(11), None, None))
    assert judges.x.ravel().tolist() == [3, 7]
    assert sorted([*learned.x.ravel(), *judges.x.ravel()]) == list(range(11))
    assert learned.y is not None and learned.y.tolist() == learned.x.ravel().tolist()
    with pytest.raises(DataError, match="found 3 calibration images; a search needs 4"):
        hold_out(ImageSet(x[:3], None, None, None))
    # Folders are read class by class: judges that are too many are thinned, not cut off.
    many = np.arange(4000, dtype=np.float32).reshape(-1, 1, 1, 1)
    _, judges = hold_out(ImageSet(many, None, None, None))
    assert len(judges) == 256 and np.bincount(judges.x.ravel().astype(int) // 1000).min() == 64


def test_what_json_cannot_hold_is_none(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    night, day = make(domain="night"), make(domain="day")
    monkeypatch.setattr(rate_search, "_difference", lambda *_: (math.nan, 0.5))
    held = dict.fromkeys(("night", "day"), np.zeros((4, 3, 16, 16), np.float32))
    row = rate_search.judge([night, day], {"night": night, "day": day}, held)
    assert row["score"] is None
    assert row["merged"] == row["single"] == {"night": None, "day": None}
    json.dumps(row, allow_nan=False)


def test_bits_that_were_not_searched_take_the_nearest(task: Task) -> None:
    rates = {"paper-hdrq-w4a4": 1.0, "paper-hdrq-w8a8": 2.0, "paper-qdrop-w4a4": 3.0}
    grid = Grid(task, rates=rates)
    found = {
        bits: grid.rate(Run("paper", "hdrq", *bits, 1)) for bits in ((4, 4), (3, 3), (8, 8), (4, 8))
    }
    assert found == {(4, 4): 1, (3, 3): 1, (8, 8): 2, (4, 8): 1}
    assert grid.rate(Run("ours", "hdrq", 4, 4, 0)) is None
    assert task.options("hdrq", "paper", 0.5).rate_factor * task.options(
        "hdrq", "paper", 0.5
    ).lr == (pytest.approx(0.5))
    assert task.options("hdrq", "ours", 0.5).lr == 0.5


@pytest.fixture
def task(work: Path) -> Task:
    """Two domains of the tiny network."""
    data = str(work / "data.npz")
    domains = tuple(
        Domain(name, str(work / f"Tiny-{name}.safetensors"), data, data)
        for name in ("night", "day")
    )
    learning = {name: {"iters": 3, "batch": 8} for name in ("hdrq", "qdrop")}
    source = str(work / "Tiny-base.safetensors")
    return Task("tiny", "tiny_models:Tiny", source, domains, images=32, learning=learning)


def stop(jobs: list[Job], *_: Any) -> None:
    """In place of running jobs."""
    raise KeyboardInterrupt(" ".join(job.name for job in jobs) + " ")


@pytest.mark.usefixtures("_path")
def test_a_search_is_kept_resumes_and_gives_the_grid_its_rates(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_search, "START", 3)
    monkeypatch.setattr(rate_search, "MOST", 4)
    grid = Grid(task, ("rtn", "hdrq"), ((4, 4),), (0,), ("ours",), 1)
    for name in ("cells", "rows"):
        (tmp_path / name).mkdir()

    def run(tuned: Grid) -> tuple[dict[str, Any], list[str]]:
        ended: list[str] = []
        with open_pool(1, 1, None, tmp_path) as pool:
            said = lambda *counted: ended.append(counted[2])  # noqa: E731
            return tune(tuned, tuned.bits, tmp_path, "cpu", 1, pool, said), ended

    record, ended = run(grid)
    assert json.loads((tmp_path / TUNING).read_text()) == record
    assert [row["method"] for row in record["searches"]] == ["hdrq"]
    for row in record["searches"]:
        assert 3 <= len(row["tried"]) <= 4
        scores = {trial["rate"]: trial["score"] for trial in row["tried"]}
        assert scores[row["chosen"]] == min(scores.values())
        at_end = row["chosen"] in {min(scores), max(scores)}
        assert row["is_at_edge"] == at_end and (not at_end or len(scores) == 4)
        assert row["images"] == {d: {"learned_from": 24, "held_out": 8} for d in grid.domains}
        for trial in row["tried"]:
            assert trial["score"] == pytest.approx(np.mean(list(trial["merged"].values())))
    assert not list((tmp_path / "tuning").glob("*.hdrq"))
    assert len([name for name in ended if "-lr" in name]) == sum(
        len(row["tried"]) for row in record["searches"]
    )
    # The same again tries nothing. A lost trial is the same again, though there are no test
    # images: what would read them fails.
    assert run(grid) == (record, [])
    trial = Trial(Run("ours", "hdrq", 4, 4, 0), record["searches"][0]["chosen"])
    lost = trial_path(tmp_path, trial)
    before = lost.read_bytes()
    lost.unlink()
    blind = replace(task, domains=tuple(replace(d, test="/nowhere") for d in task.domains))
    try_rate(CellContext(blind, tmp_path), trial)
    assert lost.read_bytes() == before
    with pytest.raises(DataError, match="/nowhere"):
        calibrate_cell(CellContext(blind, tmp_path), Run("float", "float", 8, 8, 0), "night")
    # Images that were copied again are the same images.
    times = {domain.images: Path(domain.images).stat().st_mtime_ns for domain in task.domains}
    for images in times:
        os.utime(images, ns=(1, 1))
    assert run(grid) == (record, [])
    for images, when in times.items():
        os.utime(images, ns=(when, when))
    # At another number of iterations nothing of it stands.
    learning = {"hdrq": {**task.learning["hdrq"], "iters": 2}}
    monkeypatch.setattr(tuning, "run_jobs", stop)
    with pytest.raises(KeyboardInterrupt, match="hdrq-w4a4-s0-lr1 "):
        run(replace(grid, task=replace(task, learning=learning)))
    # A cell learns with the rate that was chosen, and the table names the file.
    tuned = replace(grid, rates=chosen_rates(record))
    rate = tuned.rate(Run("ours", "hdrq", 4, 4, 0))
    run_of_cell = Run("ours", "hdrq", 4, 4, 0)
    calibrate_cell(CellContext(task, tmp_path), run_of_cell, "night", rate=rate)
    manifest = Bundle.open(bundle_path(tmp_path, "ours-hdrq-w4a4-s0-night")).manifest
    assert manifest.options["lr"] == rate == record["searches"][0]["chosen"]
    assert TUNING in notes(tuned)[0] and notes(tuned)[0] in markdown(tuned, [])
    assert notes(grid) == []


def test_rates_of_another_run_fit_or_are_refused(task: Task, tmp_path: Path) -> None:
    record = {
        "kind": "hdrq-tuning",
        "task": "tiny",
        "searches": [
            {
                "setting": "ours",
                "method": name,
                "bits": "w4a4",
                "iterations": 3,
                "tried": [{"rate": 0.1}, {"rate": 0.2}],
                "chosen": rate,
            }
            for name, rate in (("hdrq", 0.1), ("qdrop", 0.2))
        ],
    }
    file = tmp_path / "search.json"

    def refused(record: object, grid: Grid) -> str:
        file.write_text(json.dumps(record))
        with pytest.raises(SpecError) as found:
            known_search(file, grid)
        return str(found.value)

    grid = Grid(task, ("rtn", "qdrop", "hdrq"), settings=("ours",))
    file.write_text(json.dumps(record))
    assert known_search(file, grid) == record
    paper = replace(grid, settings=("paper",))
    assert "found no search of qdrop (paper)" in refused(record, paper)
    one = {**record, "searches": record["searches"][:1]}
    assert "found no search of qdrop (ours)" in refused(one, grid)
    longer = replace(grid, task=task.calibrated_with(iters=7, batch=None))
    assert "for 3 iterations a block; needed 7: take 3 `iters`" in refused(record, longer)
    own = f", {task.model}"
    said = (
        ({"task": "pacs"}, " of pacs, in"),
        ({"model": task.model}, ", in"),
        ({"model": "m:net"}, " of tiny, m:net, in"),
        ({"task": "pacs", "model": task.model}, f" of pacs{own}, in"),
    )
    for named, words in said:
        file.write_text(json.dumps({**record, **named}))
        where = searched_on(known_search(file, grid))
        of_other = replace(grid, rates=chosen_rates(record), searched_on=where)
        assert f"calibration images{words} tuning.json" in notes(of_other)[0]
    assert "needed the file as" in refused({**record, "model": 3}, grid)
    assert "found no search of rates" in refused({"kind": "hdrq-reproduce"}, grid)
    twice = [*record["searches"], {**record["searches"][0], "chosen": 0.2}]
    assert "needed the file as" in refused({**record, "searches": twice}, grid)
    strange = ({"chosen": 0.0}, {"chosen": "fast"}, {"bits": None, "chosen": None}, {"chosen": 0.3})
    for broken in strange:
        rows = [{**record["searches"][0], **broken}]
        assert "needed the file as" in refused({**record, "searches": rows}, grid)
    assert "needed the file as" in refused({"kind": "hdrq-tuning", "task": "tiny"}, grid)
    with pytest.raises(SpecError, match="nowhere.json: found no search"):
        known_search(tmp_path / "nowhere.json", grid)


@pytest.fixture
def _path(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(work)
