"""What benchmarks on the folder of a run of ``hdrq reproduce pacs`` have in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hdrq_deploy import Bundle
from hdrq_deploy.experiments.cells import engine_of, labelled_set
from hdrq_deploy.experiments.decisions import Decisions
from hdrq_deploy.experiments.real_images import Choice, prepare
from hdrq_deploy.experiments.tasks import Task
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.numerics.intervals import Bootstrap
from hdrq_deploy.runtime.bench.accuracy import accuracy
from hdrq_deploy.runtime.bench.environment import environment

__all__ = ["arguments", "measured", "task_of", "write"]


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The flags of such a benchmark."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--collect", action="store_true", help="write the finished rows, no more")
    return parser


def task_of(args: argparse.Namespace) -> Task:
    """The task of the run."""
    choice = Choice(args.data.absolute(), args.run.absolute(), imagenet=args.weights)
    return prepare("pacs", choice).task


def measured(
    target: Path,
    task: Task,
    members: Sequence[str],
    make: Callable[[], tuple[Bundle, float]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """A bundle's row on the test images; one that ``target`` holds is not made again.

    Args:
        target: The row's file.
        task: The task of the run.
        members: Domains that are measured.
        make: Gives the bundle, and the CPU seconds that it took.
        about: What else the row says.
    """
    if target.exists():
        row: dict[str, Any] = json.loads(target.read_text())
        return row
    bundle, seconds = make()
    seen = Decisions()
    with engine_of(bundle, "cpu", 1) as engine:
        tests = [domain for domain in task.domains if domain.name in members]
        sets = {domain.name: labelled_set(engine, task, domain) for domain in tests}
        found = accuracy(engine, sets, seen=seen)
    boot = Bootstrap()
    limits = boot.interval(boot.sample({0: [seen.measured]}))
    row = {
        **about,
        "members": tuple(members),
        "domains": {name: 100 * value for name, value in found.domains.items()},
        "harmonic_mean": 100 * limits.value,
        "low": 100 * limits.low,
        "high": 100 * limits.high,
        "cpu_seconds": round(seconds, 1),
    }
    write_bytes(target, json.dumps(row).encode())
    return row


def write(target: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the rows, what they were measured with, and what else is known ``about`` them."""
    measured = {"environment": {**environment(), "torch": version("torch")}, "rows": rows}
    record = {"schema_version": 1, **about, **measured}
    write_bytes(target, (json.dumps(record, indent=1) + "\n").encode())
