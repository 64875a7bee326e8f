"""INT8 only where it pays: an engine beside its float twin, both measured on this machine.

Quantization costs conversions, and kernels of small layers may be no faster in integers. The
engine is timed in turn with its twin, whose layers all compute in float with the weights that the
codes stand for, and each layer in both, where the engine tells. Layers that take longer in INT8
are candidates. They decide nothing alone: what a layer costs depends on its neighbours, for every
change between codes and floats is work too. So engines with candidates in float are built and
timed against the whole INT8 engine, and one is taken only where it is faster beyond a guard.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckFailed, ExportError
from ..exporters.engines import target_of
from ..exporters.export import export, ingredients
from ..exporters.options import BuildOptions, GraphOptions
from ..formats.atomic_files import check_output, scratch_folder
from ..formats.bench_result import Speedup
from ..formats.bundle import Bundle
from ..formats.engine_folder import PrecisionReport, read_manifest
from ..formats.file_kinds import ENGINE
from ..graph.patterns import named
from ..runtime.bench.layer_times import layer_times
from ..runtime.bench.measurement import interleaved
from ..runtime.bench.timing import ROUNDS, speedup
from ..typing import Array, Progress
from .chosen_engine import digest, golden_input, is_chosen, keep_engine, not_here

__all__ = ["GUARD", "LEFT_IN_FLOAT", "Stopwatch", "export_measured"]

_log = logging.getLogger("hdrq_deploy")
# So many times as fast must float be (performance_threshold of NVIDIA's Model-Optimizer).
GUARD = 1.02
# Key of the figures in ``build`` of a manifest.
LEFT_IN_FLOAT = "left_in_float"
_CALLS, _WARMUP = 120, 10
_KEPT = "kept in INT8"
_NOTHING = (
    "found no layer that is asked for in INT8; `measure` decides between INT8 and float: leave it "
    "out"
)
# Names of this many layers are written in a line.
_SHOWN = 6


@dataclass(frozen=True)
class Stopwatch:
    """How engines are timed.

    Attributes:
        engines: Engine folders by name to the ms of each round that they took turns in, two
            rounds or more.
        layers: An engine folder to the ms of its layers, by ONNX node; empty where it does not
            tell.
    """

    engines: Callable[[Mapping[str, Path]], Mapping[str, Sequence[float]]]
    layers: Callable[[Path], Mapping[str, float]]

    @classmethod
    def of(cls, bundle: Bundle, threads: int) -> Stopwatch:
        """The clock of this machine, with a golden input and so many threads."""

        def taken(path: Path) -> Array:
            return golden_input(bundle, read_manifest(path, check=False))

        def engines(paths: Mapping[str, Path]) -> dict[str, list[float]]:
            x = taken(next(iter(paths.values())))
            found = interleaved(list(paths.values()), x, _WARMUP, _CALLS, threads)
            rounds = [np.array(row.samples).reshape(ROUNDS, -1) for row in found]
            medians = [np.median(some, axis=1).tolist() for some in rounds]
            return dict(zip(paths, medians, strict=True))

        return cls(engines, lambda path: layer_times(path, taken(path), threads))


def export_measured(
    bundle: Bundle | str | os.PathLike[str],
    output: str | os.PathLike[str],
    engine: str = "ort",
    allow_float: Sequence[str] = (),
    options: GraphOptions | None = None,
    build: BuildOptions | None = None,
    threads: int = 0,
    force: bool = False,
    say: Callable[[str], None] = _log.info,
    progress: Progress | None = None,
    stopwatch: Stopwatch | None = None,
) -> Path:
    """Export a bundle, and leave in float what INT8 makes slower on this machine.

    Each engine that is tried is exported as :func:`~hdrq_deploy.exporters.export` does, checks
    included. ``build.left_in_float`` of the manifest says what was measured, and the precision
    report gives it as the reason of the layers that are left in float. An engine that was
    measured of the same ingredients is left as it is.

    Args:
        bundle: Bundle or its path.
        output: Engine folder to make.
        engine: One of ``ENGINES`` that runs on this machine.
        allow_float: See :func:`~hdrq_deploy.exporters.export`.
        options: Options of the graph.
        build: Options of the builder of a TensorRT engine.
        threads: Threads of an engine on the CPU; 0, one per core.
        force: Build and measure again what is there.
        say: Told in one line what was decided and why.
        progress: Called with (engines done, engines at most, what).
        stopwatch: How engines are timed; by default with the clock of this machine.

    Returns:
        The engine folder.

    Raises:
        ExportError: The engine does not run here, or the bundle asks for no layer in INT8; and as
            :func:`~hdrq_deploy.exporters.export`.
        CheckFailed: As :func:`~hdrq_deploy.exporters.export`.
    """
    options, build = options or GraphOptions(), build or BuildOptions()
    target = target_of(engine)
    if reason := not_here(engine):
        raise ExportError(
            f"found `measure` with `engine` {engine}, which cannot be timed here: {reason}; "
            "export on the device, or leave `measure` out"
        )
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if not any(
        layer.requested == "int8" and not named(layer.module, options.keep_float)
        for layer in bundle.manifest.layers
    ):
        raise ExportError(_NOTHING)
    goal = check_output(output, ENGINE, [bundle.path])
    threads = threads or os.cpu_count() or 1
    parts = ingredients(bundle, target, options, build, allow_float, False)
    asked = digest({**parts, "threads": threads, "guard": GUARD})
    if not force and is_chosen(goal, LEFT_IN_FLOAT, asked):
        say(f"{goal}: up to date")
        return goal
    trials = _Trials(bundle, engine, allow_float, options, build, say, progress)
    with scratch_folder() as trials.folder:
        choice = _choose(trials, stopwatch or Stopwatch.of(bundle, threads))
        reasons = dict.fromkeys(choice.nodes, f"left in float: {choice.why}")
        figures = {**choice.figures, "asked": asked, "threads": threads}
        keep_engine(choice.path, goal, LEFT_IN_FLOAT, figures, reasons)
    say(f"{goal}: {choice.verdict}")
    return goal


@dataclass(frozen=True)
class _Choice:
    """What was decided.

    Attributes:
        path: The engine.
        nodes: Layers that it leaves in float, by ONNX node.
        why: What was measured, in words.
        verdict: One line.
        figures: What the manifest says of it.
    """

    path: Path
    nodes: tuple[str, ...]
    why: str
    verdict: str
    figures: dict[str, Any]


class _Trials:
    """Engines of one bundle with some of its layers in float, each built once."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        allow_float: Sequence[str],
        options: GraphOptions,
        build: BuildOptions,
        say: Callable[[str], None],
        progress: Progress | None,
    ) -> None:
        self.folder = Path()
        self._bundle, self._engine, self._allow_float = bundle, engine, allow_float
        self._options, self._build, self._say = options, build, say
        self._progress = progress
        self._built: dict[tuple[str, ...], Path] = {}

    def build(self, modules: Sequence[str]) -> Path:
        """The engine that leaves these modules in float."""
        key = tuple(modules)
        if key not in self._built:
            place = self.folder / str(len(self._built))
            if self._progress:
                self._progress(len(self._built), 5, f"{len(key)} layer(s) in float")
            kept = (*self._options.keep_float, *map(glob.escape, key))
            self._built[key] = export(
                self._bundle,
                place,
                self._engine,
                allow_float=self._allow_float,
                options=self._options.model_copy(update={"keep_float": kept}),
                build=self._build,
                say=self._say,
            )
        return self._built[key]


