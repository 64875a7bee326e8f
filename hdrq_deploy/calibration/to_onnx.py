"""From the calibrated graph to tensors and ONNX.

Two custom operators mark what is quantized; their translation writes QuantizeLinear, Clip
and DequantizeLinear (the QCDQ form: codes narrower than their integer type are clipped as
integers, so the graph needs no new constants when a merge changes the steps).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..formats.atomic_files import scratch_folder
from ..formats.bundle import GRAPH, WEIGHTS
from ..formats.bundle_manifest import FoldRecord, Layer
from ..formats.bundle_manifest import Tensor as Entry
from ..formats.safetensors_layout import Span, layout
from ..graph.biases import bias_sites, fitted, shifts
from ..graph.edits import distinct_names
from ..graph.operators import LAYERS
from ..numerics.batchnorm_fold import graph_tensors
from ..numerics.spec import QuantSpec
from .capture import PRODUCTS, TRANSPOSED, Capture, Fold, module_path, quiet
from .fake_quantizers import WeightQuantizer
from .placement import HEAVY, Plan, root
from .reconstruction import Quantized
from .tensors import attribute, free_name, set_attribute

__all__ = ["OPSET", "Emitted", "emit_float", "emit_quantized", "fit_biases", "onnx_graph"]

# 21 knows INT4; TensorRT 10 and 11 and ONNX Runtime all read it.
OPSET = 21
# Names of the graph's input and output.
PORTS = ("input", "output")
# Moments of a BatchNorm that a merge matches: buffers ``running_mean`` and ``running_var``.
_MOMENTS = {"mean": "bn_mean", "var": "bn_var"}


@dataclass
class Emitted:
    """A model as its bundle holds it.

    Attributes:
        module: Computes from codes; its ``state_dict`` holds what the graph reads.
        entries: What each tensor is.
        folds: BatchNorms carried by steps, by the name of the codes.
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
        return {**{n: v.detach().cpu().numpy() for n, v in state.items()}, **self.aside}


