"""Where the time of one call goes, layer by layer, as far as the engine tells.

Runtimes time the kernels that they run. A kernel's name begins with that of a node or a tensor of
the graph that it computes; so each kernel, and with it the quantizers, sums and reorderings
behind a layer, is counted for the last layer that its values come from.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx

from ...errors import EngineError
from ...formats.atomic_files import scratch_folder
from ...formats.engine_folder import GRAPH, PrecisionReport, read_manifest
from ...graph.openvino_session import OpenVinoSession
from ...graph.reference_session import open_session, session_options
from ...typing import Array

__all__ = ["layer_times", "owners"]

# Names and ms of the kernels of one call, in the order in which they ran. A kernel has several
# names where a runtime tells which nodes it has fused, the first of them in front.
Kernels = Sequence[tuple[Sequence[str], float]]
# Calls before those that count, and how often OpenVINO is loaded.
_WARMUP, _PROGRAMS = 3, 5
# What a runtime puts in front of the name of a node that it has fused with others.
_FUSED = "fused "


def layer_times(path: Path, x: Array, threads: int = 0, calls: int = 20) -> dict[str, float]:
    """Time of each layer of an engine in ms: the sum over its kernels, in the median.

    Args:
        path: Engine folder.
        x: Input as the engine takes it.
        threads: Threads of an engine on the CPU; 0, one per core.
        calls: Calls that are timed. OpenVINO gives means of calls alone, in whole µs a kernel, so
            it is loaded and called so often several times.

    Returns:
        ms by the ONNX node of the layer; 0 of OpenVINO's is less than 1 µs. Layers that share a
        kernel have their time at the one that the runtime names first. Empty where this kind
        of engine does not tell (TensorRT).

    Raises:
        EngineError: The engine cannot be loaded or run.
    """
    kind = read_manifest(path, check=False).engine
    if kind not in _TOLD:
        return {}
    graph = onnx.load(str(path / GRAPH), load_external_data=False).graph
    known = owners(graph, {row.node for row in PrecisionReport.read(path).layers})
    samples: dict[str, list[float]] = defaultdict(list)
    for kernels in _TOLD[kind](path, x, threads, calls):
        for layer, ms in _by_layer(kernels, known).items():
            samples[layer].append(ms)
    return {layer: statistics.median(values) for layer, values in samples.items()}


def owners(graph: onnx.GraphProto, layers: Collection[str]) -> dict[str, str]:
    """The layer that each node and tensor of a graph is counted for.

    Args:
        graph: A lowered graph, its nodes in topological order.
        layers: Names of the nodes that are layers.

    Returns:
        Layers by the names of nodes and of what they compute: the last layer in front of them,
        or the first behind them where there is none in front.
    """
    place = {node.name: i for i, node in enumerate(graph.node) if node.name in layers}
    of_value: dict[str, str] = {}
    of_node: dict[str, str] = {}
    for node in graph.node:
        sources = [of_value[name] for name in node.input if name in of_value]
        mine = node.name if node.name in place else max(sources, key=place.__getitem__, default="")
        if mine:
            of_node[node.name] = mine
            of_value.update(dict.fromkeys(node.output, mine))
    first_reader: dict[str, str] = {}
    for node in reversed(graph.node):
        readers = [first_reader[name] for name in node.output if name in first_reader]
        mine = of_node.get(node.name) or min(readers, key=place.__getitem__, default="")
        if mine:
            of_node[node.name] = mine
            first_reader.update(dict.fromkeys(node.input, mine))
            of_value.update({name: of_value.get(name, mine) for name in node.output})
    return {**of_value, **of_node}


def _by_layer(kernels: Kernels, known: Mapping[str, str]) -> dict[str, float]:
    """Sums by layer. What a runtime has put in between counts for the layer before it."""
    found = [next(filter(None, (_known_prefix(n, known) for n in ns)), "") for ns, _ in kernels]
    owner = next((known[name] for name in found if name), "")
    sums: dict[str, float] = defaultdict(float)
    for name, (_, ms) in zip(found, kernels, strict=True):
        owner = known[name] if name else owner
        if owner:
            sums[owner] += ms
    return sums


def _known_prefix(name: str, known: Mapping[str, str]) -> str:
    """The longest known name that a kernel's name begins with, at the end of a word; or ""."""
    name = name.removeprefix(_FUSED)
    for end in range(len(name), 0, -1):
        if name[:end] in known and not name[end : end + 1].isalnum():
            return name[:end]
    return ""


def _on_ort(path: Path, x: Array, threads: int, calls: int) -> list[Kernels]:
    with scratch_folder() as scratch:
        options = session_options(threads, graph=path / GRAPH)
        options.enable_profiling = True
        options.profile_file_prefix = str(scratch / "profile")
        session = open_session(path / GRAPH, options)
        port = session.get_inputs()[0].name
        for _ in range(_WARMUP + calls):
            session.run(None, {port: x})
        events = json.loads(Path(session.end_profiling()).read_text())
    end = "_kernel_time"
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    if len(spans) != _WARMUP + calls:
        raise EngineError(
            f"{path}: found {len(spans)} of {_WARMUP + calls} calls in ONNX Runtime's profile; "
            "needed all of them: take another version of onnxruntime"
        )
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(end)]
    kernels.sort(key=lambda event: int(event["ts"]))
    return [
        [
            ([e["name"].removesuffix(end)], e["dur"] / 1000)
            for e in kernels
            if first <= e["ts"] < last
        ]
        for first, last in spans[_WARMUP:]
    ]


def _on_openvino(path: Path, x: Array, threads: int, calls: int) -> list[Kernels]:
    runs: list[Kernels] = []
    for _ in range(_PROGRAMS):
        session = OpenVinoSession(path / GRAPH, path, threads, profile=True)
        (port,) = session.inputs
        for _ in range(calls):
            kernels = session.kernel_times({port: x})
        runs.append(kernels)
    return runs


_TOLD = {"ort": _on_ort, "openvino": _on_openvino}
