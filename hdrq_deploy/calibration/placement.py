"""Where quantizers go.

1. Every operand that a convolution, linear or matrix product reads gets one quantizer, put
   behind the activation function, pooling or reshaping that made it and shared by all its
   readers. Max pooling and pure reordering keep codes as they are, so the quantizer goes
   before them.
2. A convolution's output that rule 1 leaves alone (a branch of a residual add, the input of
   SiLU or HardSwish) gets an 8-bit one: engines only run a convolution in INT8 when it
   writes codes. The network's outputs stay real.
3. Transposed convolutions stay float: neither TensorRT nor ONNX Runtime runs them in INT8.
4. Weights: ``wbits``, but 8 in the first and last layer. Operands: ``abits``, but 8 for the
   network's input and the input of the last layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..errors import ModelError
from ..numerics.spec import QuantSpec
from .capture import CONVOLUTIONS, LINEAR, PRODUCTS, TRANSPOSED, Capture
from .nodes import module_path
from .request import Quantization
from .tensors import attribute, free_name

__all__ = ["HEAVY", "ActivationSite", "LayerSite", "Plan", "plan_quantizers", "root"]

aten = torch.ops.aten

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
    """

    node: fx.Node
    module: str
    weight: str | None
    spec: QuantSpec | None


@dataclass
class Plan:
    """All quantizers of a model, in graph order."""

    layers: list[LayerSite] = field(default_factory=list)
    activations: list[ActivationSite] = field(default_factory=list)


def plan_quantizers(capture: Capture, codes: Quantization) -> Plan:
    """Apply the module's rules.

    Args:
        capture: The folded model.
        codes: Bits, granularity and grid.

    Raises:
        ModelError: The graph holds nothing to quantize.
    """
    heavy = [node for node in capture.graph.nodes if node.target in HEAVY]
    quantized = [node for node in heavy if node.target not in TRANSPOSED]
    weighted = [node for node in quantized if _weight_node(node) is not None]
    if not weighted:
        raise ModelError(
            "found no convolution or linear in the model's graph; there is nothing to quantize"
        )
    plan = Plan()
    # A weight that several layers share is as wide as the widest of them needs.
    ends = {str(_weight_node(node).target) for node in (weighted[0], weighted[-1])}  # type: ignore[union-attr]
    for node in heavy:
        weight = _weight_node(node)
        wide = weight is not None and str(weight.target) in ends
        plan.layers.append(
            _layer_site(capture, node, 8 if wide else codes.wbits, codes.per_channel)
        )
    bits = _operand_bits(quantized, weighted[-1], codes.abits)
    for node in heavy:
        if node.target in CONVOLUTIONS:
            end = _behind_activation(node)
            if end not in bits and not _reaches_output(end):
                bits[end] = 8
    never_negative = nonnegative_nodes(capture.graph)
    taken: set[str] = set()
    for node in capture.graph.nodes:
        if node in bits:
            spec = QuantSpec.activation(bits[node], node in never_negative, codes.grid)
            path = "input" if node.op == "placeholder" else module_path(node)
            name = free_name(capture.module, f"{path}.act_scale", taken)
            taken.add(name)
            plan.activations.append(ActivationSite(node, name, path, spec))
    return plan


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


def _weight_node(node: fx.Node) -> fx.Node | None:
    candidate = node.args[1]
    return candidate if isinstance(candidate, fx.Node) and candidate.op == "get_attr" else None


def _layer_site(capture: Capture, node: fx.Node, bits: int, per_channel: bool) -> LayerSite:
    weight = _weight_node(node)
    if weight is None or node.target in TRANSPOSED:
        return LayerSite(node, module_path(node), None, None)
    value = attribute(capture.module, str(weight.target))
    axis = _channel_axis(node, value) if per_channel else None
    path = module_path(node) if node.meta.get("hdrq_module") else str(weight.target)
    return LayerSite(node, path, str(weight.target), QuantSpec.weight(bits, axis))


def _channel_axis(node: fx.Node, weight: torch.Tensor) -> int | None:
    """The axis of the output channels, where engines take one scale per channel."""
    if node.target in PRODUCTS:
        return weight.ndim - 1 if weight.ndim == 2 else None
    return 0


def _operand_bits(heavy: list[fx.Node], last: fx.Node, abits: int) -> dict[fx.Node, int]:
    bits: dict[fx.Node, int] = {}
    for node in heavy:
        for operand in operands(node):
            source = root(operand)
            wide = node is last or source.op == "placeholder"
            bits[source] = max(bits.get(source, 0), 8 if wide else abits)
    return bits


def _behind_activation(conv: fx.Node) -> fx.Node:
    """The convolution's output, or that of the ReLU-like function that alone reads it."""
    users = list(conv.users)
    fuses: Callable[[Any], bool] = lambda n: (  # noqa: E731 - read once, in place
        n.target in {aten.relu.default, aten.relu6.default}
        or (n.target in _CLAMPS and _clamps_to_nonnegative(n))
    )
    return users[0] if len(users) == 1 and fuses(users[0]) else conv


def _reaches_output(node: fx.Node) -> bool:
    return any(
        user.op == "output" or (user.target in _TRANSPARENT and _reaches_output(user))
        for user in node.users
    )
