"""Barriers, curvature and distances of parents and merge, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdrq_deploy.analysis import Settings, analyze
from hdrq_deploy.analysis.landscape import Landscape, real_weights, top_eigenvalue, trace
from hdrq_deploy.cli import analyze as analyze_command
from hdrq_deploy.graph import reference_session


def test_the_hessian_of_a_quadratic_is_found() -> None:
    rng = np.random.default_rng(0)
    root = torch.from_numpy(rng.normal(0, 1, (12, 12)).astype(np.float32))
    matrix = root @ root.T

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        w = torch.cat([weights["a"], weights["b"]])
        return 0.5 * w @ matrix @ w + w.sum()

    at = {"a": torch.ones(5), "b": torch.zeros(7)}
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert top_eigenvalue(loss, at, ["a", "b"], 12) == pytest.approx(largest, rel=1e-3)
    # 400 draws of random signs: the off-diagonal part averages out to a few percent.
    exact = float(matrix.trace())
    assert trace(loss, at, ["a", "b"], 400) == pytest.approx(exact, rel=0.1)


def test_the_analysis_agrees_with_the_graph(make: Any, inputs: Any) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, len(inputs))
    bundles = [make(domain=d, fold="steps") for d in ("night", "day")]
    data = dict.fromkeys(("night", "day"), (inputs, labels))
    settings = Settings(points=3, noises=1, grid=3, seeds=2, candidates=5, products=3)
    result = analyze(bundles, data, None, settings)
    session = reference_session.unfused_session(bundles[0].path / "model.onnx")
    z = session.run(None, {"input": inputs})[0].astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    expected = -np.log(p[np.arange(len(p)), labels]).mean()
    assert result["models"]["night"]["loss"]["day"] == pytest.approx(expected, rel=1e-3)
    (barrier,) = result["barriers"]
    for curve in barrier["loss"]:
        ends = barrier["loss"][curve][0], barrier["loss"][curve][-1]
        height = max(barrier["loss"][curve]) - sum(ends) / 2
        assert barrier["barrier"][curve] == pytest.approx(height)
    middle = barrier["loss"]["float"][1]
    night, day = (real_weights(bundle) for bundle in bundles)
    land = Landscape(bundles[0], data)
    between = {name: (night[name] + day[name]) / 2 for name in night}
    assert middle == pytest.approx(land.real(between).mean_loss, rel=1e-4)
    assert barrier["loss"]["noise"][1] != pytest.approx(middle, rel=1e-6)
    for row in result["distances"]:
        weights = next(n for n in night if n.startswith(row["layer"]))
        a, b = (real[weights].numpy().astype(np.float64) for real in (night, day))
        expected = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert row["between"]["night - day"] == pytest.approx(expected, rel=1e-4)
    codes = [layer.weight for layer in bundles[0].manifest.layers]
    for name, weights in (("night", night), ("day", day)):
        found = result["curvature"][name]
        assert found["trace"] == pytest.approx(trace(land.loss, weights, codes, 3), rel=1e-3)
        assert found["top_eigenvalue"] > 0
    points = result["surface"]["points"]
    np.testing.assert_allclose(points["night"], [-1, 0], atol=1e-3)
    np.testing.assert_allclose(points["day"], [1, 0], atol=1e-3)
    shares = {row["layer"]: row["ambiguous"] for row in result["layers"]}
    a, b = (bundle.tensor("conv1.weight_codes").astype(int) for bundle in bundles)
    assert shares["conv1.weight"] == pytest.approx(np.mean((a + b) % 2))


def test_the_curvature_is_of_images_of_all_classes(make: Any, inputs: Any) -> None:
    """Image folders are read class by class."""
    bundle = make(domain="night")
    x = np.concatenate([inputs] * (1 + 256 // len(inputs)))[:256]
    y = np.repeat(np.arange(4), 64)
    weights = real_weights(bundle)
    losses = [
        float(Landscape(bundle, {"night": (x, np.where(y == other, 0, y))}).loss(weights))
        for other in range(1, 4)
    ]
    whole = float(Landscape(bundle, {"night": (x, y)}).loss(weights))
    # Labels of every class count: exchange those of one, and the loss is another.
    assert all(loss != pytest.approx(whole, rel=1e-6) for loss in losses)


def test_the_analysis_command_writes_one_page_and_its_numbers(
    make: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [str(make(domain=d).path) for d in ("night", "day")]
    data = [f"night={work}/data.npz", f"day={work}/data.npz"]
    few = {"points": 3, "grid": 3, "seeds": 2, "candidates": 5, "products": 2, "images": 20}
    fast = [word for name, value in few.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "report"
    argv = [*bundles, "--data", *data, *fast, "--base", str(work / "Tiny-base.safetensors")]
    assert analyze_command.main([*argv, "-o", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5 and "src=" not in page
    record = json.loads((out / "report.json").read_text())
    assert "to_source" in record["distances"][0]
    capsys.readouterr()
    np.savez(tmp_path / "bare.npz", x=np.zeros((4, 3, 16, 16), np.float32))
    np.savez(tmp_path / "small.npz", x=np.zeros((4, 3, 8, 8), np.float32), y=np.zeros(4, np.int64))
    cases = [
        ([bundles[0], "--data", *data], "two or more"),
        ([*bundles, "--data", f"night={tmp_path}/bare.npz"], "without labels"),
        ([*bundles, "--data", f"night={tmp_path}/small.npz"], "the model reads"),
        ([*bundles, "--data", *data, "--grid", "2"], "grid=2"),
        ([bundles[0], bundles[0], "--data", *data], "two bundles of night"),
    ]
    for argv, message in cases:
        assert analyze_command.main([*argv, "-o", str(tmp_path / "no")]) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()
