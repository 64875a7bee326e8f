"""What do merges of quantized models keep on real images?

    python benchmarks/real_images.py --data PACS/ --weights efficientnet-lite0.pth \
        --out build/pacs --results benchmarks/results

PACS with EfficientNet-Lite0 cut at 0.7 million weights: ``hdrq reproduce pacs --prepare`` writes
the splits and trains the checkpoints in ``--out`` (what is there is kept), and every domain's model
is calibrated in our setting by every method of ``METHODS`` at every bit-width of ``BITS``. All
pairs and the triple are merged in the ways of ``WAYS``, as ``hdrq-merge`` writes them, and every
merge's ONNX Runtime engine is run on the test images. Rates of methods that learn are scanned
first, three a method, by how much one domain's model differs from its float model on calibration
images. Cells and rows that are there are not made again, so a stopped run resumes. No choice reads
a test image.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from folded_float import averages, folded
from merge_statistics import logits_of, scored

from hdrq_deploy import Bundle, merge
from hdrq_deploy.calibration.graph_cache import GraphCache
from hdrq_deploy.calibration.loading import load_model, load_state, put_state
from hdrq_deploy.calibration.methods import Options
from hdrq_deploy.calibration.pipeline import run_calibration
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.calibration.settings import SETTINGS
from hdrq_deploy.calibration_data.readers import read
from hdrq_deploy.experiments.cells import engine_of
from hdrq_deploy.experiments.real_images import Choice, prepare
from hdrq_deploy.experiments.tasks import Domain
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.formats.bench_result import harmonic_mean
from hdrq_deploy.merging import Merger, choose_weights, re_estimate
from hdrq_deploy.merging.weight_search import score
from hdrq_deploy.runtime.bench.environment import environment

Array = npt.NDArray[Any]
ITERS = 200
METHODS = ("rtn", "qdrop", "hdrq")
BITS = ((4, 8), (4, 4), (8, 8), (8, 4), (3, 3))
# Rates for 200 iterations, three a method and about a factor of three apart, around those that the
# data set's protocol starts from; ``--scan`` says which differs least from the float model.
RATES_TRIED = {"qdrop": (3e-3, 1e-2, 3e-2), "hdrq": (3e-4, 1e-3, 3e-3)}
SCAN_BITS, SCAN_DOMAIN, SCAN_IMAGES = (4, 4), "cartoon", 256
MIX_IMAGES, RENEW_IMAGES = 64, 64
BATCH = 32
# Method, rounding, re-estimated BatchNorm, chosen merge weights, and whether pairs are merged so.
# Weights are chosen with BatchNorm as merged: measuring it again at every point takes minutes.
Way = tuple[str, str, bool, bool, bool]
WAYS: tuple[Way, ...] = (
    ("mean", "nearest", False, False, True),
    ("mean", "advanced", False, False, True),
    ("regression", "compensated", False, False, True),
    ("mean", "nearest", True, False, True),
    ("regression", "compensated", True, False, True),
    ("regression", "compensated", True, True, False),
)
FLOAT_WAYS: tuple[Way, ...] = (
    ("mean", "nearest", False, False, True),
    ("mean", "nearest", True, False, True),
    ("regression", "nearest", False, False, True),
    ("regression", "nearest", True, False, True),
    ("mean", "nearest", True, True, False),
    ("regression", "nearest", True, True, False),
)


# Bits that weights of 8 bits are rounded to by the merge itself, with new BatchNorm moments.
REQUANTIZED: tuple[Way, ...] = (("regression", "compensated", True, False, True),)
MERGED_BITS = (4, 3)


def name_of(way: Way, wbits: int | None = None) -> str:
    """``regression-compensated-auto-renewed``, with ``-w4`` where the merge requantizes."""
    method, rounding, renewed, chosen, _ = way
    requantized = "" if wbits is None else f"-w{wbits}"
    return f"{method}-{rounding}{requantized}" + "-auto" * chosen + "-renewed" * renewed


@dataclass(frozen=True)
class Parents:
    """How the models of all domains are calibrated."""

    method: str
    wbits: int
    abits: int
    seed: int

    @property
    def bits(self) -> str:
        """``w4a8``; empty for float."""
        return "" if self.method == "float" else f"w{self.wbits}a{self.abits}"

    @property
    def name(self) -> str:
        """The start of the cells' names."""
        return f"{self.method}-{self.bits}-s{self.seed}" if self.bits else "float"


