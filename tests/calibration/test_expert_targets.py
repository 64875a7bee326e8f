"""Experts' outputs as targets, beside least squares and GPTQ as their textbooks write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdrq_deploy import Bundle
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.expert_targets import ExpertTargets, calibrate_with_experts
from hdrq_deploy.calibration.graph_cache import GraphCache
from hdrq_deploy.calibration.pipeline import folded_weights
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.errors import SpecError
from hdrq_deploy.graph import reference_session
from hdrq_deploy.merging import merge_checkpoints
from tests.calibration.test_compensation import gptq, rows

DOMAINS = ("night", "day")
ANCHOR = 0.3


@pytest.fixture(scope="module")
def place(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the mean of two checkpoints, and images of two domains."""
    folder = tmp_path_factory.mktemp("experts")
    experts = [work / f"Tiny-{domain}.safetensors" for domain in DOMAINS]
    merge_checkpoints(experts, folder / "mean.safetensors")
    rng = np.random.default_rng(5)
    for count, (domain, shift) in enumerate(zip(DOMAINS, (0.0, 0.4), strict=True)):
        x = rng.random((24 + 8 * count, 3, 16, 16), dtype=np.float32) * (1 - shift) + shift
        np.savez(folder / f"{domain}.npz", x=x)
    return folder


def request(place: Path, name: str, **changes: Any) -> CalibrationRequest:
    settings = {"method": "gptq", "wbits": 3, "abits": 8, **changes}
    return CalibrationRequest(
        "tiny_models:Tiny",
        [place / f"{domain}.npz" for domain in DOMAINS],
        DOMAINS,
        place / f"{name}.hdrq",
        place / "mean.safetensors",
        **settings,
    )


@pytest.fixture(scope="module")
def guided(work: Path, place: Path) -> dict[str, Bundle]:
    experts = {domain: work / f"Tiny-{domain}.safetensors" for domain in DOMAINS}
    graphs = GraphCache()
    return {
        targets: calibrate_with_experts(
            request(place, targets), ExpertTargets(experts, ANCHOR, targets), graphs
        )
        for targets in ("network", "layer")
    }


def images(place: Path, domain: str) -> Any:
    with np.load(place / f"{domain}.npz") as data:
        return data["x"]


@pytest.mark.parametrize("targets", ["network", "layer"])
def test_the_first_layer_is_that_of_least_squares_and_gptq(
    work: Path, place: Path, guided: dict[str, Bundle], targets: str
) -> None:
    bundle = guided[targets]
    first = bundle.manifest.activations[0]
    step = float(bundle.tensor(first.scale))
    layers = {
        domain: folded_weights(
            "tiny_models:Tiny", work / f"Tiny-{domain}.safetensors", images(place, domain)[:2]
        )
        for domain in DOMAINS
    }
    merged = folded_weights(
        "tiny_models:Tiny", place / "mean.safetensors", images(place, "day")[:2]
    )
    (bias,) = (n for n in merged if n.startswith("stem") and n != "stem.weight")
    # One system of all rows: domains count alike, and the anchor is a row for every weight.
    inputs, outputs, share = [], [], []
    for domain in DOMAINS:
        real = images(place, domain)
        coded = np.clip(np.rint(real / step), first.lo, first.hi).astype(np.float32) * step
        (seen,), (own,) = (rows(x, (8, 3, 3, 3), 1, 1, 1) for x in (coded, real))
        weight = layers[domain]["stem.weight"].reshape(8, -1).astype(np.float64)
        told = (own if targets == "network" else seen) @ weight.T + layers[domain][bias]
        inputs.append(seen), outputs.append(told), share.append(np.full(len(seen), 0.5 / len(seen)))
    x, y, w = np.concatenate(inputs), np.concatenate(outputs), np.concatenate(share)[:, None]
    x_mean, y_mean = (w * x).sum(0), (w * y).sum(0)
    covariance = (w * (x - x_mean)).T @ (x - x_mean)
    held = np.sqrt(ANCHOR * np.diag(covariance).mean()) * np.eye(27)
    start = merged["stem.weight"].reshape(8, -1).T.astype(np.float64)
    a = np.concatenate([np.sqrt(w) * (x - x_mean), held])
    b = np.concatenate([np.sqrt(w) * (y - y_mean), held @ start])
    solution = np.linalg.lstsq(a, b, rcond=None)[0]
    assert np.abs(solution - start).max() > 0.02  # the experts move it
    entry = bundle.manifest.tensors["stem.weight_codes"]
    scale = float(bundle.tensor(entry.scale))
    codes = gptq(solution.T, covariance, np.full(8, scale), entry.spec)
    found = bundle.tensor("stem.weight_codes").reshape(8, -1)
    assert (found != codes).mean() < 0.01
    plain = gptq(start.T, covariance, np.full(8, scale), entry.spec)
    assert (plain != codes).mean() > 0.05  # the merged weights would not do
    free = y_mean - x_mean @ (found * scale).T
    written = bundle.tensor(bias)
    assert np.abs(written - free).max() < 2 * scale * step
    assert np.abs(written - merged[bias]).max() > 4 * scale * step


def test_outputs_are_nearer_to_the_experts_than_without_them(
    work: Path, place: Path, guided: dict[str, Bundle]
) -> None:
    import tiny_models

    plain = calibrate(**vars_of(request(place, "plain")))
    assert plain.manifest.domains == {"night": 24 / 56, "day": 32 / 56}
    errors = {}
    for name, bundle in {"plain": plain, **guided}.items():
        session = reference_session.unfused_session(bundle.path / "model.onnx", None, threads=1)
        errors[name] = 0.0
        for domain in DOMAINS:
            expert = tiny_models.Tiny().eval()
            from safetensors.torch import load_file

            expert.load_state_dict(load_file(work / f"Tiny-{domain}.safetensors"))
            x = images(place, domain)
            with torch.no_grad():
                told = expert(torch.from_numpy(x)).numpy()
            found = session.run(None, {session.get_inputs()[0].name: x})[0]
            errors[name] += float(((found - told) ** 2).mean())
    assert errors["network"] < 0.7 * errors["plain"]
    assert errors["layer"] < errors["plain"]


def vars_of(request: CalibrationRequest) -> dict[str, Any]:
    names = ("model", "data", "domain", "output", "weights", "method", "wbits", "abits")
    return {name: getattr(request, name) for name in names}


def test_the_bundle_says_what_it_is(guided: dict[str, Bundle]) -> None:
    manifest = guided["layer"].manifest
    assert set(manifest.domains) == set(DOMAINS) and manifest.method == "gptq"
    said = manifest.options["experts"]
    assert said["targets"] == "layer" and said["anchor"] == ANCHOR
    assert said["adapted_sha256"]["night"] != said["adapted_sha256"]["day"]
    assert all(block["learned"] for block in manifest.metrics["blocks"] if block["layers"])


def test_what_does_not_fit_is_refused(work: Path, place: Path) -> None:
    experts = {domain: work / f"Tiny-{domain}.safetensors" for domain in DOMAINS}
    with pytest.raises(SpecError, match="found experts of night for a model of night, day"):
        calibrate_with_experts(request(place, "x"), ExpertTargets({"night": experts["night"]}))
    for changes in ({"method": "rtn"}, {"fold": "steps"}):
        with pytest.raises(SpecError, match="need method gptq and fold weights"):
            calibrate_with_experts(request(place, "x", **changes), ExpertTargets(experts))
    with pytest.raises(SpecError, match="found anchor -1"):
        ExpertTargets(experts, -1)
    with pytest.raises(SpecError, match="choose one of network, layer"):
        ExpertTargets(experts, targets="head")
