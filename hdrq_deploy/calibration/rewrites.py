"""Operators that hide products, or have no ONNX form, in operators that show and have one."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import ModelError
from .tensors import free_name, set_attribute

__all__ = ["module_path", "rewrite"]

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
            _spell_out_attention(module, node)
    _put_constants_right(module)


def module_path(node: fx.Node) -> str:
    """Path of the module this node came from, or the node's own name."""
    return str(node.meta.get("hdrq_module") or node.name)


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
            result = _call(node, aten.mean.dim, source, axes, True)
        elif all(i % o == 0 for i, o in zip(inputs, outputs, strict=True)):
            kernel = [i // o for i, o in zip(inputs, outputs, strict=True)]
            result = _call(node, pools[len(outputs)], source, kernel, kernel)
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
        part = _call(node, aten.slice.Tensor, source, axis, first, last)
        reduce = aten.mean.dim if average else aten.amax.default
        pooled.append(_call(node, reduce, part, [axis], True))
    return _call(node, aten.cat.default, pooled, axis)


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
        turned = _call(node, aten.permute.default, weight, [0, 2, 1])
        flat = _call(node, aten.reshape.default, turned, [out * right, left])
        wide = _call(node, aten.linear.default, first, flat)
        shaped = _call(node, aten.reshape.default, wide, [-1, *lead[1:], out, right])
        products = _call(
            node, aten.mul.Tensor, shaped, _call(node, aten.unsqueeze.default, second, -2)
        )
        result = _call(node, aten.sum.dim_IntList, products, [-1])
        if rest and rest[0] is not None:
            result = _call(node, aten.add.Tensor, result, rest[0])
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
        turned = _call(node, aten.transpose.int, right, -2, -1)
        weight = _call(node, aten.transpose.int, left, -2, -1)
        # Its shape is known; torch 2.11 cannot compute it for a batch that is a symbol.
        product = module.graph.call_function(node.target, (turned, weight))  # type: ignore[arg-type]
        product.meta = {**node.meta, "val": node.meta["val"].transpose(-2, -1)}
        result = module.graph.call_function(aten.transpose.int, (product, -2, -1))
        result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)


def _spell_out_attention(module: fx.GraphModule, node: fx.Node) -> None:
    """Scaled dot product attention as product, softmax, product.

    Source:
        pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    if given.get("enable_gqa"):
        raise ModelError(
            f"{module_path(node)}: grouped-query attention is not supported; "
            "repeat keys and values in the model"
        )
    width = query.meta["val"].shape[-1]
    scale = given.get("scale")
    scale = 1 / math.sqrt(width) if scale is None else scale
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = _causal_mask(module, node, query, key)
    with node.graph.inserting_before(node):
        transposed = _call(node, aten.transpose.int, key, -2, -1)
        scores = _call(node, aten.matmul.default, query, transposed)
        scores = _call(node, aten.mul.Tensor, scores, scale)
        if mask is not None:
            if mask.meta["val"].dtype == torch.bool:
                mask = _call(node, aten.where.Scalar, mask, 0.0, -math.inf)
            scores = _call(node, aten.add.Tensor, scores, mask)
        shares = _call(node, aten.softmax.int, scores, -1)
        result = _call(node, aten.matmul.default, shares, value)
    result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _causal_mask(module: fx.GraphModule, node: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
    rows, columns = query.meta["val"].shape[-2], key.meta["val"].shape[-2]
    if not (isinstance(rows, int) and isinstance(columns, int)):
        raise ModelError(f"{module_path(node)}: causal attention needs a fixed length")
    mask = torch.zeros(rows, columns).masked_fill(
        torch.ones(rows, columns).tril().logical_not(), -math.inf
    )
    name = free_name(module, f"causal_mask_{rows}_{columns}")
    set_attribute(module, name, mask)
    with node.graph.inserting_before(node):
        got = node.graph.get_attr(name)
    got.meta["val"] = mask
    return got


def _call(like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new node whose module path is that of ``like`` and whose shapes are propagated."""
    node = like.graph.call_function(target, args)
    node.meta["hdrq_module"] = like.meta.get("hdrq_module", "")
    values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
    fakes = (v for v in pytree.tree_leaves(values) if isinstance(v, torch._subclasses.FakeTensor))
    mode = next((v.fake_mode for v in fakes), None)
    if mode is None:
        node.meta["val"] = target(*values)
        return node

    def fake(value: Any) -> Any:
        real = isinstance(value, Tensor) and not isinstance(value, torch._subclasses.FakeTensor)
        return mode.from_tensor(value) if real else value

    with mode:
        node.meta["val"] = target(*pytree.tree_map(fake, values))
    return node
