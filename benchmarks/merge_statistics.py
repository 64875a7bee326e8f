"""What does a merge gain from the statistics that calibration keeps?

    python benchmarks/merge_statistics.py --out build/merge_statistics --results benchmarks/results

Bundles of the digits and of the drawn streets, calibrated by every method and bit-width of
``PARENTS``, are merged in every way of ``WAYS``: weighted mean or regression, rounded to nearest,
by the paper's draws, or with compensated errors; at the parents' bits, or at fewer than theirs
(``--wbits``). Every merge is a bundle as ``hdrq-merge`` writes it, and its graph is run unfused on
the test images; nothing was chosen on these. Cells and rows that are there are not made again, so a
stopped run resumes. What the results hold of tasks that are not among ``--tasks`` stays there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from evidence.records import write_record
from measured import gathered, measured_here, refuse_other_options

from hdrq_deploy import Bundle, merge
from hdrq_deploy.calibration_data.readers import ImageSet, read
from hdrq_deploy.experiments.rate_search import RateSearch, hold_out, judge
from hdrq_deploy.experiments.tasks import Task, made, write_made
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.formats.bench_result import harmonic_mean
from hdrq_deploy.formats.bundle import GRAPH
from hdrq_deploy.graph import reference_session
from hdrq_deploy.merging import fit, re_estimate
from hdrq_deploy.runtime.bench.accuracy import confusion
from hdrq_deploy.runtime.predictions import enlarge

Array = npt.NDArray[Any]
TASKS = {"digits": "office-home", "streets": "segmentation"}
ITERS = 200
# Rates for 200 iterations; ``rates_tried`` of the committed JSON has what was tried. Those of the
# digits are the best of five a factor of about three apart, by how little merges at W4A4 differ
# from the float models on calibration images. Those of the streets were found by ``--tune``, which
# searches as ``hdrq reproduce --tune`` does; what it finds is to be written here.
RATES = {
    "digits": {"hdrq": 3e-4, "qdrop": 1e-1},
    "streets": {"hdrq": 1e-4, "qdrop": 1e-1},
}
TUNED = ("qdrop", "hdrq")
BITS = ((4, 8), (3, 3), (8, 8), (4, 4))
# BatchNorm in the scales; and parents of 8-bit weights on narrow activations.
STEPS = {"digits": ((4, 8), (4, 4), (3, 3)), "streets": ((4, 4),)}
NARROW = {"digits": ((8, 3), (8, 4)), "streets": ()}
# Float models as they are, and with BatchNorm folded into the weights, as in the bundles.
FLOATS = ("float", "float-folded")
# Parents whose statistics are whole covariances.
FULL = {"digits": ((4, 8),), "streets": ()}
# Parents that learn longer, at rates that are smaller in proportion, and the domains of each; all
# where there are none. A bundle of 20,000 iterations a block takes an hour of one core.
LONGER: dict[int, tuple[str, ...]] = {10 * ITERS: (), 100 * ITERS: ("handwriting", "night")}
LONGER_BITS = {"digits": ((3, 3),), "streets": ()}
SEEDS = (0, 1, 2)
ROUNDING_SEEDS = 2
RENEW_IMAGES = {"digits": 64, "streets": 16}


def _bits(wbits: int, abits: int) -> str:
    return f"w{wbits}a{abits}"


@dataclass(frozen=True)
class Parents:
    """How the bundles of all domains, or of ``only`` some, are calibrated."""

    task: str
    method: str
    wbits: int
    abits: int
    fold: str
    seed: int
    statistics: Literal["auto", "full"] = "auto"
    iters: int = ITERS
    only: tuple[str, ...] = ()

    @property
    def bits(self) -> str:
        """``w4a8``; nothing where the weights are float."""
        return "" if self.method in FLOATS else _bits(self.wbits, self.abits)

    @property
    def name(self) -> str:
        """The start of the cells' names."""
        bits = "" if self.method in FLOATS else f"-{self.bits}-{self.fold}"
        kept = "" if self.statistics == "auto" else f"-{self.statistics}"
        long = "" if self.iters == ITERS else f"-i{self.iters}"
        return f"{self.task}-{self.method}{bits}{kept}{long}-s{self.seed}"

    @property
    def label(self) -> str:
        """The method, and in brackets which statistics and iterations where they are not usual."""
        said = [] if self.statistics == "auto" else [f"{self.statistics} statistics"]
        if self.iters != ITERS:
            said.append(f"{self.iters:,} iterations")
        return self.method + (f" ({', '.join(said)})" if said else "")


