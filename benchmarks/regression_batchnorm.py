"""Regression in front of the BatchNorm behind a layer, as it was, beside regression behind it.

    python benchmarks/regression_batchnorm.py BEFORE

``BEFORE`` is a folder with the records ``pacs_wide.json``, ``pacs_resnet.json`` and
``camvid_weather.json`` as an earlier version made them, from the same bundles and images as those
in ``benchmarks/results/``. Rows of both are put side by side.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.records import write_record

RESULTS = Path(__file__).resolve().parent / "results"
RECORDS = {
    "pacs_wide": "PACS, EfficientNet-Lite0",
    "pacs_resnet": "PACS, residual network",
    "camvid_weather": "CamVid",
}
# Ways whose weights are a regression's; new moments follow it in the second kind.
WAYS = ("regression", "renewed", "renewed-w4", "renewed-w3")


def rows_of(
    before: Mapping[str, Any], after: Mapping[str, Any], images: str
) -> Iterator[dict[str, Any]]:
    """Rows that both records have, with the harmonic means of both.

    Raises:
        SystemExit: The records are of other checkpoints, or their averages differ: then more
            than the regression is another.
    """
    if before["checkpoints_sha256"] != after["checkpoints_sha256"]:
        raise SystemExit(f"{images}: found records of other checkpoints; needed the same bundles")
    earlier = {_key(row): row for row in before["rows"]}
    for row in after["rows"]:
        other = earlier.get(_key(row))
        if other is None or row["setting"] != "ours":
            continue
        values = [r["merged"]["harmonic mean"]["mean"] for r in (other, row)]
        if row["way"] == "nearest" and abs(values[0] - values[1]) > 1e-9:
            raise SystemExit(
                f"{images}: found averages of {row['method']} {row['bits']} that differ, "
                f"{values[0]} and {values[1]}; needed records of the same bundles"
            )
        if row["way"] in WAYS:
            same = {name: row[name] for name in ("method", "bits", "way", "members")}
            yield {"images": images, **same, "before": values[0], "after": values[1]}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("setting", "method", "bits", "way")) + tuple(row["members"])


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``regression_batchnorm.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    args = parser.parse_args(argv)
    records = {
        name: [
            json.loads((folder / f"{name}.json").read_text()) for folder in (args.before, RESULTS)
        ]
        for name in RECORDS
    }
    rows = [
        row
        for name, (before, after) in records.items()
        for row in rows_of(before, after, RECORDS[name])
    ]
    record = {
        "schema_version": 1,
        "kind": "hdrq-regression-batchnorm",
        "environment": records["pacs_wide"][1]["environment"],
        "rows": rows,
    }
    target = RESULTS / "regression_batchnorm.json"
    write_record(target, record)
    print(os.fspath(target))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
