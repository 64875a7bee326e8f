"""A bundle's own inputs, and an export or a merge held against the bundle with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..errors import CheckFailed
from ..formats.bundle import WEIGHTS, Bundle
from ..formats.bundle_manifest import CODED
from ..formats.engine_folder import EngineManifest, PrecisionReport
from ..formats.preprocessing import to_frames, to_input
from ..formats.records import Preprocessing
from ..formats.safetensors_layout import serialize
from ..graph import reference_session
from ..graph.edits import distinct_names, drop_unused, free_operand, quantize_only
from ..graph.model_files import with_tensors
from ..graph.reference_session import open_session, session_options
from ..numerics.batches import in_batches
from ..typing import Array
from .differences import (
    EXACT,
    HALF,
    KERNEL,
    Fidelity,
    Stage,
    Stepwise,
    check,
    difference,
    rows_at_once,
)
from .taps import GraphTap, Ran, Runs, Shows, decide, outside

__all__ = [
    "CallTap",
    "Comparison",
    "EngineTap",
    "Exported",
    "MixCheck",
    "bundle_tap",
    "check_merge",
    "engine_fidelity",
    "file_tap",
    "from_pixels",
    "inputs",
    "lowered_fidelity",
    "ort_engine",
    "recorded_tap",
    "whole_batches",
]


def inputs(bundle: Bundle) -> tuple[Array, str]:
    """Golden inputs of a bundle, or images that are drawn, and which of both they are."""
    recorded = bundle.golden()
    if recorded:
        return recorded["input"], "golden inputs"
    shape = bundle.manifest.input_shape
    x = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    p = bundle.manifest.preprocessing
    if p is not None:
        x = to_input(np.moveaxis(np.rint(x * 255), 1, -1), p)
    return x, "drawn inputs, for the bundle holds no golden ones"


def from_pixels(x: Array, preprocessing: Preprocessing | None) -> Array:
    """Network inputs as an engine that takes frames makes them: of 8 bits a value."""
    return to_input(to_frames(x, preprocessing), preprocessing)


def bundle_tap(
    bundle: Bundle,
    requested: Mapping[str, str] | None = None,
    postprocess: str = "none",
    tensors: Mapping[str, Array] | None = None,
) -> GraphTap:
    """The bundle's graph as written.

    Args:
        bundle: Gives graph and tensors.
        requested: Precision that an export asked of each layer, by ONNX node. Layers that it
            took out of INT8 read real activations here too: what they compute changes on
            purpose, and the export must compute just that.
        postprocess: What the export appended.
        tensors: Taken in place of the bundle's own, codes unpacked.
    """
    layers = bundle.manifest.layers
    asked = {
        layer.node: (requested or {}).get(layer.node, layer.requested)
        for layer in layers
        if layer.requested in CODED
    }
    nodes = [layer.node for layer in layers]
    changed = {kind for kind in asked.values() if kind not in CODED}
    if not changed:
        model = bundle.graph()
        data = (
            outside(model, bundle.path)
            if tensors is None
            else {WEIGHTS: serialize(tensors, bundle.manifest.tensors)}  # of the same layout
        )
        return GraphTap(model, data, "bundle", nodes, postprocess=postprocess)
    graph = with_tensors(bundle, tensors)
    by_name = {node.name: node for node in graph.graph}
    for node, kind in asked.items():
        if kind == "int4":
            free_operand(graph, by_name[node], 0)
    if "float32" in changed:
        quantize_only(graph, {node for node, kind in asked.items() if kind in CODED})
    drop_unused(graph)
    distinct_names(graph)
    return GraphTap(ir.to_proto(graph), {}, "bundle", nodes, postprocess=postprocess)


def file_tap(path: Path, name: str, nodes: Sequence[str], fused: bool = False) -> GraphTap:
    """A lowered graph on the disk, as written or, ``fused``, as an engine runs it."""
    model = onnx.load(str(path), load_external_data=False)

    def with_kernels(text: bytes, data: Mapping[str, bytes]) -> Runs:
        options = session_options(0, spin=False, graph=path)
        session: Runs = reference_session.open_session(text, options, data)
        return session

    return GraphTap(
        model, outside(model, path.parent), name, nodes, with_kernels if fused else None
    )


def lowered_fidelity(tap: GraphTap, exact: bool) -> Fidelity:
    """How exactly a lowered graph must compute what the bundle's does."""
    return replace(HALF if tap.half else EXACT, widened=not exact)