def _in_int8(path: Path) -> tuple[str, ...]:
    """Module paths of the layers that an engine was asked to compute in INT8."""
    asked = [r.module for r in PrecisionReport.read(path).layers if r.requested == "int8"]
    return tuple(dict.fromkeys(asked))


def _choose(trials: _Trials, watch: Stopwatch) -> _Choice:
    """The INT8 engine, or one with layers in float that is faster beyond the guard."""
    whole = trials.build(())
    everything = _in_int8(whole)
    if not everything:
        raise ExportError(_NOTHING)
    twin = trials.build(everything)
    layers = _by_module(whole, watch), _by_module(twin, watch)
    tried = _candidates(*layers, everything)
    paths = {"int8": whole, "float": twin}
    refused: dict[str, str] = {}
    for name, some in list(tried.items()):
        try:
            paths[name] = trials.build(some)
        except (CheckFailed, ExportError) as error:  # beside floats a neighbour loses its kernel
            refused[name] = str(error)
            del tried[name]
    rounds = watch.engines(paths)
    tried["float"] = everything
    gains = {name: speedup(rounds[name], rounds["int8"], "int8") for name in tried}
    worth = [name for name, gain in gains.items() if _beyond_guard(gain)]
    medians = {name: float(np.median(values)) for name, values in rounds.items()}
    best = max(worth, key=lambda name: gains[name].ratio, default="int8")
    if best == "int8":
        why = _why_kept(gains, medians, tried)
        modules: Sequence[str] = ()
        verdict = f"{_KEPT} because {why}"
    else:
        modules = tried[best]
        why = (
            f"so the engine is {gains[best].ratio:.3g} times as fast ({medians[best]:.3g} ms "
            f"against {medians['int8']:.3g} ms in INT8)"
        )
        verdict = f"left in float: {_shown(modules, everything)} because {why}"
    figures = {
        "verdict": verdict,
        "modules": list(modules),
        "guard": GUARD,
        "median_ms": medians,
        "times_as_fast": {n: [g.ratio, g.low, g.high] for n, g in gains.items()},
        "tried": {name: list(some) for name, some in tried.items() if name != "float"},
        "refused": refused,
        "layers_ms": {
            module: {"int8": layers[0][module], "float": layers[1][module]}
            for module in everything
            if module in layers[0] and module in layers[1]
        },
    }
    rows = PrecisionReport.read(whole).layers
    nodes = tuple(r.node for r in rows if r.module in modules and r.requested == "int8")
    return _Choice(trials.build(modules), nodes, why, verdict, figures)


