"""Where quantizers go.

1. Every operand that a convolution, linear or matrix product reads gets one quantizer, put
   behind the activation function, pooling or reshaping that made it and shared by all its
   readers. Max pooling and pure reordering keep codes as they are, so the quantizer goes
   before them.
2. A convolution's output that rule 1 leaves alone (a branch of a residual add, the input of
   SiLU or HardSwish) gets an 8-bit one: engines only run a convolution in INT8 when it
   writes codes. The outputs of last layers stay real.
3. Transposed convolutions stay float: neither TensorRT nor ONNX Runtime runs them in INT8.
4. Weights: ``wbits``, but 8 in the first layer and in every last layer. Operands: ``abits``,
   but 8 for the network's input (and what is cut, resized or normalised from it before the
   first layer) and for the inputs of the last layers.

A last layer is one whose output reaches the network's output without passing another layer
with codes for a weight (:func:`last_layers`). A network with two heads has two, and so has one
that adds the output of a skip convolution to that of its head.

With placement ``paper`` the quantizers are those of the paper instead:

- Rule 2 does not apply, and the network's input stays real: the first layer computes in float.
- Tensors that are joined by a concatenation have a scale each, and there is none behind it. A
  layer that reads the joined tensor computes in float, because engines compute on codes of one
  scale: TensorRT leaves INT8 where the scales before Concat differ, and ONNX Runtime where no
  QuantizeLinear follows it. Placement ``engine`` has one scale, behind the concatenation.

Bundles of version 0.1 have the placement ``EARLIER``: one last layer, the last in the graph with
a weight; the network's input only as it is given; real outputs only where a last layer's is the
network's own. They are read and run, not made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..errors import ModelError
from ..numerics.spec import QuantSpec
from .capture import CONVOLUTIONS, LINEAR, PRODUCTS, TRANSPOSED, Capture
from .nodes import module_path, weight_node
from .request import Quantization
from .tensors import attribute, free_name

__all__ = [
    "EARLIER",
    "HEAVY",
    "ActivationSite",
    "LayerSite",
    "Plan",
    "last_layers",
    "nonnegative_nodes",
    "plan_quantizers",
    "root",
]

aten = torch.ops.aten

EARLIER = "earlier"
HEAVY = CONVOLUTIONS | TRANSPOSED | LINEAR | PRODUCTS
# Codes pass through these unchanged.
_TRANSPARENT = {
    aten.max_pool2d.default,
    aten.max_pool1d.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.t.default,
}
_CLAMPS = {aten.hardtanh.default, aten.clamp.default}
_NONNEGATIVE = {
    aten.relu.default,
    aten.relu6.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.abs.default,
    aten.square.default,
    aten.exp.default,
}
_AVERAGES = {aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default}
_KEEPS_SIGN = _TRANSPARENT | {
    aten.adaptive_avg_pool2d.default,
    aten.max_pool3d.default,
    aten.amax.default,
    aten.mean.dim,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    operator.getitem,
}
# Values of nodes that are no tensors.
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
_JOINS = {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default}


@dataclass(frozen=True)
class ActivationSite:
    """A quantizer behind node ``source``; ``name`` is that of its scale in the bundle."""

    source: fx.Node
    name: str
    module: str
    spec: QuantSpec


@dataclass(frozen=True)
class LayerSite:
    """One heavy node and the spec of its weight.

    The spec is None for a product of two activations and for a layer that stays float.

    Attributes:
        activation_bits: Bits of each operand that is quantized.
        reason: Why the layer computes in float although it is no transposed convolution, or "".
    """

    node: fx.Node
    module: str
    weight: str | None
    spec: QuantSpec | None
    activation_bits: tuple[int, ...] = ()
    reason: str = ""


@dataclass
class Plan:
    """All quantizers of a model, in graph order."""

    layers: list[LayerSite] = field(default_factory=list)
    activations: list[ActivationSite] = field(default_factory=list)


def plan_quantizers(capture: Capture, codes: Quantization, placement: str = "engine") -> Plan:
    """Apply the module's rules.

    Args:
        capture: The folded model.
        codes: Bits, granularity and grid.
        placement: ``engine``, ``paper`` or ``EARLIER``.

    Raises:
        ModelError: The graph holds nothing to quantize.
    """
    graph = capture.graph
    heavy = [node for node in graph.nodes if node.target in HEAVY]
    quantized = [node for node in heavy if node.target not in TRANSPOSED]
    weighted = [node for node in quantized if weight_node(node) is not None]
    if not weighted:
        raise ModelError(
            "found no convolution or linear in the model's graph; there is nothing to quantize"
        )
    last, images = last_layers(graph), _images(graph)
    real = last
    if placement == EARLIER:
        last, images = {weighted[-1]}, {node for node in images if node.op == "placeholder"}
        real = {node for node in heavy if _reaches_output(_behind_activation(node))}
    paper = placement == "paper"
    sources = {
        operand: _joined(root(operand), images) if paper else [root(operand)]
        for node in quantized
        for operand in operands(node)
    }
    bits: dict[fx.Node, int] = {}
    for node in quantized:
        for source in (s for operand in operands(node) for s in sources[operand]):
            wide = node in last or source in images
            bits[source] = max(bits.get(source, 0), 8 if wide else codes.abits)
    if not paper:
        for node in heavy:
            if node.target in CONVOLUTIONS and node not in real:
                bits.setdefault(_behind_activation(node), 8)
    # A weight that several layers share is as wide as the widest of them needs.
    ends = {str(weight_node(node).target) for node in weighted if node in last}  # type: ignore[union-attr]
    ends.add(str(weight_node(weighted[0]).target))  # type: ignore[union-attr]
    plan = Plan()
    for node in heavy:
        weight = weight_node(node)
        wide = weight is not None and str(weight.target) in ends
        site = _layer_site(capture, node, 8 if wide else codes.wbits, codes)
        if node in quantized:
            groups = [sources[operand] for operand in operands(node)]
            widths = tuple(max(bits[s] for s in group) for group in groups if group)
            reason = _reason(node, sources)
            site = replace(site, activation_bits=widths, reason=reason)
        plan.layers.append(site)
    plan.activations += _activation_sites(capture, bits, codes.grid)
    return plan


def _activation_sites(
    capture: Capture, bits: Mapping[fx.Node, int], grid: str
) -> Iterator[ActivationSite]:
    """A quantizer behind every node of ``bits``, in graph order."""
    never_negative = nonnegative_nodes(capture.graph)
    taken: set[str] = set()
    for node in capture.graph.nodes:
        if node in bits:
            spec = QuantSpec.activation(bits[node], node in never_negative, grid)
            path = "input" if node.op == "placeholder" else module_path(node)
            name = free_name(capture.module, f"{path}.act_scale", taken)
            taken.add(name)
            yield ActivationSite(node, name, path, spec)


def last_layers(graph: fx.Graph) -> set[fx.Node]:
    """Heavy nodes whose output reaches the network's output and passes no other on the way.

    Found by a walk from the output backwards, through activation functions, resizing, sums and
    products of scores, that ends at every layer which has a weight in codes. It goes on behind
    transposed convolutions, which stay float, and behind products of two activations, which
    have no weight: such a product is a last layer (its operands have 8 bits), and so are the
    layers that write its operands. In a network without a head every layer that writes into
    the last residual stream is a last layer.
    """
    (output,) = (node for node in graph.nodes if node.op == "output")
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = list(output.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in seen or _is_size(node):
            continue
        seen.add(node)
        if node.target in HEAVY:
            found.add(node)
            if node.target not in TRANSPOSED and weight_node(node) is not None:
                continue
        waiting += node.all_input_nodes
    return found


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), _SIZES)


def _images(graph: fx.Graph) -> set[fx.Node]:
    """The network's input, and what is computed from it alone before the first layer."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = [a for a in node.all_input_nodes if a.op != "get_attr" and not _is_size(a)]
        light = node.op == "call_function" and node.target not in HEAVY
        if node.op == "placeholder" or (light and inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def _joined(source: fx.Node, images: set[fx.Node]) -> list[fx.Node]:
    """The tensors that get a scale each in placement ``paper``; none for the network's input."""
    if source in images:
        return []
    parts = _parts(source)
    if not parts:
        return [source]
    return list(dict.fromkeys(s for part in parts for s in _joined(root(part), images)))


def _parts(node: fx.Node) -> list[fx.Node]:
    """What a concatenation joins; empty where it joins parameters too, or is something else."""
    parts = node.args[0] if node.target is aten.cat.default else []
    nodes = [part for part in parts if isinstance(part, fx.Node)]  # type: ignore[union-attr]
    return [] if any(root(part).op == "get_attr" for part in nodes) else nodes


def _reason(node: fx.Node, sources: Mapping[fx.Node, Sequence[fx.Node]]) -> str:
    """Why placement ``paper`` makes a layer compute in float, or ""."""
    for operand in operands(node):
        if not sources[operand]:
            return "placement paper: its input is the network's input, which stays real"
        if root(operand) not in sources[operand]:
            return (
                "placement paper: its input joins tensors that have a scale each, and engines "
                "compute on codes of one scale"
            )
    return ""


def nonnegative_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Tensors of which the graph itself says that they are never negative.

    Data are not asked: three domains must agree on it to be merged.
    """
    known: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and _nonnegative(node, known):
            known.add(node)
    return known


def _nonnegative(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether ``node`` is never negative, where the nodes before it are ``known`` not to be."""
    if node.target in _NONNEGATIVE:
        return True
    if node.target in _CLAMPS:
        return _clamps_to_nonnegative(node)
    inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if node.target in _AVERAGES:
        divisor: Any = node.args[6] if len(node.args) > 6 else node.kwargs.get("divisor_override")
        return inputs[0] in known and (divisor is None or divisor > 0)
    if node.target in _KEEPS_SIGN:
        return inputs[0] in known
    if node.target in _JOINS:
        alpha = node.kwargs.get("alpha", 1)  # of an addition: a + alpha b
        turns = not isinstance(alpha, (int, float)) or alpha < 0
        return len(inputs) == 2 and all(arg in known for arg in inputs) and not turns
    if node.target is aten.cat.default and isinstance(node.args[0], (list, tuple)):
        return all(arg in known for arg in node.args[0])
    return False


def _clamps_to_nonnegative(node: fx.Node) -> bool:
    """Both ends are numbers >= 0 (with a lower end above the upper one, the upper one wins)."""
    names = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get(names[0])
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get(names[1])
    if high is not None and not (isinstance(high, (int, float)) and high >= 0):
        return False
    return isinstance(low, (int, float)) and low >= 0


def operands(node: fx.Node) -> list[fx.Node]:
    """The activations that a heavy node multiplies."""
    count = 2 if node.target in PRODUCTS else 1
    return [a for a in node.args[:count] if isinstance(a, fx.Node) and a.op != "get_attr"]


def root(node: fx.Node) -> fx.Node:
    """The tensor whose codes ``node`` carries: back through pooling and reordering."""
    while node.op == "call_function" and node.target in _TRANSPARENT:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.op == "get_attr":
            break
        node = source
    return node


def _layer_site(capture: Capture, node: fx.Node, bits: int, codes: Quantization) -> LayerSite:
    weight = weight_node(node)
    if weight is None or node.target in TRANSPOSED:
        return LayerSite(node, module_path(node), None, None)
    value = attribute(capture.module, str(weight.target))
    axis = _channel_axis(node, value) if codes.per_channel else None
    path = module_path(node) if node.meta.get("hdrq_module") else str(weight.target)
    return LayerSite(node, path, str(weight.target), QuantSpec.weight(bits, axis, codes.grid))


def _channel_axis(node: fx.Node, weight: torch.Tensor) -> int | None:
    """The axis of the output channels, where engines take one scale per channel."""
    if node.target in PRODUCTS:
        return weight.ndim - 1 if weight.ndim == 2 else None
    return 0


def _behind_activation(conv: fx.Node) -> fx.Node:
    """The convolution's output, or that of the ReLU-like function that alone reads it."""
    users = list(conv.users)
    fuses: Callable[[Any], bool] = lambda n: (  # noqa: E731 - read once, in place
        n.target in {aten.relu.default, aten.relu6.default}
        or (n.target in _CLAMPS and _clamps_to_nonnegative(n))
    )
    return users[0] if len(users) == 1 and fuses(users[0]) else conv


def _reaches_output(node: fx.Node) -> bool:
    """Whether the network's output holds these values and no others."""
    return any(
        user.op == "output" or (user.target in _TRANSPARENT and _reaches_output(user))
        for user in node.users
    )
