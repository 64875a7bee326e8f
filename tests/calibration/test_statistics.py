"""Statistics of layers' inputs, against all rows unfolded by F.unfold and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdrq_deploy.calibration.blocks import find_blocks
from hdrq_deploy.calibration.bundle_model import emit_float
from hdrq_deploy.calibration.capture import capture
from hdrq_deploy.calibration.layer_rows import LayerShape
from hdrq_deploy.calibration.pipeline import fake_quantized
from hdrq_deploy.calibration.preparation import Preparation
from hdrq_deploy.calibration.reconstruction import observe_float
from hdrq_deploy.calibration.statistics import Watch, rank_within
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.formats.statistics import Histogram, Statistics
from hdrq_deploy.numerics.layer_statistics import InputStatistics


class Layers(nn.Module):
    """One layer of every kind whose inputs are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.same = nn.Conv2d(8, 8, (2, 4), padding="same", dilation=(1, 2), bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.token = nn.Linear(4, 6)
        self.table = nn.Parameter(torch.randn(6, 5))
        self.shared = nn.Linear(5, 5)
        self.alone = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.same(torch.relu(self.dilated(torch.relu(self.strided(x))))))
        x = self.up(torch.relu(self.depthwise(x)))
        x = self.token(x.flatten(2).transpose(1, 2))
        x = torch.tanh(torch.tanh(x) @ self.table)
        return self.shared(torch.relu(self.shared(x)) * self.alone)


def unfolded(x: Tensor, layer: nn.Conv2d) -> np.ndarray[Any, Any]:
    """(groups, rows, features) of a convolution by F.unfold."""
    if layer.padding == "same":
        whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        left, right = [w // 2 for w in whole], [w - w // 2 for w in whole]
        x = F.pad(x, (left[1], right[1], left[0], right[0]))
        padding: Any = 0
    else:
        padding = layer.padding
    columns = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return rows.reshape(len(rows), layer.groups, -1).transpose(0, 1).double().numpy()


def all_rows(model: Layers, x: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Every layer's rows, written down by hand."""
    rows = {}
    with torch.no_grad():
        for name in ("strided", "dilated", "same", "depthwise"):
            rows[f"{name}.weight"] = unfolded(x, getattr(model, name))
            x = torch.relu(getattr(model, name)(x))
        pixels = x.permute(0, 2, 3, 1).reshape(-1, 2, 4)
        rows["up.weight"] = pixels.transpose(0, 1).double().numpy()
        x = model.up(x).flatten(2).transpose(1, 2)
        rows["token.weight"] = x.reshape(1, -1, 4).double().numpy()
        x = torch.tanh(model.token(x))
        rows["table"] = x.reshape(1, -1, 6).double().numpy()
        x = torch.tanh(x @ model.table)
        y = torch.relu(model.shared(x)) * model.alone
        rows["shared.weight"] = torch.cat([x, y]).reshape(1, -1, 5).double().numpy()
    return rows


def seen(model: nn.Module, x: Tensor, rank: Any = "full") -> Statistics:
    graph = capture(model, x[:2])
    watch = Watch(graph, rank, len(x))
    observe_float(Preparation(graph, None, find_blocks(graph)), x, watch, torch.device("cpu"))
    statistics = watch.statistics(emit_float(graph))
    assert statistics is not None
    return statistics


def test_mean_and_covariance_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(40, 3, 9, 8) + 3
    statistics, reference = seen(model, x), all_rows(model, x)
    assert set(statistics.layers) == set(reference)
    for name, rows in reference.items():
        layer = statistics.layers[name]
        assert layer.rows == rows.shape[1], name
        np.testing.assert_allclose(layer.mean, rows.mean(1), rtol=1e-5, atol=1e-6, err_msg=name)
        for group, own in enumerate(rows):
            covariance = np.cov(own.T, bias=True)
            atol = 1e-5 * np.abs(covariance).max()
            np.testing.assert_allclose(layer.covariance(group), covariance, atol=atol, err_msg=name)
    assert statistics.layouts == {
        "strided.weight": ("strided.bias", "conv"),
        "dilated.weight": ("dilated.bias", "conv"),
        "same.weight": (None, "conv"),
        "depthwise.weight": ("depthwise.bias", "conv"),
        "up.weight": ("up.bias", "transposed"),
        "token.weight": ("token.bias", "linear"),
        "table": (None, "matmul"),
        "shared.weight": ("shared.bias", "linear"),
    }


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_of_large_maps_some_rows_are_read_of_every_image() -> None:
    torch.manual_seed(0)
    model, x = One(nn.Conv2d(2, 3, 3)).eval(), torch.randn(40, 2, 34, 34)
    x[:, 0] *= torch.arange(40)[:, None, None]  # images differ
    layer = seen(model, x).layers["layer.weight"]
    rows = unfolded(x, model.layer)[0]
    assert layer.rows == 40 * ((1 << 14) // 40) < len(rows)
    covariance = np.cov(rows.T, bias=True)
    error = np.abs(layer.covariance(0) - covariance).max() / covariance.max()
    assert error < 0.04
    again = seen(model, x).layers["layer.weight"]
    np.testing.assert_array_equal(layer.factor, again.factor)


@pytest.mark.parametrize("features", [40, 900])
@pytest.mark.parametrize("images", [24, 120, 2400])
def test_the_largest_eigenvectors_and_the_exact_diagonal_are_kept(
    features: int, images: int
) -> None:
    torch.manual_seed(0)
    model = One(nn.Linear(features, 4)).eval()
    x = torch.randn(images, features) * torch.logspace(0, -4, features) + 5
    layer = seen(model, x, 12).layers["layer.weight"]
    covariance = np.cov(x.double().numpy().T, bias=True)
    values = np.linalg.eigvalsh(covariance)
    factor = layer.factor[0].astype(np.float64)
    assert factor.shape == (12, features)
    best = np.linalg.norm(values[:-12])  # Eckart and Young: no matrix of rank 12 is nearer
    assert np.linalg.norm(covariance - factor.T @ factor) < 1.01 * best
    assert (factor**2).sum() > 0.98 * values[-12:].sum()
    np.testing.assert_allclose(np.diag(layer.covariance(0)), np.diag(covariance), rtol=1e-4)
    assert (np.take_along_axis(factor, np.abs(factor).argmax(1)[:, None], 1) > 0).all()


def test_a_weight_that_is_read_in_two_ways_has_no_statistics() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 6))
            self.other = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.relu(F.linear(x, self.table)) @ self.table)

    assert set(seen(Twice().eval(), torch.randn(8, 6)).layers) == {"other.weight"}


