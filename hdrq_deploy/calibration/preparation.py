"""From a loaded model to the folded graph, its quantizers' places and its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckFailed
from .activation_cache import run_batch
from .blocks import Block, find_blocks, find_units
from .capture import Capture, capture
from .fold_batch_norm import fold_constants, folded
from .graph_cache import GraphCache
from .inputs import CalibrationInputs
from .module_check import check_capture, restored_buffers
from .placement import Plan, plan_quantizers
from .request import CalibrationRequest

__all__ = ["Preparation", "prepare"]


@dataclass(frozen=True)
class Preparation:
    """What is learned from.

    Attributes:
        capture: The folded graph with the adapted weights.
        plan: Places of the quantizers; None for a float bundle.
        blocks: What is learned together, in order; of a float bundle what is run together.
        source: The folded graph with the source weights, for the distance term.
        agreement: How far the graph is from the user's module, for the manifest.
    """

    capture: Capture
    plan: Plan | None
    blocks: Sequence[Block] = ()
    source: Capture | None = None
    agreement: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    request: CalibrationRequest, inputs: CalibrationInputs, graphs: GraphCache
) -> Preparation:
    """Capture the model, check the graph against it, fold BatchNorm and place quantizers.

    Seeds torch's random numbers with the request's seed.

    Raises:
        ModelError: The model cannot be captured, or holds nothing to quantize.
        CheckFailed: The captured graph disagrees with the model.
    """
    torch.manual_seed(request.seed)
    options, quantization = request.learning, request.quantization
    largest = max(run_batch(inputs.images), options.batch if request.learns else 1)
    fold = fold_constants if request.keeps_batch_norm else folded
    graph, agreement = _captured(
        request.model, inputs.network, inputs.state, inputs.images, largest, fold, graphs
    )
    own = graph.clone_with(inputs.state)
    if not request.quantizes:
        fold(own)
        return Preparation(own, None, find_blocks(own), agreement=agreement)
    into_scales = quantization.scales_carry_batch_norm
    source = folded(graph.clone_with(inputs.base), into_scales) if inputs.base else None
    own = folded(own, into_scales)
    plan = plan_quantizers(own, quantization, request.placement)
    if options.granularity == "layer":
        blocks = find_blocks(own, 1)
    elif request.blocks == "unit":
        blocks = find_units(own)
    else:
        blocks = find_blocks(own)
    return Preparation(own, plan, blocks, source, agreement)


def _captured(
    name: str,
    network: nn.Module,
    state: Mapping[str, Tensor],
    images: Tensor,
    largest: int,
    fold: Callable[[Capture], Any],
    graphs: GraphCache,
) -> tuple[Capture, dict[str, Any]]:
    """The model's graph, checked against the model itself.

    Domains of one model share a graph and bring their own weights; one that does not compute
    what this network computes is captured anew.
    """
    example = images[:2]
    key = f"{name} {tuple(example.shape)} {network}"

    def checked(graph: Capture) -> dict[str, Any]:
        own, prepared = graph.clone_with(state), graph.clone_with(state)
        fold(prepared)
        return check_capture(network, prepared, own, images, largest)

    known = graphs.captured(key)
    if known is not None:
        try:
            return known, checked(known)
        except CheckFailed:  # a network of the same name and layers, but another forward()
            pass
    with restored_buffers(network):
        graph = capture(network, example)
    agreement = checked(graph)
    graphs.keep(key, graph)
    return graph, agreement
