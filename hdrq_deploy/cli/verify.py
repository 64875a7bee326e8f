"""``hdrq-verify``: torch, bundle, lowered graph and engine of one model compared."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .._moved import moved_names
from .start import importing, run

with importing("hdrq-verify"):
    from rich.console import Console
    from rich.table import Table

    from ..checks.verification import Verification, verify
    from ..formats.atomic_files import check_output, check_scratch, write_bytes
    from ..formats.file_kinds import VERIFY_JSON
    from ..formats.records import Tolerances
    from .common import named, parser, paths_of
    from .help_format import shown

__all__ = ["arguments", "main", "show"]

_TEXT = (
    "Compare PyTorch, the bundle, the lowered graph and the engine on the same images: those of "
    "--data, or the few golden inputs that bundle and engine carry. The exit code is 3 where they "
    "differ by more than the tolerances."
)
_EXAMPLE = """\
hdrq-verify merged.hdrq engine --data night=test/night
hdrq-verify engine"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq-verify", _TEXT, _EXAMPLE)
    tolerances = Tolerances()
    p.add_argument("bundle", help="bundle; or an engine folder alone, checked on its golden inputs")
    p.add_argument("engine", nargs="?", help="engine folder made of the bundle")
    p.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="images of each domain (default: the golden inputs)",
    )
    p.add_argument(
        "--images", type=int, default=512, help="largest number of images of each --data"
    )
    torch = p.add_mutually_exclusive_group()
    torch.add_argument("--torch", action="store_true", help="PyTorch must be compared too")
    torch.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    p.add_argument(
        "--max-flips",
        type=float,
        help="share of decisions that may differ (default: the manifest's, usually "
        f"{shown(tolerances.decision_flips)})",
    )
    p.add_argument(
        "--max-rms",
        type=float,
        help="relative RMS of the outputs' difference that is accepted (default: the manifest's, "
        f"usually {shown(tolerances.output_rms)})",
    )
    p.add_argument("--json", help="file of all that was found, tensor by tensor")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-verify``."""
    return run("hdrq-verify", lambda: _verify(arguments().parse_args(argv)))


def _verify(args: argparse.Namespace) -> int:
    inputs = [args.bundle, args.engine, *paths_of(args.data)]
    if args.json is not None:
        check_output(args.json, VERIFY_JSON, inputs, "json")
    check_scratch()
    verification = verify(
        args.bundle,
        args.engine,
        named(args.data) if args.data else None,
        images=args.images,
        torch=True if args.torch else False if args.no_torch else None,
        max_flips=args.max_flips,
        max_rms=args.max_rms,
    )
    show(verification)
    if args.json:
        text = json.dumps(verification.record(), indent=1) + "\n"
        write_bytes(Path(args.json).absolute(), text.encode(), VERIFY_JSON)
    verification.check()
    return 0


def show(verification: Verification) -> None:
    """One line a comparison."""
    table = Table()
    for column in (
        "stages",
        "images",
        "decision flips",
        "output RMS",
        "SQNR dB",
        "largest difference",
        "first difference",
    ):
        table.add_column(column, overflow="fold")
    for stage in verification.stages:
        table.add_row(
            stage.name,
            str(stage.images),
            f"{stage.decision_flips} of {stage.decisions} ({stage.flip_share:.2%})",
            f"{stage.output_rms:.2g}",
            "equal" if stage.sqnr_db is None else f"{stage.sqnr_db:.1f}",
            f"codes by {stage.max_steps}" if stage.tensors else "-",
            stage.first_difference or "none",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if not TYPE_CHECKING:
    __getattr__ = moved_names(__name__)
