"""BatchNorm statistics of a merge measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hdrq_deploy import merge
from hdrq_deploy.cli import merge as merge_command
from hdrq_deploy.errors import HdrqError, MergeError
from hdrq_deploy.formats.bundle import WEIGHTS, Bundle
from hdrq_deploy.formats.safetensors_layout import serialize
from hdrq_deploy.graph import reference_session
from hdrq_deploy.graph.model_files import serialized
from hdrq_deploy.merging import Merger, re_estimate
from hdrq_deploy.merging.re_estimate import NewMoments


@pytest.mark.parametrize("name", ["Tiny", "PlainNorm"])
@pytest.mark.parametrize(("method", "options"), [("rtn", {"fold": "steps"}), ("float", {})])
def test_moments_are_those_of_the_images(
    make: Any, inputs: Any, tmp_path: Path, method: str, options: Any, name: str
) -> None:
    """Against torch's own BatchNorm in training mode, on the dequantized raw weights."""
    import tiny_models

    def sign_of(norm: Any) -> Any:
        return np.sign(norm.weight.detach().numpy()) if norm.affine else np.ones(8)

    parents = [make(name, domain=d, method=method, wbits=8, **options) for d in ("night", "day")]
    merged = merge(parents, tmp_path / "m.hdrq", rounding="nearest", method="mean")
    found = re_estimate(merged, {"all": inputs}, tmp_path / "r.hdrq")
    model = getattr(tiny_models, name)()
    unfolded = [make(name, domain=d, method="float") for d in ("night", "day")]
    floats = merge(unfolded, tmp_path / "f.hdrq", method="mean")
    tensors = {n: torch.from_numpy(np.array(t)) for n, t in floats.tensors().items()}
    model.load_state_dict(tensors, strict=False)
    if method == "rtn":  # the weights that the bundle really has
        for layer in ("stem", "conv1"):
            fold = merged.manifest.folds[f"{layer}.weight_codes"]
            step = merged.tensor(fold.raw_scale)[:, None, None, None]
            norm = model.bn if layer == "stem" else model.bn1
            sign = sign_of(norm)[:, None, None, None]
            real = merged.tensor(f"{layer}.weight_codes") * step * sign
            getattr(model, layer).weight.data = torch.from_numpy(real.astype(np.float32))
    for norm in (model.bn, model.bn1):
        norm.momentum = None
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(torch.from_numpy(inputs))
    for layer, norm in (("stem", model.bn), ("conv1", model.bn1)):
        if method == "rtn":
            fold = merged.manifest.folds[f"{layer}.weight_codes"]
            names = fold.mean, fold.variance
            sign = sign_of(norm)
        else:
            prefix = "bn" if layer == "stem" else "bn1"
            names, sign = (f"{prefix}.running_mean", f"{prefix}.running_var"), 1.0
        mean, variance = norm.running_mean.numpy() * sign, norm.running_var.numpy()
        np.testing.assert_allclose(found.tensor(names[0]), mean, rtol=2e-3, atol=2e-4)
        # torch divides by n - 1, n is thousands of positions.
        np.testing.assert_allclose(found.tensor(names[1]), variance, rtol=3e-3)
    for tensor in merged.manifest.tensors:
        if merged.manifest.tensors[tensor].role == "codes":
            np.testing.assert_array_equal(found.tensor(tensor), merged.tensor(tensor))


@pytest.mark.parametrize("abits", [8, 2])
def test_what_the_engine_computes_has_the_moments_that_batch_norm_gives(
    make: Any, inputs: Any, tmp_path: Path, abits: int
) -> None:
    """Behind quantizers of few bits too: outputs of a layer have mean beta and spread gamma."""
    parents = [
        make(domain=d, method="rtn", wbits=8, abits=abits, fold="steps") for d in ("night", "day")
    ]
    merged = merge(parents, tmp_path / "m.hdrq", rounding="nearest", method="mean")
    found = re_estimate(merged, {"all": inputs}, tmp_path / "r.hdrq")

    def away(bundle: Bundle, tensors: Any) -> float:
        """How far the outputs' moments are from beta and gamma at most, in gammas."""
        model, folds = bundle.graph_ir(), list(bundle.manifest.folds.values())
        for fold in folds:
            (use,) = model.graph.initializers[fold.bias].uses()
            model.graph.outputs.append(use.node.outputs[0])
        weights = {WEIGHTS: serialize(tensors, bundle.manifest.tensors)}
        session = reference_session.unfused_session(serialized(model), weights)
        _, *outputs = session.run(None, {session.get_inputs()[0].name: inputs})
        worst = []
        for fold, y in zip(folds, outputs, strict=True):
            gamma, beta = np.abs(tensors[fold.gamma]), tensors[fold.beta]
            worst.append(np.abs((y.mean((0, 2, 3)) - beta) / gamma).max())
            worst.append(np.abs(y.std((0, 2, 3)) / gamma - 1).max())
        return float(max(worst))

    assert away(found, found.tensors()) < 0.01 < 0.5 < away(merged, merged.tensors())