@dataclass(frozen=True)
class Way:
    """One way to merge: method, rounding, bits of the merged weights, new BatchNorm moments.

    ``scales`` is a way to merge activation scales. ``fitted`` says whose outputs every layer is
    fitted to in two sweeps: the ``parents``', or the ``floats``', or nobody's.
    """

    method: str
    rounding: str
    wbits: int | None = None
    renewed: bool = False
    scales: str = "mean"
    fitted: str = ""

    @property
    def name(self) -> str:
        """``regression-compensated-w3``."""
        text = f"{self.method}-{self.rounding}"
        text += "" if self.wbits is None else f"-w{self.wbits}"
        text += "" if self.scales == "mean" else f"-{self.scales}"
        text += f"-fitted-{self.fitted}" if self.fitted else ""
        return text + ("-renewed" if self.renewed else "")


def ways(parents: Parents) -> Iterator[Way]:
    """All ways to merge some parents."""
    if parents.method == "float":
        yield from (Way(method, "nearest") for method in ("mean", "regression"))
        return
    if parents.method == "float-folded":  # their mean is computed without bundles
        yield Way("regression", "nearest")
        return
    for rounding in ("nearest", "advanced", "compensated"):
        yield Way("mean", rounding)
    for rounding in ("nearest", "compensated"):
        yield Way("regression", rounding)
    if parents.abits < 8:
        for scales in ("max", "statistics"):
            yield Way("regression", "compensated", scales=scales)
    if (parents.task, parents.abits, parents.fold) == ("streets", 4, "weights"):
        for targets in ("parents", "floats"):
            yield Way("regression", "compensated", fitted=targets)
    if parents.fold == "steps":
        for way in (("mean", "nearest"), ("mean", "compensated"), ("regression", "compensated")):
            yield Way(*way, renewed=True)
    if parents.wbits == 8:
        for bits in (4, 3):
            for way in (
                ("mean", "nearest"),
                ("mean", "compensated"),
                ("regression", "compensated"),
            ):
                yield Way(*way, bits)


def grid(task: str, seed: int) -> Iterator[Parents]:
    """All parents of a task at one calibration seed, the most telling ones first."""
    if seed == 0:
        for method in FLOATS:
            yield Parents(task, method, 8, 8, "weights", 0)
        if FULL[task]:
            yield Parents(task, "float-folded", 8, 8, "weights", 0, "full")
    for wbits, abits in BITS:
        yield Parents(task, "hdrq", wbits, abits, "weights", seed)
    for wbits, abits in BITS:
        yield Parents(task, "qdrop", wbits, abits, "weights", seed)
    if seed == 0:  # round to nearest draws nothing
        for method in ("rtn", "rtn-corrected"):
            for wbits, abits in BITS:
                yield Parents(task, method, wbits, abits, "weights", seed)
    for wbits, abits in STEPS[task]:
        if seed == 0:
            yield Parents(task, "hdrq", wbits, abits, "steps", seed)
    for wbits, abits in NARROW[task]:
        if seed == 0:
            yield Parents(task, "hdrq", wbits, abits, "weights", seed)
    for wbits, abits in FULL[task]:
        yield Parents(task, "hdrq", wbits, abits, "weights", seed, "full")
    for wbits, abits in LONGER_BITS[task]:
        if seed == 0:
            for (iters, only), method in product(LONGER.items(), TUNED):
                yield Parents(task, method, wbits, abits, "weights", seed, iters=iters, only=only)


@cache
def task_of(name: str, out: Path) -> Task:
    """The task, its images written where they are missing."""
    write_made(TASKS[name], out)
    return made(TASKS[name], out)


@cache
def images_of(task: str, domain: str, split: str) -> tuple[Array, Array]:
    """Inputs (N, 3, H, W) and labels of one split."""
    from hdrq_deploy.calibration_data import digits, streets

    data = (digits if task == "digits" else streets).make(domain, split)
    pixels = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2))
    return pixels.astype(np.float32) / 255, data.labels