def recorded(bundle: Bundle, x: np.ndarray[Any, Any]) -> dict[str, tuple[Any, Tensor]]:
    """Node and input of every heavy layer of the fake-quantized model, by its weight."""
    module = fake_quantized(bundle, torch.from_numpy(x[:2]))
    inputs: dict[str, tuple[Any, Tensor]] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            named = str(n.target) if n.op == "call_function" else ""
            if "conv" in named or "linear" in named:
                weight = n.args[1]
                weight = weight.args[0] if "dequantize" in str(weight.target) else weight
                inputs[str(weight.target)] = (n, self.fetch_args_kwargs_from_env(n)[0][0])
            return super().run_node(n)

    with torch.no_grad():
        Recorder(module).run(torch.from_numpy(x))
    return inputs


@pytest.mark.parametrize("fold", ["weights", "steps"])
@pytest.mark.parametrize("method", ["rtn", "hdrq"])
def test_inputs_are_those_of_the_float_network(
    make: Any, inputs: Any, fold: str, method: str
) -> None:
    bundle = make("Tiny", method=method, abits=2, wbits=2, fold=fold, statistics="auto")
    statistics = bundle.statistics()
    assert statistics is not None
    recorded_inputs = recorded(make("Tiny", method="float", fold=fold), inputs)
    reference = {f"{weight}_codes": seen for weight, seen in recorded_inputs.items()}
    assert set(statistics.weights) == set(reference)
    for weight, (_, x) in reference.items():
        layer, record = statistics.layer(weight), statistics.record.layer(weight)
        assert record is not None
        if record.layout == "conv":
            rows = unfolded(x, nn.Conv2d(x.shape[1], 8, 3, padding=1, groups=record.groups))
        else:
            rows = x.double().numpy()[None]
        assert record.rows == rows.shape[1]
        np.testing.assert_allclose(layer.mean, rows.mean(1), rtol=1e-3, atol=2e-4, err_msg=weight)
        variances = np.diagonal([layer.covariance(g) for g in range(record.groups)], 0, 1, 2)
        np.testing.assert_allclose(variances, rows.var(1), rtol=1e-2, atol=2e-5, err_msg=weight)
        folds = bundle.manifest.folds
        own = None if weight in folds else f"{weight.split('.')[0]}.bias"
        assert record.bias == own


