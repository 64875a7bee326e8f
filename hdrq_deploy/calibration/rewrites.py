"""Operators that hide products, or have no ONNX form, in operators that show and have one."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..errors import ModelError
from .attention import spell_out_attention
from .nodes import add_node, module_path

__all__ = ["rewrite"]

aten = torch.ops.aten

PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
# By the number of spatial axes.
_AVERAGE_POOLS = {
    1: aten.avg_pool1d.default,
    2: aten.avg_pool2d.default,
    3: aten.avg_pool3d.default,
}
_MAX_POOLS = {
    1: aten.max_pool1d.default,
    2: aten.max_pool2d.default,
    3: aten.max_pool3d.default,
}
_ADAPTIVE: dict[Any, dict[int, Any]] = {
    aten.adaptive_avg_pool1d.default: _AVERAGE_POOLS,
    aten.adaptive_avg_pool2d.default: _AVERAGE_POOLS,
    aten._adaptive_avg_pool2d.default: _AVERAGE_POOLS,
    aten.adaptive_avg_pool3d.default: _AVERAGE_POOLS,
    aten._adaptive_avg_pool3d.default: _AVERAGE_POOLS,
    aten.adaptive_max_pool1d.default: _MAX_POOLS,
    aten.adaptive_max_pool2d.default: _MAX_POOLS,
    aten.adaptive_max_pool3d.default: _MAX_POOLS,
}


_CLAMPS = {aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default}


def rewrite(module: fx.GraphModule) -> None:
    """Apply every rule of this module to a captured graph, in place.

    Raises:
        ModelError: An operator is used in a way that no rule covers.
    """
    for node in list(module.graph.nodes):
        if node.target in _ADAPTIVE:
            _spell_out_pooling(node)
        elif node.target is aten.bilinear.default:
            _spell_out_bilinear(node)
        elif node.target is aten.squeeze.default:
            _name_squeezed_axes(node)
        elif node.target in {aten.amax.default, aten.amin.default} and len(node.args) == 1:
            node.args = (*node.args, list(range(node.args[0].meta["val"].ndim)))
        elif node.target in _CLAMPS:
            _clamp_with_floats(node)
        elif node.target is aten.scaled_dot_product_attention.default:
            spell_out_attention(module, node)
    _put_constants_right(module)


def _spell_out_pooling(node: fx.Node) -> None:
    """Adaptive pooling of a fixed size: plain pooling, or one axis after another in slices."""
    source: Any = node.args[0]
    size: Any = node.args[1]
    pools = _ADAPTIVE[node.target]
    outputs = [int(extent) for extent in (size if isinstance(size, (list, tuple)) else [size])]
    inputs = list(source.meta["val"].shape[-len(outputs) :])
    values = node.users if pools is _AVERAGE_POOLS else _values_of(node)
    if values is None or not all(isinstance(extent, int) for extent in inputs):
        return
    with node.graph.inserting_before(node):
        if pools is _AVERAGE_POOLS and set(outputs) == {1}:
            axes = list(range(-len(outputs), 0))
            result = add_node(node, aten.mean.dim, source, axes, True)
        elif all(i % o == 0 for i, o in zip(inputs, outputs, strict=True)):
            kernel = [i // o for i, o in zip(inputs, outputs, strict=True)]
            result = add_node(node, pools[len(outputs)], source, kernel, kernel)
        else:
            result = source
            for axis, (extent, parts) in enumerate(zip(inputs, outputs, strict=True)):
                result = _pool_axis(node, result, axis - len(outputs), extent, parts)
    for user in [node] if pools is _AVERAGE_POOLS else list(values):
        user.replace_all_uses_with(result)
        if user is not node:
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _values_of(node: fx.Node) -> list[fx.Node] | None:
    """Readers of a max pooling's values; None where its indices are read as well."""
    users = list(node.users)
    plain = all(user.target is operator.getitem and user.args[1] == 0 for user in users)
    return users if plain else None


