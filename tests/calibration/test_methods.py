"""The table of methods is all that a method needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.methods import METHODS, Method, Options
from hdrq_deploy.calibration.recipe import Recipe
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.cli import calibrate as command
from hdrq_deploy.errors import SpecError
from hdrq_deploy.experiments.tasks import Task


def test_a_method_of_ones_own_is_a_row(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Options(noise="uniform", distance=0.0, iters=5, batch=8, granularity="layer")
    monkeypatch.setitem(METHODS, "own", Method("latent weights with uniform noise", plain))
    (tmp_path / "recipe.json").write_text(json.dumps({"method": "own", "iters": 7}))
    assert Recipe.read(tmp_path / "recipe.json").options().iters == 7
    bundle = calibrate(
        "tiny_models:Tiny",
        work / "data.npz",
        "night",
        tmp_path / "b.hdrq",
        work / "Tiny-night.safetensors",
        method="own",
        wbits=4,
    )
    manifest = bundle.manifest
    assert manifest.method == "own" and manifest.options["noise"] == "uniform"
    assert any(block["learned"] for block in manifest.metrics["blocks"])
    args = ["--model", "m:F", "--data", "x", "--domain", "d", "-o", "b", "--method", "own"]
    parser = command.arguments()
    assert parser.parse_args(args).method == "own"
    assert "own: latent weights with uniform noise" in " ".join(parser.format_help().split())
    task = Task("t", "m:F", "s", ()).calibrated_with(iters=3)
    assert task.learning["own"] == {"iters": 3} and "rtn" not in task.learning


def test_every_row_says_what_it_does_and_makes_a_request() -> None:
    for name, row in METHODS.items():
        assert row.summary and Options.of(name) == row.options
        request = CalibrationRequest("m:F", "x.npz", "d", "b", base="s", method=name)
        assert request.learning == row.options
        assert request.quantizes == (name not in {"float", "float-folded"})
    with pytest.raises(
        SpecError,
        match="choose one of float, float-folded, rtn, rtn-corrected, gptq, adaround, brecq, "
        "brecq-one-stage, qdrop, latent, latent-noise, hdrq",
    ):
        Options.of("magic")


def test_the_page_of_methods_names_every_method() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    text = (docs / "how-to" / "choose-bits-and-method.md").read_text()
    assert all(f"`{name}`" in text for name in METHODS)
