"""Nodes of a captured graph: where they come from, and new ones beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

__all__ = ["add_node", "module_path", "weight_node"]


def module_path(node: fx.Node) -> str:
    """Path of the module this node came from, or the node's own name."""
    return str(node.meta.get("hdrq_module") or node.name)


def weight_node(node: fx.Node) -> fx.Node | None:
    """The parameter that a heavy node multiplies by; None for a product of two activations."""
    candidate = node.args[1]
    return candidate if isinstance(candidate, fx.Node) and candidate.op == "get_attr" else None


def add_node(like: fx.Node, target: Any, *args: Any) -> fx.Node:
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