class EngineTap:
    """An engine on ONNX Runtime: outputs as it runs, codes from its graph run beside it.

    Args:
        tap: The engine's graph with integer kernels.
        call: The engine itself.
    """

    name = "engine"

    def __init__(self, tap: GraphTap, call: Callable[[Array], Array]) -> None:
        self._tap, self._call = tap, call

    def run(self, x: Array) -> Ran:
        """A batch, as the engine takes it."""
        return replace(self._tap.run(x), output=self._call(x))


class CallTap:
    """A stage of which only the output is seen.

    Args:
        name: What the user knows it as.
        call: Inputs to outputs.
        postprocess: What is done to them, as an export would append it.
    """

    def __init__(
        self, name: str, call: Callable[[Array], Array], postprocess: str = "none"
    ) -> None:
        self.name, self._call, self._postprocess = name, call, postprocess

    def run(self, x: Array) -> Ran:
        """A batch."""
        return Ran(*decide(self._call(x), self._postprocess))


def recorded_tap(
    name: str, batches: Sequence[Array], outputs: Sequence[Array], postprocess: str = "none"
) -> CallTap:
    """A stage whose outputs of just these batches are known."""
    known = {id(rows): output for rows, output in zip(batches, outputs, strict=True)}
    return CallTap(name, lambda rows: known[id(rows)], postprocess)


def engine_fidelity(lowered: GraphTap, code_ties: float | None = None) -> Fidelity:
    """How exactly integer kernels must compute what their graph says.

    Args:
        lowered: The graph.
        code_ties: ``code_ties`` of the engine's manifest.
    """
    # The kernels of 4-bit weights in blocks round their activations to 8 bits, in blocks.
    if lowered.in_blocks:
        return replace(KERNEL, codes=0.05, output=0.05)
    return replace(KERNEL, most_ties=code_ties)


@dataclass(frozen=True)
class Exported:
    """What must be known of an export to hold it against its bundle.

    Attributes:
        path: The lowered ``model.onnx``.
        requested: Precision asked of each layer, by ONNX node.
        batch: Fixed batch; None where it is free.
        frames: It takes uint8 frames (N, H, W, C).
        exact: Whether codes end where the bundle's do.
        postprocess: What was appended to the output.
        code_ties: See :class:`~hdrq_deploy.formats.engine_folder.EngineKind`.
    """

    path: Path
    requested: Mapping[str, str]
    batch: int | None = None
    frames: bool = False
    exact: bool = True
    postprocess: str = "none"
    code_ties: float | None = None

    @classmethod
    def of(cls, path: Path, manifest: EngineManifest, report: PrecisionReport) -> Exported:
        """An engine folder's ``model.onnx``."""
        (port,) = manifest.inputs
        first = port.shape[0]
        options = manifest.options.get("graph", {})
        return cls(
            path,
            {row.node: row.requested for row in report.layers},
            first if isinstance(first, int) else None,
            port.dtype == "uint8",
            manifest.engine != "ort" or bool(options.get("exact", True)),
            manifest.postprocess,
            manifest.code_ties,
        )


