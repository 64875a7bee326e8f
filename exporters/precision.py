"""What an engine really executes, layer by layer, read from the engine itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime

from ..errors import CheckFailed
from ..formats.atomic_files import scratch_folder
from ..formats.bundle_manifest import CODED, Layer
from ..formats.engine_folder import LayerPrecision, PrecisionReport
from ..graph.openvino_session import Executed
from ..graph.operators import LAYERS
from ..graph.patterns import named
from ..graph.qdq import weight_name

__all__ = ["check", "from_openvino", "from_ort", "from_trt_log", "requested_only"]

_ORT_INT8 = {
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "MatMulInteger",
    "QAttention",
}
_ORT_INT4 = {"MatMulNBits"}
_OPENVINO_LAYERS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}
# Attention may be one kernel: two products and what lies between them.
_OPENVINO_ATTENTION = "Subgraph"
_BYTES = {"i8", "u8"}
# Its operators in float: those of the graph, and what its fusions call them.
_ORT_FLOAT = LAYERS | {"FusedConv", "FusedMatMul", "FusedGemm"}
# A fusion of a layer and its activation has this before the name.
_PREFIX = r"(fused )?"
# Suffixes that ONNX Runtime's transformers add to the name of a node they replace.
_SUFFIX = r"(_(token|nchwc|quant|fused|nhwc|scale|matmul)\w*|/\w+|_\d+)?"


def requested_only(engine: str, layers: Sequence[Layer]) -> PrecisionReport:
    """The report of a portable graph, which nothing executes yet."""
    rows = [
        _row(layer, None, "portable graph: decided by the engine that loads it") for layer in layers
    ]
    asked = Counter((layer.op, layer.requested) for layer in layers)
    text = ", ".join(f"{n} {op} asked in {p.upper()}" for (op, p), n in sorted(asked.items()))
    return PrecisionReport(engine=engine, source="graph", summary=text, layers=tuple(rows))


def from_ort(path: Path, layers: Sequence[Layer]) -> PrecisionReport:
    """Read the optimized graph of ONNX Runtime's CPU provider."""
    with scratch_folder() as scratch:
        dump = scratch / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(dump)
        options.log_severity_level = 3
        # Precision is settled here; the last level only changes memory layouts and names.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.intra_op_num_threads = 1
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = list(onnx.load(str(dump), load_external_data=False).graph.node)
    candidates = [n for n in nodes if n.op_type in _ORT_INT8 | _ORT_INT4 | _ORT_FLOAT]
    rows = []
    for layer in layers:
        node = _find_ort(layer, candidates)
        if node is None:
            rows.append(_row(layer, "unknown", "not found in the optimized graph"))
            continue
        integer = "int4" if node.op_type in _ORT_INT4 else "int8"
        executed = "float32" if node.op_type in _ORT_FLOAT else integer
        rows.append(_row(layer, executed, f"{node.op_type} {node.name}"))
    return _report("ort", f"optimized graph, onnxruntime {onnxruntime.__version__}", rows)


def _find_ort(layer: Layer, nodes: Iterable[onnx.NodeProto]) -> onnx.NodeProto | None:
    named = re.compile(_PREFIX + re.escape(layer.node) + _SUFFIX)
    held = [layer.weight, f"{layer.weight}_int8", f"{layer.weight}_uint8"]
    weights = set(held) if layer.weight else set()
    for node in nodes:
        if weights & set(node.input):
            return node
    # The exact name first: "fc/MatMul" before "fc/MatMul_2".
    matches = sorted((n for n in nodes if named.fullmatch(n.name)), key=lambda n: len(n.name))
    return matches[0] if matches else None


def from_openvino(
    nodes: Sequence[Executed], layers: Sequence[Layer], model: ir.Model, version: str
) -> PrecisionReport:
    """Read the program that OpenVINO compiled.

    A layer is INT8 where its kernel computes in int8 or uint8 and reads both operands so.
    OpenVINO computes attention in one kernel, whose products are INT8 where all its inputs are.

    Args:
        nodes: The nodes of the program.
        layers: What is asked of each layer.
        model: The lowered graph.
        version: Version of OpenVINO.
    """
    kernels = [node for node in nodes if node.kind in _OPENVINO_LAYERS]
    kernels += [node for node in nodes if node.kind == _OPENVINO_ATTENTION]
    places = {node.name: node for node in model.graph}
    rows = []
    for layer in layers:
        # A layer may be the sum of two, whose products stay in int16.
        rest = f"{layer.node}/rest"
        parts = [layer.node, rest] if rest in places else [layer.node]
        found = [_openvino_kernel(kernels, places.get(name), name, layer) for name in parts]
        mine = [kernel for kernel in found if kernel is not None]
        if len(mine) != len(parts):
            rows.append(_row(layer, "unknown", "not found in the compiled program"))
            continue
        node = next((kernel for kernel in mine if _of_openvino(kernel) != "int8"), mine[0])
        types = " x ".join(_operands(node))
        rows.append(_row(layer, _of_openvino(node), f"{node.kind} {node.precision}: {types}"))
    return _report("openvino", f"compiled program, openvino {version}", rows)


