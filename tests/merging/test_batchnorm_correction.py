"""The BatchNorm behind a merged layer, beside what leaves it on the rows themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle, merge
from hdrq_deploy.formats.statistics import LayerRecord
from hdrq_deploy.merging import Merger
from hdrq_deploy.merging.batchnorm_correction import Norm, NormAtMix, correction, norms_of
from hdrq_deploy.merging.methods import MethodOptions
from hdrq_deploy.numerics.layer_matrix import rows_of
from hdrq_deploy.numerics.layer_statistics import InputStatistics
from hdrq_deploy.numerics.quantization import dequantize
from tests.merging.seen import drawn_rows, statistics_of, with_statistics

MIX = [0.3, 0.7]
LAYER = LayerRecord(weight="w", bias=None, layout="conv", groups=2, features=18, rank=18, rows=1)


def test_a_correction_is_what_the_outputs_of_both_say() -> None:
    rng = np.random.default_rng(0)
    inputs = [drawn_rows(seed, 2, 18) for seed in range(2)]
    parents = [rng.standard_normal((6, 2, 3, 3)) for _ in range(2)]
    merged = rng.standard_normal((6, 2, 3, 3))
    seen = [statistics_of(x) for x in inputs]
    got = correction(merged, parents, seen, MIX, LAYER)

    def mixture(outputs: Any) -> Any:
        mean = sum(m * y.mean(1) for m, y in zip(MIX, outputs, strict=True))
        square = sum(m * (y**2).mean(1) for m, y in zip(MIX, outputs, strict=True))
        return mean.ravel(), (square - mean**2).ravel()

    own = [x @ rows_of(w, LAYER) for x, w in zip(inputs, parents, strict=True)]
    mean, variance = mixture(own)
    mean_now, variance_now = mixture([x @ rows_of(merged, LAYER) for x in inputs])
    np.testing.assert_allclose(got.shift, mean_now - mean, atol=1e-5)
    np.testing.assert_allclose(got.ratio, variance_now / variance, rtol=1e-4)
    same = correction(parents[0], [parents[0]] * 2, seen, MIX, LAYER)
    np.testing.assert_allclose(same.shift, 0, atol=1e-6)
    np.testing.assert_allclose(same.ratio, 1, rtol=1e-6)


@pytest.mark.parametrize("model", ["Tiny", "PlainNorm"])
def test_averages_that_are_rounded_with_statistics_correct_the_moments(
    make: Any, tmp_path: Path, model: str
) -> None:
    bundles = [
        with_statistics(make(model, domain=d, fold="steps"), tmp_path / f"{d}.hdrq", k)
        for k, d in enumerate(("night", "day"))
    ]
    norms = norms_of(bundles[0])
    assert len(norms) == 2  # bn behind stem, bn1 behind conv1
    matched = merge(bundles, tmp_path / "mean.hdrq", rounding="nearest", method="mean")
    merged = merge(bundles, tmp_path / "m.hdrq", rounding="compensated", method="mean")
    for norm in norms.values():
        ratio = merged.tensor(norm.variance) / matched.tensor(norm.variance)
        assert (ratio > 0).all() and np.abs(ratio - 1).max() > 1e-4
        assert np.abs(merged.tensor(norm.mean) - matched.tensor(norm.mean)).max() > 1e-4


@dataclass(frozen=True)
class Seen:
    """Bundles whose norms differ in all four tensors, and the rows that their layers saw."""

    bundles: list[Bundle]
    norms: dict[str, Norm]
    rows: dict[str, list[Any]]

    @classmethod
    def of(cls, make: Any, folder: Path, model: str, **options: Any) -> Seen:
        bundles = []
        for number, domain in enumerate(("night", "day")):
            plain, rng = make(model, domain=domain, **options), np.random.default_rng(number)
            own = {
                name: (plain.tensor(name) * rng.uniform(0.5, 2, 8) + shift * rng.normal(size=8))
                for norm in norms_of(plain).values()
                for name, shift in ((norm.gamma, 0.0), (norm.beta, 0.5))
                if name in plain.manifest.tensors
            }
            bundles.append(
                with_statistics(
                    plain,
                    folder / f"{domain}.hdrq",
                    50 * number,
                    tensors={name: value.astype(np.float32) for name, value in own.items()},
                )
            )
        norms = norms_of(bundles[0])
        heavy = ("stem", "conv1")
        assert [name.split(".")[0] for name in norms] == list(heavy)
        # The statistics are of rows that were drawn in the order of the layers.
        rows = {
            name: [drawn_rows(50 * parent + number, 1, features) for parent in range(2)]
            for number, (name, features) in enumerate(zip(norms, (27, 72), strict=True))
        }
        return cls(bundles, norms, rows)

    def behind(self, name: str, weight: Any, tensors: Any) -> Any:
        """What leaves BatchNorm for each parent's rows: NumPy, one channel after another."""
        norm = self.norms[name]
        mean, variance = tensors(norm.mean), tensors(norm.variance)
        gamma = tensors(norm.gamma) if norm.gamma not in norm.constants else np.ones(8)
        beta = tensors(norm.beta) if norm.beta not in norm.constants else np.zeros(8)
        bias = np.zeros(8) if norm.raw_bias is None else tensors(norm.raw_bias)
        matrix = weight.reshape(8, -1).astype(np.float64).T
        return [
            (x[0] @ matrix + bias - mean) / np.sqrt(variance.astype(np.float64) + norm.eps) * gamma
            + beta
            for x in self.rows[name]
        ]

    def own(self, name: str) -> list[Any]:
        """What leaves BatchNorm in each parent, for its own rows."""
        outputs = []
        for parent, bundle in enumerate(self.bundles):
            weight = real_weight(bundle, name)
            outputs.append(self.behind(name, weight, bundle.tensor)[parent])
        return outputs


