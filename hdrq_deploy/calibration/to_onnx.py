"""From a bundle's model to ONNX.

The two custom operators that mark what is quantized are translated to QuantizeLinear, Clip
and DequantizeLinear (the QCDQ form: codes narrower than their integer type are clipped as
integers, so the graph needs no new constants when a merge changes the scales).
"""

from __future__ import annotations

from collections.abc import Mapping
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
from ..formats.bundle_manifest import Layer
from ..formats.bundle_manifest import Tensor as Entry
from ..formats.safetensors_layout import Span, layout
from ..graph.biases import bias_sites, fitted, shifts
from ..graph.edits import distinct_names
from ..graph.operators import LAYERS
from ..numerics import e4m3
from .bundle_model import PORTS, BundleModel
from .capture import PRODUCTS, TRANSPOSED, Capture, quiet
from .graph_cache import GraphCache
from .nodes import module_path
from .placement import HEAVY, Plan
from .tensors import set_attribute

__all__ = ["OPSET", "check_graph", "fit_biases", "onnx_graph"]

_ONNX = {
    "float32": "FLOAT",
    "int8": "INT8",
    "int4": "INT4",
    e4m3.NAME: "FLOAT8E4M3FN",
    "int64": "INT64",
}
# 21 knows INT4; TensorRT 10 and 11 and ONNX Runtime all read it.
OPSET = 21


def _translations() -> dict[Any, Any]:
    from onnxscript import opset21 as op

    def onnx_quantize_dequantize(x, scale, lo: int, hi: int):  # type: ignore[no-untyped-def]
        kind = ir.DataType.UINT8 if hi > 127 else ir.DataType.INT8
        lowest, highest = (0, 255) if hi > 127 else (-128, 127)
        if hi == e4m3.LARGEST:
            kind, lowest, highest = ir.DataType.FLOAT8E4M3FN, lo, hi
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


def onnx_graph(
    model: BundleModel, example: Tensor, capture: Capture, plan: Plan | None, graphs: GraphCache
) -> tuple[bytes, list[Layer]]:
    """``model.onnx`` with every tensor of ``entries`` as external data, and its layers.

    Args:
        model: The model as the bundle holds it.
        example: Two inputs (2, C, H, W).
        capture: The folded model, for the names of its layers.
        plan: Places of the quantizers.
        graphs: Holds the graph; domains of one scheme share it.

    Raises:
        ModelError: An operator has no ONNX form; it is named with its module path.
    """
    # The graph depends on structure and shapes alone.
    described = {name: entry.model_dump_json() for name, entry in model.entries.items()}
    key = f"{tuple(example.shape)} {described} {model.module.graph}"
    return graphs.written(key, lambda: _write_graph(model, example, capture, plan))


def fit_biases(model: BundleModel, graph: bytes) -> None:
    """Give ``model`` biases that integer kernels hold (:mod:`..graph.biases`). In place."""
    sites = bias_sites(ir.from_proto(onnx.load_model_from_string(graph)))
    changed = fitted(model.tensors, sites, shifts(model.entries), model.folds)
    for name, value in changed.items():
        set_attribute(model.module, name, torch.from_numpy(value))


def _write_graph(
    model: BundleModel, example: Tensor, capture: Capture, plan: Plan | None
) -> tuple[bytes, list[Layer]]:
    program = _export(model.module, example)
    onnx_model = program.model
    _fold_shapes(onnx_model, model.entries)
    tensors = model.tensors
    with scratch_folder() as scratch:
        spans = layout(tensors, model.entries, scratch)
    read = {name: entry for name, entry in model.entries.items() if name not in model.aside}
    _point_outside(onnx_model, read, spans)
    onnx_model.graph.name = "hdrq"
    onnx_model.producer_name, onnx_model.producer_version = "hdrq-deploy", ""
    _plain(onnx_model)
    _without_invented_bias(onnx_model, read)
    layers = _name_layers(onnx_model, capture, plan, model.codes)
    distinct_names(onnx_model)
    text = ir.to_proto(onnx_model)
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
        kind = ir.DataType[_ONNX.get(entry.dtype, "BOOL")]
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
    model: ir.Model, capture: Capture, plan: Plan | None, codes: Mapping[str, str]
) -> list[Layer]:
    """Name each heavy ONNX node after its module and describe it; the others by number."""
    nodes = [n for n in model.graph if n.op_type in LAYERS]
    sources = [n for n in capture.graph.nodes if n.target in HEAVY]
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
        reason = "the model stays float: nothing is quantized"
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
    return Layer(
        node=node.name or "",
        op=node.op_type,
        module=path,
        weight=codes.get(site.weight) if site.weight else None,
        weight_bits=site.spec.bits if site.spec else None,
        activation_bits=site.activation_bits,
        requested="float32" if site.reason else "fp8" if _floating(plan) else "int8",
        reason=site.reason,
    )


def _floating(plan: Plan) -> bool:
    """Whether the codes are numbers of E4M3; all of a network are, or none."""
    return any(site.spec.floating for site in plan.activations)


def check_graph(graph: bytes, folder: Path) -> None:
    """onnx.checker with full_check, external data included."""
    path = folder / GRAPH
    path.write_bytes(graph)
    onnx.checker.check_model(str(path), full_check=True)
