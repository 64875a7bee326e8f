"""What all commands share: exit codes, one-line errors, progress, tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from ..calibration_data.readers import Wanted
from ..errors import HdrqError
from ..formats.atomic_files import check_name
from ..jobs.ray_cluster import reach
from ..numerics.spec import check_seed
from ..typing import Progress
from .start import Parser, run, shortened

__all__ = [
    "image_flags",
    "named",
    "parser",
    "paths_of",
    "progress_bar",
    "progress_lines",
    "rank_or_full",
    "rank_or_word",
    "run",
    "seed_number",
    "threads_of",
    "wanted_of",
    "where_flags",
]


def parser(command: str, text: str, example: str = "") -> Parser:
    """The parser of a command.

    Args:
        command: Name, as a user types it.
        text: What the command does; an empty line begins a new paragraph.
        example: Calls that work as they stand, one below another; each line but the first of a
            call ends the one before with a backslash.
    """
    epilog = f"example:\n{textwrap.indent(example.strip(), '  ')}" if example else None
    p = Parser(prog=command, description=text, epilog=epilog)
    p.about.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {importlib.metadata.version('hdrq-deploy')}",
        help="show the version",
    )
    return p


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar with ETA on a terminal; a plain line every few seconds otherwise."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=None)

            def show(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, description=f"{title} {what}")

            yield show
        return
    started = last = time.monotonic()

    def line(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10:
            last = now
            left = (now - started) / max(done, 1) * (total - done)
            print(f"{title} {what}: {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)

    yield line


@contextmanager
def progress_lines(title: str) -> Iterator[Progress]:
    """For pieces of minutes: a bar on a terminal, a line for each that ends otherwise.

    A line tells the time since the start, not that of its piece: pieces may run side by side. The
    time left is that of one count; where the next one begins (a search, then the cells), its pieces
    say nothing of it.
    """
    if sys.stderr.isatty():
        with progress_bar(title) as show:
            yield show
        return
    started = begun = last = time.monotonic()
    kept, counted, worked = 0, 0, False

    def line(done: int, total: int, what: str) -> None:
        nonlocal begun, last, kept, counted, worked
        now = time.monotonic()
        if done < counted:
            begun, kept, worked = last, 0, False
        last, counted = now, done
        text = f"{title} {done}/{total} {what}: {now - started:.0f} s so far"
        worked = worked or now - begun >= 1
        if not worked:  # what was there already says nothing of what is to come
            begun, kept = now, done
        else:
            text += f", {(now - begun) / max(done - kept, 1) * (total - done):.0f} s left"
        print(text, file=sys.stderr, flush=True)

    yield line


def image_flags(p: argparse._ActionsContainer) -> None:
    """How images are read; :func:`wanted_of` makes it of the arguments."""
    p.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="resize images")
    p.add_argument(
        "--resize",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="resize to this before center-cropping to --size",
    )
    p.add_argument("--mean", type=float, nargs="+", help="mean per channel, of pixels in [0, 1]")
    p.add_argument("--std", type=float, nargs="+", help="deviation per channel, of [0, 1]")


def wanted_of(args: argparse.Namespace) -> Wanted:
    """Size and normalisation, where given."""
    flags = {name: getattr(args, name) for name in ("size", "mean", "std", "resize")}
    given: dict[str, Any] = {name: tuple(values) for name, values in flags.items() if values}
    return Wanted(**given)


def where_flags(group: argparse._ArgumentGroup) -> None:
    """Flags of commands whose work has independent parts."""
    group.add_argument(
        "--workers", type=int, default=1, help="jobs that run at the same time on this machine"
    )
    group.add_argument(
        "--threads", type=int, help="CPU threads per job (default: cores divided by --workers)"
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="run on a Ray cluster (HOST:PORT, ray://HOST:PORT, auto); alone: this machine's cores",
    )
    group.add_argument("--gpus", type=float, default=0.0, help="GPUs per job on Ray")


def threads_of(given: int | None, workers: int, ray: str | None, gpus: float = 0.0) -> int:
    """Threads of one part; checks the flags of :func:`where_flags`.

    Raises:
        HdrqError: Numbers out of range, flags that do not go together, or Ray does not answer.
    """
    if ray is not None:
        reach(ray)
    if gpus < 0 or (gpus and ray is None) or (ray is not None and workers != 1):
        raise HdrqError(
            f"found --workers {workers}, --gpus {gpus:g} {'with' if ray else 'without'} --ray; "
            "--gpus (0 or more) needs --ray; --workers applies to local processes only"
        )
    if workers < 1 or (given is not None and given < 1):
        raise HdrqError(f"found --workers {workers}, --threads {given}; needed 1 or more")
    return given or (1 if ray else max(1, (os.cpu_count() or 1) // workers))


def seed_number(text: str) -> int:
    """A seed from the command line.

    Raises:
        SpecError: NumPy and PyTorch do not both take it.
    """
    try:
        return check_seed(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {shortened(text)!r}; needed a whole number of 0 to 2**63 - 1"
        ) from None


def rank_or_word(text: str) -> int | str:
    """The rank of ``--statistics``, ``full`` or ``off``.

    Raises:
        ArgumentTypeError: Neither of them.
    """
    return _rank(text, ("full", "off"))


def rank_or_full(text: str) -> int | str:
    """The rank of ``--rank``, or ``full``.

    Raises:
        ArgumentTypeError: Neither of them.
    """
    return _rank(text, ("full",))


def _rank(text: str, words: Sequence[str]) -> int | str:
    if text in words:
        return text
    if text.isascii() and text.isdigit() and 0 < len(text.lstrip("0")) < 10:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"found {shortened(text)!r}; needed a rank of 1 or more, or {' or '.join(words)}"
    )


def named(values: Sequence[str]) -> dict[str, str]:
    """``night=DIR`` arguments as a mapping; a bare path is named after its folder."""
    result: dict[str, str] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not sign:
            name, path = value.rstrip("/").rsplit("/", 1)[-1].removesuffix(".npz"), value
            # The bytes of a name under another locale are a name all the same.
            name = os.fsencode(name).decode("utf-8", "replace")
        if not name or not path:
            raise HdrqError(f"found --data {value!r}; needed NAME=DIR_OR_NPZ")
        check_name(name, "the name" if sign else f"--data {value} without NAME=; the folder's name")
        if name in result:
            raise HdrqError(f"found --data for {name} twice; give each domain one name")
        result[name] = path
    return result


def paths_of(values: Sequence[str]) -> list[str]:
    """The paths of ``NAME=DIR`` arguments."""
    return list(named(values).values())
