"""The fastest engine of a bundle on this machine, found by measuring those that run here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckFailed, EngineError, ExportError
from ..exporters.engines import ENGINES, target_of
from ..exporters.export import export, ingredients
from ..exporters.options import BuildOptions, GraphOptions
from ..formats.atomic_files import check_output, scratch_folder
from ..formats.bundle import Bundle
from ..formats.engine_folder import KINDS, is_engine, read_manifest
from ..formats.file_kinds import ENGINE
from ..runtime.bench.measurement import interleaved
from ..typing import Progress
from .chosen_engine import digest, golden_input, is_chosen, keep_engine, not_here
from .measured_precision import GUARD, export_measured

__all__ = ["AUTO", "export_fastest", "fastest_change"]

AUTO = "auto"
# Key of the figures in ``build`` of a manifest.
_FIGURES = "measured"
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
    measure: bool = False,
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
        measure: Each leaves in float what INT8 makes slower (:func:`export_measured`).

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
    asked = digest({"engines": able, "threads": threads, **({"measure": GUARD} if measure else {})})
    if not force and is_chosen(goal, _FIGURES, asked):
        say(f"{goal}: up to date")
        return goal
    with scratch_folder() as scratch:
        make = partial(export_measured, threads=threads) if measure else export

        def built_at(place: Path, name: str) -> None:
            told = _renamed(say, place, name)
            make(
                bundle,
                place,
                name,
                allow_float=allow_float,
                options=options,
                build=build,
                say=told,
            )

        built, refused = _built(able, scratch, built_at, progress)
        left_out |= refused
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
        keep_engine(built[best], goal, _FIGURES, measured, {})
    for name, why in left_out.items():
        say(f"{name}: left out, {why}")
    figures = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(medians.items(), key=_second))
    say(
        f"{goal}: {best} is the fastest ({figures}; medians of {_CALLS} calls in turn, {images} "
        f"image(s) a call, {threads} thread(s))"
    )
    return goal


def _built(
    names: Collection[str],
    scratch: Path,
    make: Callable[[Path, str], None],
    progress: Progress | None,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Engine folders by name, and why the others could not be made."""
    built: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names), name)
        try:
            make(scratch / name, name)
            built[name] = scratch / name
        except (ExportError, EngineError, CheckFailed) as error:
            left_out[name] = str(error)
    return built, left_out


def _renamed(say: Callable[[str], None], place: Path, name: str) -> Callable[[str], None]:
    """Told of an engine in a temporary folder, by its name."""
    return lambda text: say(text.replace(str(place), name))


def fastest_change(bundle: Bundle, output: str | os.PathLike[str], threads: int = 0) -> str:
    """Why :func:`export_fastest` would build, in words; "" where the engine is up to date.

    Args:
        bundle: The bundle.
        output: Engine folder.
        threads: Threads of every engine on the CPU; 0, one per core.
    """
    if not is_engine(Path(output)):
        return "it is missing"
    able, _ = _able(bundle, GraphOptions(), BuildOptions(), ())
    asked = digest({"engines": able, "threads": threads or os.cpu_count() or 1})
    if is_chosen(Path(output), _FIGURES, asked):
        return ""
    return "it was chosen of another bundle, among other engines, or is altered"


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
            continue
        target = target_of(name)
        try:
            able[name] = ingredients(bundle, target, options, build, allow_float, False)
        except ExportError as error:
            left_out[name] = str(error)
            continue
        if reason := not_here(name):
            left_out[name] = reason
            del able[name]
    return able, left_out


def _measure(
    bundle: Bundle, built: Mapping[str, Path], threads: int
) -> tuple[dict[str, float], int]:
    """Median of every engine in ms, and images in a call."""
    manifests = {name: read_manifest(path, check=False) for name, path in built.items()}
    x = golden_input(bundle, next(iter(manifests.values())))
    found = interleaved(list(built.values()), x, _WARMUP, _CALLS, threads)
    return {name: row.p50 for name, row in zip(built, found, strict=True)}, len(x)
