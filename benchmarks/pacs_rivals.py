"""Merging first and quantizing then, on photographs and drawings.

    python benchmarks/pacs_rivals.py --data PACS/ --weights efficientnet-lite0.pth \
        --run build/pacs --results benchmarks/results

``--run`` is the folder of ``hdrq reproduce pacs --pairs``, whose splits, checkpoints and merged
float models are used: the mean, and the merge by regression with BatchNorm re-estimated. Each merge
of float models is quantized at W4A8 with all images of its domains, one scale per channel, by
``gptq``, by ``gptq`` with the experts' outputs as targets
(:mod:`hdrq_deploy.calibration.expert_targets`), and by ``qdrop`` at the rate in the run's
``tuning.json``. Engines are measured on the test images as cells of the run are. A finished row is
not made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from measured import keep_row, refuse_other_options
from pacs_run import arguments, figures_of, task_of, write
from safetensors.numpy import save_file

from hdrq_deploy import Bundle
from hdrq_deploy.calibration.expert_targets import ExpertTargets, calibrate_with_experts
from hdrq_deploy.calibration.graph_cache import GraphCache
from hdrq_deploy.calibration.methods import Options
from hdrq_deploy.calibration.pipeline import run_calibration
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.experiments.grid import Merge, Run, bundle_path
from hdrq_deploy.experiments.tasks import Task
from hdrq_deploy.experiments.tuning import TUNING, chosen_rates

# Ways in which hdrq reproduce merges float models.
FLOAT_MERGES = {"nearest": "mean", "renewed": "regression, BatchNorm re-estimated"}
METHODS = ("gptq", "experts", "qdrop")


@dataclass(frozen=True)
class Rival:
    """A merge of float models, and how it is quantized."""

    members: tuple[str, ...]
    merge: str
    method: str

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{'+'.join(self.members)}-{self.merge}-{self.method}"

    @property
    def float_cell(self) -> str:
        """The cell of the run that holds the float merge."""
        return Merge(Run("ours", "float", 8, 8, 0), self.members, self.merge, 1).cell(0)


def rivals(domains: Sequence[str]) -> Iterator[Rival]:
    """Methods that learn nothing first, and of each the merge of all domains."""
    for method in METHODS:
        for members in (tuple(domains), *combinations(domains, 2)):
            for merge in FLOAT_MERGES:
                yield Rival(members, merge, method)


@cache
def graphs() -> GraphCache:
    """Shared by all calibrations: there is one model."""
    return GraphCache()


def _learning(method: str, task: Task, rate: float) -> dict[str, Any]:
    """Options of the methods that learn."""
    return {"iters": task.learning["qdrop"]["iters"], "lr": rate} if method == "qdrop" else {}


def quantized(rival: Rival, task: Task, run: Path, rate: float) -> tuple[Bundle, float]:
    """The bundle of a rival, made anew, and the CPU seconds of its calibration."""
    folder = run / "rivals"
    checkpoint = folder / f"{'+'.join(rival.members)}-{rival.merge}.safetensors"
    if not checkpoint.exists():
        save_file(Bundle.open(bundle_path(run, rival.float_cell)).tensors(), checkpoint)
    domains = [domain for domain in task.domains if domain.name in rival.members]
    method = "qdrop" if rival.method == "qdrop" else "gptq"
    request = CalibrationRequest(
        model=task.model,
        data=[domain.images for domain in domains],
        domain=tuple(domain.name for domain in domains),
        output=folder / f"{rival.name}.hdrq",
        weights=checkpoint,
        method=method,
        wbits=4,
        abits=8,
        per_channel=True,
        options=Options.of(method, **_learning(method, task, rate)),
        images=task.images,
        wanted=task.wanted,
        statistics="off",
    )
    begun = time.process_time()
    if rival.method == "experts":
        guide = ExpertTargets({domain.name: domain.weights for domain in domains})
        bundle = calibrate_with_experts(request, guide, graphs())
    else:
        bundle = run_calibration(request, graphs())
    return bundle, time.process_time() - begun


def evaluated(rival: Rival, task: Task, run: Path, rate: float) -> dict[str, Any]:
    """The row of a rival on the test images, kept on disk."""
    target = run / "rivals" / f"{rival.name}.json"
    if target.exists():
        refuse_other_options(target.with_suffix(".hdrq"), **_learning(rival.method, task, rate))
        row: dict[str, Any] = json.loads(target.read_text())
        return row
    bundle, seconds = quantized(rival, task, run, rate)
    row = {
        "members": rival.members,
        "merge": FLOAT_MERGES[rival.merge],
        "method": rival.method,
        **figures_of(bundle, task, rival.members),
        "cpu_seconds": round(seconds, 1),
    }
    return keep_row(row, target)


def main(argv: Sequence[str] | None = None) -> int:
    """Quantize every merge, measure it, and write JSON."""
    parser = arguments(__doc__)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    run = args.run.absolute()
    (run / "rivals").mkdir(exist_ok=True)
    task = task_of(args)
    rate = chosen_rates(json.loads((run / TUNING).read_text()))["ours-qdrop-w4a4"]
    rows = []
    for rival in rivals([domain.name for domain in task.domains]):
        if args.collect and not (run / "rivals" / f"{rival.name}.json").exists():
            continue
        rows.append(evaluated(rival, task, run, rate))
        print(rival.name, round(rows[-1]["harmonic_mean"], 1), flush=True)
    about = {
        "bits": "w4a8",
        "iterations_per_block": task.learning["qdrop"]["iters"],
        "rates": {"qdrop": rate},
        "experts": {"targets": ExpertTargets({}).targets, "anchor": ExpertTargets({}).anchor},
    }
    write(args.results / "pacs_rivals.json", rows, about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