@torch.library.custom_op("hdrq::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    """scale * clamp(round(x / scale), lo, hi)."""
    return torch.round(x / scale).clamp(lo, hi) * scale


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


def _translations() -> dict[Any, Any]:
    from onnxscript import opset21 as op

    def onnx_quantize_dequantize(x, scale, lo: int, hi: int):  # type: ignore[no-untyped-def]
        kind = ir.DataType.UINT8 if hi > 127 else ir.DataType.INT8
        lowest, highest = (0, 255) if hi > 127 else (-128, 127)
        zero = op.Constant(value=ir.tensor(np.array(0, kind.numpy())))
        codes = op.QuantizeLinear(x, scale, zero)
        if lo > lowest or hi < highest:
            low = op.Constant(value=ir.tensor(np.array(lo, kind.numpy())))
            high = op.Constant(value=ir.tensor(np.array(hi, kind.numpy())))
            codes = op.Clip(codes, low, high)
        return op.DequantizeLinear(codes, scale, zero)

    def onnx_dequantize(codes, scale, axis: int):  # type: ignore[no-untyped-def]
        if axis < 0:
            return op.DequantizeLinear(codes, scale)
        return op.DequantizeLinear(codes, scale, axis=axis)

    return {
        torch.ops.hdrq.quantize_dequantize.default: onnx_quantize_dequantize,
        torch.ops.hdrq.dequantize.default: onnx_dequantize,
    }


def emit_quantized(found: Capture, plan: Plan, result: Quantized, fold: str = "weights") -> Emitted:
    """The fake-quantized model that computes from codes, and what its tensors are.

    Args:
        found: The folded model.
        plan: Where quantizers are.
        result: What they learned.
        fold: ``steps`` keeps BatchNorm apart for a merge.
    """
    module = copy.deepcopy(found.module).cpu()
    graph = module.graph
    by_name = {node.name: node for node in graph.nodes}
    made = Emitted(module, {})
    entries = made.entries
    for site in plan.activations:
        source = by_name[site.source.name]
        set_attribute(module, site.name, result.activations[site.name].scale.detach().cpu())
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
            record = found.folds.get(weight) if fold == "steps" else None
            _dequantized(made, readers, weight, spec, result.weights[weight], record)
    return _finish(made)


def _dequantized(
    made: Emitted,
    readers: list[fx.Node],
    weight: str,
    spec: QuantSpec,
    quantizer: WeightQuantizer,
    record: Fold | None,
) -> None:
    """Let all ``readers`` of a weight read its codes through one dequantization."""
    graph, entries = made.module.graph, made.entries
    codes, scale = quantizer.codes().cpu(), quantizer.scale.detach().cpu()
    codes_name = free_name(made.module, f"{weight}_codes", entries)
    set_attribute(made.module, codes_name, codes)
    made.codes[weight] = codes_name
    scale_name = free_name(made.module, f"{weight}_scale", entries)
    if record is not None:
        scale = _keep_fold(made, weight, codes_name, scale_name, record, scale)
    set_attribute(made.module, scale_name, scale)
    with graph.inserting_before(readers[0]):
        parts = (graph.get_attr(codes_name), graph.get_attr(scale_name))
        axis = -1 if spec.axis is None else spec.axis
        real = graph.call_function(torch.ops.hdrq.dequantize.default, (*parts, axis))
    for node in readers:
        node.replace_all_uses_with(real)
        graph.erase_node(node)
    entries[codes_name] = Entry(
        role="codes",
        dtype="int4" if spec.bits <= 4 else "int8",
        shape=tuple(codes.shape),
        bits=spec.bits,
        lo=spec.lo,
        hi=spec.hi,
        axis=spec.axis,
        scale=scale_name,
    )
    entries[scale_name] = Entry(role="scale", dtype="float32", shape=tuple(scale.shape))


def _keep_fold(
    made: Emitted, weight: str, codes: str, scale: str, fold: Fold, raw_scale: Tensor
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
        names[part] = free_name(made.module, wanted, made.entries)
        made.aside[names[part]] = array
        made.entries[names[part]] = Entry.model_validate(
            {"role": roles.get(part, "float"), "dtype": "float32", "shape": array.shape}
        )
    made.folds[codes] = FoldRecord(scale=scale, bias=fold.bias_name, eps=fold.eps, **names)
    graph_scale, bias = graph_tensors(eps=fold.eps, **arrays)
    set_attribute(made.module, fold.bias_name, torch.from_numpy(bias))
    return torch.from_numpy(graph_scale)


def emit_float(found: Capture) -> Emitted:
    """The unquantized model, BatchNorm kept apart so that a merge can match its moments."""
    return _finish(Emitted(copy.deepcopy(found.module).cpu(), {}))


def _finish(made: Emitted) -> Emitted:
    """Drop unused tensors; give the floats that are left their roles."""
    module, entries = made.module, made.entries
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
    made.module = fx.GraphModule(clean, graph)
    return made


def onnx_graph(
    made: Emitted, example: Tensor, found: Capture, plan: Plan | None
) -> tuple[bytes, list[Layer]]:
    """``model.onnx`` with every tensor of ``entries`` as external data, and its layers.

    Raises:
        ModelError: An operator has no ONNX form; it is named with its module path.
    """
    # The graph depends on structure and shapes alone: domains of one scheme share it.
    described = {name: entry.model_dump_json() for name, entry in made.entries.items()}
    key = f"{tuple(example.shape)} {described} {made.module.graph}"
    if key not in _written:
        _written.clear()
        _written[key] = _write_graph(made, example, found, plan)
    return _written[key]


def fit_biases(made: Emitted, graph: bytes) -> None:
    """Give ``made`` biases that integer kernels hold (:mod:`..graph.biases`). In place."""
    sites = bias_sites(ir.from_proto(onnx.load_model_from_string(graph)))
    changed = fitted(made.tensors, sites, shifts(made.entries), made.folds)
    for name, value in changed.items():
        set_attribute(made.module, name, torch.from_numpy(value))


_written: dict[str, tuple[bytes, list[Layer]]] = {}


def _write_graph(
    made: Emitted, example: Tensor, found: Capture, plan: Plan | None
) -> tuple[bytes, list[Layer]]:
    program = _export(made.module, example)
    model = program.model
    _fold_shapes(model, made.entries)
    tensors = made.tensors
    with scratch_folder() as scratch:
        spans = layout(tensors, made.entries, scratch)
    read = {name: entry for name, entry in made.entries.items() if name not in made.aside}
    _point_outside(model, read, spans)
    model.graph.name = "hdrq"
    model.producer_name, model.producer_version = "hdrq-deploy", ""
    _plain(model)
    _without_invented_bias(model, read)
    layers = _name_layers(model, found, plan, made.codes)
    distinct_names(model)
    text = ir.to_proto(model)
    return text.SerializeToString(deterministic=True), layers


def _export(module: nn.Module, example: Tensor) -> Any:
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
            return torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,  # its deduplication would drop tensors that a merge needs
                opset_version=OPSET,
                custom_translation_table=_translations(),
                input_names=[PORTS[0]],
                output_names=[PORTS[1]],
                verbose=False,
            )
    except Exception as error:  # the exporter's errors share no base class
        raise ModelError(
            f"the model cannot be written as ONNX: {_explain(error, module)}; "
            "replace this operator in the model"
        ) from error


def _fold_shapes(model: ir.Model, entries: dict[str, Entry]) -> None:
    """Evaluate what depends on constants alone (axes, shapes), but nothing of a tensor."""
    from onnxscript.optimizer import fold_constants

    fold_constants(
        model, should_fold=lambda node: not any(v and v.name in entries for v in node.inputs)
    )
    RemoveUnusedNodesPass()(model)


def _explain(error: BaseException, module: nn.Module) -> str:
    """The operator and module path inside an exporter's error."""
    seen: BaseException | None = error
    text = ""
    while seen is not None:
        text = f"{seen}\n{text}"
        seen = seen.__cause__
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target) in text:
            return f"operator {node.target} in {module_path(node)} has no ONNX form"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _point_outside(model: ir.Model, entries: dict[str, Entry], spans: dict[str, Span]) -> None:
    graph = model.graph
    for name, entry in entries.items():
        value = graph.initializers.get(name)
        if value is None:
            raise ModelError(
                f"the exported graph does not use {name}; this is a bug of hdrq-deploy or of "
                "the exporter, please report the model"
            )
        dtype = {"float32": "FLOAT", "int8": "INT8", "int4": "INT4", "int64": "INT64"}.get(
            entry.dtype, "BOOL"
        )
        kind = ir.DataType[dtype]
        value.const_value = ir.ExternalTensor(
            WEIGHTS,
            spans[name].offset,
            spans[name].length,
            kind,
            shape=ir.Shape(entry.shape),
            name=name,
        )
        value.dtype = kind


