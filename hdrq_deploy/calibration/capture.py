"""From a module to a flat graph: export, fold constants and BatchNorm, spell out attention.

``torch.export`` gives the graph of any model that has no data-dependent control flow. All
later stages (placement, blocks, ONNX) read this graph; none knows the model's classes.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..numerics.batchnorm_fold import gain as fold_gain
from .nodes import module_path
from .rewrites import rewrite
from .tensors import attribute, free_name, set_attribute

__all__ = [
    "CONVOLUTIONS",
    "LINEAR",
    "PRODUCTS",
    "TRANSPOSED",
    "Capture",
    "Fold",
    "attribute",
    "capture",
    "module_path",
    "quiet",
    "run_model",
    "set_attribute",
    "single_output",
]

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
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alias.default}
# What libraries call the prediction among several outputs, the surest name first.
_PREDICTIONS = (
    "logits", "out", "output", "prediction", "predictions", "pred", "preds", "scores", "probs",
    "last_hidden_state",
)  # fmt: skip
# Loggers with levels of their own.
_LOUD = ("torch.onnx", "torch.export", "torch._export", "torch.fx.experimental.symbolic_shapes")
# The wrapper's own attribute; a user's module may be called anything else, "model" included.
_WRAPPED = "hdrq_wrapped"


@dataclass(frozen=True)
class Fold:
    """A BatchNorm that was folded into a weight; gamma >= 0 (:mod:`..numerics.batchnorm_fold`).

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
        gain = fold_gain(self.gamma.numpy(), self.variance.numpy(), self.eps)
        return torch.from_numpy(gain).float()


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
        keep_shapes(self.graph, other.graph)
        own = other.state_dict()
        for name, value in own.items():
            if name in state:
                value.copy_(state[name])
        return Capture(other, self.example)


def keep_shapes(graph: fx.Graph, copied: fx.Graph) -> None:
    """Give a copied graph the notes of its original; up to torch 2.11 a copy fixes the batch."""
    for node, other in zip(graph.nodes, copied.nodes, strict=True):
        other.meta = dict(node.meta)


def capture(model: nn.Module, example: Tensor) -> Capture:
    """Export ``model`` with a dynamic batch.

    Args:
        model: Takes one tensor; its first output tensor is the prediction.
        example: A batch of two real inputs (2, C, H, W).

    Raises:
        ModelError: The model does not take such a batch, or torch.export refuses it.
    """
    model = model.eval().requires_grad_(False)
    run_model(model, example)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(_OneOutput(model), (example,), dynamic_shapes=batch)
            program = program.run_decompositions(dict(_decompositions()))
    except Exception as error:  # torch.export has no common base for its refusals
        raise ModelError(f"torch.export cannot capture the model {_refusal(error)}") from error
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    result = _with_own_names(module, example, model.state_dict())
    _drop_buffer_writes(result.graph)
    _remove_dropout(result.graph)
    _remove_input_copy(result.graph)
    _relax_views(result.graph)
    _check_precision(result.graph)
    rewrite(result.module)
    result.graph.eliminate_dead_code()
    result.module.recompile()
    return result


def run_model(model: nn.Module, x: Tensor) -> Tensor:
    """The user's module on ``x``, which it may write to: the first tensor of what it returns.

    Args:
        model: The model in evaluation mode.
        x: Inputs (N, C, H, W); a copy is passed on.

    Raises:
        ModelError: The model does not take such inputs, or returns no tensor.
    """
    try:
        with torch.no_grad():
            output = model(x.clone())
    except Exception as error:  # a user's forward may raise anything
        raise ModelError(
            f"the model does not take an input of shape {tuple(x.shape)} "
            f"({type(error).__name__}: {_first_line(error)}); check the images' channels and size, "
            "or choose another `size`"
        ) from error
    return single_output(output)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch.export logs, warns of and prints; its exceptions say it too."""
    loggers = [logging.getLogger(name) for name in ("torch", *_LOUD)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _OneOutput(nn.Module):
    """The first tensor of whatever the model returns; the caller's input is left as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(_WRAPPED, model)

    def forward(self, x: Tensor) -> Tensor:
        return single_output(self.get_submodule(_WRAPPED)(x.clone()))


