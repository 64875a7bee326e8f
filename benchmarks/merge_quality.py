"""Does HDRQ merge better, and what do the additions to the paper bring?

    python benchmarks/merge_quality.py --out build/merge_quality --results benchmarks/results

Calibrates every method and scheme of ``GRID`` on the three domains of the digits benchmark,
merges all pairs and the triple, and measures every merge on the test splits. A cell is one
bundle on disk; a cell that is there is not made again, so a stopped run goes on. No record
was kept of how learning rates and criteria were chosen; ``hdrq reproduce --tune`` keeps one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from evidence.records import write_record
from measured import gathered, measured_here

from hdrq_deploy import Bundle
from hdrq_deploy.errors import HdrqError
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.formats.bundle import GRAPH, WEIGHTS
from hdrq_deploy.formats.safetensors_layout import serialize
from hdrq_deploy.graph import reference_session
from hdrq_deploy.merging import Merger, choose_weights
from hdrq_deploy.merging.re_estimate import moved
from hdrq_deploy.runtime.bench import harmonic_mean

MODEL = "hdrq_deploy.calibration_data.models:resnet14"
DOMAINS = ("handwriting", "photo", "night")
GROUPS = (*combinations(DOMAINS, 2), DOMAINS)
ITERS = 1000
# 1,000 iterations want the larger of the paper's two rates (1e-3, its text).
LEARNING: Mapping[str, Mapping[str, Any]] = {
    "rtn": {},
    "brecq": {"iters": ITERS},
    "qdrop": {"iters": ITERS},
    "latent": {"iters": ITERS, "lr": 1e-3, "noise": "off", "distance": 0.0},
    "latent+noise": {"iters": ITERS, "lr": 1e-3, "distance": 0.0},
    "hdrq": {"iters": ITERS, "lr": 1e-3},
}
ROUNDING_SEEDS, RENEWED_SEEDS = 8, 4
CANDIDATES = 30  # as in the paper
# Images per domain that the additions look at, without labels.
MIX_IMAGES, RENEW_IMAGES = 256, 128

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """One method at one scheme, calibrated for every domain with every seed."""

    label: str
    wbits: int
    abits: int
    steps: str = "tensor"
    seeds: tuple[int, ...] = (0, 1)

    @property
    def name(self) -> str:
        """Method, bits and steps."""
        return f"{self.label}-w{self.wbits}a{self.abits}-{self.steps}"

    def options(self) -> dict[str, Any]:
        """Arguments of ``calibrate``."""
        from hdrq_deploy.calibration.recipe import METHODS, Options

        method = self.label if self.label in METHODS else "hdrq"
        return {
            "method": method,
            "wbits": self.wbits,
            "abits": self.abits,
            "per_channel": self.steps != "tensor",
            "fold": "steps" if self.steps == "fold" else "weights",
            "options": Options.of(method, **LEARNING.get(self.label, {})),
        }


@dataclass(frozen=True)
class Cell:
    """One bundle: a setting, a seed, and the domain (or the domains merged in float first)."""

    setting: Setting
    seed: int
    members: tuple[str, ...]

    @property
    def path(self) -> str:
        """The bundle's folder."""
        return f"{self.setting.name}-s{self.seed}-{'+'.join(self.members)}.hdrq"


# In the paper's setting: one step per tensor, BatchNorm in the weights.
PAPER = [
    Setting(method, bits, bits) for bits in (4, 3) for method in ("rtn", "brecq", "qdrop", "hdrq")
]
# From QDrop to HDRQ: latent weights instead of learned rounding, then noise, then distance.
ABLATION = [Setting(label, 3, 3, seeds=(0,)) for label in ("latent", "latent+noise")]
CHANNEL = [
    Setting(method, w, a, steps, (0,))
    for steps in ("fold", "channel")
    for w, a in ((4, 4), (3, 3), (4, 8), (8, 8))
    for method in ("hdrq", "qdrop")
]
MERGED_FIRST = [
    Setting(method, bits, bits, "channel", (0,)) for method in ("hdrq", "qdrop") for bits in (4, 3)
]
FLOAT = Setting("float", 8, 8, "tensor", (0,))


