"""A calibrated graph as its bundle holds it: codes, scales and what a merge reads.

Two custom operators mark what is quantized; :mod:`.to_onnx` translates them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..formats.bundle_manifest import FoldRecord
from ..formats.bundle_manifest import Tensor as Entry
from ..numerics import e4m3
from ..numerics.batchnorm_fold import graph_tensors
from ..numerics.spec import QuantSpec
from .block_module import Quantizers
from .capture import Capture, Fold
from .fake_quantizers import WeightQuantizer, round_codes
from .placement import Plan
from .tensors import attribute, free_name, set_attribute, to_numpy

__all__ = ["PORTS", "BundleModel", "emit_float", "emit_quantized"]

# Names of the graph's input and output.
PORTS = ("input", "output")
# Moments of a BatchNorm that a merge matches: buffers ``running_mean`` and ``running_var``.
_MOMENTS = {"mean": "bn_mean", "var": "bn_var"}


@dataclass
class BundleModel:
    """A model as its bundle holds it.

    Attributes:
        module: Computes from codes; its ``state_dict`` holds what the graph reads.
        entries: What each tensor is.
        folds: BatchNorms that scales carry, by the name of the codes.
        aside: Tensors that only a merge reads.
        codes: Names of the codes by the name of the weight that they stand for.
    """

    module: fx.GraphModule
    entries: dict[str, Entry]
    folds: dict[str, FoldRecord] = field(default_factory=dict)
    aside: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """All tensors of the bundle, codes unpacked."""
        state = self.module.state_dict()
        return {**{n: to_numpy(v.detach().cpu()) for n, v in state.items()}, **self.aside}


@torch.library.custom_op("hdrq::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    """scale * clamp(round(x / scale), lo, hi), or on the numbers of E4M3 where ``hi`` is 448."""
    return round_codes(x / scale, lo, hi) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("hdrq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """scale * codes; ``axis`` -1 when one scale serves the tensor."""
    if axis >= 0:
        shape = [1] * codes.ndim
        shape[axis] = -1
        scale = scale.reshape(shape)
    return codes.to(scale.dtype) * scale


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


def emit_quantized(capture: Capture, plan: Plan, quantizers: Quantizers) -> BundleModel:
    """The fake-quantized model that computes from codes, and what its tensors are.

    Args:
        capture: The folded model; its ``folds`` are stored separately for a merge.
        plan: Places of the quantizers.
        quantizers: What they learned.
    """
    module = copy.deepcopy(capture.module).cpu()
    graph = module.graph
    by_name = {node.name: node for node in graph.nodes}
    model = BundleModel(module, {})
    entries = model.entries
    for site in plan.activations:
        source = by_name[site.source.name]
        set_attribute(module, site.name, quantizers.activations[site.name].scale.detach().cpu())
        with graph.inserting_after(source):
            scale = graph.get_attr(site.name)
        with graph.inserting_after(scale):
            coded = graph.call_function(
                torch.ops.hdrq.quantize_dequantize.default,
                (source, scale, site.spec.lo, site.spec.hi),
            )
        readers = [u for u in source.users if u is not coded and u.op != "output"]
        for reader in readers:
            reader.replace_input_with(source, coded)
        entries[site.name] = Entry(role="activation_scale", dtype="float32", shape=())
    for weight, spec in {s.weight: s.spec for s in plan.layers if s.weight is not None}.items():
        assert spec is not None
        readers = [n for n in graph.nodes if n.op == "get_attr" and n.target == weight and n.users]
        if readers:
            fold = capture.folds.get(weight)
            _dequantize(model, readers, weight, spec, quantizers.weights[weight], fold)
    return _finish(model)


def _dequantize(
    model: BundleModel,
    readers: list[fx.Node],
    weight: str,
    spec: QuantSpec,
    quantizer: WeightQuantizer,
    fold: Fold | None,
) -> None:
    """Let all ``readers`` of a weight read its codes through one dequantization."""
    graph, entries = model.module.graph, model.entries
    codes, scale = quantizer.codes().cpu(), quantizer.scale.detach().cpu()
    codes_name = free_name(model.module, f"{weight}_codes", entries)
    set_attribute(model.module, codes_name, codes)
    model.codes[weight] = codes_name
    scale_name = free_name(model.module, f"{weight}_scale", entries)
    if fold is not None:
        scale = _keep_fold(model, weight, codes_name, scale_name, fold, scale)
    set_attribute(model.module, scale_name, scale)
    with graph.inserting_before(readers[0]):
        parts = (graph.get_attr(codes_name), graph.get_attr(scale_name))
        axis = -1 if spec.axis is None else spec.axis
        real = graph.call_function(torch.ops.hdrq.dequantize.default, (*parts, axis))
    for node in readers:
        node.replace_all_uses_with(real)
        graph.erase_node(node)
    entries[codes_name] = Entry(
        role="codes",
        dtype=e4m3.NAME if spec.floating else "int4" if spec.bits <= 4 else "int8",
        shape=tuple(codes.shape),
        bits=spec.bits,
        lo=spec.lo,
        hi=spec.hi,
        axis=spec.axis,
        scale=scale_name,
    )
    entries[scale_name] = Entry(role="scale", dtype="float32", shape=tuple(scale.shape))


def _keep_fold(
    model: BundleModel, weight: str, codes: str, scale: str, fold: Fold, raw_scale: Tensor
) -> Tensor:
    """Keep what a merge averages; returns the scale that the graph reads."""
    parts = {
        "raw_scale": raw_scale,
        "gamma": fold.gamma,
        "beta": fold.beta,
        "mean": fold.mean,
        "variance": fold.variance,
        **({} if fold.raw_bias is None else {"raw_bias": fold.raw_bias.cpu()}),
    }
    arrays = {part: np.ascontiguousarray(value.numpy()) for part, value in parts.items()}
    roles = {"raw_scale": "raw_scale", "mean": "bn_mean", "variance": "bn_var"}
    names = {}
    for part, array in arrays.items():
        wanted = f"{weight}_{part if part.startswith('raw') else 'bn_' + part}"
        names[part] = free_name(model.module, wanted, model.entries)
        model.aside[names[part]] = array
        model.entries[names[part]] = Entry.model_validate(
            {"role": roles.get(part, "float"), "dtype": "float32", "shape": array.shape}
        )
    model.folds[codes] = FoldRecord(scale=scale, bias=fold.bias_name, eps=fold.eps, **names)
    graph_scale, bias = graph_tensors(eps=fold.eps, **arrays)
    set_attribute(model.module, fold.bias_name, torch.from_numpy(bias))
    return torch.from_numpy(graph_scale)


def emit_float(capture: Capture) -> BundleModel:
    """The unquantized model; BatchNorm that was not folded is a node of its own."""
    return _finish(BundleModel(copy.deepcopy(capture.module).cpu(), {}))


def _finish(model: BundleModel) -> BundleModel:
    """Drop unused tensors; give the floats that are left their roles."""
    module, entries = model.module, model.entries
    graph = module.graph
    graph.eliminate_dead_code()
    reads = [node for node in graph.nodes if node.op == "get_attr"]
    for node in reads:
        if node.target in PORTS:  # a parameter of the user's that is called like a port
            value = attribute(module, str(node.target))
            node.target = free_name(module, str(node.target), entries)
            set_attribute(module, node.target, value)
    used = {str(node.target) for node in reads}
    clean = nn.Module()
    for name in sorted(used):
        value = attribute(module, name)
        set_attribute(clean, name, value.contiguous())
        if name not in entries:
            kind = str(value.dtype).removeprefix("torch.")
            if kind not in {"float32", "int64", "bool"}:
                raise ModelError(f"found a parameter {name} of dtype {kind}; needed float32")
            role = "float" if kind == "float32" else "constant"
            stem, _, moment = name.rpartition("running_")
            if moment in _MOMENTS and {stem + f"running_{m}" for m in _MOMENTS} <= used:
                role = _MOMENTS[moment]
            entries[name] = Entry.model_validate(
                {"role": role, "dtype": kind, "shape": tuple(value.shape)}
            )
    model.module = fx.GraphModule(clean, graph)
    return model
