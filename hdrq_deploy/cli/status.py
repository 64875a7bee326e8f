"""``hdrq status``: what a run file asks for, and what of it is up to date."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .start import importing, run

with importing("hdrq status"):
    from ..runfile.loading import load
    from ..runfile.plan import Planned, plan, stages_of
    from .bench import print_table
    from .common import parser

__all__ = ["arguments", "main"]

_EXAMPLE = "hdrq status hdrq.yaml"


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq status", "Show all stages of a run file, and why one is stale.", _EXAMPLE)
    p.add_argument("file", nargs="?", default="hdrq.yaml", help="run file, YAML or JSON")
    p.add_argument(
        "--out", type=Path, help="folder of all results (default: NAME-run beside the file)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq status``."""
    return run("hdrq status", lambda: _status(arguments().parse_args(argv)))


def _status(args: argparse.Namespace) -> int:
    planned = plan(stages_of(load(args.file, args.out)))
    cells = [[row.stage.kind, row.stage.name, *_state(row)] for row in planned]
    print_table(["stage", "name", "state", "why"], cells)
    stale = sum(bool(row.why) for row in planned)
    print(f"{len(planned) - stale} of {len(planned)} stages are up to date")
    return 0


def _state(row: Planned) -> tuple[str, str]:
    """Whether a stage is stale; why, and what is done of it so far."""
    if not row.why:
        return "up to date", ""
    reached = row.stage.reached()
    return "stale", f"{row.why}; {reached} are done" if reached else row.why