def cells() -> Iterator[Cell]:
    """All bundles, the most telling ones first."""

    def alone(settings: Sequence[Setting]) -> Iterator[Cell]:
        for setting in settings:
            yield from (Cell(setting, s, (d,)) for s in setting.seeds for d in DOMAINS)

    def first(settings: Sequence[Setting]) -> Iterator[Cell]:
        for setting in settings:
            yield from (Cell(setting, 0, group) for group in GROUPS)

    yield from alone([FLOAT, *CHANNEL[:2], *reversed(PAPER), *CHANNEL[2:4]])
    yield from first(MERGED_FIRST[:2])
    yield from alone([*CHANNEL[4:8], *ABLATION, *CHANNEL[8:12]])
    yield from first(MERGED_FIRST[2:])
    yield from alone(CHANNEL[12:])


def calibrate_cell(cell: Cell, out: Path) -> float:
    """Make one bundle; seconds it took, 0 where it was there."""
    path = out / cell.path
    if path.exists():
        try:
            Bundle.open(path)
        except HdrqError as error:
            print(f"made again: {error}", file=sys.stderr)
        else:
            return 0.0
    import torch

    from hdrq_deploy.calibration import calibrate
    from hdrq_deploy.calibration_data.digits.make_checkpoints import CHECKPOINTS
    from hdrq_deploy.calibration_data.readers import ImageSet

    torch.set_num_threads(1)
    started = time.monotonic()
    images = np.concatenate([split(domain, "calibration")[0] for domain in cell.members])
    weights = CHECKPOINTS / f"{cell.members[0]}.safetensors"
    if len(cell.members) > 1:
        weights = out / f"float-{'+'.join(cell.members)}.safetensors"
    calibrate(
        MODEL,
        ImageSet(images, None, None, None),
        "+".join(cell.members),
        path,
        weights,
        CHECKPOINTS / "fonts.safetensors",
        seed=cell.seed,
        resume=True,
        **cell.setting.options(),
    )
    return time.monotonic() - started


@cache
def split(domain: str, name: str) -> tuple[Array, Array]:
    """Inputs and labels of one split."""
    from hdrq_deploy.calibration_data import digits

    data = digits.make(domain, name)
    pixels = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2))
    return pixels.astype(np.float32) / 255, data.labels


def calibrate_all(out: Path, workers: int, minutes: float) -> list[Cell]:
    """Make what is missing, two at a time; returns the cells that are there."""
    from hdrq_deploy.calibration_data.digits.make_checkpoints import CHECKPOINTS
    from hdrq_deploy.merging import merge_checkpoints

    out.mkdir(parents=True, exist_ok=True)
    for group in GROUPS:
        files = [CHECKPOINTS / f"{domain}.safetensors" for domain in group]
        merge_checkpoints(files, out / f"float-{'+'.join(group)}.safetensors")
    missing = [cell for cell in cells() if not (out / cell.path).exists()]
    deadline = time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        # Few at a time, so that a deadline finds little begun.
        waiting = iter(missing)
        running = {
            pool.submit(calibrate_cell, c, out): c
            for _, c in zip(range(workers), waiting, strict=False)
        }
        done = 0
        while running:
            future = next(as_completed(running))
            cell = running.pop(future)
            done += 1
            print(f"{done}/{len(missing)} {cell.path}: {future.result():.0f} s", flush=True)
            following = next(waiting, None) if time.monotonic() < deadline else None
            if following is not None:
                running[pool.submit(calibrate_cell, following, out)] = following
    return [cell for cell in cells() if (out / cell.path).exists()]


