"""Blocks by liveness: where exactly one tensor is alive, the network can be cut.

Consecutive cuts that hold weights form a block; on a ResNet these are the stem, every
residual block and the head. Long-lived skips (encoder-decoders) leave few such cuts: blocks
with more than ``MOST_HEAVY`` heavy nodes are then cut where the fewest tensors are alive,
and those tensors become extra inputs and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .placement import HEAVY

__all__ = ["MOST_HEAVY", "Block", "find_blocks", "rows_per_image", "scalar_value"]

MOST_HEAVY = 8


@dataclass(frozen=True)
class Block:
    """A run of nodes and the tensors that enter and leave it."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def heavy(self) -> tuple[fx.Node, ...]:
        """Convolutions, linears and matrix products in it."""
        return tuple(node for node in self.nodes if node.target in HEAVY)


def is_tensor(node: fx.Node) -> bool:
    """An activation: neither a parameter nor a shape."""
    return node.op in {"placeholder", "call_function", "call_module"} and isinstance(
        node.meta.get("val"), Tensor
    )


def _is_list(node: fx.Node) -> bool:
    """Several tensors in one value (unbind, split): no cut may fall before it is unpacked."""
    return isinstance(node.meta.get("val"), (list, tuple))


def find_blocks(graph: fx.Graph, most_heavy: int = MOST_HEAVY) -> list[Block]:
    """Cut ``graph`` into blocks, in order; every compute node is in exactly one.

    Args:
        graph: A captured graph.
        most_heavy: A block with more convolutions and products than this is split.
    """
    nodes = [n for n in graph.nodes if n.op not in {"placeholder", "output", "get_attr"}]
    alive = _alive_after(graph, nodes)
    cuts = [i for i, live in enumerate(alive) if len(live) == 1 and not any(map(_is_list, live))]
    bounds = _heavy_runs(nodes, cuts)
    bounds = [part for bound in bounds for part in _split(nodes, alive, most_heavy, *bound)]
    return [_block(nodes, first, last) for first, last in bounds]


def _alive_after(graph: fx.Graph, nodes: list[fx.Node]) -> list[set[fx.Node]]:
    """Tensors that exist after node i and are still read later."""
    position = {node: i for i, node in enumerate(nodes)}
    last_use: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if is_tensor(node) or _is_list(node):
            last_use[node] = max(
                (position.get(user, len(nodes)) for user in node.users), default=-1
            )
    alive: list[set[fx.Node]] = []
    current = {n for n in graph.nodes if n.op == "placeholder" and is_tensor(n)}
    for i, node in enumerate(nodes):
        if is_tensor(node) or _is_list(node):
            current.add(node)
        current = {tensor for tensor in current if last_use[tensor] > i}
        alive.append(set(current))
    return alive


def _heavy_runs(nodes: list[fx.Node], cuts: list[int]) -> list[tuple[int, int]]:
    """Close a block at the last cut before the next heavy node; [first, last) indices."""
    bounds, first = [], 0
    closing: int | None = None
    holds = False
    cut_set = set(cuts)
    for i, node in enumerate(nodes):
        if node.target in HEAVY:
            if holds and closing is not None:
                bounds.append((first, closing + 1))
                first = closing + 1
            holds, closing = True, None
        if i in cut_set and holds:
            closing = i
    bounds.append((first, len(nodes)))
    return bounds


def _split(
    nodes: list[fx.Node], alive: list[set[fx.Node]], most: int, first: int, last: int
) -> list[tuple[int, int]]:
    heavy = [i for i in range(first, last) if nodes[i].target in HEAVY]
    if len(heavy) <= most:
        return [(first, last)]
    middle = heavy[len(heavy) // 2]
    quarter = len(heavy) // 4
    inside = range(heavy[quarter], heavy[-quarter - 1])
    # The fewest live tensors; then late (behind activation and quantizer), near the middle.
    best = min(
        inside,
        key=lambda i: (
            any(map(_is_list, alive[i])),
            len(alive[i]),
            nodes[i + 1].target not in HEAVY,
            abs(i - middle),
        ),
    )
    return [
        *_split(nodes, alive, most, first, best + 1),
        *_split(nodes, alive, most, best + 1, last),
    ]


def _block(nodes: list[fx.Node], first: int, last: int) -> Block:
    inside = nodes[first:last]
    members = set(inside)
    inputs: dict[fx.Node, None] = {}
    for node in inside:
        for arg in node.all_input_nodes:
            if arg not in members and is_tensor(arg):
                inputs[arg] = None
    outputs = [
        node
        for node in inside
        if is_tensor(node) and any(user not in members for user in node.users)
    ]
    return Block(tuple(inside), tuple(inputs), tuple(outputs))


def rows_per_image(node: fx.Node) -> int:
    """Rows of a tensor for one image: 1, or the parts that the network cuts it into."""
    return scalar(node.meta["val"].shape[0], 1)


def scalar_value(node: fx.Node, batch: int) -> int:
    """A shape node's value at a batch size (the batch is the only symbol there is)."""
    return scalar(node.meta["val"], batch)


def scalar(value: Any, batch: int) -> int:
    """An extent at a batch size."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
    return int(value)
