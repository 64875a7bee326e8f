"""Merges of bundles that are fitted to their parents' outputs, on photographs and drawings.

    python benchmarks/pacs_fitted.py --data PACS/ --weights efficientnet-lite0.pth \
        --run build/pacs --results benchmarks/results

``--run`` is the folder of ``hdrq reproduce pacs --pairs``, whose splits, bundles and merges (by
regression, BatchNorm re-estimated) are used. Each merge is fitted with :func:`hdrq_deploy.fit` on
calibration images of its domains, as many as the bundles were calibrated with, at the anchor that
was best on the digits (``merge_rivals.py --tune``); nothing was chosen on the test images. Engines
are measured on them as cells of the run are. A finished row is not made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pacs_run import arguments, task_of, write

from hdrq_deploy import Bundle
from hdrq_deploy.calibration_data.readers import Wanted, read
from hdrq_deploy.experiments.cells import engine_of, labelled_set
from hdrq_deploy.experiments.decisions import Decisions
from hdrq_deploy.experiments.grid import Merge, Run, bundle_path
from hdrq_deploy.experiments.tasks import Task
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.merging.fitting import ANCHOR, fit
from hdrq_deploy.numerics.intervals import Bootstrap
from hdrq_deploy.runtime.bench.accuracy import accuracy

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


def evaluated(fitted: Fitted, task: Task, out: Path) -> dict[str, Any]:
    """The row of a fitted merge on the test images, kept on disk."""
    target = out / FOLDER / f"{fitted.name}.json"
    if target.exists():
        row: dict[str, Any] = json.loads(target.read_text())
        return row
    merge, parents = fitted.bundles(out)
    domains = {d.name: d for d in task.domains if d.name in fitted.members}
    wanted = Wanted.like(merge.manifest.preprocessing)
    images = {n: read(d.images, wanted, task.images).x for n, d in domains.items()}
    begun = time.process_time()
    bundle = fit(merge, parents, images, out / FOLDER / f"{fitted.name}.hdrq")
    seconds = time.process_time() - begun
    seen = Decisions()
    with engine_of(bundle, "cpu", 1) as engine:
        sets = {name: labelled_set(engine, task, domain) for name, domain in domains.items()}
        found = accuracy(engine, sets, seen=seen)
    boot = Bootstrap()
    limits = boot.interval(boot.sample({0: [seen.measured]}))
    row = {
        "method": fitted.run.method,
        "bits": f"w{fitted.run.wbits}a{fitted.run.abits}",
        "members": fitted.members,
        "domains": {name: 100 * value for name, value in found.domains.items()},
        "harmonic_mean": 100 * limits.value,
        "low": 100 * limits.low,
        "high": 100 * limits.high,
        "cpu_seconds": round(seconds, 1),
    }
    write_bytes(target, json.dumps(row).encode())
    return row


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