def _pool_axis(node: fx.Node, source: fx.Node, axis: int, extent: int, parts: int) -> fx.Node:
    """Pool one axis; part i reaches from floor(i n / p) to ceil((i + 1) n / p)."""
    average = _ADAPTIVE[node.target] is _AVERAGE_POOLS
    pooled = []
    for i in range(parts):
        first, last = i * extent // parts, -(-(i + 1) * extent // parts)
        part = add_node(node, aten.slice.Tensor, source, axis, first, last)
        reduce = aten.mean.dim if average else aten.amax.default
        pooled.append(add_node(node, reduce, part, [axis], True))
    return add_node(node, aten.cat.default, pooled, axis)


def _name_squeezed_axes(node: fx.Node) -> None:
    """squeeze() of the axes that are 1 in the graph, whatever the batch is when it runs."""
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    node.args = (source, [i for i, n in enumerate(shape) if isinstance(n, int) and n == 1])
    node.target = aten.squeeze.dims


def _clamp_with_floats(node: fx.Node) -> None:
    """Bounds 0.05 and 6 as 0.05 and 6.0: the ONNX exporter takes one type only."""
    if node.meta["val"].is_floating_point():
        node.args = (node.args[0], *map(_as_float, node.args[1:]))
        node.kwargs = {name: _as_float(value) for name, value in node.kwargs.items()}


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value


def _spell_out_bilinear(node: fx.Node) -> None:
    """y_k = a A_k b + bias_k as a linear layer of a, a product with b and a sum."""
    first, second, weight, *rest = node.args
    assert isinstance(weight, fx.Node) and isinstance(second, fx.Node)
    out, left, right = weight.meta["val"].shape
    lead = list(second.meta["val"].shape[:-1])
    if not all(isinstance(extent, int) for extent in lead[1:]):
        raise ModelError(f"{module_path(node)}: a bilinear layer needs inputs of a fixed size")
    with node.graph.inserting_before(node):
        turned = add_node(node, aten.permute.default, weight, [0, 2, 1])
        flat = add_node(node, aten.reshape.default, turned, [out * right, left])
        wide = add_node(node, aten.linear.default, first, flat)
        shaped = add_node(node, aten.reshape.default, wide, [-1, *lead[1:], out, right])
        products = add_node(
            node, aten.mul.Tensor, shaped, add_node(node, aten.unsqueeze.default, second, -2)
        )
        result = add_node(node, aten.sum.dim_IntList, products, [-1])
        if rest and rest[0] is not None:
            result = add_node(node, aten.add.Tensor, result, rest[0])
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _put_constants_right(module: fx.GraphModule) -> None:
    """A x = (x' A')', so that a constant matrix on the left is a weight like any other.

    Engines take one scale per output channel of a right operand only.
    """
    constant: set[fx.Node] = set()
    for node in list(module.graph.nodes):
        inputs = node.all_input_nodes
        computed = node.op == "call_function" and inputs and constant.issuperset(inputs)
        if node.op == "get_attr" or computed:
            constant.add(node)
        elif node.target in PRODUCTS:
            left, right = inputs if len(inputs) == 2 else (None, None)
            if left in constant and min(n.meta["val"].ndim for n in inputs) >= 2:
                _turn(module, node, left, right)


def _turn(module: fx.GraphModule, node: fx.Node, left: Any, right: Any) -> None:
    with module.graph.inserting_before(node):
        turned = add_node(node, aten.transpose.int, right, -2, -1)
        weight = add_node(node, aten.transpose.int, left, -2, -1)
        # Its shape is known; torch 2.11 cannot compute it for a batch that is a symbol.
        product = module.graph.call_function(node.target, (turned, weight))  # type: ignore[arg-type]
        product.meta = {**node.meta, "val": node.meta["val"].transpose(-2, -1)}
        result = module.graph.call_function(aten.transpose.int, (product, -2, -1))
        result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)
