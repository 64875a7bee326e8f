"""Intervals and paired tests: brute force, known cases, and coverage on simulated methods."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from hdrq_deploy.numerics.intervals import (
    Bootstrap,
    Sample,
    figure,
    mcnemar,
    swap_test,
)
from hdrq_deploy.typing import Array

RNG = np.random.default_rng


def counts(rng: np.random.Generator, images: int, classes: int = 3) -> Array:
    """Hits, labelled and predicted pixels of every class and image."""
    table = rng.integers(0, 9, (images, classes, classes))
    return np.stack([np.diagonal(table, 0, 1, 2), table.sum(2), table.sum(1)], -1)


def test_a_figure_is_the_harmonic_mean_over_domains() -> None:
    rng = RNG(0)
    right = {"a": rng.integers(0, 2, 40), "b": rng.integers(0, 2, 30)}
    assert figure(right) == pytest.approx(2 / (1 / right["a"].mean() + 1 / right["b"].mean()))
    pixels = counts(rng, 5)
    ious = [
        pixels[:, c, 0].sum() / (pixels[:, c, 1] + pixels[:, c, 2] - pixels[:, c, 0]).sum()
        for c in range(3)
    ]
    assert figure({"a": pixels}) == pytest.approx(np.mean(ious))
    absent = np.concatenate([pixels, np.zeros((5, 1, 3), int)], 1)
    assert figure({"a": absent}) == pytest.approx(np.mean(ious))
    assert figure({"a": np.zeros(3), "b": np.ones(3)}) == 0


@pytest.mark.parametrize("pixels", [False, True])
def test_replicates_are_those_of_a_loop(pixels: bool) -> None:
    rng = RNG(1)
    make = (lambda n: counts(rng, n)) if pixels else (lambda n: rng.integers(0, 2, n))
    runs = {0: [{"a": make(20), "b": make(15)}], 1: [{"a": make(20), "b": make(15)}] * 2}
    boot = Bootstrap(8)
    sample = boot.sample(runs)
    for i in range(8):
        found = []
        for drawn in runs.values():
            moved = []
            for run in drawn:
                again = {}
                for name, values in run.items():
                    times = boot._weights_of(name, len(values))[i].astype(int)
                    assert times.sum() == len(values)
                    again[name] = np.repeat(values, times, axis=0)
                moved.append(figure(again) - figure(run))
            found.append(np.mean(moved))
        assert sample.images[i] == pytest.approx(np.mean(found), abs=1e-6)


def test_mcnemar_is_the_sum_over_all_swaps() -> None:
    rng = RNG(2)
    for _ in range(20):
        a, b = rng.integers(0, 2, (2, 9))
        observed, beyond = abs(int(a.sum() - b.sum())), 0
        for swaps in product((0, 1), repeat=9):
            where = np.array(swaps) > 0
            gap = np.where(where, b, a).sum() - np.where(where, a, b).sum()
            beyond += abs(int(gap)) >= observed
        assert mcnemar(a, b) == pytest.approx(beyond / 2**9)
        assert swap_test({"d": a}, {"d": b}) == mcnemar(a, b)
    # One class of which every image has one pixel: the same figure, by random swaps.
    a, b = rng.integers(0, 2, (2, 200))
    b[:30] = 0
    pixels = [np.stack([x, np.ones(200, int), x], -1)[:, None] for x in (a, b)]
    assert figure({"d": pixels[0]}) == pytest.approx(a.mean())
    drawn = swap_test({"d": pixels[0]}, {"d": pixels[1]})
    assert 0.001 < mcnemar(a, b) < 0.9
    assert drawn == pytest.approx(mcnemar(a, b), abs=0.02)


def method(
    rng: np.random.Generator, chance: Array, shift: float, seeds: int, rounds: int, sds: Array
) -> dict[int, list[dict[str, Array]]]:
    """Runs on images of given difficulty, with spread over calibration and rounding seeds."""
    runs: dict[int, list[dict[str, Array]]] = {}
    for seed in range(seeds):
        own = shift + sds[0] * rng.standard_normal()
        runs[seed] = []
        for _ in range(rounds):
            level = own + sds[1] * rng.standard_normal()
            runs[seed].append({"d": (chance < 0.7 + level).astype(int)})
    return runs


@pytest.mark.parametrize(
    ("seeds", "rounds", "sds"),
    [
        (1, 1, (0, 0)),
        (3, 1, (0.02, 0)),
        (3, 4, (0.02, 0.02)),
        (2, 2, (0.03, 0.0)),
        (1, 4, (0, 0.03)),
    ],
)
def test_intervals_hold_the_truth_in_95_of_100_cases(
    seeds: int, rounds: int, sds: tuple[float, float]
) -> None:
    boot, inside, tries = Bootstrap(400), 0, 200
    for i in range(tries):
        rng = RNG(100 + i)
        runs = method(rng, rng.random(300), 0.0, seeds, rounds, np.array(sds))
        found = boot.interval(boot.sample(runs))
        inside += found.low <= 0.7 <= found.high
    assert 0.90 <= inside / tries <= 0.995


def test_few_seeds_without_students_factor_would_miss_the_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The simulation can fail: seeds taken as if they were many hold it too seldom."""

    def plain(rng: np.random.Generator, groups: list[Array], replicates: int) -> Array:
        result = np.zeros(replicates)
        for values in groups:
            places = rng.integers(len(values), size=(replicates, len(values)))
            result += (values[places].mean(1) - values.mean()) / len(groups)
        return result

    monkeypatch.setattr("hdrq_deploy.numerics.intervals._few", plain)
    boot, inside = Bootstrap(400), 0
    for i in range(200):
        rng = RNG(100 + i)
        runs = method(rng, rng.random(3000), 0.0, 3, 1, np.array([0.03, 0]))
        found = boot.interval(boot.sample(runs))
        inside += found.low <= 0.7 <= found.high
    assert inside / 200 < 0.85