def calibrated(
    parents: Parents,
    domain: str,
    out: Path,
    rate: float | None = None,
    learned: ImageSet | None = None,
) -> Path:
    """The bundle of one domain, made where it is missing.

    A trial of a search has its own ``rate`` and learns from ``learned`` alone.
    """
    import torch

    from hdrq_deploy.calibration.methods import Options
    from hdrq_deploy.calibration.pipeline import run_calibration
    from hdrq_deploy.calibration.request import CalibrationRequest

    torch.set_num_threads(1)
    task = task_of(parents.task, out)
    learning = _learning(parents, rate)
    suffix = "" if learned is None else f"-trial-lr{rate:g}"
    path = out / "cells" / f"{parents.name}{suffix}-{domain}.hdrq"
    if path.exists():
        refuse_other_options(path, **learning)
        return path
    learning = {**task.learning.get(parents.method, {}), **learning}
    place = next(d for d in task.domains if d.name == domain)
    request = CalibrationRequest(
        model=task.model,
        data=place.images if learned is None else learned,
        domain=domain,
        output=path,
        weights=place.weights,
        base=task.source,
        method=parents.method,
        wbits=parents.wbits,
        abits=parents.abits,
        fold=parents.fold,
        options=Options.of(parents.method, **learning),
        images=task.images,
        wanted=task.wanted,
        seed=parents.seed,
        statistics=parents.statistics,
        resume=True,
    )
    run_calibration(request)
    return path


def logits_of(bundle: Bundle, images: Array, batch: int = 32) -> Array:
    """Outputs of a bundle's graph, every operator as it is written."""
    session = reference_session.unfused_session(bundle.path / GRAPH, None, threads=1)
    port = session.get_inputs()[0].name
    parts = [
        session.run(None, {port: images[i : i + batch]})[0] for i in range(0, len(images), batch)
    ]
    return np.concatenate(parts)


def accuracy(bundle: Bundle, task: str, domain: str) -> float:
    """Top-1 accuracy, or mean intersection over union, on the test images of a domain."""
    images, labels = images_of(task, domain, "test")
    return scored(logits_of(bundle, images), labels)


def scored(logits: Array, labels: Array) -> float:
    """Top-1 accuracy, or for label maps mean intersection over union."""
    if labels.ndim == 1:
        return float((logits.argmax(1) == labels).mean())
    size = (labels.shape[1], labels.shape[2])
    predicted = np.stack([enlarge(row, size).argmax(0) for row in logits])
    table = confusion(labels, predicted, logits.shape[1])
    hits, rows, columns = np.diag(table), table.sum(1), table.sum(0)[:-1]
    counted = rows + columns - hits
    return float(np.mean(hits[counted > 0] / counted[counted > 0]))


def groups_of(task: Task, only: Collection[str] = ()) -> list[tuple[str, ...]]:
    """All pairs of domains, and all domains; of ``only`` some of them, where it names any."""
    names = tuple(domain.name for domain in task.domains if not only or domain.name in only)
    return [*dict.fromkeys((*combinations(names, 2), names))]


def evaluate(parents: Parents, out: Path) -> list[dict[str, Any]]:
    """All merges of some parents on the test images, in %."""
    task = task_of(parents.task, out)
    groups = groups_of(task, parents.only)
    names = groups[-1]
    bundles = {name: Bundle.open(calibrated(parents, name, out)) for name in names}
    single = {name: accuracy(bundles[name], parents.task, name) for name in names}
    rows = []
    for group in groups:
        own = {name: single[name] for name in group}
        rows.append(record(parents, group, "single", [own]))
        for way in ways(parents):
            if way.fitted and len(group) < len(names):
                continue  # a fit of large images takes minutes
            draws = ROUNDING_SEEDS if way.rounding == "advanced" else 1
            measured = [
                merged(parents, [bundles[name] for name in group], way, group, draw, out)
                for draw in range(draws)
            ]
            rows.append(record(parents, group, way.name, measured))
    return rows


