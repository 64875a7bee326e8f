"""Choose rates anew from the trials of a search, by single models in place of merged ones.

    python benchmarks/rates_by_singles.py pacs_paper_tuning pacs_paper_singles_tuning

``hdrq reproduce --tune`` chooses the rate whose bundles merge best. Where every merge is near a
guess, as in the paper's setting on PACS, this says little of the models. Both records stand in
``benchmarks/results``; nothing is calibrated, and ``--rates`` takes either.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.records import RESULTS, needed, write_record

from hdrq_deploy.errors import SpecError

_CRITERION = (
    "cross entropy of each single model with its domain's float expert on held-out calibration "
    "images of that domain, nats, mean over the domains"
)


def chosen_anew(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a search with the rates that are best for single models.

    Args:
        record: As ``tuning.json`` of ``hdrq reproduce`` holds it.

    Returns:
        A copy, whose trials have the mean of ``single`` for a score; ``is_at_edge`` follows it.

    Raises:
        SpecError: No single model of a search gave finite outputs.
    """
    searches = []
    for search in record["searches"]:
        tried = [
            {**trial, "score": statistics.fmean(trial["single"].values())}
            for trial in search["tried"]
        ]
        usable = [trial for trial in tried if math.isfinite(trial["score"])]
        if not usable:
            raise SpecError(
                f"{search['method']} {search['bits']}: found no trial whose single models give "
                "finite outputs; needed one: search other rates"
            )
        best = min(usable, key=lambda trial: trial["score"])
        searches.append(
            {
                **search,
                "tried": tried,
                "chosen": best["rate"],
                "is_at_edge": best in (tried[0], tried[-1]),
            }
        )
    protocol = {**record["protocol"], "criterion": _CRITERION}
    return {**record, "protocol": protocol, "searches": searches}


def main(argv: Sequence[str] | None = None) -> int:
    """Choose, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("search", help="the name of a record")
    parser.add_argument("target", help="the name of the record to write")
    args = parser.parse_args(argv)
    write_record(RESULTS / f"{args.target}.json", chosen_anew(needed(args.search)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
