"""What a worker does: make the bundle of a cell, and measure its engine."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..calibration.graph_cache import GraphCache
from ..calibration.methods import METHODS
from ..calibration.request import CalibrationRequest
from ..calibration.settings import SETTINGS
from ..calibration_data.readers import Wanted, read
from ..errors import DataError
from ..exporters import export
from ..formats.atomic_files import scratch_folder, write_bytes
from ..formats.bench_result import Accuracy
from ..formats.bundle import Bundle
from ..formats.engine_folder import read_manifest
from ..formats.file_kinds import CELL_ROW
from ..formats.staleness import code_of, fingerprint, first_change, stamp, versions_of
from ..jobs.job import Job
from ..merging import Merger, choose_weights
from ..merging import merge as merge_bundles
from ..merging.written import Guidance, write_merge
from ..runtime.bench.accuracy import Labelled, accuracy, classes_of
from ..runtime.bench.measurement import labelled
from ..runtime.engine import Engine
from ..runtime.loading import open_engine
from .bundles import (
    is_merged,
    make_bundle,
    record_ingredients,
    recorded_change,
)
from .decisions import Decisions, packed
from .grid import Grid, Merge, Run, bundle_path, read_row, row_path
from .tasks import Domain, Task
from .threads import calibration_threads
from .ways import WAYS, Way

__all__ = [
    "CellContext",
    "accuracies_of",
    "calibrate_cell",
    "engine_of",
    "jobs",
    "labelled_set",
    "request_of",
]

_log = logging.getLogger("hdrq_deploy")
CANDIDATES = 30  # as in the paper
# Hashes of the bundles that a merge read, by their part.
_MADE_OF = ("parents", "guides")


@dataclass(frozen=True)
class CellContext:
    """Where the cells of a task are made, and with what.

    Attributes:
        task: Network, images and settings of the cells.
        out: The folder of the run.
        device: Where calibrations run.
        threads: Threads of each cell.
    """

    task: Task
    out: Path
    device: str = "cpu"
    threads: int = 1


def jobs(grid: Grid, out: Path, device: str, threads: int) -> Iterator[Job]:
    """All work of a grid: calibrations first, then what reads them."""
    common = {"context": CellContext(grid.task, out, device, threads)}
    graphs = GraphCache()
    for run in grid.runs():
        names = {domain: run.single(domain) for domain in grid.domains}
        for domain, name in names.items():
            arguments = {**common, "run": run, "domain": domain, "graphs": graphs}
            arguments["statistics"] = grid.needs_statistics(run)
            arguments["rate"] = grid.rate(run)
            yield Job(name, calibrate_cell, arguments, limit_threads=calibration_threads)
        for merge in grid.merges(run):
            after = tuple(names[member] for member in merge.members)
            if WAYS[merge.way].reads_floats:
                after += tuple(merge.float_run.single(member) for member in merge.members)
            yield Job(merge.name, merge_cells, {**common, "merge": merge}, after)


def calibrate_cell(
    context: CellContext,
    run: Run,
    domain: str,
    statistics: bool = False,
    graphs: GraphCache | None = None,
    rate: float | None = None,
) -> None:
    """The bundle of one domain, and its engine's accuracy there; ``rate`` was searched."""
    make_bundle(request_of(context, run, domain, statistics, rate), graphs)
    _measure(context, run.single(domain), (domain,), {"setting": run.setting})


def request_of(
    context: CellContext, run: Run, domain: str, statistics: bool, rate: float | None
) -> CalibrationRequest:
    """How the bundle of one domain is calibrated."""
    task = context.task
    where = next(d for d in task.domains if d.name == domain)
    # Float models of no setting are the paper's, whose BatchNorm is in the weights.
    method = "float-folded" if run.setting == "float" else run.method
    codes = dict(SETTINGS[run.setting].codes) if METHODS[method].quantizes else {}
    return CalibrationRequest(
        model=task.model,
        data=where.images,
        domain=domain,
        output=bundle_path(context.out, run.single(domain)),
        weights=where.weights,
        base=task.source,
        method=method,
        wbits=run.wbits,
        abits=run.abits,
        options=task.options(method, run.setting, rate),
        images=task.images,
        wanted=task.wanted,
        seed=run.seed,
        statistics="auto" if statistics else "off",
        device=context.device,
        **codes,
    )


