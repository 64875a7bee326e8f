"""Figures of ``benchmarks/parents.py``, beside NumPy on the rows themselves."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.numerics.layer_statistics import InputStatistics
from hdrq_deploy.numerics.quantization import along

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def parents(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("parents")


def test_noise_and_shift_are_those_of_the_rows(parents: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((500, 2, 6)) @ rng.standard_normal((2, 6, 6)).sum(0)  # (rows, groups, features)
    own, other = (rng.standard_normal((4, 6)) for _ in range(2))  # two outputs of each group
    mean = x.mean(0)
    centred = x - mean
    covariance = np.einsum("rgf,rgh->gfh", centred, centred) / len(x)
    seen = InputStatistics.of(len(x), mean, covariance, 6)
    record = SimpleNamespace(layout="conv", groups=2, features=6)
    layers = [parents.Layer(w.reshape(4, 6, 1, 1), b) for w, b in ((own, 0.5), (other, 0.2))]

    def outputs(weight: Any, bias: float) -> Any:
        return np.einsum("rgf,gof->rgo", x, weight.reshape(2, 2, 6)).reshape(len(x), 4) + bias

    difference = outputs(other, 0.2) - outputs(own, 0.5)
    variance = outputs(own, 0.5).var(0).sum()
    expected = difference.var(0).sum() / variance, (difference.mean(0) ** 2).sum() / variance
    assert parents._output_error(layers[1], layers[0], record, seen) == pytest.approx(expected)


def test_all_forms_of_a_bundle_give_the_layers_of_the_network(
    parents: ModuleType, make: Any
) -> None:
    folded = parents.layers_of(make(method="float-folded").path)
    apart = parents.layers_of(make(method="float").path)
    carried = make(fold="steps", wbits=8, per_channel=True)
    assert folded.keys() == apart.keys() == parents.layers_of(carried.path).keys()
    scales = {layer.module: layer.weight for layer in carried.manifest.layers}
    for name, layer in parents.layers_of(carried.path).items():
        np.testing.assert_allclose(apart[name].weight, folded[name].weight, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(apart[name].bias, folded[name].bias, rtol=1e-5, atol=1e-6)
        entry = carried.manifest.tensors[scales[name]]
        step = along(carried.tensor(entry.scale), layer.weight.ndim, entry.axis)
        assert (np.abs(layer.weight - folded[name].weight) <= 0.5001 * step + 1e-6).mean() > 0.98
        np.testing.assert_allclose(layer.bias, folded[name].bias, rtol=1e-2, atol=1e-2)


def test_moved_codes_are_counted(parents: ModuleType, make: Any) -> None:
    bundle, folded = make(wbits=4), make(method="float-folded")
    floats = parents.layers_of(folded.path)
    assert parents.moved(bundle, floats) == 0.0  # round to nearest moves none
    layer = bundle.manifest.layers[0]
    step = bundle.tensor(bundle.manifest.tensors[layer.weight].scale)
    pushed = parents.Layer(floats[layer.module].weight + np.max(step), floats[layer.module].bias)
    counts = {item.weight: bundle.tensor(item.weight).size for item in bundle.manifest.layers}
    found = parents.moved(bundle, {**floats, layer.module: pushed})
    assert 0.5 < found * sum(counts.values()) / counts[layer.weight] <= 1.0
