"""From a module to a flat graph: export, fold constants and BatchNorm, spell out attention.

``torch.export`` gives the graph of any model that has no data-dependent control flow. All
later steps (placement, blocks, ONNX) read this graph; none knows the model's classes.
"""

from __future__ import annotations

import copy
import math
import operator
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..fold import gain as fold_gain

__all__ = ["Capture", "Fold", "attribute", "capture", "module_path", "set_attribute"]

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
TRANSPOSED = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
LINEAR = {aten.linear.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
_BATCH_NORMS = {aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alias.default}


@dataclass(frozen=True)
class Fold:
    """A BatchNorm that was folded into a weight; gamma >= 0 (see ``hdrq_deploy.fold``).

    Attributes:
        raw: The weight before the fold, its sign changed where gamma was negative.
        sign: 1 or -1 per output channel, (C,).
        gamma, beta, mean, variance: (C,), the signs of gamma and mean changed likewise.
        eps: Added to the variance.
        raw_bias: The layer's own bias, or None.
        bias_name: The bias that the folded graph reads.
    """

    raw: Tensor
    sign: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor
    eps: float
    raw_bias: Tensor | None
    bias_name: str

    @property
    def gain(self) -> Tensor:
        """Factor of each output channel, (C,) float32."""
        found = fold_gain(self.gamma.numpy(), self.variance.numpy(), self.eps)
        return torch.from_numpy(found).float()


class Capture:
    """A captured model: functional graph, parameters as ``get_attr``, dynamic batch.

    ``folds`` holds what ``fold_batch_norm`` folded, by the name of the weight.
    """

    def __init__(self, graph_module: fx.GraphModule, example: Tensor) -> None:
        self.module = graph_module
        self.example = example
        self.folds: dict[str, Fold] = {}

    @property
    def graph(self) -> fx.Graph:
        """The flat graph."""
        return self.module.graph

    def clone_with(self, state: Mapping[str, Tensor]) -> Capture:
        """The same graph with other weights, ``state`` named as in the model."""
        other = copy.deepcopy(self.module)
        own = other.state_dict()
        for name, value in own.items():
            if name in state:
                value.copy_(state[name])
        return Capture(other, self.example)


def capture(model: nn.Module, example: Tensor) -> Capture:
    """Export ``model`` with a dynamic batch.

    Args:
        model: Takes one tensor; its first output tensor is the prediction.
        example: A batch of two real inputs (2, C, H, W).

    Raises:
        ModelError: The model does not take such a batch, or torch.export refuses it.
    """
    model = model.eval().requires_grad_(False)
    try:
        output = model(example)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ModelError(
            f"the model does not take an input of shape {tuple(example.shape)} "
            f"({_first_line(error)}); check channels and size of --data, or pass --size"
        ) from error
    _single_output(output)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with torch.no_grad():
            program = torch.export.export(_OneOutput(model), (example,), dynamic_shapes=batch)
            program = program.run_decompositions(_decompositions())
    except Exception as error:  # torch.export has no common base for its refusals
        raise ModelError(f"torch.export cannot capture the model {_refusal(error)}") from error
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    found = Capture(module, example)
    _strip_prefix(found)
    _remove_dropout(found.graph)
    _relax_views(found.graph)
    _spell_out_global_pooling(found.graph)
    _spell_out_attention(found)
    found.graph.eliminate_dead_code()
    found.module.recompile()
    return found


class _OneOutput(nn.Module):
    """The first tensor of whatever the model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return _single_output(self.model(x))


def _single_output(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, (tuple, list)) or hasattr(values, "__iter__"):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise ModelError(
        f"the model returns {type(output).__name__}; needed a tensor, or a tuple or mapping "
        "whose first tensor is the prediction"
    )


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Keep convolutions, linears and attention whole; open only what hides products."""
    table = torch.export.default_decompositions()
    hiding = (aten.einsum.default, aten.addmm.default, aten.baddbmm.default)
    return {target: table[target] for target in hiding if target in table}


def _refusal(error: BaseException) -> str:
    """Where torch.export gave up, why, and what to change."""
    library = str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    entered = next((i for i, f in enumerate(frames) if f.filename.startswith(library)), 0)
    inside = [f for f in frames[entered:] if not f.filename.startswith(library)]
    where = ""
    if inside:
        last = inside[-1]
        where = f"at {last.filename}:{last.lineno} in {last.name} ({last.line}) "
    text = _first_line(error)
    if "Constraints violated" in str(error) or "onstraint" in text:
        advice = (
            "the batch size is fixed inside the model: use x.shape[0] or -1 instead of a number"
        )
    elif "data-dependent" in str(error):
        advice = (
            "a Python branch or size depends on the values of a tensor: use torch.where, or make "
            "it depend on shapes"
        )
    else:
        advice = "rewrite this part of the model so that torch.export takes it"
    return f"{where}({text}); {advice}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _strip_prefix(found: Capture) -> None:
    """Give parameters and module paths the model's own names (without ``model.``)."""
    inner = found.module.get_submodule("model") if hasattr(found.module, "model") else None
    for node in found.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("model."):
            value = attribute(found.module, str(node.target))
            node.target = str(node.target)[len("model.") :]
            set_attribute(found.module, node.target, value)
        stack = node.meta.get("nn_module_stack")
        if stack:
            path = list(stack.values())[-1][0]
            path = path.removeprefix("L['self'].").removeprefix("L__self___")
            node.meta["hdrq_module"] = path.removeprefix("model").removeprefix(".")
    if inner is not None:
        del found.module._modules["model"]
    found.module.recompile()


def _remove_dropout(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in _DROPOUTS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _relax_views(graph: fx.Graph) -> None:
    """A view promises a memory layout that other kernels need not keep; a reshape does not."""
    for node in graph.nodes:
        if node.target in {aten.view.default, aten._unsafe_view.default}:
            node.target = aten.reshape.default


def _spell_out_global_pooling(graph: fx.Graph) -> None:
    """Average pooling to 1x1 is a mean; the ONNX exporter would write it as a Gather."""
    for node in graph.nodes:
        if node.target is aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target = aten.mean.dim
            node.args = (node.args[0], [-2, -1], True)


def _spell_out_attention(found: Capture) -> None:
    """Write scaled dot product attention as product, softmax, product.

    Source:
        pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention
    """
    graph = found.graph
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        query, key, value = given["query"], given["key"], given["value"]
        if given.get("enable_gqa"):
            raise ModelError(
                f"{module_path(node)}: grouped-query attention is not supported; "
                "repeat keys and values in the model"
            )
        width = query.meta["val"].shape[-1]
        scale = given.get("scale") or 1 / math.sqrt(width)
        mask = given.get("attn_mask")
        if given.get("is_causal"):
            mask = _causal_mask(found, node, query, key)
        with graph.inserting_before(node):
            transposed = _call(graph, node, aten.transpose.int, key, -2, -1)
            scores = _call(graph, node, aten.matmul.default, query, transposed)
            scores = _call(graph, node, aten.mul.Tensor, scores, scale)
            if mask is not None:
                if mask.meta["val"].dtype == torch.bool:
                    raise ModelError(
                        f"{module_path(node)}: a boolean attention mask is not supported; "
                        "use an additive float mask"
                    )
                scores = _call(graph, node, aten.add.Tensor, scores, mask)
            shares = _call(graph, node, aten.softmax.int, scores, -1)
            result = _call(graph, node, aten.matmul.default, shares, value)
        result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _causal_mask(found: Capture, node: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
    rows, columns = query.meta["val"].shape[-2], key.meta["val"].shape[-2]
    if not (isinstance(rows, int) and isinstance(columns, int)):
        raise ModelError(f"{module_path(node)}: causal attention needs a fixed length")
    name = f"causal_mask_{rows}_{columns}"
    mask = torch.zeros(rows, columns).masked_fill(
        torch.ones(rows, columns).tril().logical_not(), float("-inf")
    )
    set_attribute(found.module, name, mask)
    with found.graph.inserting_before(node):
        got = found.graph.get_attr(name)
    got.meta["val"] = mask
    return got


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new node whose module path is that of ``like`` and whose shapes are propagated."""
    node = graph.call_function(target, args)
    node.meta["hdrq_module"] = like.meta.get("hdrq_module", "")
    values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
    mode = next((v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor)), None)
    if mode is not None:
        with mode:
            node.meta["val"] = target(
                *(
                    mode.from_tensor(v)
                    if isinstance(v, Tensor) and not isinstance(v, torch._subclasses.FakeTensor)
                    else v
                    for v in values
                )
            )
    return node


def fold_constants(found: Capture) -> None:
    """Evaluate every node that depends on parameters alone (weight norm, bias tables)."""
    graph = found.graph
    constant: set[fx.Node] = set()
    folded = 0
    for node in list(graph.nodes):
        if node.op == "get_attr" or (
            node.op == "call_function"
            and node.all_input_nodes
            and all(arg in constant for arg in node.all_input_nodes)
        ):
            constant.add(node)
    for node in list(graph.nodes):
        users = [user for user in node.users if user not in constant]
        if node not in constant or node.op == "get_attr" or not users:
            continue
        value = _evaluate(found.module, node)
        if not isinstance(value, Tensor):
            continue
        path = node.meta.get("hdrq_module", "")
        name = f"{path}.folded_{folded}" if path else f"folded_{folded}"
        folded += 1
        set_attribute(found.module, name, value.detach().clone())
        with graph.inserting_before(node):
            got = graph.get_attr(name)
        got.meta.update(node.meta)
        for user in users:
            user.replace_input_with(node, got)
    graph.eliminate_dead_code()
    found.module.recompile()


def _evaluate(module: nn.Module, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: _evaluate(module, arg))
    assert callable(node.target)
    return node.target(*args, **kwargs)


def fold_batch_norm(found: Capture) -> list[str]:
    """Fold each BatchNorm into the convolution or linear that alone feeds it.

    Returns:
        Module paths of the BatchNorms that stay (nothing weighted before them).
    """
    graph, kept = found.graph, []
    for norm in [node for node in graph.nodes if node.target in _BATCH_NORMS]:
        source = norm.args[0]
        assert isinstance(source, fx.Node)
        if not _foldable(source):
            kept.append(module_path(norm))
            continue
        _fold_one(found, norm, source)
    graph.eliminate_dead_code()
    found.module.recompile()
    return kept


def _foldable(source: fx.Node) -> bool:
    if source.target not in CONVOLUTIONS | TRANSPOSED | LINEAR or len(source.users) != 1:
        return False
    weight = source.args[1]
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return False
    readers = [
        user
        for node in source.graph.nodes
        if node.op == "get_attr" and node.target == weight.target
        for user in node.users
    ]
    # A 3-D linear output has its channels last, BatchNorm reads axis 1.
    plain = source.target not in LINEAR or source.meta["val"].ndim == 2
    return len(readers) == 1 and plain


def _fold_one(found: Capture, norm: fx.Node, source: fx.Node) -> None:
    module, graph = found.module, found.graph
    gamma, beta, mean, variance = (
        attribute(module, str(arg.target)).double() if isinstance(arg, fx.Node) else None
        for arg in norm.args[1:5]
    )
    assert mean is not None and variance is not None
    eps = (
        norm.args[6]
        if norm.target is aten._native_batch_norm_legit_no_training.default
        else norm.args[7]
    )
    assert isinstance(eps, float)
    spread = torch.sqrt(variance + eps)
    gain = (torch.ones_like(spread) if gamma is None else gamma) / spread
    weight_node = source.args[1]
    assert isinstance(weight_node, fx.Node)
    name = str(weight_node.target)
    weight = attribute(module, name)
    axis = _output_axis(source)
    groups = weight.shape[axis] and len(gain) // weight.shape[axis]
    shape = [1] * weight.ndim
    shape[axis] = -1
    if groups > 1:  # grouped transposed convolution: (in, out / groups, ...)
        per_group = gain.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        factor = per_group.reshape(*per_group.shape, *[1] * (weight.ndim - 2))
    else:
        factor = gain.reshape(shape)
    set_attribute(module, name, (weight.double() * factor).to(weight.dtype))
    bias_node = source.args[2] if len(source.args) > 2 else None
    old = attribute(module, str(bias_node.target)) if isinstance(bias_node, fx.Node) else None
    bias = (0 if beta is None else beta) + ((0 if old is None else old) - mean) * gain
    bias_name = name.removesuffix("weight") + "bias" if name.endswith("weight") else name + "_bias"
    if source.target not in TRANSPOSED:
        sign = torch.where(gain < 0, -1.0, 1.0).to(weight.dtype)
        one = torch.ones_like(mean)
        found.folds[name] = Fold(
            raw=weight * sign.reshape(shape),
            sign=sign,
            gamma=((one if gamma is None else gamma) * sign).float(),
            beta=(0 * one if beta is None else beta).float(),
            mean=(mean * sign).float(),
            variance=variance.float(),
            eps=eps,
            raw_bias=None if old is None else old * sign,
            bias_name=bias_name,
        )
    set_attribute(module, bias_name, bias.to(weight.dtype))
    with graph.inserting_before(source):
        bias_got = graph.get_attr(bias_name)
    bias_got.meta["val"] = bias.to(weight.dtype)
    source.args = (source.args[0], source.args[1], bias_got, *source.args[3:])
    if norm.target is aten.batch_norm.default:
        norm.replace_all_uses_with(source)
    else:
        for user in list(norm.users):
            assert user.target is operator.getitem and user.args[1] == 0
            user.replace_all_uses_with(source)
            graph.erase_node(user)
    graph.erase_node(norm)


def _output_axis(node: fx.Node) -> int:
    return 1 if node.target in TRANSPOSED else 0


def module_path(node: fx.Node) -> str:
    """Path of the module this node came from, or the node's own name."""
    return str(node.meta.get("hdrq_module") or node.name)


def attribute(module: nn.Module, target: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def set_attribute(module: nn.Module, target: str, value: Tensor) -> None:
    """Register ``value`` as a buffer at a dotted path, making the modules on the way."""
    *path, name = target.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    if name in module._parameters:
        del module._parameters[name]
    if name in module.__dict__:
        del module.__dict__[name]
    module.register_buffer(name, value.detach())
