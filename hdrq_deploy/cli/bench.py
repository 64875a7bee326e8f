"""``hdrq-bench``: latency, and accuracy per domain, of one or more engines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..files import write_bytes
from ..runtime import benchmark
from ..runtime.power import Energy
from ..runtime.report import need_matplotlib, page, table
from .common import named, parser, run


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq-bench", "Measure engines: latency, and accuracy per domain.")
    p.add_argument("engines", nargs="+", help="engine folders from hdrq-export")
    p.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH", help="labelled images of each domain"
    )
    p.add_argument("--warmup", type=int, default=10, help="calls before the clock counts")
    p.add_argument("--iterations", type=int, default=100, help="timed calls")
    p.add_argument("--batch", type=int, default=1, help="images per call")
    p.add_argument("--threads", type=int, default=0, help="0: one per core")
    p.add_argument(
        "--energy",
        action="store_true",
        help="joules per call, idle subtracted (RAPL, INA3221 or NVML)",
    )
    p.add_argument("--skip-corrupt", action="store_true", help="leave out broken images")
    p.add_argument("--json", type=Path, help="write the result (a list for several engines)")
    p.add_argument("--html", type=Path, help="write a report, one file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-bench``."""
    args = arguments().parse_args(argv)
    return run("hdrq-bench", lambda: _bench(args))


def _bench(args: argparse.Namespace) -> int:
    if args.html:
        need_matplotlib()
    data = named(args.data)
    rows = []
    for engine in args.engines:  # one session alive at a time: idle pools disturb each other
        result = benchmark(
            engine,
            data,
            args.warmup,
            args.iterations,
            args.batch,
            args.threads,
            args.skip_corrupt,
            args.energy,
        )
        rows.append((Path(engine).name or str(engine), result))
    print_table(*table(rows))
    if args.energy:
        for name, result in rows:
            print(f"{name}: energy {_energy(result.energy)}")
    if args.json:
        results = [json.loads(result.model_dump_json()) for _, result in rows]
        text = json.dumps(results[0] if len(results) == 1 else results, indent=1) + "\n"
        write_bytes(args.json, text.encode())
    if args.html:
        write_bytes(args.html, page("hdrq-bench", rows).encode())
    return 0


def _energy(found: Energy | str) -> str:
    if isinstance(found, str):
        return f"{found} (no RAPL, INA3221 or NVML counter can be read here)"
    rails = ", ".join(found.rails)
    return (
        f"{1000 * found.joules_per_inference:.2f} mJ a call beyond idling at "
        f"{found.idle_watts:.1f} W ({rails}; sampled every {1000 * found.period_s:.0f} ms)"
    )


def print_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a plain table, as wide as it needs to be."""
    made = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        made.add_column(
            name, justify="left" if i in {0, len(header) - 1} else "right", no_wrap=True
        )
    for row in cells:
        made.add_row(*row)
    console = Console()
    Console(width=max(console.width, 160) if not console.is_terminal else None).print(made)


__all__ = ["arguments", "main", "print_table"]
