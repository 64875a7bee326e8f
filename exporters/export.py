"""From a bundle to an engine folder."""

from __future__ import annotations

import logging
import os
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
from ..errors import CheckFailed, EngineError
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
    EngineManifest,
    PrecisionReport,
    altered_file,
    read_manifest,
    write_manifest,
)
from ..formats.file_kinds import ENGINE
from ..formats.staleness import code_of, first_change
from ..graph import model_files
from ..graph.patterns import check_patterns
from ..typing import Progress
from . import precision
from .engines import ENGINES, target_of
from .io_signature import port_of, shape_ports
from .mixed_precision import keep_float, real_weights, weights_only
from .options import BuildOptions, GraphOptions
from .precision_reasons import explain
from .target import Target

__all__ = ["ENGINES", "engine_change", "export", "ingredients", "lowered", "ports"]

_log = logging.getLogger("hdrq_deploy")


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
    say: Callable[[str], None] = _log.info,
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
        options: Options of the graph.
        build: Options of the builder.
        force: Build again what is there.
        only_graph: Stop at the lowered ``model.onnx``; no library is needed.
        say: Told whether an engine was there, and why it is built again; by default the log is.
        progress: Called with (steps done, steps in all, what).

    Returns:
        The engine folder.

    Raises:
        ExportError: The engine is unknown, missing, or refuses the graph.
        CheckFailed: A layer does not run in the precision that was requested.
    """
    target = target_of(engine)
    options = options or GraphOptions()
    build = build or BuildOptions(batches=batches)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    asked = bundle.manifest.layers
    modules = [*(layer.module for layer in asked), *(layer.node for layer in asked)]
    check_patterns("allow_float", allow_float, modules)
    goal = check_output(output, ENGINE, [bundle.path])
    parts = ingredients(bundle, target, options, build, allow_float, only_graph)
    if not force and _is_up_to_date(goal, parts, say):
        return goal
    model, layers = lowered(bundle, engine, options)
    with new_directory(goal, ENGINE) as folder:
        model_files.save(model, folder / GRAPH)
        _check_onnx(folder / GRAPH)
        facts: dict[str, Any] = {}
        if only_graph:
            target.check_graph(folder / GRAPH)
            report = precision.requested_only(engine, layers)
        else:
            report, facts = target.realize(folder, model, layers, build, progress)
        remark = target.remark(options)
        if remark:
            report = report.model_copy(update={"source": f"{report.source}; {remark}"})
        report = explain(report, model)
        precision.check(report, allow_float)
        report.write(folder)

        def describe(facts: Mapping[str, Any]) -> None:
            manifest = _manifest(bundle, target, model, report, options, parts, facts)
            write_manifest(folder, manifest)

        describe(facts)  # an engine that is run for the check is one like any other
        takes = None if only_graph else target.batches(model, build)
        checked = _check_golden(
            bundle, target, folder, report, options, build, takes, not only_graph, say
        )
        describe({**facts, "checked": checked})
    return goal


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
        options: Options of the graph.
        tensors: Taken in place of the bundle's own (a merge that is on no disk).

    Raises:
        ExportError: The engine cannot run this bundle, or an option does not fit it.
    """
    target = target_of(engine)
    model = model_files.load(bundle, tensors)
    layers = list(bundle.manifest.layers)
    if options.weights_only:
        layers = weights_only(model, layers, options.weights_only)
    if options.keep_float:
        layers = keep_float(model, layers, options.keep_float)
    real_weights(model, layers)
    shape_ports(model, options, bundle.manifest.preprocessing)
    return target.lower(model, options), layers


def _check_golden(
    bundle: Bundle,
    target: Target,
    folder: Path,
    report: PrecisionReport,
    options: GraphOptions,
    build: BuildOptions,
    takes: tuple[int, int] | None,
    built: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Hold lowered graph and engine against the bundle, on its golden inputs; keep those.

    Args:
        bundle: What was exported.
        target: What it was exported for.
        folder: The engine folder.
        report: What is asked of the layers.
        options: Options of the graph.
        build: Options of the builder.
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
        target.exact(options),
        options.postprocess,
        KINDS[target.name].code_ties,
    )
    at_once = None
    if takes is not None:
        at_once = min(max(len(x), takes[0]), takes[1])
        x = np.resize(x, (at_once, *x.shape[1:]))
    both = golden.Comparison(bundle, exported, x, at_once=at_once)
    stages = [both.to_lowered()]
    engine, why = None, "the engine is not built"
    if built:
        engine, why = target.run(folder, both.fed)
        if engine is not None:
            stages.append(both.to_engine(engine))
        elif target.builds:
            target.unchecked(build, why)
            say(f"{report.engine}: checked up to its lowered graph, for {why}")
    check(stages, bundle.manifest.tolerances)
    if bundle.golden():
        (folder / GOLDEN).write_bytes(safetensors.numpy.save(both.recorded()))
    checked: dict[str, Any] = {"inputs": origin, "images": stages[0].images}
    if engine is None:
        checked["engine_not_run"] = why
    return {**checked, "stages": [stage.brief for stage in stages]}


