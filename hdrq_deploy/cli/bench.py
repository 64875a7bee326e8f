"""``hdrq-bench``: latency, and accuracy per domain, of one or more engines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

from .start import importing, run

with importing("hdrq-bench"):
    from rich.console import Console
    from rich.table import Table

    from ..errors import CheckFailed, HdrqError
    from ..formats.atomic_files import check_container, check_outputs, check_scratch, write_bytes
    from ..formats.bench_result import BenchResult, Energy, Scenario
    from ..formats.file_kinds import BENCH_CSV, BENCH_HTML, BENCH_JSON, PICTURE
    from ..formats.findings import Findings
    from ..reports.bench_page import Details, csv_text, page, phase_table, table
    from ..reports.verdict import did_it_pay
    from ..runtime.bench.measurement import benchmark_all
    from ..runtime.bench.segmentation_images import picture_names
    from ..runtime.bench.timing import BenchPlan
    from .common import named, parser


_TEXT = (
    "Measure engines: latency and its phases, accuracy per domain. Several engines take turns, and "
    "are compared with the first float one."
)
_EXAMPLE = """\
hdrq-bench engine --data night=test/night day=test/day --json bench.json --html bench.html"""
# Calls of a plan where a flag is not given.
_PLAN = {field.name: field.default for field in fields(BenchPlan)}


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq-bench", _TEXT, _EXAMPLE)
    what = p.add_argument_group("engines and images")
    what.add_argument("engines", nargs="*", help="engine folders from hdrq-export")
    what.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH", help="labelled images of each domain"
    )
    _result_flags(p.add_argument_group("what is written"))
    _timing_flags(p.add_argument_group("how it is measured"))
    _machine_flags(p.rarely_used("where it runs"))
    _check_flags(p.rarely_used("more measurements and checks"))
    _scene_flags(p.rarely_used("images"))
    return p


def _result_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", type=Path, help="file of the result (a list for several engines)")
    group.add_argument("--csv", type=Path, help="file with one line an engine")
    group.add_argument("--html", type=Path, help="a report, one file")
    group.add_argument("--schema", action="store_true", help="print the JSON schema and stop")


def _timing_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch",
        type=int,
        help="images per call (default: 1; multistream: the streams; offline: 32)",
    )
    group.add_argument(
        "--iterations", type=int, default=_PLAN["iterations"], help="timed queries, at least"
    )
    group.add_argument(
        "--duration", type=float, default=_PLAN["duration"], help="seconds timed, at least"
    )
    group.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one per core")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda[:N], tensorrt[:N]")


def _machine_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scenario",
        choices=get_args(Scenario),
        default=_PLAN["scenario"],
        help="MLPerf's: query after query of one sample, or of --streams; or all at once",
    )
    group.add_argument(
        "--streams", type=int, default=_PLAN["streams"], help="samples in a multistream query"
    )
    group.add_argument(
        "--warmup", type=int, default=_PLAN["warmup"], help="calls before the clock counts"
    )
    group.add_argument(
        "--cache",
        "--runtime-cache",
        type=Path,
        metavar="PATH",
        help="where a folder of OpenVINO or a file of TensorRT-RTX keeps what is compiled at load "
        "(default: nothing is kept)",
    )
    group.add_argument("--no-cuda-graph", action="store_true", help="enqueue work call by call")


def _check_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--reference", help="engine whose decisions these are compared with")
    group.add_argument(
        "--percentiles",
        type=float,
        nargs="+",
        default=[],
        help="percentiles of latency beside 50, 90 and 99",
    )
    group.add_argument(
        "--energy",
        action="store_true",
        help="joules per call, idle subtracted (RAPL, INA3221 or NVML)",
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="refuse a run (exit code 3, nothing written) that was throttled, changed its clock "
        "or had a noisy neighbour",
    )


def _scene_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--split", default="val", help="split of street scenes that is measured")
    group.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="street scenes are brought to this; windows cover what is larger than the input",
    )
    group.add_argument(
        "--draw", type=Path, help="folder for pictures of image, labels, found labels"
    )
    group.add_argument("--skip-corrupt", action="store_true", help="leave out broken images")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-bench``."""
    return run("hdrq-bench", lambda: _bench(arguments().parse_args(argv)))


def schema() -> str:
    """The JSON schema of one result."""
    return json.dumps(BenchResult.model_json_schema(), indent=1) + "\n"