class Work:
    """The splits, the checkpoints and the cells in one folder."""

    def __init__(self, data: Path, imagenet: Path | None, out: Path) -> None:
        self.preparation = prepare("pacs", Choice(data.absolute(), out, imagenet=imagenet))
        self.task, self.out = self.preparation.task, out
        self.names = [domain.name for domain in self.task.domains]
        self.graphs = GraphCache()
        self._read: dict[tuple[str, str], tuple[Array, Array]] = {}

    def domain(self, name: str) -> Domain:
        """A domain of the task."""
        return next(domain for domain in self.task.domains if domain.name == name)

    def images(self, name: str, split: str) -> tuple[Array, Array]:
        """Inputs (N, 3, 96, 96) in a fixed random order, and labels, of one split."""
        if (name, split) not in self._read:
            place = self.domain(name)
            found = read(place.test if split == "test" else place.images, self.task.wanted)
            assert found.y is not None
            order = np.random.default_rng(0).permutation(len(found.x))
            self._read[name, split] = found.x[order], found.y[order]
        return self._read[name, split]

    def few(self, members: Sequence[str], count: int) -> dict[str, Array]:
        """The first unlabelled calibration images of every member."""
        return {name: self.images(name, "calibration")[0][:count] for name in members}

    def groups(self) -> list[tuple[str, ...]]:
        """All pairs of domains, and all domains."""
        return [*combinations(self.names, 2), tuple(self.names)]

    @cached_property
    def rates(self) -> dict[str, float]:
        """The rate of every method that learns, from the scan."""
        rows = scan(self)
        return {
            method: min((r for r in rows if r["method"] == method), key=lambda r: r["nats"])["rate"]
            for method in RATES_TRIED
        }

    def bundle(self, parents: Parents, name: str, rate: float | None = None) -> Bundle:
        """The bundle of one domain in our setting, calibrated where it is missing."""
        suffix = ""
        if parents.method in RATES_TRIED:
            rate = rate or self.rates[parents.method]
            suffix = f"-lr{rate:g}"
        path = self.out / "bundles" / f"{parents.name}{suffix}-{name}.hdrq"
        if path.exists():
            return Bundle.open(path)
        ours, place = SETTINGS["ours"], self.domain(name)
        learned = {} if rate is None else {"iters": ITERS, "lr": rate}
        begun = time.process_time()
        bundle = run_calibration(
            CalibrationRequest(
                model=self.task.model,
                data=place.images,
                domain=name,
                output=path,
                weights=place.weights,
                base=self.task.source,
                method=parents.method,
                wbits=parents.wbits,
                abits=parents.abits,
                options=Options.of(parents.method, **{**ours.options(parents.method), **learned}),
                images=self.task.images,
                wanted=self.task.wanted,
                seed=parents.seed,
                **(ours.codes if parents.bits else {}),
            ),
            self.graphs,
        )
        print(f"{path.name}: {time.process_time() - begun:.0f} s of CPU", flush=True)
        return bundle

    def accuracies(self, bundle: Bundle, names: Sequence[str]) -> dict[str, float]:
        """Top-1 accuracy of the bundle's engine on the test images of domains."""
        found = {}
        with engine_of(bundle, "cpu", 1) as engine:
            for name in names:
                images, labels = self.images(name, "test")
                parts = [engine(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
                found[name] = scored(np.concatenate(parts), labels)
        return found


def scan(work: Work) -> list[dict[str, Any]]:
    """How much one domain's model differs from its float model, for every rate tried.

    Cross entropy with the float model's predictions on calibration images, in nats; no label is
    read.
    """
    target = work.out / "scan.json"
    rows: list[dict[str, Any]] = json.loads(target.read_text()) if target.exists() else []
    images = work.few([SCAN_DOMAIN], SCAN_IMAGES)[SCAN_DOMAIN]
    judge = logits_of(work.bundle(Parents("float", 8, 8, 0), SCAN_DOMAIN), images)
    for method, rates in RATES_TRIED.items():
        for rate in rates:
            if any((row["method"], row["rate"]) == (method, rate) for row in rows):
                continue
            bundle = work.bundle(Parents(method, *SCAN_BITS, 0), SCAN_DOMAIN, rate)
            nats = score("agreement", logits_of(bundle, images), judge)
            rows.append({"method": method, "rate": rate, "nats": nats})
            print(json.dumps(rows[-1]), flush=True)
            write_bytes(target, json.dumps(rows).encode())
    return rows


def evaluate(parents: Parents, work: Work) -> Iterator[dict[str, Any]]:
    """All merges of some parents on the test images; the triple first."""
    bundles = {name: work.bundle(parents, name) for name in work.names}
    single: dict[str, float] = {}
    for name, bundle in bundles.items():
        single |= work.accuracies(bundle, [name])
    for group in reversed(work.groups()):
        yield record(parents, group, "single", {name: single[name] for name in group})
        for way in FLOAT_WAYS if parents.method == "float" else WAYS:
            # Three models at equal thirds have no ties, and nothing to draw.
            if way[4] if len(group) == 2 else way[1] != "advanced":
                yield merged(parents, [bundles[name] for name in group], group, way, work)
        if parents.bits and parents.wbits == 8:
            for way in REQUANTIZED:
                for wbits in MERGED_BITS:
                    yield merged(
                        parents, [bundles[name] for name in group], group, way, work, wbits
                    )


def merged(
    parents: Parents,
    bundles: Sequence[Bundle],
    group: Sequence[str],
    way: Way,
    work: Work,
    wbits: int | None = None,
) -> dict[str, Any]:
    """The row of one merge."""
    method, rounding, renewed, chosen, _ = way
    images = work.few(group, RENEW_IMAGES) if renewed else None
    weights, begun = None, time.monotonic()
    if chosen:
        found = choose_weights(Merger(bundles, method=method), work.few(group, MIX_IMAGES))
        weights = list(found.weights)
    with tempfile.TemporaryDirectory() as folder:
        bundle = merge(
            bundles,
            Path(folder) / "merged.hdrq",
            weights,
            rounding,
            candidates=30,  # as in the paper
            threads=1,
            method=method,
            wbits=wbits,
        )
        if images is not None:
            bundle = re_estimate(bundle, images, Path(folder) / "renewed.hdrq", 0)
        seconds = time.monotonic() - begun
        measured = work.accuracies(bundle, group)
    extra = {"weights": weights} if chosen else {}
    return {
        **record(parents, group, name_of(way, wbits), measured),
        **extra,
        "seconds": round(seconds, 1),
    }


def renewed_singles(parents: Parents, work: Work) -> dict[str, Any]:
    """The row of the unmerged models, each with BatchNorm measured again on its own domain."""
    single: dict[str, float] = {}
    for name in work.names:
        bundle, images = work.bundle(parents, name), work.few([name], RENEW_IMAGES)
        with tempfile.TemporaryDirectory() as folder:
            renewed = re_estimate(bundle, images, Path(folder) / "renewed.hdrq", 0)
            single |= work.accuracies(renewed, [name])
    return record(parents, work.names, "single-renewed", single)


def record(
    parents: Parents, group: Sequence[str], way: str, measured: Mapping[str, float]
) -> dict[str, Any]:
    """A row, in %."""
    return {
        "parents": parents.method,
        "bits": parents.bits,
        "seed": parents.seed,
        "members": list(group),
        "way": way,
        "domains": {name: round(100 * value, 2) for name, value in measured.items()},
        "harmonic_mean": round(100 * harmonic_mean(list(measured.values())), 2),
    }


def folded_float(work: Work) -> Iterator[dict[str, Any]]:
    """The float weights with BatchNorm folded, averaged: the paper's upper row."""
    models = {}
    for name in work.names:
        network = load_model(work.task.model)
        put_state(network, load_state(network, work.domain(name).weights, "weights"))
        models[name] = folded(network, torch.from_numpy(work.images(name, "test")[0][:2]))
    for group, model in averages(models, work.groups()):
        measured = {}
        for name in group:
            images, labels = work.images(name, "test")
            with torch.no_grad():
                parts = torch.from_numpy(images).split(64)
                measured[name] = scored(torch.cat([model(p) for p in parts]).numpy(), labels)
        yield record(Parents("float", 32, 32, 0), group, "mean-folded", measured)


def rows_of(parents: Parents, work: Work, only_kept: bool = False) -> list[dict[str, Any]]:
    """Rows of some parents, kept on disk; ``only_kept`` makes none that is missing."""
    target = measured_at(work.out, parents)
    if not target.exists():
        rows = list(evaluate(parents, work))
        if parents.method == "float":
            rows += folded_float(work)
        write_bytes(target, json.dumps(rows).encode())
        print(parents.name, rows[1]["way"], rows[1]["harmonic_mean"], flush=True)
    found: list[dict[str, Any]] = json.loads(target.read_text())
    apart = target.with_name(f"{parents.name}-single-renewed.json")
    if not apart.exists() and only_kept:
        return found
    if not apart.exists():
        write_bytes(apart, json.dumps(renewed_singles(parents, work)).encode())
    return [*found, json.loads(apart.read_text())]


def measured_at(out: Path, parents: Parents) -> Path:
    """The file of the rows of some parents."""
    return out / "measured" / f"{parents.name}.json"


def grid(seeds: Sequence[int]) -> Iterator[Parents]:
    """All parents, the most telling ones first."""
    yield Parents("float", 8, 8, 0)
    for seed in seeds:
        for wbits, abits in BITS:
            for method in METHODS:
                if seed == 0 or method != "rtn":  # round to nearest draws nothing
                    yield Parents(method, wbits, abits, seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, calibrate, merge, measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="PACS, DOMAIN/CLASS/*.jpg")
    parser.add_argument("--weights", type=Path, required=True, help="Lite0's ImageNet weights")
    parser.add_argument("--out", type=Path, default=Path("build/pacs"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--collect", action="store_true", help="write the finished rows, no more")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = args.out.absolute()
    work = Work(args.data, args.weights.absolute(), out)
    for folder in ("bundles", "measured"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    if not args.collect:
        work.preparation.make("cpu", 1)
    rows, missing = [], []
    for parents in grid(args.seeds):
        left_out = parents.bits and parents.method not in args.methods
        if (args.collect or left_out) and not measured_at(out, parents).exists():
            missing.append(parents.name)
            continue
        rows += rows_of(parents, work, args.collect)
    scanned = out / "scan.json"
    result = {
        "schema_version": 1,
        "network": work.task.form,
        "iterations_per_block": ITERS,
        "calibration_images": work.task.images,
        "mix_images": MIX_IMAGES,
        "renew_images": RENEW_IMAGES,
        "test_images": {name: len(work.images(name, "test")[0]) for name in work.names},
        "scan": json.loads(scanned.read_text()) if scanned.exists() else [],
        "missing": missing,
        "environment": {**environment(), "torch": version("torch")},
        "rows": rows,
    }
    write_bytes(args.results / "pacs.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"{len(rows)} rows in {args.results / 'pacs.json'}, {len(missing)} settings missing")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