def test_histograms_are_those_of_what_the_quantizers_read(make: Any, inputs: Any) -> None:
    bundle = make("Tiny", abits=4, fold="weights", statistics="auto")
    statistics = bundle.statistics()
    assert statistics is not None
    assert set(statistics.record.histograms) == {a.scale for a in bundle.manifest.activations}
    histogram = statistics.histogram("input.act_scale")
    counts, _ = np.histogram(inputs, len(histogram.counts), (histogram.low, histogram.high))
    assert histogram.low <= inputs.min() and histogram.high >= inputs.max()
    assert np.abs(histogram.counts - counts).sum() < 20  # values at an edge, in float32


def test_ranges_widen_without_losing_counts() -> None:
    from hdrq_deploy.calibration.statistics import _Counts

    rng, counts = np.random.default_rng(0), _Counts()
    parts = [rng.standard_normal(5000).astype(np.float32) * s for s in (1, 5, 0.1, 40)]
    for part in parts:
        counts.add(torch.from_numpy(part))
    histogram, values = counts.histogram(), np.concatenate(parts)
    assert histogram.low <= values.min() and histogram.high >= values.max()
    assert histogram.high - histogram.low < 4 * (values.max() - values.min())
    needed, _ = np.histogram(values, len(histogram.counts), (histogram.low, histogram.high))
    assert histogram.counts.sum() == len(values)
    assert np.abs(histogram.counts - needed).sum() < 40


def test_a_bundle_is_the_same_with_and_without_statistics(make: Any) -> None:
    off, on = make(), make(statistics="auto")
    assert off.statistics() is None and on.statistics() is not None
    assert off.manifest_sha256 == on.manifest_sha256
    assert (off.path / "manifest.json").read_bytes() != (on.path / "manifest.json").read_bytes()


def test_a_float_bundle_has_statistics_of_the_float_network(make: Any, inputs: Any) -> None:
    bundle = make(method="float", statistics=3)
    statistics = bundle.statistics()
    assert statistics is not None and statistics.record.rank == 3
    rows = unfolded(torch.from_numpy(inputs), nn.Conv2d(3, 8, 3, padding=1))[0]
    layer = statistics.layer("stem.weight")
    np.testing.assert_allclose(layer.mean[0], rows.mean(0), rtol=1e-3)
    np.testing.assert_allclose(np.diag(layer.covariance(0)), rows.var(0), rtol=2e-3)
    assert {layer.rank for layer in statistics.record.layers} == {3}


def test_as_much_room_as_codes_of_a_byte() -> None:
    shapes = {
        "small": LayerShape("conv", 1, 27, 64),
        "large": LayerShape("conv", 1, 4608, 512),
        "depthwise": LayerShape("conv", 512, 9, 512),
        "head": LayerShape("linear", 1, 2048, 1000),
    }
    histograms = {f"{i}.act_scale": Histogram(0.0, 1.0, np.ones(512, np.float32)) for i in range(9)}
    codes = sum(s.features * s.outputs for s in shapes.values())

    def size(rank: int) -> int:
        parts = {}
        for name, s in shapes.items():
            factor = np.zeros((s.groups, min(rank, s.features), s.features))
            each = np.ones((s.groups, s.features))
            parts[name] = InputStatistics.of_factor(1.0, each, each, factor)
        layouts: dict[str, Any] = {name: (None, s.layout) for name, s in shapes.items()}
        return len(Statistics("auto", layouts, parts, histograms).serialize())

    rank = rank_within(shapes, len(histograms))
    assert size(rank) <= codes < size(rank + 5)
    assert rank_within({"tiny": LayerShape("conv", 1, 27, 4)}, 1) == 8