def merge_cells(context: CellContext, merge: Merge) -> None:
    """The merged bundles of one way, and their engines' accuracies."""
    task, out = context.task, context.out
    parents = [Bundle.open(bundle_path(out, merge.run.single(m))) for m in merge.members]
    guides = []
    if WAYS[merge.way].reads_floats:
        guides = [Bundle.open(bundle_path(out, merge.float_run.single(m))) for m in merge.members]
    targets = [bundle_path(out, merge.cell(draw)) for draw in range(merge.draws)]
    ingredients = [
        _merge_ingredients(task, merge, parents, guides, draw) for draw in range(merge.draws)
    ]
    missing = [
        draw
        for draw, path in enumerate(targets)
        if recorded_change(path, ingredients[draw], lambda made: is_merged(made, parents))
    ]
    if missing:
        way = WAYS[merge.way]
        _check_statistics(way, parents)
        renewed = _unlabelled(task, merge, parents[0], task.renew_images) if way.renews else None
        mix, record = _mix(task, merge, parents, renewed)
        candidates = CANDIDATES if way.tosses else 1
        with scratch_folder() as scratch:
            if way.fits == "mean":
                mean = scratch / "mean.hdrq"
                guides = [merge_bundles(guides, mean, rounding="nearest", method="mean")]
            guiding = None
            if way.fits:
                images = _unlabelled(task, merge, parents[0], task.fit_images)
                guiding = Guidance(images, guides, way.sweeps)
            for draw in missing:
                merger = Merger(
                    parents, way.rounding, candidates, draw, way.method, wbits=way.wbits
                )
                write_merge(merger, targets[draw], mix, record, renewed, guiding, context.threads)
                record_ingredients(targets[draw], ingredients[draw])
    for draw in range(merge.draws):
        extra = {"setting": merge.run.setting, "way": merge.way, "draw": draw}
        made_of = {key: ingredients[draw][key] for key in _MADE_OF if key in ingredients[draw]}
        _measure(context, merge.cell(draw), merge.members, extra, made_of)


def _check_statistics(way: Way, parents: Sequence[Bundle]) -> None:
    """Refuse parents whose statistics were removed, where the merge needs them.

    Raises:
        DataError: They were.
    """
    without = [parent.path for parent in parents if parent.manifest.statistics is None]
    if way.needs_statistics and without:
        raise DataError(
            f"{without[0]}: found no statistics, which {len(without)} of {len(parents)} bundles "
            "lack; needed those of all: remove these folders, which calibrates them again, or "
            "choose other `ways`"
        )


def _merge_ingredients(
    task: Task, merge: Merge, parents: list[Bundle], guides: list[Bundle], draw: int
) -> dict[str, Any]:
    """All that a merged bundle depends on."""
    way = WAYS[merge.way]
    images: dict[str, Any] = {}
    if way.renews or way.fits:
        read_from = {d.name: stamp(d.images) for d in task.domains if d.name in merge.members}
        images = {"data": read_from}
        images |= {"renew_images": task.renew_images} if way.renews else {}
        images |= {"fit_images": task.fit_images} if way.fits else {}
        images |= {"mix_images": task.mix_images} if way.chooses else {}
    return {
        "parents": [parent.manifest_sha256 for parent in parents],
        **({"guides": [guide.manifest_sha256 for guide in guides]} if guides else {}),
        **images,
        "way": {"name": merge.way, **asdict(way)},
        "draw": draw,
        "candidates": CANDIDATES,
        "versions": versions_of("numpy", "onnx", "onnxruntime"),
        "code": code_of("merging"),
    }