def _openvino_kernel(
    kernels: Sequence[Executed], node: ir.Node | None, name: str, layer: Layer
) -> Executed | None:
    """The kernel of a node of the lowered graph."""
    names = _openvino_names(node, name)
    weight = weight_name(node) or layer.weight
    mine = [n for n in kernels if names & set(n.origins) or weight in n.constants]
    return mine[0] if mine else None


def _openvino_names(node: ir.Node | None, name: str) -> set[str]:
    """Names by which OpenVINO may call a layer: its own, or that of what is computed with it.

    The bias of a layer is taken off it, and the rest has another name; so has the factor that
    makes its sums real where no codes follow; a factor behind it is multiplied into it, and the
    product has none of the graph.
    """
    names = {name, f"{name}/WithoutBiases"}
    names |= {f"{each}/DequantizationMultiply" for each in names}
    while node is not None:
        names.add(str(node.outputs[0].name))
        readers = [use.node for use in node.outputs[0].uses()]
        if len(readers) != 1 or _reads_activations(readers[0]) != 1:
            break
        node = readers[0]
        names.add(str(node.name))
        if node.op_type == "QuantizeLinear":
            break
    return names


def _reads_activations(node: ir.Node) -> int:
    """How many inputs of a node are computed."""
    return sum(value is not None and value.const_value is None for value in node.inputs)


def _operands(node: Executed) -> tuple[str, ...]:
    """Types of what a kernel multiplies; of the one kernel of attention all that it reads."""
    return node.inputs if node.kind == _OPENVINO_ATTENTION else node.inputs[:2]


def _of_openvino(node: Executed) -> str:
    operands = _operands(node)
    if node.precision in _BYTES and len(operands) >= 2 and set(operands) <= _BYTES:
        return "int8"
    if operands[1:2] in {("i4",), ("u4",)}:
        return "int4"
    real = next((kind for kind in (node.precision, *operands) if kind not in _BYTES), "")
    return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(real, "unknown")


def from_trt_log(engine: str, dump: str, layers: Sequence[Layer]) -> PrecisionReport:
    """Read the builder's layer dump (ProfilingVerbosity.DETAILED).

    A layer is INT8 or FP8 when the compute layer that carries its name in Metadata reads data
    and a weight of that type.
    """
    parsed = [_parse_line(line) for line in dump.splitlines() if line.startswith("Name: ")]
    return _from_trt(engine, "builder's layer dump", parsed, layers)


def from_trt_inspector(engine: str, text: str, layers: Sequence[Layer]) -> PrecisionReport:
    """Read the JSON of TensorRT's EngineInspector, whose versions spell its keys in many ways.

    Raises:
        CheckFailed: It is no JSON, or names no layer.
    """
    entries = _inspected(text)
    if not entries:
        raise CheckFailed(
            f"{engine}: the engine inspector tells of no layer (it says "
            f"{text.strip()[:80] or 'nothing'!r}), so the engine's precision cannot be shown; "
            "build with `profiling` detailed, or with another version of the library"
        )
    parsed = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            continue  # without DETAILED verbosity the inspector lists names only
        inputs, constants = (
            [str(_spelled(tensor, _DATATYPE) or "") for tensor in _spelled(entry, (key,)) or []]
            for key in ("inputs", "constants")
        )
        kind, metadata, name = (
            str(_spelled(entry, keys) or "") for keys in (_LAYER_TYPE, ("metadata",), ("name",))
        )
        parsed.append((kind, _data_and_weight(inputs, constants), metadata, name))
    return _from_trt(engine, "engine inspector", parsed, layers)


# TensorRT 8 to 11 write "Format/Datatype", "Datatype", "DataType" and "Data Type", and
# "LayerType", "Layer Type" and "Type": letters only, these are few.
_DATATYPE = ("datatype", "formatdatatype")
_LAYER_TYPE = ("layertype", "type")


def _inspected(text: str) -> list[Any]:
    try:
        record = json.loads(text)
    except ValueError:
        return []
    layers = _spelled(record, ("layers",)) if isinstance(record, Mapping) else record
    return layers if isinstance(layers, list) else []


