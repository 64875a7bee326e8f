"""Why an engine runs a layer in float: the measured rules, applied to the lowered graph."""

from __future__ import annotations

import onnx_ir as ir

from ..formats.engine_folder import PrecisionReport
from ..graph.operators import MOVES_VALUES
from ..graph.qdq import producer, weight_name

__all__ = ["explain"]

# Behind Gather and Identity a layer is told that its operand comes from there: that engines find
# the codes across these two was not measured.
_LOOKED_OVER = MOVES_VALUES - {"Gather", "Identity"}


def explain(report: PrecisionReport, model: ir.Model) -> PrecisionReport:
    """The report with a reason and the weight's bytes in every row."""
    nodes = {node.name: node for node in model.graph}
    sizes = {
        name: value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    weights = {layer.node: weight_name(nodes.get(layer.node)) for layer in report.layers}
    lost = {layer.node for layer in report.lost}
    rows = []
    for layer in report.layers:
        update: dict[str, object] = {"weight_bytes": sizes.get(weights[layer.node] or "", 0)}
        if layer.node in lost:
            node = nodes.get(layer.node)
            update["reason"] = _reason(report.engine, node, layer.requested, layer.evidence)
        rows.append(layer.model_copy(update=update))
    return report.model_copy(update={"layers": tuple(rows)})


def _reason(engine: str, node: ir.Node | None, requested: str, evidence: str) -> str:
    if node is None:
        return "the lowered graph has no node of this name"
    if node.op_type == "ConvTranspose":
        return "no engine has an INT8 kernel for transposed convolutions"
    if requested == "int4":
        return "the engine unpacks its 4-bit weights before every product"
    for i, value in enumerate(node.inputs[:2]):
        source = producer(value)
        if source is not None and source.op_type != "DequantizeLinear":
            origin: ir.Node | None = source
            while origin is not None and origin.op_type in _LOOKED_OVER:
                origin = producer(origin.inputs[0])
            if origin is None or origin.op_type != "DequantizeLinear":
                return (
                    f"operand {i} comes from {source.op_type}; engines compute on codes only where "
                    "QuantizeLinear and DequantizeLinear stand directly in front of the layer"
                )
    if engine == "ort" and node.op_type == "Conv":
        readers = [use.node.op_type for use in node.outputs[0].uses()]
        if readers not in (["QuantizeLinear"], ["Relu"], ["Clip"]):
            return (
                f"its output goes to {', '.join(readers) or 'the network output'}; ONNX Runtime "
                "runs a convolution in INT8 only where it writes codes"
            )
    if engine == "ort" and evidence.startswith("Fused"):
        kernel = evidence.split()[0]
        return (
            f"ONNX Runtime fused it with what reads its output ({kernel}), and {kernel} computes "
            "in float"
        )
    if engine == "openvino":
        return (
            f"OpenVINO has no INT8 kernel for this {node.op_type} with such operands, or fused it "
            "out of sight; the graph has its codes in place"
        )
    if engine == "ort":
        return (
            f"ONNX Runtime has no INT8 kernel for this {node.op_type}, or its session was made "
            "without those kernels; the graph has its codes in place"
        )
    return "the builder chose a float kernel for this layer's shape on the target GPU"
