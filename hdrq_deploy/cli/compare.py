"""``hdrq compare``: two benchmarks, and whether the second is worse."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .start import importing, run

with importing("hdrq compare"):
    from rich.console import Console
    from rich.table import Table

    from ..errors import CheckFailed
    from ..formats.atomic_files import check_output, write_bytes
    from ..formats.file_kinds import COMPARE_JSON
    from ..runtime.bench.compare import Change, compare, read_result
    from .common import parser

__all__ = ["arguments", "main", "show"]


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser(
        "hdrq compare",
        "What changed between two hdrq-bench runs, with bootstrap intervals; exit code 3 on a "
        "regression beyond the tolerance.",
        "hdrq compare before.json after.json --tolerance 0.05",
    )
    p.add_argument("base", help="--json of hdrq-bench, before")
    p.add_argument("new", help="--json of hdrq-bench, now")
    p.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        help="relative loss of latency or size, absolute loss of accuracy, that is accepted",
    )
    p.add_argument(
        "--confidence", type=float, default=0.95, help="confidence level of the intervals"
    )
    p.add_argument("--json", help="file of the comparison")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq compare``."""
    return run("hdrq compare", lambda: _compare(arguments().parse_args(argv)))


def _compare(args: argparse.Namespace) -> int:
    if args.json is not None:
        check_output(args.json, COMPARE_JSON, [args.base, args.new], "json")
    base, new = read_result(args.base), read_result(args.new)
    changes = compare(base, new, args.tolerance, args.confidence)
    show(changes, args.confidence)
    if args.json:
        record = {
            "schema_version": 1,
            "kind": COMPARE_JSON.kind,
            "base": args.base,
            "new": args.new,
            "tolerance": args.tolerance,
            "confidence": args.confidence,
            "changes": [asdict(change) for change in changes],
        }
        text = json.dumps(record, indent=1) + "\n"
        write_bytes(Path(args.json).absolute(), text.encode(), COMPARE_JSON)
    worse = [change for change in changes if change.regression]
    if worse:
        first = worse[0]
        raise CheckFailed(
            f"found {len(worse)} of {len(changes)} metrics worse than the tolerance of "
            f"{args.tolerance:g} (first: {first.metric}, {first.base:.4g} to {first.new:.4g}, "
            f"{first.change:+.1%}); find the cause, or raise --tolerance"
        )
    return 0


def show(changes: Sequence[Change], confidence: float) -> None:
    """One line a metric."""
    table = Table()
    for column in ("metric", "before", "now", "change", f"{confidence:.0%} interval", "verdict"):
        table.add_column(column)
    for change in changes:
        table.add_row(
            change.metric,
            f"{change.base:.4g}",
            f"{change.new:.4g}",
            f"{change.change:+.1%}",
            f"{change.low:+.1%} to {change.high:+.1%}",
            change.verdict + (", a regression" if change.regression else ""),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
