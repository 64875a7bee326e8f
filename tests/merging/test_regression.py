"""Merging by regression, beside least squares on the rows themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdrq_deploy import Bundle, merge
from hdrq_deploy.cli import merge as command
from hdrq_deploy.errors import MergeError
from hdrq_deploy.formats.statistics import LayerRecord
from hdrq_deploy.merging import METHODS
from hdrq_deploy.merging.methods import MethodOptions
from hdrq_deploy.numerics.layer_matrix import bias_of, rows_of, weight_of, with_bias
from hdrq_deploy.numerics.moments import Moments, SingularError, second_moments
from hdrq_deploy.numerics.quantization import dequantize
from tests.merging.seen import drawn_rows, statistics_of, with_statistics

MIX = [0.5, 0.3, 0.2]


def regression(
    weights: Any, rows: Any, mix: Any, bias: bool, options: MethodOptions, rank: int = 1000
) -> Any:
    layers = METHODS["regression"].layers
    assert layers is not None
    parts = [
        layers.prepare(w, statistics_of(x, rank), bias, options)
        for w, x in zip(weights, rows, strict=True)
    ]
    return layers.merge(parts, mix, options)


@pytest.mark.parametrize("bias", [False, True])
def test_regression_is_least_squares_on_the_rows_of_all_parents(bias: bool) -> None:
    rng = np.random.default_rng(0)
    rows = [drawn_rows(seed, 3, 7) for seed in range(3)]
    weights = [rng.standard_normal((3, 7 + bias, 4)) for _ in range(3)]
    got = regression(weights, rows, MIX, bias, MethodOptions(alpha=1.0, ridge=0.0))
    wrong = regression(weights, rows, MIX[::-1], bias, MethodOptions(alpha=1.0, ridge=0.0))
    for group in range(3):
        sides: list[Any] = [[], []]
        for x, w, share in zip(rows, weights, MIX, strict=True):
            x = np.hstack([x[group], np.ones((x.shape[1], 1))]) if bias else x[group]
            sides[0].append(np.sqrt(share / len(x)) * x)
            sides[1].append(np.sqrt(share / len(x)) * x @ w[group])
        expected = np.linalg.lstsq(np.vstack(sides[0]), np.vstack(sides[1]))[0]
        # Statistics are kept in single precision.
        np.testing.assert_allclose(got[group], expected, rtol=1e-3, atol=1e-4)
        assert np.abs(wrong[group] - expected).max() > 0.01


def test_without_products_of_inputs_every_weight_is_a_mean_by_its_inputs_size() -> None:
    rng = np.random.default_rng(1)
    rows = [drawn_rows(seed, 1, 5) for seed in range(2)]
    weights = [rng.standard_normal((1, 5, 3)) for _ in range(2)]
    got = regression(weights, rows, [0.25, 0.75], False, MethodOptions(alpha=0.0, ridge=0.0))
    sizes = [share * (x[0] ** 2).mean(0) for x, share in zip(rows, [0.25, 0.75], strict=True)]
    expected = (
        sum(s[:, None] * w[0] for s, w in zip(sizes, weights, strict=True)) / sum(sizes)[:, None]
    )
    np.testing.assert_allclose(got[0], expected, rtol=1e-5)


def test_a_low_rank_is_solved_like_the_whole_matrix() -> None:
    rng = np.random.default_rng(2)
    moments = Moments(rng.standard_normal((2, 5, 40)), rng.uniform(0.1, 1, (2, 40)))
    rows = rng.standard_normal((2, 40, 3))
    assert moments.low_rank
    whole = moments.whole()
    np.testing.assert_allclose(moments.times(rows), whole @ rows)
    np.testing.assert_allclose(moments.solved(rows), np.linalg.solve(whole, rows), rtol=1e-9)
    np.testing.assert_allclose(moments.variances(), np.diagonal(whole, axis1=1, axis2=2))


def test_a_channel_without_inputs_gets_the_mean_and_without_ridge_there_is_no_solution() -> None:
    rng = np.random.default_rng(3)
    rows = [drawn_rows(seed, 1, 5) for seed in range(2)]
    for x in rows:
        x[:, :, 2] = 0
    weights = [rng.standard_normal((1, 5, 3)) for _ in range(2)]
    got = regression(weights, rows, [0.5, 0.5], False, MethodOptions())
    np.testing.assert_allclose(got[0, 2], (weights[0] + weights[1])[0, 2] / 2)
    with pytest.raises(SingularError, match="always 0"):
        regression(weights, rows, [0.5, 0.5], False, MethodOptions(alpha=1.0, ridge=0.0))
    for x in rows:
        x[:, :, 2] = x[:, :, 1]
    with pytest.raises(SingularError, match="singular|badly conditioned"):
        regression(weights, rows, [0.5, 0.5], False, MethodOptions(alpha=1.0, ridge=0.0))


def test_second_moments_are_those_of_the_rows_with_a_one() -> None:
    x = drawn_rows(4, 2, 6)
    got = second_moments(statistics_of(x), 0.8, bias=True).whole()
    for group in range(2):
        longer = np.hstack([x[group], np.ones((x.shape[1], 1))])
        g = longer.T @ longer / len(longer)
        np.testing.assert_allclose(got[group], 0.8 * g + 0.2 * np.diag(np.diag(g)), rtol=1e-4)


@pytest.mark.parametrize("layout", ["conv", "linear", "matmul", "transposed"])
def test_rows_of_a_weight_compute_what_the_layer_computes(layout: Any) -> None:
    torch.manual_seed(0)
    groups = 2 if layout in {"conv", "transposed"} else 1
    shapes = {"conv": (6, 4, 3, 3), "linear": (6, 8), "matmul": (8, 6), "transposed": (8, 3, 1, 1)}
    weight, bias = torch.randn(shapes[layout]), torch.randn(6)
    if layout == "conv":
        x = torch.randn(5, 8, 3, 3)
        expected = torch.nn.functional.conv2d(x, weight, bias, groups=2).flatten(1)
    elif layout == "transposed":
        x = torch.randn(5, 8, 1, 1)
        expected = torch.nn.functional.conv_transpose2d(x, weight, bias, groups=2).flatten(1)
    else:
        x = torch.randn(5, 8)
        expected = x @ (weight.T if layout == "linear" else weight) + bias
    features = x[0].numel() // groups
    record = LayerRecord(
        weight="w", bias="b", layout=layout, groups=groups, features=features, rank=0, rows=1
    )
    rows = rows_of(weight.numpy().astype(np.float64), record)
    inputs = x.numpy().reshape(5, groups, features).swapaxes(0, 1)
    ones = np.concatenate([inputs, np.ones((groups, 5, 1))], 2)
    whole = with_bias(rows, bias.numpy())
    got = (ones @ whole).swapaxes(0, 1).reshape(5, 6)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(weight_of(rows, record, weight.shape), weight.numpy())
    np.testing.assert_allclose(bias_of(whole), bias.numpy())


@pytest.fixture(scope="module")
def seen(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pairs of bundles with statistics, by name and options."""
    folder = tmp_path_factory.mktemp("seen")
    made: dict[Any, list[Bundle]] = {}

    def pair(name: str = "Tiny", **options: Any) -> list[Bundle]:
        key = (name, tuple(sorted(options.items())))
        if key not in made:
            made[key] = [
                with_statistics(
                    make(name, domain=d, **options), folder / f"{len(made)}-{d}.hdrq", seed
                )
                for seed, d in enumerate(("night", "day"))
            ]
        return made[key]

    return pair