def merged(
    parents: Parents,
    bundles: Sequence[Bundle],
    way: Way,
    group: Sequence[str],
    draw: int,
    out: Path,
) -> dict[str, float]:
    """Accuracies of one merge on the domains of its parents."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = merge(
            bundles,
            Path(folder) / "merged.hdrq",
            method=way.method,
            rounding=way.rounding,
            wbits=way.wbits,
            activation_scales=way.scales,
            candidates=30,  # as in the paper
            seed=draw,
            threads=1,
        )
        if way.renewed:
            count = RENEW_IMAGES[parents.task]
            images = {d: images_of(parents.task, d, "calibration")[0][:count] for d in group}
            bundle = re_estimate(bundle, images, Path(folder) / "renewed.hdrq", draw)
        if way.fitted:
            count = task_of(parents.task, out).fit_images
            images = {d: images_of(parents.task, d, "calibration")[0][:count] for d in group}
            floats = Parents(parents.task, "float", 8, 8, "weights", 0)
            guides = [Bundle.open(calibrated(floats, d, out)) for d in group]
            bundle = fit(
                bundle, bundles, images, Path(folder) / "fitted.hdrq", seed=draw,
                guides=guides if way.fitted == "floats" else (), sweeps=2,
            )  # fmt: skip
        return {name: accuracy(bundle, parents.task, name) for name in group}


def record(
    parents: Parents, group: Sequence[str], way: str, measured: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """A row: harmonic means in %, one for each rounding seed."""
    return {
        "task": parents.task,
        "parents": parents.label,
        "bits": parents.bits,
        "fold": parents.fold,
        "seed": parents.seed,
        "members": list(group),
        "way": way,
        "domains": {
            name: round(100 * statistics.fmean(row[name] for row in measured), 2) for name in group
        },
        "harmonic_means": [round(100 * harmonic_mean(list(row.values())), 2) for row in measured],
    }


def folded_float(task: str, out: Path) -> list[dict[str, Any]]:
    """The float weights with BatchNorm folded, averaged: the paper's upper row."""
    import torch
    from folded_float import averages, folded

    from hdrq_deploy.calibration.loading import load_model, load_state, put_state

    models, rows = {}, []
    names = [domain.name for domain in task_of(task, out).domains]
    for name in names:
        place = next(d for d in task_of(task, out).domains if d.name == name)
        network = load_model(task_of(task, out).model)
        put_state(network, load_state(network, place.weights, "weights"))
        models[name] = folded(network, torch.from_numpy(images_of(task, name, "test")[0][:2]))
    for group, model in averages(models, groups_of(task_of(task, out))):
        measured = {}
        for name in group:
            images, labels = images_of(task, name, "test")
            with torch.no_grad():
                parts = torch.split(torch.from_numpy(images), 32)
                logits = torch.cat([model(part) for part in parts]).numpy()
            measured[name] = scored(logits, labels)
        parents = Parents(task, "float", 32, 32, "weights", 0)
        rows.append(record(parents, group, "mean-folded", [measured]))
    return rows


def tune(task: str, out: Path) -> list[dict[str, Any]]:
    """All rates that the package's search tries, at W4A4; trials that are kept are not made again.

    A row holds what ``hdrq_deploy.experiments.rate_search.judge`` says of a trial, and whether its
    rate is the one that was chosen.
    """
    rows = []
    for method in TUNED:
        search, found = RateSearch.of(method, ITERS), dict[int, dict[str, Any]]()
        parents = Parents(task, method, 4, 4, "weights", 0)
        scores: dict[int, float] = {}
        while places := search.waiting(scores):
            for place in places:
                found[place] = trial(parents, search.rate(place), out)
                scores[place] = found[place]["score"] or math.inf
                print(json.dumps(found[place]), flush=True)
        best = search.best(scores)
        for place, row in sorted(found.items()):
            edge = {"is_at_edge": search.is_at_edge(scores)} if place == best else {}
            rows.append({**row, "chosen": place == best, **edge})
    return rows


