"""What benchmarks on the folder of a run of ``hdrq reproduce`` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from evidence.records import write_record
from measured import gathered

from hdrq_deploy import Bundle
from hdrq_deploy.experiments.cells import accuracies_of
from hdrq_deploy.experiments.decisions import Decisions
from hdrq_deploy.experiments.real_images import Choice, prepare
from hdrq_deploy.experiments.tasks import Task
from hdrq_deploy.numerics.intervals import Bootstrap

__all__ = ["arguments", "figures_of", "task_of", "write"]


def arguments(
    about: str | None, needed: bool = True, collects: bool = True
) -> argparse.ArgumentParser:
    """The flags of such a benchmark.

    Some do without the data where others are analysed (not ``needed``); those that keep rows on
    disk collect them (``collects``).
    """
    parser = argparse.ArgumentParser(description=about)
    for name in ("--data", "--weights", "--run"):
        parser.add_argument(name, type=Path, required=needed)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    if collects:
        parser.add_argument(
            "--collect", action="store_true", help="write the finished rows, no more"
        )
    return parser


def task_of(args: argparse.Namespace, name: str = "pacs", targets: Sequence[str] = ()) -> Task:
    """The task of the run, with these targets or its own."""
    run = args.run.absolute()
    choice = Choice(args.data.absolute(), run, targets=targets, imagenet=args.weights)
    return prepare(name, choice).task


def figures_of(bundle: Bundle, task: Task, domains: Collection[str]) -> dict[str, Any]:
    """Accuracies in % by domain, and their harmonic mean with its 95% interval over test images."""
    seen, boot = Decisions(), Bootstrap()
    found = accuracies_of(bundle, task, domains, seen=seen)
    limits = boot.interval(boot.sample({0: [seen.measured]}))
    return {
        "domains": {name: 100 * value for name, value in found.domains.items()},
        "harmonic_mean": 100 * limits.value,
        "low": 100 * limits.low,
        "high": 100 * limits.high,
    }


def write(target: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the rows, what they were measured with, and what else is known ``about`` them."""
    write_record(target, {"schema_version": 1, **about, **gathered(rows)})
