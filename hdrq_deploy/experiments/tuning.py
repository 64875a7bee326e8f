"""Learning rates of a grid's methods, searched by :mod:`.rate_search` and kept as JSON.

Every trial leaves ``OUT/tuning/NAME.json``, so that a search that was stopped resumes and one that
is complete tries nothing again. ``OUT/tuning.json`` is the record of all searches, which the grid
then reads its rates from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..calibration.graph_cache import GraphCache
from ..calibration.methods import METHODS
from ..calibration.settings import SETTINGS
from ..calibration_data.readers import ImageSet, Wanted, read
from ..errors import SpecError
from ..formats.atomic_files import Kind, make_directory, read_json, remove_folder, write_bytes
from ..formats.bundle import Bundle
from ..formats.file_kinds import BUNDLE, TRIAL, TUNING_JSON
from ..formats.staleness import (
    CALIBRATION,
    change_in,
    code_of,
    plain,
    stamp,
    versions_of,
    with_contents,
)
from ..jobs.job import Job, Pool, run_jobs
from ..typing import Progress
from .bundles import forget, make_bundle
from .cells import CellContext, calibrate_cell, request_of
from .grid import Grid, Run, bundle_path, search_name
from .rate_search import RateSearch, hold_out, images_for, judge, protocol
from .tasks import Domain, Task
from .threads import calibration_threads

__all__ = [
    "TUNING",
    "Trial",
    "chosen_rates",
    "first_trials",
    "keep_search",
    "known_search",
    "searched_on",
    "searched_runs",
    "trial_path",
    "try_rate",
    "tune",
]

TUNING = "tuning.json"


@dataclass(frozen=True)
class Trial:
    """A run at one learning rate."""

    run: Run
    rate: float

    @property
    def name(self) -> str:
        """``paper-hdrq-w4a4-s0-lr0.01``."""
        return f"{self.run.name}-lr{self.rate:g}"


def tune(
    grid: Grid,
    bits: Sequence[tuple[int, int]],
    out: Path,
    device: str,
    threads: int,
    pool: Pool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Search the rate of every learning method, setting and bit-width; write ``tuning.json``.

    Args:
        grid: Methods, settings and task; the first of its calibration seeds is used.
        bits: Bit-widths at which rates are searched.
        out: Folder of the run.
        device: Where calibrations run.
        threads: Threads of each trial.
        pool: Where trials run.
        progress: Called with (trials done, trials of this round, name).

    Returns:
        The record that was written.

    Raises:
        SpecError: As :func:`searched_runs`, or no rate of a method gives finite outputs.
    """
    runs = searched_runs(grid, bits)
    make_directory(out / "tuning")
    common = {"context": CellContext(grid.task, out, device, threads)}
    graphs = GraphCache()
    while True:
        waiting = [trial for run in runs for trial in _waiting(grid.task, run, out)]
        trials = [
            Job(
                trial.name,
                try_rate,
                {**common, "trial": trial, "graphs": graphs},
                _experts(grid),
                calibration_threads,
            )
            for trial in waiting
        ]
        if not trials:
            break
        run_jobs([*_expert_jobs(grid, common, graphs), *trials], pool, progress)
    record = {
        "schema_version": 1,
        "kind": TUNING_JSON.kind,
        "task": grid.task.name,
        "model": grid.task.model,
        "protocol": protocol(),
        "versions": versions_of("torch", "onnx", "onnxruntime", "numpy"),
        "searches": [_record(grid.task, run, out) for run in runs],
    }
    keep_search(record, out)
    return record


def searched_runs(grid: Grid, bits: Sequence[tuple[int, int]]) -> list[Run]:
    """The runs whose rates a search at these bits finds.

    Raises:
        SpecError: No method of the grid learns, or there are too few calibration images.
    """
    runs = [
        Run(setting, method, *pair, grid.seeds[0])
        for pair in bits
        for setting in grid.settings
        for method in grid.methods
        if METHODS[method].options.iterates
    ]
    if not runs:
        raise SpecError(
            f"found no method that learns among {', '.join(grid.methods)}, and so no rate to "
            "search; leave `tune` out"
        )
    if grid.task.images < (needed := images_for(grid.batch)):
        raise SpecError(
            f"found {grid.task.images} calibration images of a domain; a search needs {needed} or "
            "more (one batch, beside those held out): give more `images`, or a smaller `batch`"
        )
    return runs