@pytest.mark.parametrize(
    ("name", "options"),
    [("Tiny", {}), ("Tiny", {"per_channel": True}), ("Attention", {}), ("Tiny", {"fold": "steps"})],
)
def test_bundles_with_statistics_are_merged_by_regression(
    seen: Any, tmp_path: Path, name: str, options: Any
) -> None:
    bundles = seen(name, **options)
    merged = merge(bundles, tmp_path / "m.hdrq", [0.4, 0.6])
    told = merged.manifest.options["merge"]
    assert (told["method"], told["rounding"]) == ("regression", "compensated")
    assert "fallbacks" not in told
    record = bundles[0].manifest.statistics
    assert record is not None
    merged = merge(bundles, tmp_path / "m.hdrq", [0.4, 0.6], "nearest")
    for layer in record.layers:
        if layer.weight in merged.manifest.folds:
            continue  # solved behind BatchNorm: see test_batchnorm_correction
        scale = merged.manifest.tensors[layer.weight].scale
        axis = merged.manifest.tensors[layer.weight].axis
        real = [
            dequantize(b.tensor(layer.weight), b.tensor(scale), axis).astype(np.float64)
            for b in [*bundles, merged]
        ]
        # Half a scale beside the solution, and more where a weight is beyond the codes' range.
        rows = [rows_of(w, layer) for w in real]
        if layer.bias is not None:
            rows = [
                with_bias(r, b.tensor(layer.bias))
                for r, b in zip(rows, [*bundles, merged], strict=True)
            ]
        moments = [
            second_moments(b.statistics().layer(layer.weight), 0.98, layer.bias is not None).whole()
            for b in bundles
        ]
        whole = 0.4 * moments[0] + 0.6 * moments[1]
        expected = np.linalg.solve(whole, 0.4 * moments[0] @ rows[0] + 0.6 * moments[1] @ rows[1])
        inner = slice(None, layer.features)
        widest = float(np.max(merged.tensor(scale)))
        away = np.abs(rows[2] - expected)[:, inner].max()
        assert away < 2 * widest