def test_new_moments_are_those_of_weights_that_are_not_rounded(make: Any, inputs: Any) -> None:
    """Against torch, up to the second convolution, with the mean of the parents' real weights."""
    parents = [make(domain=d, method="rtn", wbits=2, fold="steps") for d in ("night", "day")]
    merger, mix = Merger(parents), (0.5, 0.5)
    floats = merger.unrounded(mix, {})
    found = NewMoments(parents[0]).of(floats, {"all": inputs})
    stem, conv1 = (parents[0].manifest.folds[f"{n}.weight_codes"] for n in ("stem", "conv1"))
    limits = {a.scale: (a.lo, a.hi) for a in parents[0].manifest.activations}

    def quantized(x: Any, scale: str) -> Any:
        return torch.clamp(torch.round(x / float(floats[scale])), *limits[scale]) * float(
            floats[scale]
        )

    def convolved(x: Any, weight: Any) -> Any:
        return F.conv2d(x, torch.from_numpy(weight.astype(np.float32)), padding=1)

    def variance(real: Any) -> Any:
        """Of what the second convolution puts out; ``real`` gives a layer's weights."""
        y = convolved(quantized(torch.from_numpy(inputs), "input.act_scale"), real("stem", stem))
        gamma, beta = np.abs(floats[stem.gamma]), floats[stem.beta]
        scale, shift = (torch.from_numpy(np.array(t)) for t in (gamma, beta))
        y = F.relu(F.batch_norm(y, None, None, scale, shift, training=True, eps=stem.eps))
        y = F.max_pool2d(quantized(y, "relu.act_scale"), 2)
        return convolved(y, real("conv1", conv1)).numpy().var((0, 2, 3))

    def dequantized(tensors: Any, layer: str, fold: Any) -> Any:
        return tensors[f"{layer}.weight_codes"] * tensors[fold.raw_scale][:, None, None, None]

    own = [parent.tensors() for parent in parents]
    unrounded = variance(lambda *layer: np.mean([dequantized(t, *layer) for t in own], 0))
    np.testing.assert_allclose(found[conv1.variance], unrounded, rtol=1e-3)
    # Those of the rounded merge are others.
    tensors = merger.tensors(mix)
    rounded = variance(lambda *layer: dequantized(tensors, *layer))
    assert np.abs(rounded / unrounded - 1).max() > 0.05


def test_bundles_without_a_batch_norm_of_their_own_are_not_re_estimated(
    make: Any, inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MergeError, match="folded into the scales .`fold` steps."):
        re_estimate(make(), {"night": inputs}, tmp_path / "r.hdrq")
    with pytest.raises(HdrqError, match="2 or more"):
        re_estimate(make(fold="steps"), {"night": inputs[:1]}, tmp_path / "r.hdrq")
    # Before any image is read, and in the name of a bundle that is there.
    parents = [str(make(domain=domain).path) for domain in ("night", "day")]
    nowhere = [f"{domain}={tmp_path / 'nowhere'}" for domain in ("night", "day")]
    argv = [*parents, "--re-estimate", *nowhere, "-o", str(tmp_path / "r.hdrq")]
    assert merge_command.main(argv) == MergeError.exit_code == 2
    assert capsys.readouterr().err.startswith(
        f"hdrq-merge: {parents[0]}: found no BatchNorm kept apart"
    )
    assert not list(tmp_path.iterdir())
