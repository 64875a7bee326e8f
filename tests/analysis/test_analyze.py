"""Barriers, curvature and distances of parents and merge, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdrq_deploy.analysis import Settings, analyze
from hdrq_deploy.analysis.landscape import top_eigenvalue, trace
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
    points = result["surface"]["points"]
    np.testing.assert_allclose(points["night"], [-1, 0], atol=1e-3)
    np.testing.assert_allclose(points["day"], [1, 0], atol=1e-3)
    shares = {row["layer"]: row["ambiguous"] for row in result["layers"]}
    a, b = (bundle.tensor("conv1.weight_codes").astype(int) for bundle in bundles)
    assert shares["conv1.weight"] == pytest.approx(np.mean((a + b) % 2))


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