def test_one_parents_whole_weight_gives_its_own_codes(seen: Any, tmp_path: Path) -> None:
    bundles = seen("Tiny")
    for rounding in ("nearest", "compensated"):
        merged = merge(bundles, tmp_path / "m.hdrq", [1.0, 0.0], rounding)
        for name, entry in merged.manifest.tensors.items():
            if entry.role == "codes":
                np.testing.assert_array_equal(merged.tensor(name), bundles[0].tensor(name))


def test_a_layer_without_a_solution_gets_the_mean_and_the_manifest_says_so(
    seen: Any, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def less(name: str, statistics: Any) -> Any:
        return None if name.startswith("fc") else statistics

    day = with_statistics(make(domain="day"), tmp_path / "day.hdrq", 1, change=less)
    night = with_statistics(make(), tmp_path / "night.hdrq", 0, rank=0)
    bundles = [night, day]
    merged = merge(bundles, tmp_path / "m.hdrq")
    assert merged.manifest.options["merge"]["fallbacks"] == {
        "fc.weight_codes": "no statistics in day.hdrq"
    }
    argv = [str(bundle.path) for bundle in bundles]
    assert command.main([*argv, "-o", str(tmp_path / "n.hdrq")]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(tmp_path / "n.hdrq")]
    assert "note: 1 of the layers merged as the mean" in said.err
    assert "fc.weight_codes (no statistics in day.hdrq)" in said.err
    np.testing.assert_allclose(
        merged.tensor("fc.bias"), (night.tensor("fc.bias") + day.tensor("fc.bias")) / 2, rtol=1e-6
    )

    def dead(name: str, statistics: Any) -> Any:
        if not name.startswith("conv1"):
            return statistics
        return statistics_of(np.zeros((1, 10, statistics.features)))

    blind = [
        with_statistics(make(domain=d), tmp_path / f"{d}.hdrq", k, change=dead)
        for k, d in enumerate(("night", "day"))
    ]
    options = MethodOptions(alpha=1.0, ridge=0.0)
    merged = merge(blind, tmp_path / "m.hdrq", method_options=options)
    reason = merged.manifest.options["merge"]["fallbacks"]["conv1.weight_codes"]
    assert "always 0" in reason
    assert "fallbacks" not in merge(blind, tmp_path / "m.hdrq").manifest.options["merge"]


def test_merges_of_merges_are_merges_of_all(make: Any, tmp_path: Path) -> None:
    domains = ("night", "day", "night")
    a, b, c = (
        with_statistics(make(domain=d, method="float"), tmp_path / f"{k}.hdrq", 10 * k)
        for k, d in enumerate(domains)
    )
    at_once = merge([a, b, c], tmp_path / "abc.hdrq", [0.3, 0.3, 0.4])
    pair = merge([a, b], tmp_path / "ab.hdrq", [0.5, 0.5])
    in_turn = merge([pair, c], tmp_path / "ab-c.hdrq", [0.6, 0.4])
    averaged = merge([a, b, c], tmp_path / "mean.hdrq", [0.3, 0.3, 0.4], method="mean")
    for name in ("conv1.weight", "conv2.weight", "fc.weight", "fc.bias"):
        spread = float(np.abs(at_once.tensor(name) - averaged.tensor(name)).max())
        apart = float(np.abs(at_once.tensor(name) - in_turn.tensor(name)).max())
        # alpha weakens other products the second time, by what the parents' means differ.
        assert apart < 0.05 * spread, name
    files = [merged.statistics() for merged in (at_once, in_turn)]
    for name in files[0].weights:
        whole, parts = (file.layer(name) for file in files)
        # The file holds halves and codes of one byte; the merge of a merge has rounded them twice.
        np.testing.assert_allclose(whole.mean, parts.mean, atol=1e-3)
        largest = float(np.abs(whole.covariance(0)).max())
        np.testing.assert_allclose(whole.covariance(0), parts.covariance(0), atol=0.01 * largest)
    counts = (
        [file.histogram(files[0].record.histograms[0]).counts for file in files]
        if (files[0].record.histograms)
        else []
    )
    assert all(np.isfinite(count).all() for count in counts)


def test_regression_is_the_same_on_any_number_of_threads(seen: Any, tmp_path: Path) -> None:
    one, three = (merge(seen("Tiny"), tmp_path / f"{n}.hdrq", threads=n) for n in (1, 3))
    assert one.manifest == three.manifest


def test_what_a_merge_with_statistics_refuses(
    seen: Any, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [make(domain=d, statistics="off") for d in ("night", "day")]
    for arguments, text in (
        ({"method": "regression"}, "found no statistics"),
        ({"rounding": "compensated"}, "found no statistics"),
        ({"method": "regression", "rounding": "noise"}, "choose nearest or compensated"),
    ):
        with pytest.raises(MergeError, match=text):
            merge(plain, tmp_path / "no.hdrq", **arguments)
    with pytest.raises(MergeError, match="needed an alpha of 0 to 1"):
        MethodOptions(alpha=1.5)
    paths = [str(b.path) for b in seen("Tiny")]
    for flags, text in (
        (["--method", "regression", "--rounding", "advanced"], "no"),
        (["--method", "mean", "--alpha", "0.5"], "--alpha with --method mean"),
        (["--candidates", "3"], "--candidates with --rounding compensated"),
    ):
        assert command.main([*paths, *flags, "-o", str(tmp_path / "no.hdrq")]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "no.hdrq").exists()


@pytest.mark.parametrize("more", [[], ["--wbits", "4"]])
def test_bundles_of_which_one_has_no_statistics_are_averaged_with_a_note(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    seen, plain = make(domain="night", statistics="full"), make(domain="day", statistics="off")
    target = tmp_path / "m.hdrq"

    def said(*bundles: Bundle, flags: Sequence[str] = ()) -> str:
        line = [*(str(b.path) for b in bundles), *more, *flags, "-o", str(target)]
        assert command.main(line) == 0
        return capsys.readouterr().err

    note = f"averaged: regression needs the statistics of all bundles, and {plain.path} has none"
    assert note in said(seen, plain)
    assert "method" not in Bundle.open(target).manifest.options["merge"]
    # Nobody is told who asked for the mean, or has no statistics anywhere.
    assert "averaged" not in said(seen, plain, flags=["--method", "mean"])
    assert "averaged" not in said(plain, make(domain="night", statistics="off"))


def test_bundles_without_statistics_are_averaged_as_before(make: Any, tmp_path: Path) -> None:
    plain = [make(domain=d, statistics="off") for d in ("night", "day")]
    merged = merge(plain, tmp_path / "m.hdrq")
    assert merged.manifest.options["merge"] == {
        "weights": [0.5, 0.5],
        "rounding": "advanced",
        "candidates": 100,
    }
    assert merged.manifest.statistics is None
    third = make(domain="night", per_channel=False, method="rtn", seed=1, statistics="off")
    triple = merge([*plain, third], tmp_path / "t.hdrq")
    assert triple.manifest.options["merge"]["rounding"] == "nearest"
