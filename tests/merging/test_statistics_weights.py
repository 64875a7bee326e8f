"""Merge weights from statistics, beside the rows that the statistics are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle, merge
from hdrq_deploy.cli import merge as command
from hdrq_deploy.errors import MergeError
from hdrq_deploy.formats.bundle_manifest import FoldRecord
from hdrq_deploy.merging import METHODS, Merger, weights_from_statistics
from hdrq_deploy.merging.layers import LayerMerge
from hdrq_deploy.merging.methods import MethodOptions
from hdrq_deploy.merging.statistics_weights import layers_in_order, output_errors
from hdrq_deploy.numerics.layer_matrix import rows_of, with_bias
from hdrq_deploy.numerics.layer_statistics import InputStatistics
from tests.merging.seen import drawn_rows, with_statistics

POINTS = [(0.5, 0.5), (0.2, 0.8), (1.0, 0.0)]


def merging_of(bundles: Any) -> LayerMerge:
    tensors = bundles[0].manifest.tensors
    return LayerMerge(bundles, METHODS["regression"], "nearest", MethodOptions(), tensors)


def seen(
    make: Any, folder: Path, name: str, faint: float = 1.0, silent: str = "", **options: Any
) -> list[Bundle]:
    """A pair; inputs of the second are ``faint`` times as large, and none at ``silent``."""

    def change(layer: str, statistics: InputStatistics) -> InputStatistics:
        size = 0.0 if layer == silent else faint
        return replace(
            statistics,
            mean=size * statistics.mean,
            factor=size * statistics.factor,
            diagonal=size**2 * statistics.diagonal,
        )

    night, day = (make(name, domain=domain, **options) for domain in ("night", "day"))
    return [
        with_statistics(night, folder / "night.hdrq", 0),
        with_statistics(day, folder / "day.hdrq", 50, change=change),
    ]


def gain(fold: FoldRecord | None, tensor: Any) -> Any:
    """What a BatchNorm carried by the scales multiplies its layer's outputs by."""
    return 1.0 if fold is None else tensor(fold.gamma) / np.sqrt(tensor(fold.variance) + fold.eps)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Tiny", {}), ("Tiny", {"fold": "steps"}), ("Attention", {}), ("Net", {})],
)
def test_errors_are_those_of_the_rows(make: Any, tmp_path: Path, name: str, options: Any) -> None:
    bundles = seen(make, tmp_path, name, **options)
    merging = merging_of(bundles)
    heavy = [
        node
        for node in bundles[0].graph_ir().graph
        if node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}
    ]
    names = layers_in_order(merging)
    errors = output_errors(merging, names, POINTS)
    found = {name: errors[:, :, place] for place, name in enumerate(names)}
    assert found.keys() == set(merging.weights)
    looked = 0
    for number, node in enumerate(heavy):
        value = node.inputs[1]
        while value.name not in found and value.producer() is not None:
            value = value.producer().inputs[0]
        weight = str(value.name)
        if weight not in found:
            continue
        record = merging.record(weight)
        assert record is not None
        weights = [rows_of(w.astype(np.float64), record) for w in merging.weights_of(weight)]
        fold = bundles[0].manifest.folds.get(weight)
        for parent, (own, bundle) in enumerate(zip(weights, bundles, strict=True)):
            x = drawn_rows(50 * parent + number, *own.shape[:2])
            outputs = x @ own * gain(fold, bundle.tensor)
            bias = None if record.bias is None else bundle.tensor(record.bias)
            for point, value in zip(POINTS, found[weight][:, parent], strict=True):
                real = merging.real(weight, point)
                merged = Merger(bundles).floats(point)
                away = x @ rows_of(real.weight, record) * gain(fold, merged.get) - outputs
                if fold is not None:
                    away = away - away.mean(1, keepdims=True)  # BatchNorm is behind it
                elif bias is not None:
                    shift = with_bias(own[:, :0], real.bias - bias.astype(np.float64))
                    away = away + shift
                expected = (away**2).mean(1).sum() / outputs.var(1).sum()
                # Statistics are stored in half precision.
                assert value == pytest.approx(expected, rel=0.05, abs=1e-4)
                looked += 1
    assert looked == 2 * len(POINTS) * len(found)


def test_layers_stand_in_the_order_of_the_graph(make: Any, tmp_path: Path) -> None:
    bundles = seen(make, tmp_path, "Tiny")
    graph = [
        str(value.name)
        for node in bundles[0].graph_ir().graph
        if node.op_type == "DequantizeLinear"
        for value in node.inputs[:1]
        if value is not None
    ]
    names = layers_in_order(merging_of(bundles))
    assert sorted(names) == sorted(merging_of(bundles).weights)
    # The order of the names is another one, or this would test nothing.
    assert names == sorted(names, key=graph.index) != sorted(names)


