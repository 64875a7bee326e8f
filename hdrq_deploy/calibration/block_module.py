"""A block of the graph as a module that holds its quantizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .blocks import Block, is_tensor, rows_per_image, scalar_value
from .capture import Capture
from .fake_quantizers import ActivationQuantizer, Mode, WeightQuantizer
from .nodes import weight_node
from .placement import HEAVY, Plan
from .tensors import attribute, set_attribute

__all__ = [
    "BlockModule",
    "Quantizers",
    "block_module",
    "block_state",
    "quantizers_of",
    "restore_block",
]


@dataclass
class Quantizers:
    """What calibration learned, by the names used in the bundle."""

    weights: dict[str, WeightQuantizer]
    activations: dict[str, ActivationQuantizer]
    blocks: list[dict[str, Any]]


class BlockModule(nn.Module):
    """A block of the graph as a module, quantizers included.

    ``weight_names`` are the parameters that heavy nodes of ``body`` multiply by.
    """

    def __init__(
        self,
        block: Block,
        body: fx.GraphModule,
        scalars: list[fx.Node],
        weight_names: dict[fx.Node, str],
    ) -> None:
        super().__init__()
        self.block = block
        self.body = body
        self.scalars = scalars
        self.weight_names = weight_names
        modules = list(body.modules())
        self.weights: list[WeightQuantizer] = [m for m in modules if isinstance(m, WeightQuantizer)]
        self.activations: list[ActivationQuantizer] = [
            m for m in modules if isinstance(m, ActivationQuantizer)
        ]

    def forward(
        self, inputs: list[Tensor], run: Callable[..., list[Tensor]] | None = None
    ) -> list[Tensor]:
        """Tensors of ``block.inputs`` to tensors of ``block.outputs``.

        Args:
            inputs: One per node of ``block.inputs``.
            run: Runs ``body`` in its place, with the same arguments.
        """
        batch = len(inputs[0]) // rows_per_image(self.block.inputs[0])
        shapes = [scalar_value(node, batch) for node in self.scalars]
        return (run or self.body)(*inputs, *shapes)

    def set_mode(self, weights: Mode, activations: Mode | None = None, drop: float = 0.0) -> None:
        """Set every quantizer of the block; ``activations`` as ``weights`` by default."""
        for weight in self.weights:
            weight.mode = weights
        for activation in self.activations:
            activation.mode = weights if activations is None else activations
            activation.drop = drop


def quantizers_of(capture: Capture, plan: Plan, device: torch.device) -> Quantizers:
    """Untrained quantizers for every site of ``plan``; weight scales by search.

    Args:
        capture: The folded model; weights in its ``folds`` are quantized as they were before
            the fold.
        plan: Places of the quantizers.
        device: Device that computes.
    """
    weights: dict[str, WeightQuantizer] = {}
    for site in plan.layers:
        if site.weight is None or site.spec is None or site.weight in weights:
            continue
        folded = capture.folds.get(site.weight)
        value = attribute(capture.module, site.weight) if folded is None else folded.raw
        gain = None if folded is None else folded.gain.to(device)
        weights[site.weight] = WeightQuantizer(value.to(device), site.spec, gain)
    activations = {
        site.name: ActivationQuantizer(site.spec, site.name, device) for site in plan.activations
    }
    return Quantizers(weights, activations, [])


def block_state(module: BlockModule, result: Quantizers) -> dict[str, Tensor]:
    """What a finished block has learned, by the names of its weights and scales."""
    names = {id(q): n for n, q in (*result.weights.items(), *result.activations.items())}
    state = {}
    for weight in module.weights:
        state[f"codes {names[id(weight)]}"] = weight.codes().cpu()
        state[f"scale {names[id(weight)]}"] = weight.scale.detach().cpu()
    for activation in module.activations:
        state[f"act {names[id(activation)]}"] = activation.scale.detach().cpu()
    return state


@torch.no_grad()
def restore_block(module: BlockModule, result: Quantizers, state: dict[str, Tensor]) -> None:
    """Give a block what :func:`block_state` read of it. In place."""
    names = {id(q): n for n, q in (*result.weights.items(), *result.activations.items())}
    for weight in module.weights:
        name = names[id(weight)]
        weight.freeze(state[f"codes {name}"], state[f"scale {name}"])
    for activation in module.activations:
        activation.scale.copy_(state[f"act {names[id(activation)]}"])
        activation.settled = True


def block_module(capture: Capture, plan: Plan, block: Block, result: Quantizers) -> BlockModule:
    """Copy the block's nodes into a graph of their own, with quantizers in place."""
    sites = {site.source: site for site in plan.activations}
    members = set(block.nodes)
    graph, modules = fx.Graph(), nn.ModuleDict()
    copies: dict[fx.Node, fx.Node] = {}

    def add(quantizer: nn.Module, *args: fx.Node) -> fx.Node:
        key = next((k for k, m in modules.items() if m is quantizer), f"q{len(modules)}")
        modules[key] = quantizer
        return graph.call_module(key, args)

    for node in block.inputs:
        copies[node] = graph.placeholder(node.name)
    outside = [a for n in block.nodes for a in n.all_input_nodes if a not in members]
    scalars = [
        node for node in dict.fromkeys(outside) if node.op != "get_attr" and not is_tensor(node)
    ]
    for node in scalars:
        copies[node] = graph.placeholder(node.name)
    for node in block.inputs:
        if node.op == "placeholder" and node in sites:
            copies[node] = add(result.activations[sites[node].name], copies[node])
    for node in dict.fromkeys(outside):
        if node.op != "get_attr":
            continue
        target = str(node.target)
        if target in result.weights:
            copies[node] = add(result.weights[target])
        else:
            copies[node] = graph.get_attr(target)
    weight_names = {}
    for node in block.nodes:
        copies[node] = graph.node_copy(node, lambda arg: copies[arg])
        weight = weight_node(node) if node.target in HEAVY else None
        if weight is not None:
            weight_names[copies[node]] = str(weight.target)
        if node in sites:
            copies[node] = add(result.activations[sites[node].name], copies[node])
    graph.output([copies[node] for node in block.outputs])
    parameters = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            set_attribute(parameters, target, attribute(capture.module, target))
    for key, quantizer in modules.items():
        parameters.add_module(key, quantizer)
    return BlockModule(block, fx.GraphModule(parameters, graph), scalars, weight_names)
