"""Fold constants and BatchNorm of a captured graph into its weights."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..formats.statistics import NormRecord
from .capture import CONVOLUTIONS, LINEAR, TRANSPOSED, Capture, Fold
from .nodes import module_path
from .tensors import attribute, free_name, set_attribute

__all__ = ["fold_batch_norm", "fold_constants", "folded", "norms_behind", "read_once"]

aten = torch.ops.aten

_BATCH_NORMS = {aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default}


def fold_constants(capture: Capture) -> None:
    """Evaluate every node that depends on parameters alone (weight norm, bias tables), in place."""
    graph = capture.graph
    constant: set[fx.Node] = set()
    values: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" or (
            node.op == "call_function"
            and node.all_input_nodes
            and all(arg in constant for arg in node.all_input_nodes)
        ):
            constant.add(node)
            values[node] = _evaluate(capture.module, node, values)
    count = 0
    for node in list(graph.nodes):
        users = [user for user in node.users if user not in constant]
        if node not in constant or node.op == "get_attr" or not users:
            continue
        value = values[node]
        if not isinstance(value, Tensor):
            continue
        path = node.meta.get("hdrq_module", "")
        name = free_name(capture.module, f"{path}.folded_{count}" if path else f"folded_{count}")
        count += 1
        set_attribute(capture.module, name, value.detach().clone())
        with graph.inserting_before(node):
            got = graph.get_attr(name)
        got.meta.update(node.meta)
        for user in users:
            user.replace_input_with(node, got)
    graph.eliminate_dead_code()
    capture.module.recompile()


def _evaluate(module: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: values[arg])
    assert callable(node.target)
    return node.target(*args, **kwargs)


def folded(capture: Capture, into_scales: bool = False) -> Capture:
    """Fold constants and BatchNorm in place (:func:`fold_batch_norm`); returns ``capture``."""
    fold_constants(capture)
    fold_batch_norm(capture, into_scales)
    return capture


def fold_batch_norm(capture: Capture, into_scales: bool = False) -> list[str]:
    """Fold each BatchNorm into the convolution or linear that alone feeds it, in place.

    Args:
        capture: The model's graph.
        into_scales: Fill ``capture.folds``: weights are then quantized as they were before the
            fold, and their scales carry BatchNorm. Transposed convolutions stay float, and are
            not recorded.

    Returns:
        Module paths of the BatchNorms that stay (nothing weighted before them).
    """
    graph, unfolded = capture.graph, []
    for norm in [node for node in graph.nodes if node.target in _BATCH_NORMS]:
        if not _foldable(norm):
            unfolded.append(module_path(norm))
            continue
        source = norm.args[0]
        assert isinstance(source, fx.Node)
        _fold_one(capture, norm, source, into_scales)
    graph.eliminate_dead_code()
    capture.module.recompile()
    return unfolded


def norms_behind(graph: fx.Graph) -> dict[str, NormRecord]:
    """BatchNorms of their own tensors that could be folded, by the weight of the layer before each.

    Transposed convolutions are left out: what leaves them is no product of one row of inputs.
    """
    found = {}
    for norm in graph.nodes:
        if norm.target not in _BATCH_NORMS or not _foldable(norm):
            continue
        source = norm.args[0]
        bias = source.args[2] if len(source.args) > 2 else None
        gamma, beta, mean, variance = (arg and str(arg.target) for arg in norm.args[1:5])
        own = all(read_once(arg) for arg in norm.args[1:5] if arg is not None)
        if own and source.target not in TRANSPOSED:
            found[str(source.args[1].target)] = NormRecord(
                gamma=gamma,
                beta=beta,
                mean=mean,
                variance=variance,
                eps=_eps(norm),
                raw_bias=bias and str(bias.target),
            )
    return found


def _eps(norm: fx.Node) -> float:
    eps = norm.args[7 if norm.target is aten.batch_norm.default else 6]
    assert isinstance(eps, (int, float))
    return float(eps)


def _foldable(norm: fx.Node) -> bool:
    source = norm.args[0]
    if not (isinstance(source, fx.Node) and _has_own_statistics(norm)):
        return False
    if source.target not in CONVOLUTIONS | TRANSPOSED | LINEAR or len(source.users) != 1:
        return False
    weight = source.args[1]
    # A 3-D linear output has its channels last, BatchNorm reads axis 1.
    plain = source.target not in LINEAR or source.meta["val"].ndim == 2
    return plain and read_once(weight)


def _has_own_statistics(norm: fx.Node) -> bool:
    """Mean and variance are buffers, not those of the batch or computed from the input."""
    given = [arg for arg in norm.args[1:5] if arg is not None]
    stored = all(isinstance(arg, fx.Node) and arg.op == "get_attr" for arg in given)
    if norm.args[3] is None or norm.args[4] is None or not stored:
        return False
    if norm.target is aten.batch_norm.default:
        return not norm.args[5]
    return all(user.target is operator.getitem and user.args[1] == 0 for user in norm.users)


def read_once(got: Any) -> bool:
    """Whether ``got`` is a parameter that one node alone reads."""
    if not (isinstance(got, fx.Node) and got.op == "get_attr"):
        return False
    readers = [
        user
        for node in got.graph.nodes
        if node.op == "get_attr" and node.target == got.target
        for user in node.users
    ]
    return len(readers) == 1


@dataclass(frozen=True)
class _Moments:
    """A BatchNorm's numbers, (C,) float64; gamma and beta are None where it has none."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.Module, norm: fx.Node) -> _Moments:
        gamma, beta, mean, variance = (
            attribute(module, str(arg.target)).double() if isinstance(arg, fx.Node) else None
            for arg in norm.args[1:5]
        )
        assert mean is not None and variance is not None
        return cls(gamma, beta, mean, variance, _eps(norm))

    @property
    def gain(self) -> Tensor:
        """Factor of each output channel, (C,)."""
        deviation = torch.sqrt(self.variance + self.eps)
        return (torch.ones_like(deviation) if self.gamma is None else self.gamma) / deviation


