"""The fastest engine of a bundle on this machine, found by measuring those that run here."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..comparison import golden
from ..errors import CheckFailed, EngineError, ExportError
from ..exporters.engines import ENGINES, target_of
from ..exporters.export import export, ingredients
from ..exporters.first_run import has_driver
from ..exporters.options import BuildOptions, GraphOptions
from ..formats.atomic_files import check_output, new_directory, scratch_folder
from ..formats.bundle import Bundle
from ..formats.engine_folder import (
    KINDS,
    MANIFEST,
    PLAN,
    EngineManifest,
    altered_file,
    read_manifest,
    write_manifest,
)
from ..formats.file_kinds import ENGINE
from ..formats.preprocessing import feed
from ..runtime.bench.measurement import interleaved
from ..typing import Array, Progress

__all__ = ["AUTO", "export_fastest"]

AUTO = "auto"
_log = logging.getLogger("hdrq_deploy")
_CALLS, _WARMUP = 60, 5


def export_fastest(
    bundle: Bundle | str | os.PathLike[str],
    output: str | os.PathLike[str],
    allow_float: Sequence[str] = (),
    options: GraphOptions | None = None,
    build: BuildOptions | None = None,
    threads: int = 0,
    force: bool = False,
    say: Callable[[str], None] = _log.info,
    progress: Progress | None = None,
) -> Path:
    """Build every engine that runs on this machine, measure them in turn, and keep the fastest.

    Each is exported as :func:`~hdrq_deploy.exporters.export` does, checks included; one whose
    library is missing, or that refuses the bundle or an option, is left out. They are measured
    on the same golden input with the same number of threads, call by call, and ``build.measured``
    of the manifest says what was found. An engine that was chosen among the same ones is left as
    it is.

    Args:
        bundle: Bundle or its path.
        output: Engine folder to make.
        allow_float: See :func:`~hdrq_deploy.exporters.export`.
        options: Options of the graph, the same for all.
        build: Options of the builder of a TensorRT engine.
        threads: Threads of every engine on the CPU; 0, one per core.
        force: Build and measure again what is there.
        say: Told what was measured and what was left out.
        progress: Called with (engines done, engines in all, what).

    Returns:
        The engine folder.

    Raises:
        ExportError: No engine can be built and run here; says why each cannot.
    """
    options, build = options or GraphOptions(), build or BuildOptions()
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    goal = check_output(output, ENGINE, [bundle.path])
    threads = threads or os.cpu_count() or 1
    able, left_out = _able(bundle, options, build, allow_float)
    asked = _digest({"engines": able, "threads": threads})
    if not force and _is_chosen_so(goal, asked):
        say(f"{goal}: up to date")
        return goal
    with scratch_folder() as scratch:
        built: dict[str, Path] = {}
        for i, name in enumerate(able):
            if progress:
                progress(i, len(able), name)
            try:
                place = scratch / name
                export(
                    bundle,
                    place,
                    name,
                    allow_float=allow_float,
                    options=options,
                    build=build,
                    say=say,
                )
                built[name] = place
            except (ExportError, EngineError, CheckFailed) as error:
                left_out[name] = str(error)
        if not built:
            raise ExportError(
                "found no engine that can be built and run here: "
                + "; ".join(f"{name}: {why}" for name, why in left_out.items())
            )
        medians, images = _measure(bundle, built, threads)
        best = min(medians, key=medians.__getitem__)
        measured = {
            "asked": asked,
            "median_ms": medians,
            "images": images,
            "calls": _CALLS,
            "threads": threads,
            "left_out": left_out,
        }
        _keep(built[best], goal, measured)
    for name, why in left_out.items():
        say(f"{name}: left out, {why}")
    figures = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(medians.items(), key=_second))
    say(
        f"{goal}: {best} is the fastest ({figures}; medians of {_CALLS} calls in turn, {images} "
        f"image(s) a call, {threads} thread(s))"
    )
    return goal


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def _able(
    bundle: Bundle, options: GraphOptions, build: BuildOptions, allow_float: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What each engine that may run here depends on; and why the others cannot."""
    able: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in ENGINES:
        if not KINDS[name].built:
            continue  # a portable graph is for no runtime of its own
        target = target_of(name)
        try:
            able[name] = ingredients(bundle, target, options, build, allow_float, False)
        except ExportError as error:
            left_out[name] = str(error)
            continue
        if KINDS[name].runs == PLAN and not has_driver():
            left_out[name] = "this machine has no NVIDIA driver"
            del able[name]
    return able, left_out


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_chosen_so(goal: Path, asked: str) -> bool:
    """Whether the engine there was chosen in the same way among the same ones."""
    if not (goal / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(goal, check=False)
    except EngineError:
        return False
    measured = manifest.build.get("measured")
    same = isinstance(measured, Mapping) and measured.get("asked") == asked
    return same and altered_file(goal, manifest) == ("", "")


def _measure(
    bundle: Bundle, built: Mapping[str, Path], threads: int
) -> tuple[dict[str, float], int]:
    """Median of every engine in ms, and images in a call."""
    manifests = {name: read_manifest(path, check=False) for name, path in built.items()}
    x = _input(bundle, next(iter(manifests.values())))
    found = interleaved(list(built.values()), x, _WARMUP, _CALLS, threads)
    return {name: row.p50 for name, row in zip(built, found, strict=True)}, len(x)


def _input(bundle: Bundle, manifest: EngineManifest) -> Array:
    """A golden input as the engines take it, one image or as many as they are fixed to."""
    fixed = manifest.inputs[0].shape[0]
    rows, _ = golden.inputs(bundle)
    count = fixed if isinstance(fixed, int) else 1
    return feed(np.ascontiguousarray(np.resize(rows, (count, *rows.shape[1:]))), manifest)


def _keep(chosen: Path, goal: Path, measured: Mapping[str, Any]) -> None:
    """Put an engine into its place, with the figures in its manifest."""
    manifest = read_manifest(chosen, check=False)
    with new_directory(goal, ENGINE) as folder:
        for name in manifest.files:
            shutil.copyfile(chosen / name, folder / name)
        build = {**manifest.build, "measured": dict(measured)}
        write_manifest(folder, manifest.model_copy(update={"build": build}))
