"""Residual units in a graph: the branches between a tensor and the sum that joins them again.

BRECQ, QDrop and HDRQ learn a residual unit at a time, written by hand for each architecture.
Here a unit is found from the graph alone: the sum of two tensors, the tensor that all of the
sum's inputs are computed from (its nearest dominator), and the layers between them.

Source:
    Li et al., ICLR 2021 (arXiv 2102.05426), section 3.2.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx

from .placement import HEAVY

__all__ = ["residual_units"]

aten = torch.ops.aten

_SUMS = {aten.add.Tensor, aten.sub.Tensor}


def residual_units(graph: fx.Graph, most_heavy: int) -> list[tuple[fx.Node, ...]]:
    """The heavy nodes of every residual unit and the sum that closes it, in graph order.

    Of regions that contain each other the smallest is the unit, so that the long skips of an
    encoder-decoder close none. Sums in a row of branches of one tensor (x + a(x) + b(x)) close
    one unit.

    Args:
        graph: A captured graph.
        most_heavy: A region with more heavy nodes than this is no unit.

    Returns:
        Each unit's nodes; the last is the sum.
    """
    fork = _dominators(graph)
    place = {node: i for i, node in enumerate(graph.nodes)}
    found: list[tuple[fx.Node, ...]] = []
    for node in graph.nodes:
        if not _joins(node, fork) or _goes_on(node, fork):
            continue
        layers = sorted(_between(fork[node], node), key=place.__getitem__)
        if 0 < len(layers) <= most_heavy and _is_run(layers, graph):
            found.append((*layers, node))
    taken: set[fx.Node] = set()
    units = []
    for unit in sorted(found, key=len):  # stable: the earlier of two
        if taken.isdisjoint(unit):
            taken.update(unit)
            units.append(unit)
    return sorted(units, key=lambda unit: place[unit[0]])


def _dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every activation, the last one before it that all paths from the images pass."""
    above: dict[fx.Node, fx.Node] = {}
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            above[node], depth[node] = node, 0
            continue
        inputs = [arg for arg in node.all_input_nodes if arg in depth]
        if not inputs or not _is_activation(node):
            continue
        meeting = inputs[0]
        for other in inputs[1:]:
            while meeting is not other:
                if depth[meeting] >= depth[other]:
                    meeting = above[meeting]
                else:
                    other = above[other]
        above[node], depth[node] = meeting, depth[meeting] + 1
    return above


def _is_activation(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, list, tuple))


def _joins(node: fx.Node, fork: Collection[fx.Node]) -> bool:
    """A sum of two tensors that are computed from the images."""
    terms = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and arg in fork]
    return node.target in _SUMS and len(terms) == 2 and node in fork


def _goes_on(node: fx.Node, fork: dict[fx.Node, fx.Node]) -> bool:
    """Whether the sum is only read by another one, which adds a branch of the same tensor."""
    users = list(node.users)
    return len(users) == 1 and _joins(users[0], fork) and fork[users[0]] is fork[node]


def _between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    """Heavy nodes that ``last`` is computed by from its dominator ``first``."""
    seen, waiting = {first}, [last]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [arg for arg in node.all_input_nodes if arg.op == "call_function"]
    return {node for node in seen - {first} if node.target in HEAVY}


def _is_run(layers: list[fx.Node], graph: fx.Graph) -> bool:
    """Whether no other layer is computed in between."""
    order = [node for node in graph.nodes if node.target in HEAVY]
    first = order.index(layers[0])
    return order[first : first + len(layers)] == layers