def _without_invented_bias(model: ir.Model, entries: Mapping[str, Entry]) -> None:
    """Drop the zeros that the exporter gives a 3-D convolution that has no bias.

    Their shape is (C, 2) where a bias has (C,), and ONNX Runtime refuses them.
    """
    for node in model.graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is None or bias.const_value is None or bias.name in entries:
            continue
        if not bias.const_value.numpy().any():
            node.resize_inputs(2)
    RemoveUnusedNodesPass()(model)


def _plain(model: ir.Model) -> None:
    """Drop the exporter's debugging metadata (it holds paths of this machine)."""
    model.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _name_layers(
    model: ir.Model, found: Capture, plan: Plan | None, codes: Mapping[str, str]
) -> list[Layer]:
    """Name each heavy ONNX node after its module and describe it; the others by number."""
    nodes = [n for n in model.graph if n.op_type in LAYERS]
    sources = [n for n in found.graph.nodes if n.target in HEAVY]
    if len(nodes) != len(sources):
        raise ModelError(
            f"found {len(nodes)} convolutions and products in ONNX for {len(sources)} in the "
            "captured graph; the exporter changed their number, please report the model"
        )
    taken: dict[str, int] = {}
    layers = []
    for node, source in zip(nodes, sources, strict=True):
        path = _layer_path(source)
        count = taken[path] = taken.get(path, 0) + 1
        node.name = f"{path}/{node.op_type}" + (f"_{count}" if count > 1 else "")
        layers.append(_describe(node, source, path, plan, codes))
    for i, node in enumerate(n for n in model.graph if n.op_type not in LAYERS):
        node.name = f"{node.op_type}/{i}"
    return layers


def _layer_path(source: fx.Node) -> str:
    weight = source.args[1]
    if source.target not in PRODUCTS and isinstance(weight, fx.Node) and weight.op == "get_attr":
        return str(weight.target).removesuffix(".weight")
    return module_path(source)


def _describe(
    node: ir.Node, source: fx.Node, path: str, plan: Plan | None, codes: Mapping[str, str]
) -> Layer:
    reason = ""
    if plan is None:
        reason = "method float: nothing is quantized"
    elif source.target in TRANSPOSED:
        reason = "no engine runs transposed convolutions in INT8"
    if plan is None or reason:
        return Layer(
            node=node.name or "",
            op=node.op_type,
            module=path,
            weight=None,
            weight_bits=None,
            activation_bits=(),
            requested="float32",
            reason=reason,
        )
    site = next(s for s in plan.layers if s.node.name == source.name)
    bits = {s.source.name: s.spec.bits for s in plan.activations}
    count = 2 if source.target in PRODUCTS else 1
    sources = [a for a in source.args[:count] if isinstance(a, fx.Node) and a.op != "get_attr"]
    return Layer(
        node=node.name or "",
        op=node.op_type,
        module=path,
        weight=codes.get(site.weight) if site.weight else None,
        weight_bits=site.spec.bits if site.spec else None,
        activation_bits=tuple(bits[root(a).name] for a in sources),
        requested="int8",
    )


def check_graph(graph: bytes, folder: Path) -> None:
    """onnx.checker with full_check, external data included."""
    path = folder / GRAPH
    path.write_bytes(graph)
    onnx.checker.check_model(str(path), full_check=True)