def first_trials(grid: Grid, bits: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Kind]]:
    """Place in the folder of a run, and kind, of what a search writes first."""
    for run in searched_runs(grid, bits):
        search = _search(grid.task, run)
        for place in search.waiting({}):
            trial = Trial(run, search.rate(place))
            yield str(trial_path(Path(), trial)), TRIAL
            for domain in grid.task.domains:
                yield str(_place(Path(), trial, domain)), BUNDLE


def keep_search(record: Mapping[str, Any], out: Path) -> None:
    """Write the record of a search into the folder of a run."""
    write_bytes(out / TUNING, (json.dumps(record, indent=1) + "\n").encode(), TUNING_JSON)


def known_search(path: Path, grid: Grid) -> dict[str, Any]:
    """The record of an earlier search, which a grid takes its rates from instead of searching.

    The search may have been made on another task or network; the record names them.

    Args:
        path: A file that :func:`tune` wrote, of any run.
        grid: Methods, settings and task that are to run.

    Raises:
        SpecError: No such record, one of other iterations, or one without a method and setting of
            the grid: methods of a comparison are all searched or none is.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("kind") != TUNING_JSON.kind:
        raise SpecError(f"{path}: found no search of rates; needed a {TUNING} of hdrq reproduce")
    try:
        searched = {(r["setting"], r["method"]): r["iterations"] for r in record["searches"]}
        rates = chosen_rates(record)
        fits = (
            isinstance(record["task"], str)
            and isinstance(record.get("model", ""), str)
            and len(rates) == len(record["searches"])
            and all(0 < rate < math.inf for rate in rates.values())
            and all(r["chosen"] in [t["rate"] for t in r["tried"]] for r in record["searches"])
        )
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise SpecError(
            f"{path}: found a search without task, setting, method, bits, iterations or a chosen "
            "rate above 0 among those tried, or two of one kind; needed the file as hdrq reproduce "
            "wrote it"
        )
    learning = [name for name in grid.methods if METHODS[name].options.iterates]
    for setting, method in product(grid.settings, learning):
        iters = searched.get((setting, method))
        if iters is None:
            raise SpecError(
                f"{path}: found no search of {method} ({setting}); leave the method out, or search "
                "the rates of all anew"
            )
        if iters != grid.task.options(method, setting).iters:
            raise SpecError(
                f"{path}: found rates of {method} for {iters} iterations a block; needed "
                f"{grid.task.options(method, setting).iters}: take {iters} `iters`, or search anew"
            )
    return record


def chosen_rates(record: Mapping[str, Any]) -> dict[str, float]:
    """The rates of a record that :func:`tune` made, by the start of a run's name."""
    return {
        f"{row['setting']}-{row['method']}-{row['bits']}": row["chosen"]
        for row in record["searches"]
    }


def searched_on(record: Mapping[str, Any]) -> str:
    """Task and network of a record that :func:`tune` made; earlier ones name the task alone."""
    return search_name(record["task"], record.get("model", ""))


def trial_path(out: Path, trial: Trial) -> Path:
    """The file of a trial's figures."""
    return out / "tuning" / f"{trial.name}.json"


def try_rate(context: CellContext, trial: Trial, graphs: GraphCache | None = None) -> None:
    """Calibrate all domains at one rate, merge them and write how they are judged.

    The bundles are removed when the figures are written.
    """
    task, out = context.task, context.out
    target, ingredients = trial_path(out, trial), _ingredients(task, trial)
    if not _change(target, ingredients):
        return
    experts, bundles, held, images = {}, [], {}, {}
    for domain in task.domains:
        expert = Bundle.open(bundle_path(out, f"float-{domain.name}"))
        learned, judges = hold_out(_read(task, domain, expert, trial.run.seed))
        bundles.append(Bundle.open(_calibrated(context, trial, domain, learned, graphs)))
        experts[domain.name], held[domain.name] = expert, judges.x
        images[domain.name] = {"learned_from": len(learned), "held_out": len(judges)}
    row = {
        "kind": TRIAL.kind,
        "trial": trial.name,
        "origin": with_contents(ingredients),
        "rate": trial.rate,
        "images": images,
        **judge(bundles, experts, held),
    }
    write_bytes(target, (json.dumps(row, indent=1, allow_nan=False) + "\n").encode(), TRIAL)
    for domain in task.domains:
        place = _place(out, trial, domain)
        forget(place)
        remove_folder(place, BUNDLE)


def _read(task: Task, domain: Domain, expert: Bundle, seed: int) -> ImageSet:
    """The calibration images of a domain, as its float bundle reads them."""
    p = expert.manifest.preprocessing
    return read(domain.images, Wanted.like(p) if p else task.wanted, task.images, seed)