def test_the_mix_of_the_least_error_is_chosen(make: Any, tmp_path: Path) -> None:
    bundles = seen(make, tmp_path, "Tiny", faint=0.3)
    chosen = weights_from_statistics(Merger(bundles, method="regression"))
    # The parent with faint inputs needs the larger weight.
    assert chosen.weights[1] > 0.5
    merging = merging_of(bundles)
    names = layers_in_order(merging)
    assert list(chosen.layers) == names[len(names) // 2 :]
    points = [point for point, _ in chosen.tried]
    assert points[0] == (0.5, 0.5)
    assert (0.0, 1.0) in points
    scores = output_errors(merging, chosen.layers, points).mean((1, 2))
    assert [score for _, score in chosen.tried] == pytest.approx(scores, abs=2e-6)
    assert chosen.weights == points[int(np.argmin(scores))]
    three = weights_from_statistics(Merger(bundles, method="regression"), threads=3)
    assert (three.weights, three.tried) == (chosen.weights, chosen.tried)


def test_alike_parents_get_equal_weights(make: Any, tmp_path: Path) -> None:
    bundles = [
        with_statistics(make(domain="night"), tmp_path / f"{number}.hdrq", 3) for number in range(3)
    ]
    chosen = weights_from_statistics(Merger(bundles, method="regression"))
    assert chosen.weights == (1 / 3,) * 3
    assert len(chosen.tried) == 67


def test_a_layer_that_saw_nothing_does_not_decide(make: Any, tmp_path: Path) -> None:
    plain = merging_of(seen(make, tmp_path, "Tiny"))
    last = layers_in_order(plain)[-1]
    bundles = seen(make, tmp_path, "Tiny", silent=last)
    errors = output_errors(merging_of(bundles), [last], POINTS)
    assert np.isnan(errors[:, 1]).all()
    assert np.isfinite(errors[:, 0]).all()
    chosen = weights_from_statistics(Merger(bundles, method="regression"))
    assert 0 < chosen.weights[0] < 1
    assert all(np.isfinite(score) for _, score in chosen.tried)


def test_the_command_takes_them(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = seen(make, tmp_path, "Tiny", faint=0.3)
    paths = [str(bundle.path) for bundle in bundles]
    target = tmp_path / "m.hdrq"
    assert command.main([*paths, "--weights", "statistics", "-o", str(target)]) == 0
    said = capsys.readouterr().out
    chosen = weights_from_statistics(Merger(bundles, method="regression"))
    assert "weights " + " ".join(f"{w:g}" for w in chosen.weights) in said
    assert chosen.weights[1] > 0.5
    assert "chosen from statistics: 21 mixes" in said
    told = Bundle.open(target).manifest.options["merge"]
    assert told["from_statistics"]["weights"] == told["weights"] == list(chosen.weights)
    assert "candidates" not in told
    again = merge(bundles, tmp_path / "again.hdrq", list(chosen.weights))
    for name, tensor in Bundle.open(target).tensors().items():
        np.testing.assert_array_equal(tensor, again.tensor(name))


def test_what_it_refuses(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundles = seen(make, tmp_path, "Tiny")
    plain = [make(domain=domain, statistics="off") for domain in ("night", "day")]
    with pytest.raises(MergeError, match="with method 'mean' and rounding 'nearest'; they are th"):
        weights_from_statistics(Merger(bundles))
    with pytest.raises(MergeError, match="found no statistics of its layers' inputs"):
        weights_from_statistics(Merger(plain, method="regression"))
    paths, target = [str(bundle.path) for bundle in bundles], tmp_path / "no.hdrq"
    for parents, flags, text in (
        (paths, ["statistics", "--method", "mean"], "choose --method regression"),
        (paths, ["statistics", "--rounding", "noise"], "and rounding 'noise'; they are those"),
        ([str(b.path) for b in plain], ["statistics"], "found no statistics of its layers' inputs"),
        (paths, ["statistics", "--data", "night=x"], "--data without --weights auto"),
        (paths, ["stats"], "needed one number per bundle, auto or statistics"),
    ):
        assert command.main([*parents, "--weights", *flags, "-o", str(target)]) == 2
        assert text in capsys.readouterr().err
    assert not target.exists()


def test_a_bias_that_is_not_finite_is_named(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = seen(make, tmp_path, "Tiny")
    record = merging_of(bundles).record(layers_in_order(merging_of(bundles))[-1])
    assert record is not None and record.bias is not None
    read = Bundle.tensor

    def tensor(bundle: Bundle, name: str) -> Any:
        value = read(bundle, name)
        return np.full_like(value, np.nan) if name == record.bias else value

    monkeypatch.setattr(Bundle, "tensor", tensor)
    with pytest.raises(MergeError, match=f"{record.weight}: found NaN or infinity in its weights"):
        weights_from_statistics(Merger(bundles, method="regression"))
