"""What HDRQ's distance to the source does on photographs and drawings, at the rate of one search.

    python benchmarks/pacs_distance.py --data PACS/ --weights efficientnet-lite0.pth \
        --run build/pacs --rate 0.00316 --results benchmarks/results

``--run`` is the folder of ``hdrq reproduce pacs --tune w4a4``, whose splits, checkpoints and float
bundles are used. Every distance of ``DISTANCES`` is one more trial of its search of rates (W4A4,
seed 0, iterations of that run): calibrated without the images that are held out, merged, and judged
on them. No test image is read. Trials that are there are not made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from pacs_run import arguments, task_of, write

from hdrq_deploy.calibration.settings import SETTINGS
from hdrq_deploy.experiments.cells import CellContext
from hdrq_deploy.experiments.grid import Run, bundle_path
from hdrq_deploy.experiments.tuning import Trial, trial_path, try_rate

# Form and weight of the distance; that of the run's own cells first.
DISTANCES = (("relative", 0.3), ("relative", 0.1), ("norm", 0.05), ("relative", 0.03))


def main(argv: Sequence[str] | None = None) -> int:
    """Try every distance, and write JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rate", type=float, required=True, help="that the search chose")
    parser.add_argument("--iters", type=int, default=200)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    run = args.run.absolute()
    task = task_of(args).calibrated_with(iters=args.iters, batch=None)
    trial = Trial(Run("ours", "hdrq", 4, 4, 0), args.rate)
    ours, rows = SETTINGS["ours"], []
    for form, weight in DISTANCES:
        out = run / "distances" / f"{form}-{weight:g}"
        (out / "tuning").mkdir(parents=True, exist_ok=True)
        (out / "cells").mkdir(exist_ok=True)
        for domain in task.domains:
            place = bundle_path(out, f"float-{domain.name}")
            if not place.exists():
                place.symlink_to(bundle_path(run, f"float-{domain.name}"))
        options = {"distance_form": form, "distance": weight}
        SETTINGS["ours"] = replace(ours, distance=options)
        if not args.collect:
            try_rate(CellContext(task, out), trial)
        if trial_path(out, trial).exists():
            found = json.loads(trial_path(out, trial).read_text())
            kept = ("rate", "score", "merged", "single", "decisions", "images")
            rows.append({**options, **{key: found[key] for key in kept}})
            print(form, weight, found["score"], flush=True)
    about = {
        "iterations_per_block": args.iters,
        "bits": "w4a4",
    }
    write(args.results / "pacs_distance.json", rows, about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