def _bench(args: argparse.Namespace) -> int:
    if args.schema:
        print(schema(), end="")
        return 0
    if not args.engines:
        raise HdrqError("found no engine; needed one or more folders from hdrq-export")
    data = named(args.data)
    _check_outputs(args, data)
    check_scratch()
    plan = BenchPlan(
        args.scenario,
        args.warmup,
        args.iterations,
        args.duration,
        args.batch,
        args.streams,
        tuple(args.percentiles),
    )
    found: dict[str, Findings] = {}
    results = benchmark_all(
        args.engines,
        data,
        plan,
        threads=args.threads,
        skip_corrupt=args.skip_corrupt,
        energy=args.energy,
        device=args.device,
        cuda_graph=not args.no_cuda_graph,
        reference=args.reference,
        split=args.split,
        image_size=tuple(args.image_size) if args.image_size else None,
        draw=args.draw,
        cache=args.cache,
        found=found if args.html else None,
    )
    rows = list(zip(_names(args.engines), results, strict=True))
    _show(rows, args.energy)
    marks = [f"{name}: {mark}" for name, result in rows for mark in result.marks]
    if marks and args.strict:
        raise CheckFailed(
            f"found {'; '.join(marks)}; needed an undisturbed run for --strict: stop other work, "
            "fix the clock, let the device cool, and measure again"
        )
    _write(args, rows, found)
    return 0


def _check_outputs(args: argparse.Namespace, data: dict[str, str]) -> None:
    inputs = [*args.engines, args.reference, *data.values()]
    kinds = (("json", BENCH_JSON), ("csv", BENCH_CSV), ("html", BENCH_HTML))
    given = [(getattr(args, name), kind, name) for name, kind in kinds]
    check_outputs([(path, kind, name) for path, kind, name in given if path is not None], inputs)
    if args.draw is not None:
        files = [(name, PICTURE) for domain in data for name in picture_names(domain)]
        check_container(args.draw, files, inputs, "draw")


def _names(paths: Sequence[str]) -> list[str]:
    """Names of the folders, or whole paths where those are not different."""
    names = [Path(path).name or path for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _show(rows: list[tuple[str, BenchResult]], energy: bool) -> None:
    times = rows[0][1].latency_ms
    print_table(*table(rows))
    print(f"\nmedian ms: {times.what}, batch {times.batch}; phases in calls of their own:")
    print_table(*phase_table(rows))
    for line in did_it_pay(rows):
        print(line)
    for name, result in rows:
        if result.cuda_graph is not None:
            print(f"{name}: CUDA graph {result.cuda_graph}")
        if energy:
            print(f"{name}: energy {_energy(result.energy)}")
        for mark in result.marks:
            print(f"{name}: doubtful, {mark}")


def _write(
    args: argparse.Namespace, rows: list[tuple[str, BenchResult]], found: dict[str, Findings]
) -> None:
    if args.json:
        results = [json.loads(result.model_dump_json()) for _, result in rows]
        text = json.dumps(results[0] if len(results) == 1 else results, indent=1) + "\n"
        write_bytes(args.json.absolute(), text.encode(), BENCH_JSON)
    if args.csv:
        write_bytes(args.csv.absolute(), csv_text(rows).encode(), BENCH_CSV)
    if args.html:
        details = {name: Details.of(Path(r.path), found.get(r.path)) for name, r in rows}
        text = page("hdrq-bench", rows, details)
        write_bytes(args.html.absolute(), text.encode(), BENCH_HTML)


def _energy(energy: Energy | str) -> str:
    if isinstance(energy, str):
        return f"{energy} (no RAPL, INA3221 or NVML counter can be read here)"
    rails = ", ".join(energy.rails)
    return (
        f"{1000 * energy.joules_per_inference:.2f} mJ a call beyond idling at "
        f"{energy.idle_watts:.1f} W ({rails}; sampled every {1000 * energy.period_s:.0f} ms)"
    )


def print_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a plain table, as wide as it needs to be."""
    shown = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        shown.add_column(
            name, justify="left" if i in {0, len(header) - 1} else "right", no_wrap=True
        )
    for row in cells:
        shown.add_row(*row)
    console = Console()
    Console(width=max(console.width, 160) if not console.is_terminal else None).print(shown)


__all__ = ["arguments", "main", "print_table", "schema"]
