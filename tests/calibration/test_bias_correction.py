"""Biases that make up for what rounding does to the mean of a layer's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdrq_deploy import Bundle
from hdrq_deploy.calibration.loading import load_model, load_state
from hdrq_deploy.calibration.pipeline import run_calibration
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.graph import reference_session

KINDS = ("weights", "steps")


def outputs(bundle: Bundle, x: Any) -> Any:
    session = reference_session.unfused_session(bundle.path / "model.onnx")
    return session.run(None, {"input": x})[0]


def module(work: Path) -> Any:
    """The user's own module."""
    model = load_model("tiny_models:Tiny")
    load_state(model, work / "Tiny-night.safetensors", "adapted")
    return model.eval()


@pytest.mark.parametrize("fold", KINDS)
def test_the_mean_of_the_outputs_is_that_of_the_users_module(
    make: Any, work: Path, inputs: Any, fold: str
) -> None:
    """On all calibration images, as ONNX Runtime computes the bundle's own graph."""
    x = np.load(work / "data.npz")["x"]
    with torch.no_grad():
        real = module(work)(torch.from_numpy(x)).numpy().mean(0)
    away = {}
    for method in ("rtn", "rtn-corrected"):
        bundle = make("Tiny", method=method, wbits=3, abits=4, fold=fold)
        bundle.validate()
        away[method] = np.abs(outputs(bundle, x).mean(0) - real).max()
    assert away["rtn-corrected"] < 1e-4 < 1e-2 < away["rtn"]


def test_a_running_mean_moves_by_the_mean_error_of_its_layer(
    make: Any, work: Path, inputs: Any
) -> None:
    """By hand for the first layer, which reads images and the codes of images."""
    x = torch.from_numpy(np.load(work / "data.npz")["x"])
    options = {"wbits": 3, "abits": 4, "fold": "steps"}
    plain, moved = (make("Tiny", method=m, **options) for m in ("rtn", "rtn-corrected"))
    (name,) = (n for n in plain.manifest.folds if n.startswith("stem"))
    fold, stem = plain.manifest.folds[name], module(work).stem
    step = plain.tensor("input.act_scale")
    (at,) = (a for a in plain.manifest.activations if a.scale == "input.act_scale")
    coded = torch.clamp(torch.round(x / float(step)), at.lo, at.hi) * float(step)
    codes, scale = (torch.from_numpy(plain.tensor(n)) for n in (name, fold.raw_scale))
    sign = torch.from_numpy(np.sign(module(work).bn.weight.detach().numpy()))
    with torch.no_grad():
        real = stem(x).mean((0, 2, 3)) * sign
        weight = codes.float() * scale.reshape(-1, 1, 1, 1)
        found = torch.nn.functional.conv2d(coded, weight, padding=1).mean((0, 2, 3))
    shift = moved.tensor(fold.mean) - plain.tensor(fold.mean)
    np.testing.assert_allclose(shift, (found - real).numpy(), atol=1e-5)
    assert np.abs(shift).max() > 1e-3
    np.testing.assert_array_equal(moved.tensor(fold.variance), plain.tensor(fold.variance))


def test_a_stopped_calibration_resumes_to_the_same_bytes(work: Path, tmp_path: Path) -> None:
    found = []
    for stops in (False, True):
        request = CalibrationRequest(
            "tiny_models:Tiny",
            work / "data.npz",
            "night",
            tmp_path / f"{stops}.hdrq",
            work / "Tiny-night.safetensors",
            method="rtn-corrected",
            wbits=4,
            fold="steps",
            resume=True,
        )
        done: list[int] = []

        def stop(step: int, total: int, block: str, done: list[int] = done) -> None:
            done.append(step)
            if len(done) == 2:
                raise KeyboardInterrupt

        if stops:
            with pytest.raises(KeyboardInterrupt):
                run_calibration(request, progress=stop)
        found.append(run_calibration(request))
    assert found[0].manifest_sha256 == found[1].manifest_sha256