def _mix(
    task: Task, merge: Merge, parents: list[Bundle], renewed: dict[str, Any] | None
) -> tuple[list[float], dict[str, Any]]:
    """Merge weights and how they were found; merges are judged as they will be written."""
    way = WAYS[merge.way]
    if not way.chooses:
        return [1 / len(parents)] * len(parents), {}
    images = _unlabelled(task, merge, parents[0], task.mix_images)
    mix = choose_weights(Merger(parents, method=way.method, keep=True), images, renewed=renewed)
    return list(mix.weights), {"auto": mix.record()}


def _unlabelled(task: Task, merge: Merge, like: Bundle, limit: int) -> dict[str, Any]:
    p = like.manifest.preprocessing
    wanted = Wanted.like(p) if p else task.wanted
    where = {domain.name: domain.images for domain in task.domains}
    return {m: read(where[m], wanted, limit).x for m in merge.members}


def _measure(
    context: CellContext,
    cell: str,
    domains: tuple[str, ...],
    extra: dict[str, Any],
    made_of: Mapping[str, Any] | None = None,
) -> None:
    """Accuracy of the cell's ONNX Runtime engine; kept beside the hash of its bundle.

    ``made_of`` are the hashes of the bundles that a merge read, by their part.
    """
    task, out = context.task, context.out
    bundle = Bundle.open(bundle_path(out, cell))
    target = row_path(out, cell)
    tests = [domain for domain in task.domains if domain.name in domains]
    origin = {
        "bundle": bundle.manifest_sha256,
        **(made_of or {}),
        "tests": {d.name: [fingerprint(d.test), task.split, d.image_size] for d in tests},
        "versions": versions_of("numpy", "onnx", "onnxruntime", "pillow"),
        "code": code_of("exporters", "runtime"),
    }
    before = read_row(out, cell, domains)
    if before is not None:
        change = first_change({key: before[key] for key in origin if key in before}, origin)
        if not change:
            return
        _log.info("%s: %s; measuring it again", cell, change)
    seen = Decisions()
    device = _engine_device(context.device)
    accuracies = accuracies_of(bundle, task, domains, device, context.threads, seen)
    row = {
        "kind": CELL_ROW.kind,
        "cell": cell,
        **origin,
        "metric": accuracies.metric,
        "domains": accuracies.domains,
        "harmonic_mean": accuracies.harmonic_mean,
        "images": accuracies.images,
        "per_class": accuracies.per_class,
        "decisions": packed(seen.measured),
        **extra,
    }
    write_bytes(target, (json.dumps(row, indent=1) + "\n").encode(), CELL_ROW)


def accuracies_of(
    bundle: Bundle,
    task: Task,
    domains: Collection[str],
    device: str = "cpu",
    threads: int = 1,
    seen: Decisions | None = None,
) -> Accuracy:
    """Accuracies of the bundle's ONNX Runtime engine on the test images of domains of a task."""
    with engine_of(bundle, device, threads) as engine:
        sets = {d.name: labelled_set(engine, task, d) for d in task.domains if d.name in domains}
        return accuracy(engine, sets, seen=seen)


@contextmanager
def engine_of(bundle: Bundle, device: str, threads: int) -> Iterator[Engine]:
    """The bundle's ONNX Runtime engine, for a while."""
    with scratch_folder() as scratch:
        folder = export(bundle, scratch / "engine", "ort")
        with open_engine(folder, read_manifest(folder), device, threads) as engine:
            yield engine


def labelled_set(engine: Engine, task: Task, domain: Domain) -> Labelled:
    """The labelled images of a domain, as the engine reads them."""
    name, size = domain.name, domain.image_size
    count = classes_of(engine.path, engine.manifest)
    return labelled(
        engine.manifest, name, domain.test, split=task.split, image_size=size, count=count
    )


def _engine_device(device: str) -> str:
    """ONNX Runtime's CUDA provider where there is one and it was not declined."""
    import onnxruntime

    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return "cuda" if cuda and device != "cpu" else "cpu"
