"""From a bundle to an engine folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import safetensors.numpy

from ..comparison import golden
from ..comparison.differences import check
from ..errors import CheckFailed, EngineError, ExportError
from ..formats.atomic_files import (
    check_output,
    new_directory,
)
from ..formats.bundle import Bundle
from ..formats.bundle_manifest import Layer
from ..formats.engine_folder import (
    GOLDEN,
    GRAPH,
    KINDS,
    MANIFEST,
    PLAN,
    EngineManifest,
    Port,
    PrecisionReport,
    altered_file,
    read_manifest,
    write_manifest,
)
from ..formats.file_kinds import ENGINE
from ..formats.staleness import code_of, first_change
from ..graph import model_files
from ..graph.patterns import check_patterns
from . import precision
from . import tensorrt_build as trt
from .first_run import run_apart
from .half_precision import to_fp16
from .io_signature import shape_ports
from .lint import lint
from .lowering import lower_ort, lower_portable
from .mixed_precision import keep_float, weights_only
from .options import BuildOptions, GraphOptions, profile
from .precision_reasons import explain

__all__ = ["ENGINES", "export", "lowered", "port_of", "ports"]

ENGINES = tuple(KINDS)

Progress = Callable[[int, int, str], None]


def export(
    bundle: Bundle | str | os.PathLike[str],
    output: str | os.PathLike[str],
    engine: str = "ort",
    batches: tuple[int, int, int] = (1, 1, 8),
    allow_float: Sequence[str] = (),
    options: GraphOptions | None = None,
    build: BuildOptions | None = None,
    force: bool = False,
    only_graph: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    progress: Progress | None = None,
) -> Path:
    """Lower a bundle for one engine, build it, and report what it executes.

    An engine that is there already, made of the same bundle, options, library and device, is
    left as it is.

    Args:
        bundle: Bundle or its path.
        output: Engine folder to make: ``manifest.json``, ``model.onnx`` with external data,
            ``precision.json`` and, for TensorRT, ``model.plan``.
        engine: One of ``ENGINES``.
        batches: Smallest, best and largest batch of a TensorRT engine; ``build`` wins.
        allow_float: Patterns (fnmatch) of layers that may run in float; each names one at least.
        options: Of the graph.
        build: Of the builder.
        force: Build again what is there.
        only_graph: Stop at the lowered ``model.onnx``; no library is needed.
        say: Told whether an engine was there, and why it is built again.
        progress: Called with (steps done, steps in all, what).

    Returns:
        The engine folder.

    Raises:
        ExportError: The engine is unknown, missing, or refuses the graph.
        CheckFailed: A layer does not run in the precision that was requested.
    """
    if engine not in ENGINES:
        raise ExportError(f"found engine {engine!r}; choose one of {', '.join(ENGINES)}")
    options = options or GraphOptions()
    build = build or BuildOptions(batches=batches)
    build.check()
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    asked = bundle.manifest.layers
    named = [*(layer.module for layer in asked), *(layer.node for layer in asked)]
    check_patterns("--allow-float", allow_float, named)
    target = check_output(output, ENGINE, [bundle.path])
    ingredients = _ingredients(bundle, engine, options, build, allow_float, only_graph)
    if not force and _is_fresh(target, ingredients, say):
        return target
    model, layers = lowered(bundle, engine, options)
    with new_directory(target, ENGINE) as folder:
        model_files.save(model, folder / GRAPH)
        _check_onnx(folder / GRAPH)
        if only_graph:
            lint(folder / GRAPH, engine in trt.MODULES)
            report = precision.requested_only(engine, layers)
            facts: dict[str, Any] = {}
        else:
            report, facts = _realize(engine, folder, model, layers, build, progress)
        if engine == "ort":
            kind = "codes as calibrated" if options.exact else "non-negative codes to 255"
            report = report.model_copy(update={"source": f"{report.source}; {kind}"})
        report = explain(report, model)
        precision.check(report, allow_float)
        report.write(folder)

        def describe(facts: Mapping[str, Any]) -> None:
            manifest = _manifest(bundle, model, report, options, ingredients, facts)
            write_manifest(folder, manifest)

        describe(facts)  # an engine that is run for the check is one like any other
        takes = _batches(model, build) if engine in trt.MODULES and not only_graph else None
        checked = _check_golden(bundle, folder, report, options, takes, not only_graph, say)
        describe({**facts, "checked": checked})
    return target


def lowered(
    bundle: Bundle,
    engine: str,
    options: GraphOptions,
    tensors: Mapping[str, Any] | None = None,
) -> tuple[ir.Model, list[Layer]]:
    """The graph for one engine, in memory, and what is asked of its layers.

    Args:
        bundle: What is lowered.
        engine: One of ``ENGINES``.
        options: Of the graph.
        tensors: Taken in place of the bundle's own (a merge that is on no disk).

    Raises:
        ExportError: The engine cannot run this bundle, or an option does not fit it.
    """
    model = model_files.load(bundle, tensors)
    layers = list(bundle.manifest.layers)
    if options.weights_only:
        layers = weights_only(model, layers, options.weights_only)
    if options.keep_float:
        layers = keep_float(model, layers, options.keep_float)
    shape_ports(model, options, bundle.manifest.preprocessing)
    if engine == "ort":
        return lower_ort(model, options.exact), layers
    on_tensorrt = engine in trt.MODULES
    model = lower_portable(model, options.pack_int4 and on_tensorrt)
    if on_tensorrt and options.compute == "fp16":
        model = to_fp16(model)
    return model, layers


def _check_golden(
    bundle: Bundle,
    folder: Path,
    report: PrecisionReport,
    options: GraphOptions,
    takes: tuple[int, int] | None,
    built: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Hold lowered graph and engine against the bundle, on its golden inputs; keep those.

    Args:
        bundle: What was exported.
        folder: The engine's.
        report: What is asked of the layers.
        options: Of the graph.
        takes: Smallest and largest batch of an engine that does not take all.
        built: There is an engine, and not its graph alone.
        say: Told why an engine cannot be run here.

    Returns:
        What was compared, and how far it was apart, for the manifest.

    Raises:
        CheckFailed: They compute something else.
    """
    x, origin = golden.inputs(bundle)
    exported = golden.Exported(
        folder / GRAPH,
        {row.node: row.requested for row in report.layers},
        options.batch,
        options.fold_preprocess,
        report.engine != "ort" or options.exact,
        options.postprocess,
    )
    at_once = None
    if takes is not None:
        at_once = min(max(len(x), takes[0]), takes[1])
        x = np.resize(x, (at_once, *x.shape[1:]))
    both = golden.Comparison(bundle, exported, x, at_once=at_once)
    stages = [both.to_lowered()]
    why = "the graph is portable" if built else "the engine is not built"
    if built and report.engine == "ort":
        stages.append(both.to_engine(golden.ort_engine(folder / GRAPH)))
    elif built and report.engine in trt.MODULES:
        outputs, why = run_apart(folder, both.fed)
        if outputs is not None:
            stages.append(both.to_engine(golden.recorded_tap("engine", both.fed, outputs)))
        else:
            say(f"{report.engine}: checked up to its lowered graph, for {why}")
    check(stages, bundle.manifest.tolerances)
    if bundle.golden():
        (folder / GOLDEN).write_bytes(safetensors.numpy.save(both.recorded()))
    found: dict[str, Any] = {"inputs": origin, "images": stages[0].images}
    if len(stages) == 1:
        found["engine_not_run"] = why
    return {**found, "stages": [stage.brief for stage in stages]}


