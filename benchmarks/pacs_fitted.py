"""Merges of bundles that are fitted to their parents' outputs, on photographs and drawings.

    python benchmarks/pacs_fitted.py --data PACS/ --weights efficientnet-lite0.pth \
        --run build/pacs --results benchmarks/results

``--run`` is the folder of ``hdrq reproduce pacs --pairs``, whose splits, bundles and merges (by
regression, BatchNorm re-estimated) are used. Each merge is fitted with
:func:`hdrq_deploy.merging.fit` on calibration images of its domains, as many as the bundles were
calibrated with, at the anchor that was best on the digits (``merge_rivals.py --tune``); nothing was
chosen on the test images. Engines are measured on them as cells of the run are. A finished row is
not made again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pacs_run import arguments, measured, task_of, write

from hdrq_deploy import Bundle
from hdrq_deploy.calibration_data.readers import Wanted, read
from hdrq_deploy.experiments.grid import Merge, Run, bundle_path
from hdrq_deploy.experiments.tasks import Task
from hdrq_deploy.merging.fitting import ANCHOR, fit

BITS = ((4, 8), (4, 4))
METHODS = ("qdrop", "hdrq")
FOLDER = "fitted"


@dataclass(frozen=True)
class Fitted:
    """A merge of one calibration's bundles that is fitted."""

    run: Run
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.run.name}-{'+'.join(self.members)}"

    def bundles(self, out: Path) -> tuple[Bundle, list[Bundle]]:
        """The merge, and its parents."""
        merge = Merge(self.run, self.members, "renewed", 1).cell(0)
        parents = [Bundle.open(bundle_path(out, self.run.single(m))) for m in self.members]
        return Bundle.open(bundle_path(out, merge)), parents


def grid(domains: Sequence[str]) -> Iterator[Fitted]:
    """All rows, the merge of all domains first."""
    for wbits, abits in BITS:
        for members in (tuple(domains), *combinations(domains, 2)):
            for method in METHODS:
                yield Fitted(Run("ours", method, wbits, abits, 0), members)


def fitted_bundle(fitted: Fitted, task: Task, out: Path) -> tuple[Bundle, float]:
    """The fitted merge, made anew, and the CPU seconds of its fit."""
    merge, parents = fitted.bundles(out)
    wanted = Wanted.like(merge.manifest.preprocessing)
    images = {
        domain.name: read(domain.images, wanted, task.images).x
        for domain in task.domains
        if domain.name in fitted.members
    }
    begun = time.process_time()
    bundle = fit(merge, parents, images, out / FOLDER / f"{fitted.name}.hdrq")
    return bundle, time.process_time() - begun


def evaluated(fitted: Fitted, task: Task, out: Path) -> dict[str, Any]:
    """The row of a fitted merge on the test images, kept on disk."""
    about = {"method": fitted.run.method, "bits": fitted.run.bits}
    target = out / FOLDER / f"{fitted.name}.json"
    return measured(target, task, fitted.members, lambda: fitted_bundle(fitted, task, out), about)


def main(argv: Sequence[str] | None = None) -> int:
    """Fit every merge, measure it, and write JSON."""
    args = arguments(__doc__).parse_args(argv)
    out = args.run.absolute()
    (out / FOLDER).mkdir(exist_ok=True)
    task = task_of(args)
    rows, missing = [], []
    for fitted in grid([domain.name for domain in task.domains]):
        if args.collect and not (out / FOLDER / f"{fitted.name}.json").exists():
            missing.append(fitted.name)
            continue
        rows.append(evaluated(fitted, task, out))
        print(fitted.name, round(rows[-1]["harmonic_mean"], 1), flush=True)
    about = {"images": task.images, "anchor": ANCHOR, "seeds": [0], "missing": missing}
    write(args.results / "pacs_fitted.json", rows, about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