def ingredients(
    bundle: Bundle,
    target: Target,
    options: GraphOptions,
    build: BuildOptions,
    allow_float: Sequence[str],
    only_graph: bool,
) -> dict[str, Any]:
    """Everything that an engine depends on: bundle, options, versions, device.

    Args:
        bundle: What is exported.
        target: What it is exported for.
        options: Options of the graph.
        build: Options of the builder.
        allow_float: Patterns of layers that may run in float.
        only_graph: No engine is built.

    Raises:
        ExportError: A library is missing, or an option does not fit the engine.
    """
    return {
        "bundle": bundle.manifest_sha256,
        "engine": target.name,
        "graph": options.model_dump(mode="json"),
        "allow_float": list(allow_float),
        "hdrq-deploy": version("hdrq-deploy"),
        "exporter": code_of("exporters"),
        "onnx": onnx.__version__,
        **target.ingredients(build, only_graph),
    }


def _is_up_to_date(folder: Path, wanted: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the engine at ``folder`` was made of just this; says so, or what changed."""
    if not (folder / MANIFEST).is_file():
        return False
    change = _change(folder, wanted)
    say(f"{folder}: built again, {change}" if change else f"{folder}: up to date")
    return not change


def _change(folder: Path, wanted: Mapping[str, Any]) -> str:
    """What is different from the engine at ``folder`` that would be made now; "" for nothing."""
    try:
        manifest = read_manifest(folder, check=False)
    except EngineError:
        return "its manifest is of another version"
    changed = first_change(manifest.options, wanted)
    if changed:
        return changed
    name, state = altered_file(folder, manifest)
    return f"{name} is {state}" if name else ""


def engine_change(
    bundle: Bundle,
    output: str | os.PathLike[str],
    engine: str = "ort",
    options: GraphOptions | None = None,
    build: BuildOptions | None = None,
) -> str:
    """Why :func:`export` would build, in words; "" where the engine is up to date.

    Args:
        bundle: The bundle.
        output: Engine folder.
        engine: One of ``ENGINES``.
        options: Options of the graph.
        build: Options of the builder.

    Raises:
        ExportError: The engine is unknown, or its library is missing.
    """
    if not (Path(output) / MANIFEST).is_file():
        return "it is missing"
    options, build = options or GraphOptions(), build or BuildOptions()
    wanted = ingredients(bundle, target_of(engine), options, build, (), False)
    return _change(Path(output), wanted)


def _check_onnx(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(
            f"the lowered graph does not pass onnx.checker ({str(error).splitlines()[0]}); "
            "please report the bundle"
        ) from error


def _manifest(
    bundle: Bundle,
    target: Target,
    model: ir.Model,
    report: PrecisionReport,
    options: GraphOptions,
    parts: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> EngineManifest:
    origin = bundle.manifest
    versions = ("hdrq-deploy", "onnx", *target.libraries)
    return EngineManifest(
        engine=report.engine,
        model=origin.model,
        method=origin.method,
        domains=origin.domains,
        scheme=origin.scheme,
        bundle_sha256=parts["bundle"],
        inputs=tuple(port_of(v, options.fold_preprocess) for v in model.graph.inputs),
        outputs=tuple(port_of(v) for v in model.graph.outputs),
        preprocessing=origin.preprocessing,
        classes=origin.classes,
        precision=report.summary,
        postprocess=options.postprocess,
        options=dict(parts),
        build=dict(facts),
        tolerances=origin.tolerances,
        code_ties=KINDS[report.engine].code_ties,
        versions={name: str(parts[name]) for name in versions if name in parts},
    )


def ports(folder: Path) -> dict[str, tuple[int | str, ...]]:
    """Shape of every input of an engine folder, by name."""
    return {port.name: port.shape for port in read_manifest(folder, check=False).inputs}