class Comparison:
    """A bundle, its lowered graph and perhaps its engine on the same inputs.

    Args:
        bundle: Calibrated or merged.
        exported: Made of it.
        x: Network inputs (N, C, H, W) float32.
        tensors: Taken in place of the bundle's own (a merge that is on no disk).
        at_once: Rows of a batch, where the batch is free.

    Attributes:
        fed: The batches as lowered graph and engine take them.
        input: The network's inputs; of an engine that takes frames, those of 8 bits a value.
    """

    def __init__(
        self,
        bundle: Bundle,
        exported: Exported,
        x: Array,
        tensors: Mapping[str, Array] | None = None,
        at_once: int | None = None,
    ) -> None:
        self.bundle, self.exported, self._count = bundle, exported, len(x)
        p = bundle.manifest.preprocessing
        x = from_pixels(x, p) if exported.frames else x
        size = exported.batch or at_once or rows_at_once(bundle.manifest.input_shape)
        self._rows = list(in_batches(whole_batches(x, exported.batch), size))
        self.fed = [to_frames(rows, p) for rows in self._rows] if exported.frames else self._rows
        self.input = np.concatenate(self._rows)[: self._count]
        self.reference = bundle_tap(bundle, exported.requested, exported.postprocess, tensors)

    @cached_property
    def lowered(self) -> GraphTap:
        """The lowered graph as written."""
        nodes = [layer.node for layer in self.bundle.manifest.layers]
        return file_tap(self.exported.path, "lowered graph", nodes)

    def to_output(self, engine: Shows) -> Stage:
        """Bundle to engine, of which only the output is seen."""
        how = Stepwise.of_bundle(self.bundle, replace(EXACT, widened=not self.exported.exact))
        return difference(self.reference, engine, self._both, how)

    def _both(self) -> Iterator[tuple[Array, Array]]:
        return zip(self._rows, self.fed, strict=True)

    def to_lowered(self) -> Stage:
        """Bundle to lowered graph."""
        fidelity = lowered_fidelity(self.lowered, self.exported.exact)
        free = self.exported.batch is None
        how = replace(Stepwise.of_bundle(self.bundle, fidelity), probe=True, one_row=free)
        return difference(self.reference, self.lowered, self._both, how)

    def to_engine(self, engine: Shows) -> Stage:
        """Lowered graph to engine."""
        how = Stepwise.of_bundle(
            self.bundle, engine_fidelity(self.lowered, self.exported.code_ties)
        )
        return difference(self.lowered, engine, lambda: zip(self.fed, self.fed, strict=True), how)

    def run_reference(self) -> None:
        """Run the bundle's graph, before there is anything to compare it with."""
        for rows in self._rows:
            self.reference.run(rows)

    def recorded(self) -> dict[str, Array]:
        """Inputs, and the scores that an engine's own check starts from."""
        # Codes that go on beyond the bundle's give another output on purpose.
        stage, rows = (
            (self.reference, self._rows) if self.exported.exact else (self.lowered, self.fed)
        )
        scores = np.concatenate([stage.run(some).scores for some in rows])[: self._count]
        if self.exported.postprocess == "softmax":  # of the logarithm it is the same again
            scores = np.log(np.maximum(scores, np.finfo(np.float32).tiny))
        return {"input": np.ascontiguousarray(self.input), "output": np.ascontiguousarray(scores)}


def ort_engine(path: Path) -> EngineTap:
    """A lowered graph as an engine on ONNX Runtime's CPU runs it."""
    session = open_session(path, session_options(0, spin=False, graph=path))
    port = session.get_inputs()[0].name

    def call(x: Array) -> Array:
        output: Array = session.run(None, {port: x})[0]
        return output

    return EngineTap(file_tap(path, "engine", (), fused=True), call)


def whole_batches(x: Array, size: int | None) -> Array:
    """``x``, its first rows repeated until whole batches are full."""
    if size is None or len(x) % size == 0:
        return x
    return np.resize(x, (-(-len(x) // size) * size, *x.shape[1:]))


def check_merge(bundle: Bundle) -> None:
    """One input through a merged bundle's graph.

    Raises:
        CheckFailed: The graph does not run, or gives nothing, NaN or infinity.
    """
    x, _ = inputs(bundle)
    model = bundle.graph()
    output = GraphTap(model, outside(model, bundle.path), "merged graph").run(x[:1]).output
    if not output.size or not np.isfinite(output).all():
        wrong = "NaN or infinity" if output.size else "no values"
        raise CheckFailed(
            f"found {wrong} in the output of the merge; needed finite numbers: check the bundles "
            "with hdrq-verify, or merge at other weights"
        )


class MixCheck:
    """One image through the graph of a mix that is on no disk, and through its engine.

    Args:
        bundle: Gives graph, layers and the image.
        tensors: Tensors of the mix.
        exported: How it is lowered.
    """

    def __init__(self, bundle: Bundle, tensors: Mapping[str, Array], exported: Exported) -> None:
        self._tolerances = bundle.manifest.tolerances
        self._mix = Comparison(bundle, exported, inputs(bundle)[0][:1], tensors)
        self._mix.run_reference()

    def __call__(self, engine: Callable[[Array], Array]) -> None:
        """Compare the engine.

        Raises:
            CheckFailed: It does not compute what the graph of the mix does.
        """
        check([self._mix.to_output(CallTap("engine", engine))], self._tolerances)
