"""What is learned together: blocks by liveness, or by residual unit.

By liveness (:func:`find_blocks`): where exactly one tensor is alive, the network can be cut.
Consecutive cuts that hold weights form a block; on a ResNet these are the stem, every
residual block and the head. Long-lived skips (encoder-decoders) leave few such cuts: blocks
with more than ``MOST_HEAVY`` heavy nodes are then cut where the fewest tensors are alive,
and those tensors become extra inputs and outputs.

By residual unit (:func:`find_units`): every residual unit is a block, and every layer outside
of units is one of its own, whatever else is alive. On a ResNet both give the same.

Activations are kept image by image between blocks, so a cut falls only where every live
tensor has the images on axis 0 and nowhere else, the rows of one image together. Two images
are swapped to see that (sequence-first attention, for one, has them on axis 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from .capture import Capture
from .placement import HEAVY
from .residual_units import residual_units
from .tensors import attribute

__all__ = [
    "MOST_HEAVY",
    "Block",
    "find_blocks",
    "find_units",
    "is_tensor",
    "rows_per_image",
    "scalar_value",
]

MOST_HEAVY = 8
# Relative to the RMS: a product sums in another order when the rows move.
_SWAP_TOLERANCE = 1e-4


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


def find_blocks(capture: Capture, most_heavy: int = MOST_HEAVY) -> list[Block]:
    """Cut a captured graph into blocks, in order; every compute node is in exactly one.

    Args:
        capture: A captured model, on the CPU.
        most_heavy: A block with more convolutions and products than this is split where it
            can be.
    """
    nodes, alive, cuttable = _possible_cuts(capture)
    bounds = _heavy_runs(nodes, [i for i in cuttable if len(alive[i]) == 1])
    bounds = [part for b in bounds for part in _split(nodes, alive, set(cuttable), most_heavy, *b)]
    return [_block(nodes, first, last) for first, last in bounds]


def find_units(capture: Capture, most_heavy: int = MOST_HEAVY) -> list[Block]:
    """Cut a captured graph by residual unit; every compute node is in exactly one block.

    A block ends behind the sum that closes its unit, or behind its layer, at the last of the
    places where the fewest tensors are alive; where nothing can be cut in between, two blocks
    are one.

    Args:
        capture: A captured model, on the CPU.
        most_heavy: What joins more convolutions and products than this is no residual unit.
    """
    nodes, alive, cuttable = _possible_cuts(capture)
    place = {node: i for i, node in enumerate(nodes)}
    parts = residual_units(capture.graph, most_heavy)
    inside = {node for part in parts for node in part}
    alone = [(node,) for node in nodes if node.target in HEAVY and node not in inside]
    parts = sorted([*parts, *alone], key=lambda part: place[part[0]])
    bounds, first = [], 0
    for part, following in pairwise(parts):
        places = range(place[part[-1]], place[following[0]])
        possible = [i for i in places if i in cuttable]
        if possible:
            best = min(possible, key=lambda i: (len(alive[i]), -i))
            bounds.append((first, best + 1))
            first = best + 1
    return [_block(nodes, *bound) for bound in [*bounds, (first, len(nodes))]]


def _possible_cuts(capture: Capture) -> tuple[list[fx.Node], list[set[fx.Node]], list[int]]:
    """Compute nodes, the tensors alive after each, and after which of them a cut may fall."""
    nodes = [n for n in capture.graph.nodes if n.op not in {"placeholder", "output", "get_attr"}]
    by_image = _kept_by_image(capture)
    alive = _alive_after(capture.graph, nodes)
    return nodes, alive, [i for i, live in enumerate(alive) if live <= by_image]


@torch.no_grad()
def _kept_by_image(capture: Capture) -> set[fx.Node]:
    """Tensors whose axis 0 holds the images, the rows of one image together."""
    example = capture.example[:2].cpu()
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    # The two must differ, and blank images would not.
    pair = example + 0.1 * (example.std() + 1e-3) * noise
    straight: dict[fx.Node, Any] = {}
    swapped: dict[fx.Node, Any] = {}
    nodes = list(capture.graph.nodes)
    last_use = {arg: i for i, node in enumerate(nodes) for arg in node.all_input_nodes}
    by_image = set()
    for i, node in enumerate(nodes):
        if node.op == "output":
            break
        for values, x in ((straight, pair), (swapped, pair.flip(0))):
            values[node] = _compute(capture.module, node, values, x)
        if _leads_with_batch(node) and _follows_swap(straight[node], swapped[node]):
            by_image.add(node)
        for arg in node.all_input_nodes:
            if last_use[arg] == i:
                del straight[arg], swapped[arg]
    return by_image


def _compute(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], x: Tensor) -> Any:
    if node.op == "placeholder":
        return x
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    assert callable(node.target)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: values[arg])
    return node.target(*args, **kwargs)


def _leads_with_batch(node: fx.Node) -> bool:
    """A tensor whose axis 0 is a multiple of the batch, and no other axis depends on it."""
    if not is_tensor(node) or node.meta["val"].ndim == 0:
        return False
    first, *others = node.meta["val"].shape
    if not isinstance(first, torch.SymInt) or not all(isinstance(n, int) for n in others):
        return False
    rows = scalar(first, 1)
    return rows > 0 and all(scalar(first, n) == n * rows for n in (2, 3, 5))


def _follows_swap(straight: Tensor, swapped: Tensor) -> bool:
    """Whether swapping two images swapped the two halves of the rows."""
    rows = len(straight) // 2
    expected = torch.cat([straight[rows:], straight[:rows]]).double()
    away = (expected - swapped.double()).norm()
    return bool(away <= _SWAP_TOLERANCE * expected.norm())


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
    nodes: list[fx.Node],
    alive: list[set[fx.Node]],
    cuttable: set[int],
    most: int,
    first: int,
    last: int,
) -> list[tuple[int, int]]:
    heavy = [i for i in range(first, last) if nodes[i].target in HEAVY]
    if len(heavy) <= most:
        return [(first, last)]
    middle = heavy[len(heavy) // 2]
    quarter = len(heavy) // 4
    inside = [i for i in range(heavy[quarter], heavy[-quarter - 1]) if i in cuttable]
    if not inside:
        inside = [i for i in range(heavy[0], heavy[-1]) if i in cuttable]
    if not inside:
        return [(first, last)]
    # The fewest live tensors; then late (behind activation and quantizer), near the middle.
    best = min(
        inside,
        key=lambda i: (len(alive[i]), nodes[i + 1].target not in HEAVY, abs(i - middle)),
    )
    return [
        *_split(nodes, alive, cuttable, most, first, best + 1),
        *_split(nodes, alive, cuttable, most, best + 1, last),
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
    first = node.meta["val"].shape[0]
    # Up to torch 2.11 some graphs have lost the symbol: the example's number of images stands in
    # its place. They are one block, from images to output.
    symbolic = isinstance(first, torch.SymInt) and first.node.expr.free_symbols
    return scalar(first, 1) if symbolic else 1


def scalar_value(node: fx.Node, batch: int) -> int:
    """A shape node's value at a batch size (the batch is the only symbol there is)."""
    return scalar(node.meta["val"], batch)


def scalar(value: Any, batch: int) -> int:
    """An extent at a batch size."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
    return int(value)
