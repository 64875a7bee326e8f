"""How long a search of merge weights takes, beside the whole grid, and whether it chooses the same.

    python benchmarks/weight_search.py --out build/weight_search --results benchmarks/results \
        [--pacs PACS/ --imagenet efficientnet-lite0.pth]

Three domains of digits (ResNet-14) by round to nearest at three schemes, BatchNorm in the scales,
256 images a domain, every criterion. With ``--pacs`` also the three domains of ``hdrq reproduce
pacs`` (EfficientNet-Lite0 cut at 0.7 million weights, 96 x 96): its splits and checkpoints are
made in ``OUT/pacs`` where they are missing. There the mean is searched with BatchNorm as merged,
and the merge by regression with new moments for every mix. Searches and grid run in turn in one
process; CPU seconds are those of all its threads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from evidence.records import write_record
from merge_quality import DOMAINS as DIGITS
from merge_quality import Cell, Setting, calibrate_cell, split

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration_data.readers import read, spread
from hdrq_deploy.experiments.real_images import Choice, prepare
from hdrq_deploy.merging import CRITERIA, Merger, choose_weights
from hdrq_deploy.merging.weight_search import ChosenWeights
from hdrq_deploy.runtime.bench.environment import Watch, environment

SCHEMES = ((8, 8), (4, 8), (3, 3))
IMAGES = 256

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Bundles to merge, images of their domains, and those for new moments of every mix."""

    name: str
    bundles: Sequence[Path]
    images: Mapping[str, Array]
    criteria: Sequence[str]
    renewed: Mapping[str, Array] | None = None


def digits(out: Path) -> Iterator[Case]:
    """Digits at every scheme."""
    images = {d: split(d, "calibration")[0][:IMAGES] for d in DIGITS}
    for wbits, abits in SCHEMES:
        cells = [Cell(Setting("rtn", wbits, abits, "fold", (0,)), 0, (d,)) for d in DIGITS]
        for cell in cells:
            calibrate_cell(cell, out)
        paths = [out / cell.path for cell in cells]
        yield Case(f"digits W{wbits}A{abits}", paths, images, list(CRITERIA))


def pacs(out: Path, data: Path, imagenet: Path) -> Iterator[Case]:
    """PACS at W4A8."""
    preparation = prepare("pacs", Choice(data.absolute(), out / "pacs", imagenet=imagenet))
    preparation.make("cpu", 1)
    task = preparation.task
    images, paths = {}, []
    for domain in task.domains:
        images[domain.name] = read(domain.images, task.wanted, IMAGES).x
        paths.append(out / f"{domain.name}.hdrq")
        if not paths[-1].exists():
            calibrate(
                task.model,
                domain.images,
                domain.name,
                paths[-1],
                domain.weights,
                task.source,
                method="rtn",
                wbits=4,
                abits=8,
                fold="steps",
                images=task.images,
                wanted=task.wanted,
            )
    yield Case("PACS W4A8", paths, images, ["agreement"])
    renewed = {name: x[spread(len(x), task.renew_images)] for name, x in images.items()}
    yield Case("PACS W4A8, regression, new BatchNorm", paths, images, ["agreement"], renewed)


def timed(search: Callable[[], ChosenWeights]) -> tuple[ChosenWeights, dict[str, Any]]:
    """What was chosen, and its cost."""
    began = time.process_time()
    chosen = search()
    return chosen, {
        "weights": chosen.weights,
        "mixes": len(chosen.tried) + len(chosen.left),
        "images_run": chosen.runs,
        "seconds": round(chosen.seconds, 2),
        "cpu_seconds": round(time.process_time() - began, 2),
    }


def compare(case: Case, seeds: int) -> Iterator[dict[str, Any]]:
    """The grid once for every criterion, and the search in ``seeds`` orders of the images."""
    exact = case.renewed is None
    merger = Merger(case.bundles, method="mean" if exact else "regression", keep=not exact)
    for criterion in case.criteria:

        def search(seed: int, whole: bool, criterion: str = criterion) -> ChosenWeights:
            return choose_weights(
                merger, case.images, criterion, seed=seed, exhaustive=whole, renewed=case.renewed
            )

        found = [timed(partial(search, seed, False)) for seed in range(seeds)]
        grid, grid_cost = timed(partial(search, 0, True))
        scores = dict(grid.tried)
        searches = []
        for chosen, cost in found:
            worse = scores[chosen.weights] - scores[grid.weights]
            searches.append({**cost, "same": worse == 0, "worse_by_nats": round(worse, 5)})
        row = {"case": case.name, "criterion": criterion, "grid": grid_cost, "search": searches}
        print(json.dumps(row), flush=True)
        yield row


def write(folder: Path, rows: Sequence[Mapping[str, Any]], watch: Watch) -> None:
    """Write the rows that there are."""
    record = {
        "schema_version": 1,
        "images": IMAGES,
        "environment": {**environment(), **watch.facts()},
        "marks": watch.marks(),
        "rows": rows,
    }
    write_record(folder / "weight_search.json", record)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("build/weight_search"))
    parser.add_argument("--pacs", type=Path, help="folder of PACS, DOMAIN/CLASS/*.jpg")
    parser.add_argument("--imagenet", type=Path, help="EfficientNet-Lite0's ImageNet weights")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    cases: Iterator[Case] = digits(args.out)
    if args.pacs:
        cases = chain(pacs(args.out, args.pacs, args.imagenet), cases)
    args.results.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with Watch() as watch:
        for case in cases:
            for row in compare(case, args.seeds):
                rows.append(row)  # A run that is stopped keeps what it measured.
                write(args.results, rows, watch)
    write(args.results, rows, watch)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