def _place(out: Path, trial: Trial, domain: Domain) -> Path:
    return out / "tuning" / f"{trial.name}-{domain.name}.hdrq"


def _calibrated(
    context: CellContext,
    trial: Trial,
    domain: Domain,
    images: ImageSet,
    graphs: GraphCache | None,
) -> Path:
    output = _place(context.out, trial, domain)
    request = request_of(context, trial.run, domain.name, False, trial.rate)
    request = replace(request, data=images, output=output)
    make_bundle(request, graphs, [stamp(domain.images), "without those held out"])
    return output


def _ingredients(task: Task, trial: Trial) -> dict[str, Any]:
    """All that the figures of a trial depend on."""
    run = trial.run
    return {
        "model": task.model,
        "base": stamp(task.source),
        "weights": {domain.name: stamp(domain.weights) for domain in task.domains},
        "data": {domain.name: stamp(domain.images) for domain in task.domains},
        "images": task.images,
        "wanted": plain(task.wanted),
        "options": plain(task.options(run.method, run.setting, trial.rate)),
        "codes": plain(SETTINGS[run.setting].codes),
        "bits": run.bits,
        "seed": run.seed,
        "protocol": protocol(),
        "versions": versions_of("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "pillow"),
        "code": code_of(*CALIBRATION, "merging", "experiments.rate_search"),
    }


def _change(target: Path, ingredients: Mapping[str, Any]) -> str:
    row = read_json(target)
    if not isinstance(row, dict) or "origin" not in row:
        return "it was not tried yet"
    return change_in(row["origin"], ingredients)


def _scores(task: Task, run: Run, out: Path) -> dict[int, dict[str, Any]]:
    """Rows of the trials that are up to date, by place, as far as the search has gone."""
    search = _search(task, run)
    rows: dict[int, dict[str, Any]] = {}
    while True:
        places = search.waiting({place: _score(row) for place, row in rows.items()})
        found = {}
        for place in places:
            trial = Trial(run, search.rate(place))
            target = trial_path(out, trial)
            if not _change(target, _ingredients(task, trial)):
                found[place] = read_json(target)
        rows |= found
        if len(found) < len(places) or not places:
            return rows


def _search(task: Task, run: Run) -> RateSearch:
    return RateSearch.of(run.method, task.options(run.method, run.setting).iters)


def _score(row: Mapping[str, Any]) -> float:
    return math.inf if row["score"] is None else float(row["score"])


def _waiting(task: Task, run: Run, out: Path) -> Iterator[Trial]:
    search, rows = _search(task, run), _scores(task, run, out)
    places = search.waiting({place: _score(row) for place, row in rows.items()})
    yield from (Trial(run, search.rate(place)) for place in places if place not in rows)


def _record(task: Task, run: Run, out: Path) -> dict[str, Any]:
    """One search: all rates that were tried, and the one that was chosen."""
    search, rows = _search(task, run), _scores(task, run, out)
    scores = {place: _score(row) for place, row in rows.items()}
    best = search.best(scores)
    if not math.isfinite(scores[best]):
        raise SpecError(
            f"{run.name}: found no rate at which the merged model gives finite outputs, of "
            f"{', '.join(f'{search.rate(p):g}' for p in sorted(rows))}; give other iterations"
        )
    names = ("rate", "score", "failed", "merged", "single", "decisions")
    return {
        "setting": run.setting,
        "method": run.method,
        "bits": run.bits,
        "seed": run.seed,
        "iterations": task.options(run.method, run.setting).iters,
        "images": rows[best]["images"],
        "tried": [{n: rows[p][n] for n in names if n in rows[p]} for p in sorted(rows)],
        "chosen": search.rate(best),
        "is_at_edge": search.is_at_edge(scores),
    }


def _experts(grid: Grid) -> tuple[str, ...]:
    return tuple(f"float-{domain}" for domain in grid.domains)


def _expert_jobs(grid: Grid, common: Mapping[str, Any], graphs: GraphCache) -> Iterator[Job]:
    """The float model of every domain, which is a cell of the grid too."""
    run = next(grid.runs())
    for domain in grid.domains:
        arguments = {**common, "run": run, "domain": domain, "graphs": graphs}
        arguments["statistics"] = grid.needs_statistics(run)
        yield Job(run.single(domain), calibrate_cell, arguments, limit_threads=calibration_threads)