def real_weight(bundle: Bundle, name: str) -> Any:
    entry, fold = bundle.manifest.tensors[name], bundle.manifest.folds.get(name)
    if fold is None:
        return bundle.tensor(name)
    return dequantize(bundle.tensor(name), bundle.tensor(fold.raw_scale), entry.axis)


# Float nodes, and codes whose scales carry BatchNorm; a norm of its own gamma, and one of none; the
# second layer has a bias in front of BatchNorm.
KEPT_APART = [
    ("Tiny", "float", {}),
    ("PlainNorm", "float", {}),
    ("Tiny", "rtn", {"fold": "steps"}),
    ("PlainNorm", "rtn", {"fold": "steps"}),
]


@pytest.mark.parametrize(("model", "method", "options"), KEPT_APART)
def test_regression_is_least_squares_behind_batchnorm(
    make: Any, tmp_path: Path, model: str, method: str, options: Any
) -> None:
    seen = Seen.of(make, tmp_path, model, method=method, **options)
    numbers = MethodOptions(alpha=1.0, ridge=0.0)
    merger = Merger(seen.bundles, method="regression", method_options=numbers)
    layers = merger.merged_layers(MIX)
    tensors = {**layers.others, **layers.weights}
    for name in seen.norms:
        got = seen.behind(name, tensors[name], tensors.__getitem__)
        own = seen.own(name)
        sides: list[Any] = [[], []]
        for share, x, wanted in zip(MIX, seen.rows[name], own, strict=True):
            root = np.sqrt(share / x.shape[1])
            sides[0].append(root * np.hstack([x[0], np.ones((x.shape[1], 1))]))
            sides[1].append(root * wanted)
        solution = np.linalg.lstsq(np.vstack(sides[0]), np.vstack(sides[1]))[0]
        for x, found, wanted in zip(seen.rows[name], got, own, strict=True):
            best = np.hstack([x[0], np.ones((x.shape[1], 1))]) @ solution
            # Statistics are stored as codes.
            assert np.abs(found - best).max() < 0.05 * wanted.std()
            # The compromise is another function than this parent's own.
            assert np.abs(found - wanted).max() > 0.2 * wanted.std()


@pytest.mark.parametrize(
    ("model", "method", "options", "rounding"),
    [
        *((*kept, "nearest") for kept in KEPT_APART),
        *((*kept, "compensated") for kept in KEPT_APART if kept[1] != "float"),
    ],
)
def test_rounded_merges_keep_the_mean_behind_batchnorm(
    make: Any, tmp_path: Path, model: str, method: str, options: Any, rounding: str
) -> None:
    seen = Seen.of(make, tmp_path, model, method=method, **options)
    merged = merge(seen.bundles, tmp_path / "m.hdrq", MIX, rounding, method="regression")
    for name, norm in seen.norms.items():
        got = seen.behind(name, real_weight(merged, name), merged.tensor)
        found = sum(share * y.mean(0) for share, y in zip(MIX, got, strict=True))
        own = seen.own(name)
        wanted = sum(share * y.mean(0) for share, y in zip(MIX, own, strict=True))
        spread = np.vstack(own).std(0)
        assert (np.abs(found - wanted) < 0.02 * spread).all()
        if norm.raw_bias is not None:
            biases = [bundle.tensor(norm.raw_bias) for bundle in seen.bundles]
            expected = sum(share * bias for share, bias in zip(MIX, biases, strict=True))
            np.testing.assert_allclose(merged.tensor(norm.raw_bias), expected, rtol=1e-5)