class Judge:
    """Accuracies of tensors in a graph on one of the splits."""

    def __init__(self, like: Bundle) -> None:
        self._graph = (like.path / GRAPH).read_bytes()
        self._entries = like.manifest.tensors

    def __call__(
        self, tensors: Mapping[str, Array], domains: Sequence[str], name: str = "test"
    ) -> dict[str, float]:
        """Top-1 accuracy of every domain, 0 to 1, on the split ``name``."""
        network, result = self.network(tensors), {}
        for domain in domains:
            x, labels = split(domain, name)
            result[domain] = float((network(x).argmax(1) == labels).mean())
        return result

    def network(self, tensors: Mapping[str, Array]) -> Callable[[Array], Array]:
        """The graph with these tensors, every operator as it is written: inputs to outputs."""
        weights = serialize(tensors, self._entries)
        session = reference_session.unfused_session(self._graph, {WEIGHTS: weights}, threads=1)
        port = session.get_inputs()[0].name
        return lambda x: np.asarray(session.run(None, {port: x})[0])


@dataclass
class Row:
    """Accuracies (0 to 1) of one way to serve some domains; one entry of ``means`` a draw."""

    setting: str
    members: tuple[str, ...]
    way: str
    seed: int
    domains: dict[str, float]
    means: list[float]
    extra: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """JSON, with mean and spread of the harmonic mean over the draws."""
        spread = statistics.stdev(self.means) if len(self.means) > 1 else 0.0
        return {
            **asdict(self),
            "harmonic_mean": statistics.fmean(self.means),
            "standard_deviation": spread,
        }


def evaluate(setting: Setting, seed: int, out: Path) -> list[dict[str, Any]]:
    """All merges of one setting and seed."""
    paths = {d: out / Cell(setting, seed, (d,)).path for d in DOMAINS}
    bundles = {d: Bundle.open(path) for d, path in paths.items() if path.exists()}
    if len(bundles) < len(DOMAINS):
        return []
    judge = Judge(bundles[DOMAINS[0]])
    rows = []
    single = {d: judge(b.tensors(), (d,))[d] for d, b in bundles.items()}
    for group in GROUPS:
        own = {d: single[d] for d in group}
        rows.append(Row(setting.name, group, "single", seed, own, [harmonic(own)]))
        rows += _merges(setting, seed, group, [bundles[d] for d in group], judge)
    return [row.record() for row in rows]


def _merges(
    setting: Setting, seed: int, group: tuple[str, ...], parents: list[Bundle], judge: Judge
) -> Iterator[Row]:
    even = [1 / len(group)] * len(group)
    is_float = setting.label == "float"

    def merged(way: str, rounding: str, mix: Sequence[float], renewed: Any = None) -> Row:
        draws = RENEWED_SEEDS if renewed else ROUNDING_SEEDS
        draws = 1 if rounding == "nearest" else draws
        found, all_domains = [], []
        for draw in range(draws):
            tensors = Merger(parents, rounding, CANDIDATES, draw).tensors(mix)
            if renewed:
                tensors = moved(parents[0], tensors, renewed)
            all_domains.append(judge(tensors, group))
            found.append(harmonic(all_domains[-1]))
        mean = {d: statistics.fmean(a[d] for a in all_domains) for d in group}
        return Row(setting.name, group, way, seed, mean, found)

    if is_float:
        yield merged("merged", "nearest", even)
    else:
        for rounding in ("nearest", "noise", "advanced"):
            yield merged(rounding, rounding, even)
    if is_float or setting.steps == "fold":
        rounding = "nearest" if is_float else "advanced"
        renewed = {d: split(d, "calibration")[0][:RENEW_IMAGES] for d in group}
        images = {d: split(d, "calibration")[0][:MIX_IMAGES] for d in group}
        yield merged("re-estimated", rounding, even, renewed)
        if is_float or (setting.label == "hdrq" and setting.wbits < 8 and setting.abits < 8):
            for criterion in ("entropy", "information", "agreement"):
                mix = choose_weights(Merger(parents), images, criterion)
                row = merged(f"auto ({criterion})", rounding, mix.weights)
                row.extra = {"weights": mix.weights}
                yield row
        else:
            return
        mix = choose_weights(Merger(parents), images, None, renewed)
        row = merged("auto + re-estimated", rounding, mix.weights, renewed)
        row.extra = {"weights": mix.weights, "criterion": mix.criterion}
        yield row