def _beyond_guard(gain: Speedup) -> bool:
    """Whether an engine is faster by more than the guard, and by more than chance explains."""
    return gain.ratio > GUARD and gain.verdict == "faster"


def _by_module(path: Path, watch: Stopwatch) -> dict[str, float]:
    """ms of every module that the engine tells of."""
    times = watch.layers(path)
    sums: dict[str, float] = {}
    for row in PrecisionReport.read(path).layers:
        if row.node in times:
            sums[row.module] = sums.get(row.module, 0.0) + times[row.node]
    return sums


def _candidates(
    in_int8: Mapping[str, float], in_float: Mapping[str, float], modules: Sequence[str]
) -> dict[str, Sequence[str]]:
    """Sets of modules that may be better off in float, by what they are; none of them twice.

    All that take longer in INT8 beyond the guard, the half of these that gains most, and the run
    of neighbours with the largest gain in all, which changes between codes and floats at its ends
    only.
    """
    both = [m for m in modules if m in in_int8 and m in in_float]
    gain = {m: in_int8[m] - in_float[m] for m in both}
    slower = [m for m in both if in_int8[m] > GUARD * in_float[m]]
    most = sorted(slower, key=lambda m: -gain[m])[: (len(slower) + 1) // 2]
    sets = {
        "layers slower in INT8": slower,
        "half of these layers": [m for m in both if m in most],
        "neighbouring layers": _best_run(both, gain),
    }
    taken: dict[str, Sequence[str]] = {}
    for name, some in sets.items():
        if some and some not in [*taken.values(), list(modules)]:  # all of them: the float twin
            taken[name] = some
    return taken


def _best_run(modules: Sequence[str], gain: Mapping[str, float]) -> list[str]:
    """The neighbours whose gains have the largest sum (Kadane's algorithm); none below 0."""
    best = total = 0.0
    run: list[str] = []
    longest: list[str] = []
    for module in modules:
        if total <= 0:
            total, run = 0.0, []
        total, run = total + gain[module], [*run, module]
        if total > best:
            best, longest = total, run
    return longest


def _why_kept(
    gains: Mapping[str, Speedup],
    medians: Mapping[str, float],
    tried: Mapping[str, Sequence[str]],
) -> str:
    """Why no layer is left in float."""
    twin = gains["float"]
    text = (
        f"it takes {medians['int8']:.3g} ms against {medians['float']:.3g} ms of its float twin "
        f"({1 / twin.ratio:.3g} times as fast)"
    )
    best = max(gains, key=lambda name: gains[name].ratio)
    found = gains[best]
    if len(gains) == 1 and found.ratio <= 1:
        return f"{text} and no layer was found to take longer in INT8"
    what = "all layers" if best == "float" else f"{len(tried[best])} {best}"
    chance = f" ({found.low:.3g} to {found.high:.3g})" if found.ratio > GUARD else ""
    return (
        f"{text}; with {what} in float it would be {found.ratio:.3g} times as fast{chance}, and "
        f"more than {GUARD} is needed"
    )


def _shown(modules: Sequence[str], everything: Sequence[str]) -> str:
    if len(modules) == len(everything):
        return f"all {len(modules)} layers"
    more = len(modules) - _SHOWN
    return ", ".join(modules[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