def single_output(output: Any) -> Tensor:
    """The prediction in what a model returns.

    A tensor; of a tuple the first one; of a mapping or dataclass the one that ``_PREDICTIONS``
    names, or the only one.

    Raises:
        ModelError: There is none, or nothing says which of several it is.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return _named_output({str(key): value for key, value in output.items()})
    if dataclasses.is_dataclass(output):
        names = [field.name for field in dataclasses.fields(output)]
        return _named_output({name: getattr(output, name) for name in names})
    if isinstance(output, (tuple, list)) or hasattr(output, "__iter__"):
        for value in output:
            if isinstance(value, Tensor):
                return value
    raise ModelError(
        f"the model returns {type(output).__name__}; needed a tensor, a tuple whose first tensor "
        "is the prediction, or a mapping or dataclass that names it logits or out"
    )


def _named_output(values: dict[str, Any]) -> Tensor:
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for name in _PREDICTIONS:
        if name in tensors:
            return tensors[name]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    names = ", ".join(list(tensors)[:6]) or "no tensor"
    raise ModelError(
        f"the model returns {names}, and nothing says which is the prediction; needed one tensor, "
        "or one that is called logits or out: return the prediction alone"
    )


@cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
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
    place = ""
    if inside:
        last = inside[-1]
        place = f"at {last.filename}:{last.lineno} in {last.name} ({last.line}) "
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
    return f"{place}({text}); {advice}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _with_own_names(exported: fx.GraphModule, example: Tensor, state: Collection[str]) -> Capture:
    """The exported graph with parameters and module paths named as in the user's model."""
    prefix = f"{_WRAPPED}."
    own, names = nn.Module(), {}
    reads = [node for node in exported.graph.nodes if node.op == "get_attr"]
    # The user's names first: what the exporter lifted must step aside for them.
    for target in sorted({str(n.target) for n in reads}, key=lambda t: not t.startswith(prefix)):
        value = _member(exported, target)
        name = target.removeprefix(prefix)
        if not target.startswith(prefix):
            name = free_name(own, name, state)
        names[target] = name
        if isinstance(value, Tensor):
            set_attribute(own, name, value)
        else:
            raise ModelError(
                f"the model's graph holds a graph of its own at {name} ({type(value).__name__}), "
                "as torch.autocast, torch.cond and torch.utils.checkpoint leave it; needed one "
                "flat graph: call these parts directly in evaluation mode"
            )
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            node.target = names[str(node.target)]
        stack = node.meta.get("nn_module_stack")
        if stack:
            path = list(stack.values())[-1][0]
            path = path.removeprefix("L['self'].").removeprefix("L__self___")
            node.meta["hdrq_module"] = f"{path}.".removeprefix(prefix).removesuffix(".")
    module = fx.GraphModule(own, exported.graph)
    keep_shapes(exported.graph, module.graph)
    return Capture(module, example)


def _member(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _check_precision(graph: fx.Graph) -> None:
    """Refuse what autocast or .half() inside forward() leave; engines compute from float32."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype in {torch.float16, torch.bfloat16}:
            kind = str(value.dtype).removeprefix("torch.")
            raise ModelError(
                f"the model computes in {kind} in {module_path(node)}; needed float32: leave "
                "torch.autocast and casts to half precision out of forward() in evaluation mode"
            )


def _drop_buffer_writes(graph: fx.Graph) -> None:
    """Counters and running means that forward() writes are no part of an engine.

    Whether the output depends on them is found out by :mod:`.module_check`.
    """
    for node in list(graph.nodes):
        if node.target is aten.copy_.default and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _remove_input_copy(graph: fx.Graph) -> None:
    """The copy that protects the caller's input; the graph itself writes to nothing."""
    for node in list(graph.nodes):
        if node.target is aten.clone.default and node.args[0].op == "placeholder":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


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
