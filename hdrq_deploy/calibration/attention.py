"""Scaled dot product attention, which hides two products, as operators that show them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..errors import ModelError
from .nodes import add_node, module_path
from .tensors import free_name, set_attribute

__all__ = ["spell_out_attention"]

aten = torch.ops.aten


def spell_out_attention(module: fx.GraphModule, node: fx.Node) -> None:
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
        transposed = add_node(node, aten.transpose.int, key, -2, -1)
        scores = add_node(node, aten.matmul.default, query, transposed)
        scores = add_node(node, aten.mul.Tensor, scores, scale)
        if mask is not None:
            if mask.meta["val"].dtype == torch.bool:
                mask = add_node(node, aten.where.Scalar, mask, 0.0, -math.inf)
            scores = add_node(node, aten.add.Tensor, scores, mask)
        shares = add_node(node, aten.softmax.int, scores, -1)
        result = add_node(node, aten.matmul.default, shares, value)
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
