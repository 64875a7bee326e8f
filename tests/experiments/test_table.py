"""The table of a grid: intervals from kept decisions, and bold only outside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.experiments import table
from hdrq_deploy.experiments.decisions import Decisions, packed, unpacked
from hdrq_deploy.experiments.grid import Grid, row_path
from hdrq_deploy.experiments.table import cells, header, markdown, rows
from hdrq_deploy.experiments.tasks import Domain, Task
from hdrq_deploy.numerics.intervals import Bootstrap, figure
from hdrq_deploy.runtime.bench.accuracy import confusion

IMAGES = 300


def test_decisions_are_kept_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    seen = Decisions()
    labels, predicted = rng.integers(0, 4, (2, 21))
    seen("night", labels[:16], predicted[:16], 4)
    seen("night", labels[16:], predicted[16:], 4)
    maps, answers = rng.integers(0, 3, (2, 5, 4, 6))
    maps[0, 0, 0] = 255
    seen("street", maps, answers, 3)
    kept = unpacked(json.loads(json.dumps(packed(seen.measured))))
    assert kept is not None
    assert kept["night"].tolist() == (labels == predicted).tolist()
    pixels = kept["street"]
    assert pixels.shape == (5, 3, 3) and pixels[..., 1].sum() == maps.size - 1
    whole = confusion(maps, answers, 3)
    assert pixels[..., 0].sum(0).tolist() == np.diag(whole).tolist()
    union = whole.sum(1) + whole.sum(0)[:-1] - np.diag(whole)
    assert figure({"street": pixels}) == pytest.approx(np.mean(np.diag(whole) / union))
    odd = [
        {"a": {"shape": shape, "bits": "AAA="}} for shape in ([], [8], [17], [-9], ["9"], [9, 1])
    ]
    assert unpacked({"a": {"shape": [9], "bits": "AAA="}})
    two = packed({"a": np.zeros((2, 4, 2), np.int32)})
    for broken in (None, {}, {"a": {}}, {"a": {"shape": [9], "bits": "AA"}}, {"a": 3}, two, *odd):
        assert not unpacked(broken)


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Grid:
    """Two methods on three domains, merged all together, with bundles that nobody reads."""
    monkeypatch.setattr(table, "_options", lambda path: {})
    domains = tuple(Domain(name, "w", "x", "t") for name in ("a", "b", "c"))
    task = Task("t", "m:F", "s", domains)
    return Grid(task, ("qdrop", "hdrq"), ((4, 4),), (0, 1, 2), ("paper",), 1)


def write(grid: Grid, out: Path, chances: Mapping[str, float], keep: bool = True) -> None:
    """A row for every cell; hits of a method come at its chance on images of given difficulty."""
    (out / "rows").mkdir()
    hard = np.random.default_rng(1).random((3, IMAGES))
    for number, run in enumerate(grid.runs()):
        chance = chances[run.method]
        merges = [(merge.cell(0), merge.members) for merge in grid.merges(run)]
        singles = [(run.single(domain), (domain,)) for domain in grid.domains]
        for cell, members in [*singles, *merges]:
            noise = np.random.default_rng([number, len(members)])
            right = {}
            for member in members:
                row = hard[grid.domains.index(member)] + 0.02 * noise.standard_normal(IMAGES)
                right[member] = row < chance
            record: dict[str, Any] = {
                "cell": cell,
                "domains": {name: float(hits.mean()) for name, hits in right.items()},
                "tests": dict.fromkeys(members, 1),
            }
            if keep:
                record["decisions"] = packed(right)
            row_path(out, cell).write_text(json.dumps(record))


def merged_of(records: list[dict[str, Any]], method: str, count: int = 3) -> dict[str, Any]:
    (row,) = [r for r in records if r["method"] == method and len(r["members"]) == count]
    return row


def test_a_clear_winner_is_bold_and_what_lies_in_the_noise_is_not(
    grid: Grid, tmp_path: Path
) -> None:
    (tmp_path / "clear").mkdir()
    write(grid, tmp_path / "clear", {"float": 0.95, "qdrop": 0.7, "hdrq": 0.8})
    records = rows(grid, tmp_path / "clear")
    qdrop, hdrq = merged_of(records, "qdrop"), merged_of(records, "hdrq")
    assert (qdrop["wins"], hdrq["wins"]) == (False, True)
    assert qdrop["against"] == []
    (gap,) = hdrq["against"]
    means = [row["merged"]["harmonic mean"]["mean"] for row in (hdrq, qdrop)]
    assert gap["method"] == "qdrop" and gap["low"] > 0 and gap["p"] < 0.01
    assert gap["difference"] == pytest.approx(means[0] - means[1], abs=2e-3)
    line = dict(zip(header(grid), cells(grid, hdrq), strict=True))
    half = (hdrq["merged"]["harmonic mean"]["high"] - hdrq["merged"]["harmonic mean"]["low"]) / 2
    assert line["merged"] == f"**{means[0]:.1f} ± {half:.1f}**"
    assert "**" not in " ".join(cells(grid, qdrop))
    # Float is no rival: it is what all are compared with.
    assert not any(r["wins"] for r in records if r["method"] == "float")
    assert "Bold: better than every other" in markdown(grid, records)
    (tmp_path / "close").mkdir()
    write(grid, tmp_path / "close", {"float": 0.95, "qdrop": 0.7, "hdrq": 0.703})
    close = rows(grid, tmp_path / "close")
    assert not any(row["wins"] for row in close)
    best, other = (
        merged_of(close, method)["merged"]["harmonic mean"]["mean"] for method in ("hdrq", "qdrop")
    )
    assert best != other
    assert "**" not in markdown(grid, close)


def test_one_calibration_seed_is_never_bold(grid: Grid, tmp_path: Path) -> None:
    write(grid, tmp_path, {"float": 0.95, "qdrop": 0.6, "hdrq": 0.8})
    one = Grid(grid.task, grid.methods, grid.bits, (0,), grid.settings, 1)
    hdrq = merged_of(rows(one, tmp_path), "hdrq")
    assert hdrq["against"][0]["of_one_run_each"] and hdrq["against"][0]["p"] < 0.01
    assert not hdrq["wins"]


def test_a_mean_is_the_centre_of_its_interval(grid: Grid, tmp_path: Path) -> None:
    """A seed whose rounding seeds are not all there counts as much as the others."""
    drawn = replace(grid, task=replace(grid.task, domains=grid.task.domains[:2]), rounding_seeds=4)
    write(drawn, tmp_path, {"float": 0.95, "qdrop": 0.6, "hdrq": 0.8})
    shares = (0.7, 0.64, 0.64)
    for seed, draws in ((0, 4), (1, 1), (2, 1)):
        for draw in range(draws):
            cell = f"paper-hdrq-w4a4-s{seed}-a+b-advanced-r{draw}"
            right = dict.fromkeys("ab", np.arange(IMAGES) < shares[seed] * IMAGES)
            record = {
                "cell": cell,
                "domains": {name: float(found.mean()) for name, found in right.items()},
                "tests": dict.fromkeys("ab", 1),
                "decisions": packed(right),
            }
            row_path(tmp_path, cell).write_text(json.dumps(record))
    (row,) = [r for r in rows(drawn, tmp_path) if (r["method"], r["way"]) == ("hdrq", "advanced")]
    found = row["merged"]["harmonic mean"]
    assert found["mean"] == pytest.approx(100 * np.mean(shares), abs=1e-3)
    assert (found["low"] + found["high"]) / 2 == pytest.approx(found["mean"], abs=0.5)
    assert row["merged"]["a"]["mean"] == found["mean"] and found["count"] == 6


def test_rows_of_earlier_versions_have_no_interval(grid: Grid, tmp_path: Path) -> None:
    chances = {"float": 0.95, "qdrop": 0.6, "hdrq": 0.8}
    (tmp_path / "old").mkdir()
    write(grid, tmp_path / "old", chances, keep=False)
    records = rows(grid, tmp_path / "old")
    hdrq = merged_of(records, "hdrq")
    assert hdrq["merged"]["harmonic mean"]["count"] == 3 and hdrq["against"] == []
    text = markdown(grid, records)
    assert "±" not in text and "**" not in text
    # Of one such cell among newer ones nobody knows whom it beats.
    (tmp_path / "new").mkdir()
    write(grid, tmp_path / "new", chances)
    assert merged_of(rows(grid, tmp_path / "new"), "hdrq")["wins"]
    file = row_path(tmp_path / "new", "paper-qdrop-w4a4-s1-a+b+c-nearest-r0")
    record = json.loads(file.read_text())
    del record["decisions"]
    file.write_text(json.dumps(record))
    assert not merged_of(rows(grid, tmp_path / "new"), "hdrq")["wins"]


def test_replicates_of_a_table_are_the_same_each_time(grid: Grid) -> None:
    right = {0: [{"a": np.arange(9) % 2}]}
    first, second = (Bootstrap().sample(right).images for _ in range(2))
    assert (first == second).all()
