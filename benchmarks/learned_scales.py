"""How far HDRQ's learning moved the scales of weights in the paper's setting.

    python benchmarks/learned_scales.py --run pacs=OUT --run camvid=OUT --run camvid=OTHER

``OUT`` are folders of ``hdrq reproduce TASK --settings paper`` with bundles of ``hdrq`` and ``rtn``
at the same bits, and the ``results.json`` that it ends with; a task may have several, of one
training of its checkpoints and of other rates. A row is a bundle, the rate at which it learned, and
the layer whose scale is the most times that of rounding to nearest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.records import write_record
from measured import current_environment

from hdrq_deploy import Bundle
from hdrq_deploy.calibration.methods import Options
from hdrq_deploy.errors import SpecError
from hdrq_deploy.experiments.grid import bundle_path

_SUFFIX = ".weight_scale"


def rows_of(task: str, out: Path) -> list[dict[str, Any]]:
    """Compare scales, and give the rows of a run's bundles of calibration seed 0.

    Raises:
        SpecError: There are none, or one has no bundle of ``rtn`` beside it.
    """
    rows = []
    for path in sorted((out / "cells").glob("paper-hdrq-w*-s0-*.hdrq")):
        _, _, bits, _, domain = path.stem.split("-", 4)
        if "+" in domain:  # a merge
            continue
        rounded = bundle_path(out, f"paper-rtn-{bits}-s0-{domain}")
        if not rounded.exists():
            raise SpecError(f"{path}: found no {rounded.name} beside it; needed one: run rtn too")
        bundle = Bundle.open(path)
        learned, nearest = bundle.tensors(), Bundle.open(rounded).tensors()
        times = {
            name.removesuffix(_SUFFIX): float(np.max(learned[name] / nearest[name]))
            for name in learned
            if name.endswith(_SUFFIX)
        }
        layer = max(times, key=lambda name: times[name])
        row = {
            "task": task,
            "bits": bits,
            "domain": domain,
            "rate": float(f"{_rate(bundle.manifest.options):.3g}"),
            "layer": layer,
            "times_rtn": round(times[layer], 2),
            "median_times_rtn": round(float(np.median(list(times.values()))), 3),
        }
        rows.append(row)
    if not rows:
        raise SpecError(f"{out}: found no bundles of hdrq in the paper's setting; needed some")
    return rows


def _rate(options: Mapping[str, Any]) -> float:
    """The rate of a bundle as searches call it, raised for fewer iterations than the paper's."""
    names = ("lr", "iters", "scale_rates")
    used = Options.of("hdrq", **{name: options[name] for name in names})
    return used.lr * used.rate_factor


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="append", required=True, metavar="TASK=OUT")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    checkpoints: dict[str, Any] = {}
    for text in args.run:
        task, _, out = text.partition("=")
        if not out:
            parser.error(f"--run: found {text!r}; needed TASK=OUT")
        rows += rows_of(task, Path(out).absolute())
        found = json.loads((Path(out) / "results.json").read_text())["checkpoints_sha256"]
        if checkpoints.setdefault(task, found) != found:
            raise SpecError(
                f"{out}: found bundles of other checkpoints than an earlier --run {task}; needed "
                "runs of one training"
            )
    record = {
        "schema_version": 1,
        "checkpoints_sha256": checkpoints,
        "environment": current_environment(),
        "rows": rows,
    }
    write_record(args.results / "learned_scales.json", record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
