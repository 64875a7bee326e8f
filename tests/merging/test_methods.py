"""The tables of merge methods, roundings and criteria."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hdrq_deploy import merge
from hdrq_deploy.errors import MergeError
from hdrq_deploy.merging import METHODS, ROUNDINGS, merge_checkpoints
from hdrq_deploy.merging.methods import MergeMethod, MethodOptions
from hdrq_deploy.numerics.quantization import along, dequantize


def largest(tensors: Any, merge_weights: Any, base: Any, options: Any) -> Any:
    return np.max(np.stack(tensors), axis=0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(METHODS, "largest", MergeMethod(largest, "the largest value"))
    return "largest"


def test_a_method_of_the_table_merges_checkpoints(toy: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    states = [
        {"weight": rng.normal(size=(3, 4)).astype(np.float32), "factor": np.float32(i + 1)}
        for i in range(2)
    ]
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for state, path in zip(states, paths, strict=True):
        save_file({name: np.asarray(value) for name, value in state.items()}, path)
    merged = load_file(merge_checkpoints(paths, tmp_path / "m.safetensors", method=toy))
    expected = np.maximum(states[0]["weight"], states[1]["weight"])
    np.testing.assert_array_equal(merged["weight"], expected)
    assert merged["factor"] == 1.5  # one element: the weighted mean


def test_a_method_of_the_table_merges_the_real_weights_of_bundles(
    toy: str, make: Any, tmp_path: Path
) -> None:
    bundles = [make(domain=d) for d in ("night", "day")]
    merged = merge(bundles, tmp_path / "m.hdrq", rounding="nearest", method=toy)
    assert merged.manifest.options["merge"]["method"] == toy
    entries = merged.manifest.tensors
    for name, entry in entries.items():
        values = [bundle.tensor(name).astype(np.float64) for bundle in bundles]
        if entry.role == "codes":
            scales = [bundle.tensor(entry.scale) for bundle in bundles]
            real = [
                dequantize(q.astype(np.int8), s, entry.axis)
                for q, s in zip(values, scales, strict=True)
            ]
            scale = along(merged.tensor(entry.scale).astype(np.float64), real[0].ndim, entry.axis)
            codes = np.rint(np.maximum(*real).astype(np.float64) / scale).clip(entry.lo, entry.hi)
            np.testing.assert_array_equal(merged.tensor(name), codes)
        elif entry.role == "scale":  # never the largest: a scale is no trained parameter
            np.testing.assert_allclose(merged.tensor(name), np.mean(values, 0), rtol=1e-6)


def test_a_method_of_the_table_merges_float_bundles(toy: str, make: Any, tmp_path: Path) -> None:
    bundles = [make(domain=d, method="float") for d in ("night", "day")]
    merged = merge(bundles, tmp_path / "m.hdrq", rounding="nearest", method=toy)
    names = [n for n, e in merged.manifest.tensors.items() if e.role == "float"]
    differing = [n for n in names if not np.array_equal(bundles[0].tensor(n), bundles[1].tensor(n))]
    assert "conv1.weight" in differing
    for name in names:
        expected = np.maximum(*(bundle.tensor(name) for bundle in bundles))
        np.testing.assert_array_equal(merged.tensor(name), expected)


def test_bundles_refuse_what_they_cannot_be_merged_with(
    toy: str, make: Any, tmp_path: Path
) -> None:
    bundles = [make(domain=d) for d in ("night", "day")]
    for options, message in (
        ({"method": "ties"}, "needs the source weights"),
        ({"method": "median"}, "choose one of mean, regression, task-arithmetic, ties"),
        ({"method": toy, "rounding": "advanced"}, "choose nearest"),
        ({"rounding": "up"}, "choose one of nearest, noise, advanced"),
    ):
        with pytest.raises(MergeError, match=message):
            merge(bundles, tmp_path / "m.hdrq", **options)


def test_options_are_checked_when_they_are_made() -> None:
    for options in ({"density": 0.0}, {"density": 1.5}, {"scaling": float("nan")}):
        with pytest.raises(MergeError, match="density above 0"):
            MethodOptions(**options)


def test_a_rounding_that_tosses_is_one_that_draws() -> None:
    tossing = [name for name, rounding in ROUNDINGS.items() if rounding.tosses]
    assert tossing == ["noise", "advanced"]
