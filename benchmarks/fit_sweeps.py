"""How often should a fit go over the layers of a merge, and to whose outputs?

    python benchmarks/fit_sweeps.py --data PACS/ --weights efficientnet-lite0.pth \
        --run build/pacs --results benchmarks/results

``--run`` is the folder of ``hdrq reproduce pacs --settings ours``. Its merges of all domains by
regression at W4A4, of calibration seed 0, are fitted on calibration images: to what their parents
put out, or to what the float models do, in one to three sweeps. Every fourth image is held out, as
in that command's search of rates, and judges: cross entropy with the domain's float model, and how
often a merge decides as it does. No label and no test image is read. Rows that are there are not
made again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from measured import keep_row
from pacs_run import arguments, task_of, write

from hdrq_deploy import Bundle
from hdrq_deploy.calibration_data.readers import Wanted, read, spread
from hdrq_deploy.experiments.grid import Merge, Run, bundle_path
from hdrq_deploy.experiments.rate_search import agreements, hold_out
from hdrq_deploy.experiments.tasks import Task
from hdrq_deploy.merging import fit
from hdrq_deploy.typing import Array

METHODS = ("qdrop", "hdrq")
SWEEPS = (1, 2, 3)


def images_of(task: Task, like: Bundle) -> tuple[dict[str, Array], dict[str, Array]]:
    """The images of each domain (N, 3, H, W) that fits read, and those that judge them."""
    assert like.manifest.preprocessing is not None
    wanted = Wanted.like(like.manifest.preprocessing)
    fitted, judges = {}, {}
    for domain in task.domains:
        learned, held = hold_out(read(domain.images, wanted))
        rows = spread(len(learned), task.fit_images)
        fitted[domain.name], judges[domain.name] = learned.x[rows], held.x
    return fitted, judges


def evaluated(
    bundle: Bundle, floats: dict[str, Bundle], judges: dict[str, Array], about: dict[str, Any]
) -> dict[str, Any]:
    """How a merge agrees with the float model of every domain."""
    nats, shares = agreements(bundle, floats, judges)
    return {
        **about,
        "score": statistics.fmean(nats.values()),
        "nats": nats,
        "decisions": shares,
        "images": {name: len(rows) for name, rows in judges.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Fit every merge in every way, judge it, and write JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    run, task = args.run.absolute(), task_of(args)
    folder = run / "sweeps"
    folder.mkdir(exist_ok=True)
    names = tuple(domain.name for domain in task.domains)
    of_float = Run("ours", "float", 8, 8, 0)
    floats = {name: Bundle.open(bundle_path(run, of_float.single(name))) for name in names}
    fitted, judges = images_of(task, floats[names[0]])
    rows = []
    for method in METHODS:
        cell = Run("ours", method, 4, 4, 0)
        parents = [Bundle.open(bundle_path(run, cell.single(name))) for name in names]
        start = Bundle.open(bundle_path(run, Merge(cell, names, "regression", 1).cell(0)))
        ways = [("", 0), *((to, sweeps) for sweeps in SWEEPS for to in ("parents", "floats"))]
        for targets, sweeps in ways:
            about = {"parents": method, "bits": "w4a4", "targets": targets, "sweeps": sweeps}
            file = folder / f"{method}-{targets or 'none'}-{sweeps}.json"
            if not (file.exists() or args.collect) and method in args.methods:
                bundle, begun = start, time.process_time()
                if sweeps:
                    target = folder / f"{file.stem}.hdrq"
                    guides = list(floats.values()) if targets == "floats" else []
                    bundle = fit(start, parents, fitted, target, guides=guides, sweeps=sweeps)
                about["cpu_seconds"] = round(time.process_time() - begun, 1)
                keep_row(evaluated(bundle, floats, judges, about), file)
            if file.exists():
                rows.append(json.loads(file.read_text()))
                print(file.stem, round(rows[-1]["score"], 3), flush=True)
    fitted_on = {name: len(x) for name, x in fitted.items()}
    about = {"criterion": "mean over domains of nats", "images_fitted_on": fitted_on}
    write(args.results / "fit_sweeps.json", rows, about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
