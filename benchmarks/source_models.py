"""What a source model reaches on the other domains, before it is adapted to them.

    python benchmarks/source_models.py --data PACS/ --weights efficientnet-lite0.pth \
        --run build/pacs --results benchmarks/results
    python benchmarks/source_models.py --task camvid --targets dusk --data CamVid/ \
        --weights efficientnet-lite0.pth --run build/camvid

``--run`` is the folder of ``hdrq reproduce``, whose splits and source checkpoint are used. The
float model's engine is measured on the test images as cells of the run are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measured import measured_here
from pacs_run import arguments, figures_of, task_of, write

from hdrq_deploy.calibration.pipeline import run_calibration
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.experiments.real_images import PROTOCOLS
from hdrq_deploy.experiments.tasks import Task
from hdrq_deploy.formats.staleness import fingerprint


def measured(task: Task) -> dict[str, Any]:
    """What :func:`pacs_run.figures_of` says of the source model, and its domain."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = run_calibration(
            CalibrationRequest(
                model=task.model,
                data=task.domains[0].images,
                domain="source",
                output=Path(scratch) / "source.hdrq",
                weights=task.source,
                method="float",
                images=task.images,
                wanted=task.wanted,
                statistics="off",
            )
        )
        names = [domain.name for domain in task.domains]
        return {"source": task.source_domain, **figures_of(bundle, task, names)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write JSON."""
    parser = arguments(__doc__, collects=False)
    parser.add_argument("--task", default="pacs", choices=PROTOCOLS)
    parser.add_argument("--targets", nargs="+", default=(), help="domains (all that there are)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    task = task_of(args, args.task, args.targets)
    about = {"checkpoints_sha256": {"source": fingerprint(Path(task.source))}}
    write(args.results / f"{args.task}_source.json", [measured_here(measured(task))], about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
