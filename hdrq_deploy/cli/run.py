"""``hdrq run``: make what is stale of all that a run file asks for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .start import importing, run

with importing("hdrq run"):
    from ..formats.atomic_files import alone_in, make_directory
    from ..jobs.pool import open_pool
    from ..reports.bench_page import table
    from ..reports.verdict import did_it_pay
    from ..runfile.loading import Loaded, load
    from ..runfile.plan import KINDS, Planned, plan, stages_of
    from ..runfile.preflight import preflight
    from ..runfile.results import BenchStage, left_out, rows_of, verified
    from ..runfile.running import check, execute, prepare
    from ..runfile.schema import schema
    from ..runfile.stage import Stage
    from .bench import print_table
    from .common import parser, threads_of, where_flags
    from .stage_table import StageTable

__all__ = ["Where", "arguments", "main", "make"]

_TEXT = (
    "Adapt, calibrate, merge, export and measure what a run file asks for. Only what is missing "
    "or stale is made: where a checkpoint, images, options, a library or this package changed."
)
_EXAMPLE = """\
hdrq run hdrq.yaml --dry-run
hdrq run hdrq.yaml --workers 2"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq run", _TEXT, _EXAMPLE)
    p.add_argument("file", nargs="?", default="hdrq.yaml", help="run file, YAML or JSON")
    p.add_argument(
        "--out", type=Path, help="folder of all results (default: NAME-run beside the file)"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="say what would be made and why; make nothing"
    )
    p.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="STAGE",
        help=f"make these stages ({', '.join(KINDS)}) and what they read",
    )
    p.add_argument("--schema", action="store_true", help="print the file's JSON schema and stop")
    where_flags(p.add_argument_group("where it runs"))
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq run``."""
    kept = "finished stages are kept; the same command resumes"
    return run("hdrq run", lambda: _run(arguments().parse_args(argv)), kept)


def _run(args: argparse.Namespace) -> int:
    if args.schema:
        print(schema(), end="")
        return 0
    loaded = load(args.file, args.out)
    threads = threads_of(args.threads, args.workers, args.ray, args.gpus)
    stages = stages_of(loaded, threads)
    if args.dry_run:
        _explain(plan(stages, args.only))
        return 0
    make(loaded, stages, args.only, Where(args.workers, threads, args.ray, args.gpus))
    return 0


@dataclass(frozen=True)
class Where:
    """Where stages run; see :func:`..jobs.pool.open_pool`."""

    workers: int = 1
    threads: int = 1
    ray: str | None = None
    gpus: float = 0.0


def make(loaded: Loaded, stages: Sequence[Stage], only: Sequence[str], where: Where) -> None:
    """Make what is stale, show a table of stages meanwhile and that of the results at the end.

    Args:
        loaded: The run file.
        stages: All its stages.
        only: Kinds or names of the stages that are asked for; all by default.
        where: Where the work is done.

    Raises:
        HdrqError: With file and line where a line of the file is the cause.
    """
    planned = plan(stages, only)
    check(loaded, [row.stage for row in planned])
    preflight(loaded, planned)
    make_directory(loaded.out)
    with alone_in(loaded.out):
        prepare(loaded, stages)
        stale = {row.stage.key for row in planned if row.why}
        if stale:
            by_key = {row.stage.key: row.stage for row in planned}
            with (
                StageTable(by_key, stale) as shown,
                open_pool(where.workers, where.threads, where.ray, loaded.out, where.gpus) as pool,
            ):
                shown.room = pool.room
                execute(loaded, planned, pool, shown.ended, shown.begun)
        else:
            print(f"all {len(planned)} stages are up to date", file=sys.stderr)
        _show(loaded, [row.stage for row in planned])


def _explain(planned: Sequence[Planned]) -> None:
    stale = [row for row in planned if row.why]
    for row in stale:
        print(f"{row.stage.key}: {row.why}")
    print(f"{len(stale)} of {len(planned)} stages would be made")


def _show(loaded: Loaded, stages: Sequence[Stage]) -> None:
    """The table of results, where they were asked for."""
    bench = next((stage for stage in stages if isinstance(stage, BenchStage)), None)
    if bench is None:
        print(loaded.out)
        return
    rows = rows_of(bench.output)
    if rows:
        print_table(*table(rows))
        for line in did_it_pay(rows):
            print(line)
    for label, why in left_out(bench.output).items():
        print(f"{label}: {why}")
    for line in verified(bench.output):
        print(line)
    if rows:
        print(f"\nReport: {bench.report}")
    print(f"Results: {bench.output}; bundles and engines: {loaded.out}")
