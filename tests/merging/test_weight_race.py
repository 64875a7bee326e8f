"""The race between merge weights finds the best of the grid, which is computed whole here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.merging import weight_race
from hdrq_deploy.merging.weight_race import Point, Race
from hdrq_deploy.merging.weight_search import _every_second, _neighbours, simplex

SIZES = (256, 200)


class Landscape:
    """Losses of images that each have their own best merge weights, and jumps as of rounding."""

    def __init__(self, parents: int, seed: int, jumps: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        self.points = list(simplex(parents))
        best = rng.dirichlet(np.ones(parents))
        self.table: list[Any] = []
        for size in SIZES:
            aims = best + rng.normal(0, 0.3, (size, parents))
            away = ((np.array(self.points)[:, None] - aims) ** 2).sum(2)
            self.table.append(away + jumps * rng.exponential(0.3, away.shape))
        self.scores = np.mean([losses.mean(1) for losses in self.table], axis=0)

    def sample(self, point: Point, count: int) -> list[Any]:
        return [losses[self.points.index(point), :count] for losses in self.table]

    def race(self, sizes: tuple[int, ...] = SIZES, kept: tuple[Point, ...] = ()) -> Race:
        near: Callable[[Point], list[Point]] = lambda p: _neighbours(p, self.points)  # noqa: E731
        coarse = _every_second(self.points)
        return Race(self.points, self.sample, sizes, near, coarse, kept)

    def best(self) -> Point:
        return self.points[int(np.argmin(self.scores))]


def share_of_grids_best(parents: int) -> tuple[float, float]:
    """How often the race finds the best of the grid, and the part of all images that it runs."""
    found, runs = [], []
    for seed in range(20):
        landscape = Landscape(parents, seed)
        race = landscape.race()
        found.append(race.run() == landscape.best())
        runs.append(race.runs / (len(landscape.points) * sum(SIZES)))
    return float(np.mean(found)), float(np.mean(runs))


@pytest.mark.parametrize("parents", [2, 3, 4])
def test_the_race_finds_the_best_of_the_grid_on_fewer_images(parents: int) -> None:
    found, runs = share_of_grids_best(parents)
    assert found == 1 and runs < 0.6


@pytest.mark.parametrize("looks_around", [False, True])
def test_a_race_that_is_certain_too_early_is_found_out(
    looks_around: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_race, "FIRST", 4)
    monkeypatch.setattr(weight_race, "LIKELY", 0.0)
    if looks_around:  # but not well
        monkeypatch.setattr(weight_race, "CERTAIN", 0.0)
    found = []
    for seed in range(20):
        landscape = Landscape(3, seed)
        race = landscape.race()
        if not looks_around:
            race.near = lambda point: []
        found.append(race.run() == landscape.best())
    assert np.mean(found) < 0.5


def test_scores_runs_and_neighbours_are_as_stated() -> None:
    landscape = Landscape(3, 1)
    corner = (0.0, 0.0, 1.0)
    reports: list[tuple[int, int]] = []
    race = landscape.race(kept=(corner,))
    race.progress = lambda done, total: reports.append((done, total))
    best = race.run()
    table = dict(zip(landscape.points, landscape.scores, strict=True))
    assert corner in race.finished
    for point, value in race.finished.items():
        assert value == pytest.approx(table[point], rel=1e-12)
    near = [p for p in landscape.points if np.abs(np.subtract(p, best)).max() < 0.11]
    assert set(near) <= {*race.finished, *race.left} and len(near) in {5, 7}
    for point in set(near) & set(race.left):  # three errors of what is not seen yet
        count = race.left[point][1]
        parts = [
            losses[landscape.points.index(point), :count]
            - losses[landscape.points.index(best), :count]
            for losses in landscape.table
        ]
        error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)
        assert np.mean([part.mean() for part in parts]) > 2 * error
    assert not set(race.left) & set(race.finished)
    runs = sum(sum(min(count, size) for size in SIZES) for _, count in race.left.values())
    assert race.runs == runs + len(race.finished) * sum(SIZES)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert all(done <= total for done, total in reports)
    assert reports[-1] == (race.runs, race.runs)


def test_few_images_are_all_run_on_all_points() -> None:
    landscape = Landscape(3, 0)
    landscape.table = [losses[:, :16] for losses in landscape.table]
    landscape.scores = np.mean([losses.mean(1) for losses in landscape.table], axis=0)
    race = landscape.race(sizes=(16, 16))
    assert race.run() == landscape.best() and len(race.finished) == 66


def test_the_first_of_equal_points_wins() -> None:
    landscape = Landscape(2, 0)
    landscape.table = [np.ones_like(losses) for losses in landscape.table]
    assert landscape.race().run() == landscape.points[0]


def test_a_grid_has_the_neighbours_of_one_step() -> None:
    grid = list(simplex(3))
    assert len(_every_second(grid)) == 21
    assert sorted(_neighbours((0.0, 0.0, 1.0), grid)) == [(0.0, 0.1, 0.9), (0.1, 0.0, 0.9)]
    assert len(_neighbours(grid[len(grid) // 2], grid)) in {4, 6}
    assert _neighbours((0.01, 0.0, 0.99), grid) == []
    five = list(simplex(5))  # quarters
    assert {max(p) for p in _every_second(five)} == {1.0, 0.5}