def evaluate_merged_first(setting: Setting, out: Path) -> Iterator[dict[str, Any]]:
    """Merge in float, then quantize: the competitor that needs all parents in one place."""
    for group in GROUPS:
        path = out / Cell(setting, 0, group).path
        if path.exists():
            bundle = Bundle.open(path)
            domains = Judge(bundle)(bundle.tensors(), group)
            means = [harmonic(domains)]
            yield Row(setting.name, group, "merged first", 0, domains, means).record()


def evaluate_folded_float(out: Path) -> Iterator[dict[str, Any]]:
    """Float weights with BatchNorm folded, averaged: the paper's upper row."""
    import torch
    from folded_float import averages, folded

    from hdrq_deploy.calibration_data.digits.make_checkpoints import load

    models = {domain: folded(load(domain), torch.zeros(2, 3, 32, 32)) for domain in DOMAINS}
    for group, model in averages(models, GROUPS):
        domains = {}
        for domain in group:
            x, labels = split(domain, "test")
            with torch.no_grad():
                predicted = model(torch.from_numpy(x)).argmax(1).numpy()
            domains[domain] = float((predicted == labels).mean())
        yield Row("float-folded", group, "merged", 0, domains, [harmonic(domains)]).record()


def harmonic(domains: Mapping[str, float]) -> float:
    """Harmonic mean of the accuracies."""
    return harmonic_mean(list(domains.values()))


def _evaluate_task(setting: Setting, seed: int, out: Path, folder: Path) -> None:
    """Rows of one setting and seed, kept on disk."""
    target = folder / f"{setting.name}-s{seed}.json"
    if target.exists():
        return
    rows = [measured_here(row) for row in evaluate(setting, seed, out)]
    if rows:
        write_bytes(target, json.dumps(rows).encode())


def evaluate_all(out: Path, workers: int, finished: bool = False) -> list[dict[str, Any]]:
    """All rows; those of ``finished`` settings are read from disk, only those if asked."""
    folder = out / "rows"
    folder.mkdir(exist_ok=True)
    tasks = [(s, seed) for s in (FLOAT, *PAPER, *ABLATION, *CHANNEL) for seed in s.seeds]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        open_tasks = [] if finished else tasks
        futures = [pool.submit(_evaluate_task, s, seed, out, folder) for s, seed in open_tasks]
        for i, future in enumerate(as_completed(futures)):
            future.result()
            print(f"evaluated {i + 1}/{len(futures)}", flush=True)
    rows = [measured_here(row) for row in evaluate_folded_float(out)]
    for setting, seed in tasks:
        path = folder / f"{setting.name}-s{seed}.json"
        if path.exists():
            rows += json.loads(path.read_text())
    for setting in MERGED_FIRST:
        rows += map(measured_here, evaluate_merged_first(setting, out))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, evaluate, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/merge_quality"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after that")
    parser.add_argument("--only-evaluate", action="store_true", help="calibrate nothing")
    parser.add_argument("--collect", action="store_true", help="write the finished rows, no more")
    args = parser.parse_args(argv)
    started = time.monotonic()
    there = [c for c in cells() if (args.out / c.path).exists()]
    if not (args.only_evaluate or args.collect):
        there = calibrate_all(args.out, args.workers, args.minutes)
    rows = evaluate_all(args.out, args.workers, args.collect)
    record = {
        "schema_version": 1,
        "iterations_per_block": ITERS,
        "rounding_seeds": ROUNDING_SEEDS,
        "cells": len(there),
        "cells_in_grid": len(list(cells())),
        "seconds_of_this_run": round(time.monotonic() - started),
        **gathered(rows),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    write_record(args.results / "merge_quality.json", record)
    print(f"{len(rows)} rows in {args.results / 'merge_quality.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