def trial(parents: Parents, rate: float, out: Path) -> dict[str, Any]:
    """How bundles of one rate are judged on the calibration images that were held out."""
    target = out / "rows" / f"trial-{parents.name}-lr{rate:g}.json"
    if target.exists():
        row: dict[str, Any] = json.loads(target.read_text())
        return row
    task = task_of(parents.task, out)
    floats = Parents(parents.task, "float", 8, 8, "weights", 0)
    bundles, experts, held = [], {}, {}
    for domain in task.domains:
        images = read(domain.images, task.wanted, task.images, parents.seed)
        learned, judges = hold_out(images)
        bundles.append(Bundle.open(calibrated(parents, domain.name, out, rate, learned)))
        experts[domain.name] = Bundle.open(calibrated(floats, domain.name, out))
        held[domain.name] = judges.x
    row = {
        "task": parents.task,
        "method": parents.method,
        "bits": parents.bits,
        "rate": rate,
        "images_held_out": {name: len(x) for name, x in held.items()},
        **judge(bundles, experts, held),
    }
    write_bytes(target, json.dumps(row).encode())
    return row


def _learning(parents: Parents, rate: float | None = None) -> dict[str, float]:
    """Iterations and the rate for them, by default that of ``RATES``; none if they do not learn."""
    rate = rate or RATES[parents.task].get(parents.method)
    return {} if rate is None else {"iters": parents.iters, "lr": rate * ITERS / parents.iters}


def work(parents: Parents, out: Path) -> str:
    """Rows of some parents, kept on disk."""
    target = out / "rows" / f"{parents.name}.json"
    if target.exists():
        for place in (out / "cells").glob(f"{parents.name}-*.hdrq"):
            if "-trial-" not in place.name:
                refuse_other_options(place, **_learning(parents))
    else:
        rows = [measured_here(row) for row in evaluate(parents, out)]
        write_bytes(target, json.dumps(rows).encode())
    return parents.name


def _task_of_entry(entry: str | Mapping[str, Any]) -> str:
    """The task of a row, or of the name of one that is missing."""
    return entry.partition("-")[0] if isinstance(entry, str) else str(entry["task"])


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, merge, measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--bits", nargs="+", choices=[_bits(*pair) for pair in BITS])
    parser.add_argument("--out", type=Path, default=Path("build/merge_statistics"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--tune", action="store_true", help="search rates, no more")
    parser.add_argument("--collect", action="store_true", help="write the finished rows, no more")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    (out / "rows").mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        task_of(task, out)
    if args.tune:
        for task in args.tasks:
            rows = tune(task, out)
            write_bytes(out / f"tuning-{task}.json", json.dumps(rows).encode())
            for row in rows:
                if row["chosen"]:
                    print(f"{task} {row['method']}: {row['rate']:g}", flush=True)
        return 0
    # A record has all that is there, whatever is run now.
    parents = [p for seed in SEEDS for t in args.tasks for p in grid(t, seed)]
    if not args.collect:
        wanted = [p for p in parents if p.seed in args.seeds]
        wanted = [p for p in wanted if not args.bits or p.bits in args.bits]
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(work, p, out) for p in wanted]
            for i, future in enumerate(as_completed(futures)):
                print(f"{i + 1}/{len(futures)} {future.result()}", flush=True)
    files = [out / "rows" / f"{p.name}.json" for p in parents]
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text())]
    for task in args.tasks:
        rows += map(measured_here, folded_float(task, out))
    tunings = [out / f"tuning-{task}.json" for task in args.tasks]
    tried = [r for f in tunings if f.exists() for r in json.loads(f.read_text())]
    missing = [f.stem for f in files if not f.exists()]
    target = args.results / "merge_statistics.json"
    before = json.loads(target.read_text()) if target.exists() else {}

    def kept(key: str) -> list[Any]:
        """What was found of other tasks."""
        return [r for r in before.get(key, []) if _task_of_entry(r) not in args.tasks]

    others = [{"environment": before["environment"], **row} for row in kept("rows")]

    result: dict[str, Any] = {
        "schema_version": 1,
        "iterations_per_block": ITERS,
        "rates": RATES,
        "rates_tried": kept("rates_tried") + tried,
        "rounding_seeds": ROUNDING_SEEDS,
        "missing": kept("missing") + missing,
        **gathered(others + rows),
    }
    write_record(target, result)
    print(f"{len(result['rows'])} rows in {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