def _fold_one(capture: Capture, norm: fx.Node, source: fx.Node, into_scales: bool) -> None:
    """Fold ``norm`` into the weight and the bias of ``source``, in place."""
    module, graph = capture.module, capture.graph
    moments = _Moments.of(module, norm)
    gain = moments.gain
    weight_node = source.args[1]
    assert isinstance(weight_node, fx.Node)
    name = str(weight_node.target)
    weight = attribute(module, name)
    factor = _along_outputs(gain, weight, source)
    set_attribute(module, name, (weight.double() * factor).to(weight.dtype))
    bias_node = source.args[2] if len(source.args) > 2 else None
    old = attribute(module, str(bias_node.target)) if isinstance(bias_node, fx.Node) else None
    shifted = ((0 if old is None else old) - moments.mean) * gain
    bias = ((0 if moments.beta is None else moments.beta) + shifted).to(weight.dtype)
    bias_name = _bias_name(module, name, bias_node)
    if into_scales and source.target not in TRANSPOSED:
        capture.folds[name] = _fold_record(moments, weight, old, bias_name)
    set_attribute(module, bias_name, bias)
    with graph.inserting_before(source):
        bias_got = graph.get_attr(bias_name)
    bias_got.meta["val"] = bias
    source.args = (source.args[0], source.args[1], bias_got, *source.args[3:])
    _bypass(norm, source)


def _along_outputs(gain: Tensor, weight: Tensor, source: fx.Node) -> Tensor:
    """``gain`` (C,) in a shape that broadcasts against the weight of ``source``."""
    axis = 1 if source.target in TRANSPOSED else 0
    groups = weight.shape[axis] and len(gain) // weight.shape[axis]
    if groups > 1:  # grouped transposed convolution: (in, out / groups, ...)
        per_group = gain.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        return per_group.reshape(*per_group.shape, *[1] * (weight.ndim - 2))
    shape = [1] * weight.ndim
    shape[axis] = -1
    return gain.reshape(shape)


def _fold_record(moments: _Moments, weight: Tensor, bias: Tensor | None, bias_name: str) -> Fold:
    """What a merge needs of a fold, with the signs of gamma in the weight (output axis 0)."""
    sign = torch.where(moments.gain < 0, -1.0, 1.0).to(weight.dtype)
    one = torch.ones_like(moments.mean)
    gamma = one if moments.gamma is None else moments.gamma
    return Fold(
        raw=weight * sign.reshape(-1, *[1] * (weight.ndim - 1)),
        sign=sign,
        gamma=(gamma * sign).float(),
        beta=(0 * one if moments.beta is None else moments.beta).float(),
        mean=(moments.mean * sign).float(),
        variance=moments.variance.float(),
        eps=moments.eps,
        raw_bias=None if bias is None else bias * sign,
        bias_name=bias_name,
    )


def _bypass(norm: fx.Node, source: fx.Node) -> None:
    """Let the readers of ``norm`` read ``source``, and erase ``norm``."""
    if norm.target is aten.batch_norm.default:
        norm.replace_all_uses_with(source)
    else:
        for user in list(norm.users):
            assert user.target is operator.getitem and user.args[1] == 0
            user.replace_all_uses_with(source)
            norm.graph.erase_node(user)
    norm.graph.erase_node(norm)


def _bias_name(module: nn.Module, weight: str, bias: Any) -> str:
    """The layer's own bias; a new tensor where it has none or shares it with another reader."""
    if read_once(bias):
        return str(bias.target)
    stem = weight.removesuffix("weight")
    return free_name(module, f"{stem}bias" if stem != weight else f"{weight}_bias")