def test_an_interval_shrinks_with_images_and_says_where_spread_comes_from() -> None:
    rng = RNG(3)
    boot, widths = Bootstrap(500), []
    for images in (100, 400, 1600):
        runs = {0: [{"d": (np.arange(images) % 10 < 7).astype(int)}]}
        found = boot.interval(boot.sample(runs))
        assert found.value == pytest.approx(0.7)
        assert found.half == pytest.approx(1.96 * np.sqrt(0.21 / images), rel=0.15)
        assert found.spread["calibration"] == found.spread["rounding"] == 0
        widths.append(found.half)
    assert widths[0] > widths[1] > widths[2]
    noisy = method(rng, rng.random(4000), 0, 3, 3, np.array([0.0, 0.1]))
    spread = boot.interval(boot.sample(noisy)).spread
    assert spread["rounding"] > spread["images"]


def samples(boot: Bootstrap, gap: float, seeds: int = 3) -> list[Sample]:
    """Two methods on the same images, the first better by ``gap``."""
    rng = RNG(4)
    chance = rng.random(500)
    sds = np.array([0.01, 0.005])
    return [boot.sample(method(rng, chance, shift, seeds, 2, sds)) for shift in (gap, 0.0)]


def test_a_method_does_not_differ_from_itself() -> None:
    boot = Bootstrap(300)
    first, _ = samples(boot, 0.0)
    found = boot.difference(first, first)
    assert found.value == 0 and found.low < 0 < found.high and found.p > 0.9
    one = boot.sample({0: [{"d": np.arange(50) % 2}]})
    found = boot.difference(one, one)
    assert (found.low, found.high, found.p, found.is_exact) == (0, 0, 1, True)
    assert boot.winner([first, first]) is None


def test_only_what_wins_outside_its_interval_is_the_winner() -> None:
    boot = Bootstrap(1000)
    clear, close = samples(boot, 0.15), samples(boot, 0.004)
    assert boot.winner(clear) == 0 and boot.winner(clear[::-1]) == 1
    assert boot.difference(*clear).p < 0.01
    # The best of a close pair is the best by its mean alone.
    assert abs(boot.difference(*close).value) > 0
    assert boot.winner(close) is None
    # Clear against one and not against another is not enough.
    assert boot.winner([*close, clear[1]]) is None
    # One calibration seed says nothing of others, however clear it is.
    assert boot.winner(samples(boot, 0.15, seeds=1)) is None
    assert boot.winner(clear[:1]) is None


def test_pairing_by_images_finds_what_separate_intervals_hide() -> None:
    rng, boot = RNG(5), Bootstrap(1000)
    hard = rng.random(400)
    steady = np.array([0.002, 0])
    first, second = (boot.sample(method(rng, hard, shift, 3, 1, steady)) for shift in (0.04, 0.0))
    a, b = boot.interval(first), boot.interval(second)
    assert a.low < b.high
    assert boot.difference(first, second).wins


def test_runs_of_other_seeds_are_drawn_apart() -> None:
    boot = Bootstrap(500)
    first, second = samples(boot, 0.0)
    renamed = Sample(
        second.runs, second.images, {seed + 7: v for seed, v in second.figures.items()}
    )
    apart = boot.difference(first, renamed)
    assert apart.calibrations == 3 and apart.value == boot.difference(first, second).value
    assert apart.spread["calibration"] > 0