def _spelled(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first of these keys, whatever its case, spaces and strokes; else None."""
    plain = {"".join(filter(str.isalpha, key)).lower(): key for key in record}
    return next((record[plain[key]] for key in keys if key in plain), None)


_Parsed = tuple[str, list[str], str, str]
_COMPUTE = {
    "correlation",
    "gemm",
    "deconv",
    "runtime_fusion",
    "kgen",
    "convolution",
    "caskconvolution",
    "matrixmultiply",
    "caskgemmconvolution",
}


def _parse_line(line: str) -> _Parsed:
    """One line of the dump: layer type, datatypes of its operands, metadata, name."""
    kind = re.search(r"LayerType: ([^,]*)", line)
    inputs, _, constants = line.split("Outputs: [", 1)[0].partition("Constants: [")
    metadata = re.search(r"Metadata: (.*)$", line)
    name = re.match(r"Name: ([^,]*)", line)
    return (
        kind.group(1) if kind else "",
        _data_and_weight(*(re.findall(r"Datatype: (\w+)", text) for text in (inputs, constants))),
        metadata.group(1) if metadata else "",
        name.group(1) if name else "",
    )


def _data_and_weight(inputs: list[str], constants: list[str]) -> list[str]:
    """Datatypes of inputs, then constants; of a layer that adds a real tensor without that one.

    TensorRT fuses a residual sum into a convolution, which then reads the other branch as its
    second input, before the weight among its constants.
    """
    weights = [kind for kind in constants if _coded(kind)]
    codes = [bool(_coded(kind)) for kind in inputs[:2]]
    return [inputs[0], *weights] if codes == [True, False] and weights else [*inputs, *constants]


def _from_trt(
    engine: str, source: str, parsed: Sequence[_Parsed], layers: Sequence[Layer]
) -> PrecisionReport:
    rows = []
    for layer in layers:
        tag = f"[ONNX Layer: {layer.node}]"
        mine = [p for p in parsed if tag in p[2] and p[0].lower() in _COMPUTE]
        mine.sort(key=lambda p: p[0] in {"kgen", "runtime_fusion"} and "mha" not in p[3])
        if not mine:
            rows.append(_row(layer, "unknown", "not found in the builder's dump"))
            continue
        kind, datatypes, _, name = mine[0]
        rows.append(
            _row(layer, _executed(datatypes), f"{kind} {name}: {' x '.join(datatypes[:2])}")
        )
    return _report(engine, source, rows)


def _coded(kind: str) -> str:
    """``int8`` or ``fp8`` for a datatype of codes, as TensorRT spells it; "" for others."""
    kind = kind.lower()
    if kind.startswith(("fp8", "float8", "e4m3")):
        return "fp8"
    return "int8" if kind.startswith("int8") else ""


def _executed(datatypes: Sequence[str]) -> str:
    """Precision of a layer, from the datatypes of its inputs and constants."""
    kinds = [kind.lower() for kind in datatypes]
    operands = {_coded(kind) for kind in kinds[:2]}
    if len(kinds) >= 2 and len(operands) == 1 and "" not in operands:
        return operands.pop()
    if any(kind.startswith("int4") for kind in kinds):
        return "int4"
    return "float16" if kinds and kinds[0].startswith("half") else "float32"


def _row(layer: Layer, executed: str | None, evidence: str) -> LayerPrecision:
    return LayerPrecision(
        node=layer.node,
        op=layer.op,
        module=layer.module,
        weight_bits=layer.weight_bits,
        requested=layer.requested,
        executed=executed,
        evidence=evidence,
        reason=layer.reason,
    )


def _report(engine: str, source: str, rows: Sequence[LayerPrecision]) -> PrecisionReport:
    total = Counter(row.op for row in rows)
    parts = []
    for kind in ("int8", "fp8", "int4"):
        counts = Counter(row.op for row in rows if row.executed == kind)
        if counts or (kind in CODED and any(row.requested == kind for row in rows)):
            ops = sorted(counts if kind == "int4" else total)
            parts.append(
                ", ".join(f"{counts[op]}/{total[op]} {op}" for op in ops) + f" {kind.upper()}"
            )
    summary = "; ".join(parts)
    if not parts:
        summary = ", ".join(f"{n} {op}" for op, n in sorted(total.items())) + " FLOAT32"
    return PrecisionReport(engine=engine, source=source, summary=summary, layers=tuple(rows))


def check(report: PrecisionReport, allowed: Sequence[str]) -> None:
    """Fail when a layer does not run as requested and no pattern in ``allowed`` names it.

    Raises:
        CheckFailed: Names the first such layer and what the engine does instead.
    """
    lost = [
        row for row in report.lost if not (named(row.module, allowed) or named(row.node, allowed))
    ]
    if lost:
        first = lost[0]
        raise CheckFailed(
            f"found {len(lost)} of {len(report.layers)} layers that {report.engine} does not run "
            f"as requested (first: {first.module}, {first.op}, asked {first.requested}, runs "
            f"{first.executed}: {first.evidence}"
            f"{'; ' + first.reason if first.reason else ''}); change the model there, or "
            f"let it run in float (`allow_float` '{first.module}')"
        )
