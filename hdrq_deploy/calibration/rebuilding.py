"""Models of bundles and checkpoints built again in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..formats.bundle import Bundle
from .block_module import quantizers_of
from .bundle_model import BundleModel, emit_float, emit_quantized
from .capture import Capture, capture, run_model
from .fold_batch_norm import fold_constants, folded
from .loading import current_folder_importable, is_lazy, load_model, load_state
from .placement import EARLIER, Plan, plan_quantizers
from .request import PLACEMENTS, Quantization
from .tensors import from_numpy

__all__ = ["fake_quantized", "folded_weights"]


def fake_quantized(bundle: Bundle, example: Tensor) -> nn.Module:
    """The torch model that computes with a bundle's codes, for comparison with engines.

    Args:
        bundle: Calibrated or merged; its ``model`` must be importable here.
        example: Two inputs (2, C, H, W).

    Raises:
        ModelError: The model of that name now has another graph than the bundle.
    """
    manifest = bundle.manifest
    with current_folder_importable():
        model = _bundle_model(bundle, example)
    tensors = bundle.tensors()
    if set(tensors) != set(model.entries):
        raise ModelError(
            f"{manifest.model} now has other tensors than {bundle.path}; needed the version of "
            "the model that was calibrated"
        )
    values = {name: from_numpy(tensors[name].copy()) for name in manifest.graph_tensors}
    model.module.load_state_dict(values)
    return model.module


def _bundle_model(bundle: Bundle, example: Tensor) -> BundleModel:
    """The bundle's model with other numbers: what its tensors are, and its graph."""
    manifest, scheme = bundle.manifest, bundle.manifest.scheme
    graph = capture(load_model(manifest.model), example)
    if scheme.wbits is None:
        (folded if scheme.fold == "weights" else fold_constants)(graph)
        return emit_float(graph)
    assert scheme.abits and scheme.grid
    codes = Quantization.of(
        scheme.wbits, scheme.abits, scheme.per_channel, scheme.grid, scheme.fold
    )
    folded(graph, codes.scales_carry_batch_norm)
    plan = _plan_of(bundle, graph, codes)
    return emit_quantized(graph, plan, quantizers_of(graph, plan, torch.device("cpu")))


def _plan_of(bundle: Bundle, graph: Capture, codes: Quantization) -> Plan:
    """The plan that a bundle was made with: of all placements the one that gives what it holds.

    A merged bundle does not name its placement, nor does one of version 0.1.
    """
    manifest = bundle.manifest
    activations = [(a.scale, a.bits, a.lo, a.hi) for a in manifest.activations]
    weights = [layer.weight_bits for layer in manifest.layers]
    for placement in (*PLACEMENTS, EARLIER):
        plan = plan_quantizers(graph, codes, placement)
        sites = [(s.name, s.spec.bits, s.spec.lo, s.spec.hi) for s in plan.activations]
        bits = [site.spec.bits if site.spec else None for site in plan.layers]
        if (sites, bits) == (activations, weights):
            return plan
    return plan_quantizers(graph, codes)


def folded_weights(model: str, weights: str | Path, example: Any) -> dict[str, Any]:
    """A checkpoint's tensors by the names of the folded graph, as NumPy arrays.

    Args:
        model: Name of the model, as for :func:`.pipeline.calibrate`.
        weights: Checkpoint of that model.
        example: Two inputs (2, C, H, W).

    Raises:
        ModelError: Model or checkpoint cannot be loaded, or do not fit each other.
    """
    with current_folder_importable():
        network = load_model(model)
        if is_lazy(network):
            run_model(network, torch.as_tensor(example))
        load_state(network, weights, "source")
        graph = folded(capture(network, torch.as_tensor(example)))
    state = graph.module.state_dict()
    return {name: value.detach().cpu().numpy() for name, value in state.items()}