def _batches(model: ir.Model, build: BuildOptions) -> tuple[int, int] | None:
    """Smallest and largest batch of an engine; None where it is fixed."""
    (port,) = map(port_of, model.graph.inputs)
    shapes = profile(port.name, port.shape, build)
    return None if shapes is None else (shapes.smallest[0], shapes.largest[0])


def _ingredients(
    bundle: Bundle,
    engine: str,
    options: GraphOptions,
    build: BuildOptions,
    allow_float: Sequence[str],
    only_graph: bool,
) -> dict[str, Any]:
    """Everything that an engine depends on."""
    found: dict[str, Any] = {
        "bundle": bundle.manifest_sha256,
        "engine": engine,
        "graph": options.model_dump(mode="json"),
        "allow_float": list(allow_float),
        "hdrq-deploy": version("hdrq-deploy"),
        "exporter": code_of("exporters"),
        "onnx": onnx.__version__,
    }
    if engine == "ort":
        found["onnxruntime"] = version("onnxruntime")
    if engine in trt.MODULES and not only_graph:
        found["build"] = build.model_dump(mode="json")
        found[trt.MODULES[engine]] = trt.library_version(engine)
        found["device"] = trt.device(engine)
    return found


def _is_fresh(target: Path, wanted: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the engine at ``target`` was made of just this; says so, or what changed."""
    if not (target / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(target, check=False)
    except EngineError:
        say(f"{target}: built again, its manifest is of another version")
        return False
    changed = first_change(manifest.options, wanted)
    if changed:
        say(f"{target}: built again, {changed}")
        return False
    name, state = altered_file(target, manifest)
    if name:
        say(f"{target}: built again, {name} is {state}")
        return False
    say(f"{target}: up to date")
    return True


def _check_onnx(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(
            f"the lowered graph does not pass onnx.checker ({str(error).splitlines()[0]}); "
            "please report the bundle"
        ) from error


def _realize(
    engine: str,
    folder: Path,
    model: ir.Model,
    layers: Sequence[Layer],
    build: BuildOptions,
    progress: Progress | None,
) -> tuple[PrecisionReport, dict[str, Any]]:
    """Build what there is to build and read back what it executes."""
    if engine == "onnx":
        return precision.requested_only(engine, layers), {}
    if engine == "ort":
        return precision.from_ort(folder / GRAPH, layers), {}
    shapes = {port.name: port.shape for port in map(port_of, model.graph.inputs)}
    built = trt.build(engine, folder / GRAPH, folder / PLAN, build, shapes, progress)
    if built.dump:
        report = precision.from_trt_log(engine, built.dump, layers)
    elif built.inspector:
        report = precision.from_trt_inspector(engine, built.inspector, layers)
    else:
        raise CheckFailed(
            f"{engine} {built.version} built an engine but reports no layers, so its precision "
            "cannot be shown; build with --profiling detailed, or pass --allow-float '*'"
        )
    facts = {"seconds": round(built.seconds, 2), "peak_bytes": built.peak_bytes}
    return report, facts


def _manifest(
    bundle: Bundle,
    model: ir.Model,
    report: PrecisionReport,
    options: GraphOptions,
    ingredients: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> EngineManifest:
    origin = bundle.manifest
    versions = ("hdrq-deploy", "onnx", "onnxruntime", *trt.MODULES.values())
    return EngineManifest(
        engine=report.engine,
        model=origin.model,
        method=origin.method,
        domains=origin.domains,
        scheme=origin.scheme,
        bundle_sha256=ingredients["bundle"],
        inputs=tuple(port_of(v, options.fold_preprocess) for v in model.graph.inputs),
        outputs=tuple(port_of(v) for v in model.graph.outputs),
        preprocessing=origin.preprocessing,
        classes=origin.classes,
        precision=report.summary,
        postprocess=options.postprocess,
        options=dict(ingredients),
        build=dict(facts),
        tolerances=origin.tolerances,
        versions={name: str(ingredients[name]) for name in versions if name in ingredients},
    )


def ports(folder: Path) -> dict[str, tuple[int | str, ...]]:
    """Shape of every input of an engine folder, by name."""
    return {port.name: port.shape for port in read_manifest(folder, check=False).inputs}


def port_of(value: ir.Value, frames: bool = False) -> Port:
    """A graph's input or output as the manifest names it; ``frames`` are (N, H, W, C)."""
    shape = tuple(d if isinstance(d, int) else str(d) for d in (value.shape or ()))
    layout = {4: "NHWC" if frames else "NCHW"}.get(len(shape), "")
    return Port(
        name=value.name or "", shape=shape, dtype=str(value.dtype or "FLOAT").lower(), layout=layout
    )