def test_a_layer_without_a_solution_is_averaged_and_its_mean_follows(
    make: Any, tmp_path: Path
) -> None:
    def without_the_first_input(name: str, seen: InputStatistics) -> InputStatistics:
        dead = [seen.mean.copy(), seen.factor.copy(), seen.diagonal.copy()]
        for values in dead:
            values[..., 0] = 0
        return replace(seen, mean=dead[0], factor=dead[1], diagonal=dead[2])

    bundles = [
        with_statistics(
            make("Tiny", domain=d, method="float"),
            tmp_path / f"{d}.hdrq",
            50 * k,
            change=without_the_first_input,
        )
        for k, d in enumerate(("night", "day"))
    ]
    (norm,) = (n for n in norms_of(bundles[0]).values() if n.raw_bias is not None)
    numbers = MethodOptions(alpha=1.0, ridge=0.0)
    merged = merge(bundles, tmp_path / "m.hdrq", MIX, method_options=numbers)
    assert "conv1.weight" in merged.manifest.options["merge"]["fallbacks"]
    rows = [drawn_rows(50 * parent + 1, 1, 72)[0] for parent in range(2)]
    for x in rows:
        x[:, 0] = 0

    def centred(bundle: Bundle, parent: int) -> Any:
        matrix = bundle.tensor("conv1.weight").reshape(8, -1).T
        outputs = rows[parent] @ matrix + bundle.tensor(norm.raw_bias)
        return MIX[parent] * (outputs.mean(0) - bundle.tensor(norm.mean))

    own = sum(centred(bundle, parent) for parent, bundle in enumerate(bundles))
    together = sum(centred(merged, parent) for parent in range(2))
    np.testing.assert_allclose(together, own, atol=2e-3)


def parent(gamma: Any, variance: Any, seed: int) -> dict[str, Any]:
    """Tensors of a norm, its mean and beta drawn."""
    mean, beta = np.random.default_rng(seed).normal(size=(2, 4)).astype(np.float32)
    return {"g": np.float32(gamma), "b": beta, "m": mean, "v": np.float32(variance)}


def test_a_channel_that_shows_nothing_is_averaged_and_keeps_matched_moments() -> None:
    one = np.ones(4)
    # Gammas that cancel, that do not, that are 0, and next to 0.
    parents = [parent([1, 2, 0, 1e-20], one, 0), parent([-1, 1, 0, 1e-20], one, 1)]
    norm = NormAtMix(Norm("g", "b", "m", "v", 0.0), parents, [0.5, 0.5])
    assert norm.shows.tolist() == [False, True, False, False]
    behind, averaged = np.ones((1, 5, 4)), np.full((1, 5, 4), 7.0)
    rows = norm.in_front(behind, lambda: averaged)
    assert (rows[..., [0, 2, 3]] == 7).all()
    np.testing.assert_allclose(rows[..., 1], 1 / norm.gain[1])
    layer = LAYER.model_copy(update={"layout": "linear", "groups": 1, "features": 5, "rank": 5})
    inputs = [drawn_rows(k, 1, 5) for k in range(2)]
    seen, weight = [statistics_of(x) for x in inputs], np.ones((4, 5))
    placed = norm.placed(weight, [weight] * 2, seen, layer)
    hidden = [0, 2, 3]
    np.testing.assert_array_equal(placed["m"][hidden], norm.tensors["m"][hidden])
    np.testing.assert_array_equal(placed["v"], norm.tensors["v"])
    sums = [x[0].sum(1).mean() for x in inputs]
    both = zip(parents, sums, strict=True)
    wanted = sum(p["g"][1] * (s - p["m"][1]) + p["b"][1] for p, s in both) / 2
    got = norm.gain[1] * (np.mean(sums) - placed["m"][1]) + norm.tensors["b"][1]
    assert got == pytest.approx(wanted, rel=1e-5)


def test_a_parent_that_hardly_varies_hides_no_channel() -> None:
    parents = [parent(np.ones(4), np.full(4, 1e-9), 0), parent(np.ones(4), np.full(4, 30.0), 1)]
    norm = NormAtMix(Norm("g", "b", "m", "v", 1e-5), parents, [0.3, 0.7])
    assert np.max(norm.gains[0]) > 1e3 * np.max(norm.gain) and norm.shows.all()


def test_merges_that_keep_their_systems_solve_the_same_behind_batchnorm(
    make: Any, tmp_path: Path
) -> None:
    seen = Seen.of(make, tmp_path, "Tiny", fold="steps")
    plain, kept = (Merger(seen.bundles, method="regression", keep=keep) for keep in (False, True))
    for mix in ([0.5, 0.5], MIX, [1.0, 0.0]):
        one, other = plain.merged_layers(mix), kept.merged_layers(mix)
        for name, norm in seen.norms.items():
            np.testing.assert_allclose(one.weights[name], other.weights[name], atol=1e-4)
            np.testing.assert_allclose(
                one.others[norm.mean], other.others[norm.mean], rtol=1e-3, atol=1e-3
            )
