"""Fitted merges that round 8-bit bundles to 4 bits, beside those of bundles that had 4 bits before.

    python benchmarks/late_rounding.py OUT

``OUT`` is the folder of a run of ``hdrq reproduce pacs`` in our setting, whose cells keep their
decisions: merges of ``fitted-w4`` less merges of ``fitted``, with the same bits of activations, on
the same test images.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evidence.records import write_record

from hdrq_deploy.experiments.decisions import unpacked
from hdrq_deploy.experiments.grid import Merge, Run, parse_bits, read_row
from hdrq_deploy.numerics.intervals import Bootstrap, Sample

RESULTS = Path(__file__).resolve().parent / "results"
LATE, EARLY = "fitted-w4", "fitted"
SEEDS = range(8)


def sample_of(out: Path, row: Mapping[str, Any], boot: Bootstrap) -> Sample:
    """The decisions of a row of ``results.json``, one run a calibration seed.

    Raises:
        SystemExit: Its cells keep none.
    """
    ((wbits, abits),) = parse_bits([row["bits"]])
    measured, members = {}, tuple(row["members"])
    for seed in SEEDS:
        run = Run(row["setting"], row["method"], wbits, abits, seed)
        cell = read_row(out, Merge(run, members, row["way"], 1).cell(0), members)
        decisions = unpacked(cell.get("decisions")) if cell else None
        if decisions:
            measured[seed] = [decisions]
    if not measured:
        raise SystemExit(f"{out}: found cells without decisions; run it again")
    return boot.sample(measured)


def rows_of(out: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every late merge beside every early one of the same domains and activations.

    Raises:
        SystemExit: The run has no such merges, or cells without decisions.
    """
    boot = Bootstrap()
    early = [
        (row, sample_of(out, row, boot))
        for row in rows
        if row["way"] == EARLY and row["bits"].startswith("w4")
    ]
    late = [(row, sample_of(out, row, boot)) for row in rows if row["way"] == LATE]
    if not late or not early:
        raise SystemExit(f"{out}: found no merges of {LATE} or of {EARLY} at W4; needed both")
    for row, first in late:
        for other, second in early:
            if row["members"] == other["members"] and row["bits"][2:] == other["bits"][2:]:
                yield {
                    "members": row["members"],
                    "late": _told(row, first),
                    "early": _told(other, second),
                    **asdict(boot.difference(first, second)),
                }


def _told(row: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
    return {"method": row["method"], "bits": row["bits"], "mean": sample.value}


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``late_rounding.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    run = json.loads((args.out / "results.json").read_text())
    record = {
        "schema_version": 1,
        "kind": "hdrq-late-rounding",
        "checkpoints_sha256": run["checkpoints_sha256"],
        "environment": run["environment"],
        "rows": list(rows_of(args.out, run["rows"])),
    }
    target = RESULTS / "late_rounding.json"
    write_record(target, record)
    print(os.fspath(target))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
