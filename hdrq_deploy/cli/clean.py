"""``hdrq clean``: remove what runs of a file wrote."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from .start import importing, run

with importing("hdrq clean"):
    from ..formats.atomic_files import alone_in
    from ..runfile.loading import load
    from ..runfile.plan import KINDS, stages_of
    from ..runfile.running import clean
    from .common import parser
    from .start import with_flags

__all__ = ["arguments", "main"]


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser(
        "hdrq clean",
        "Remove what runs of a file wrote into their folder. What does not bear the mark of its "
        "kind stays, and so does everything outside that folder.",
        "hdrq clean hdrq.yaml --only export --dry-run",
    )
    p.add_argument("file", nargs="?", default="hdrq.yaml", help="run file, YAML or JSON")
    p.add_argument(
        "--out", type=Path, help="folder of all results (default: NAME-run beside the file)"
    )
    p.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="STAGE",
        help=f"outputs of these stages ({', '.join(KINDS)})",
    )
    p.add_argument(
        "--unused",
        action="store_true",
        help="only what earlier forms of the file asked for, and this one does not",
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be removed")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq clean``."""
    stopped = "what was removed is gone; the same command goes on"
    return run("hdrq clean", lambda: _clean(arguments().parse_args(argv)), stopped)


def _clean(args: argparse.Namespace) -> int:
    loaded = load(args.file, args.out)
    removes = loaded.out.is_dir() and not args.dry_run
    with alone_in(loaded.out) if removes else nullcontext():
        removed = clean(loaded, stages_of(loaded), args.only, args.unused, args.dry_run)
    for name in removed.names:
        print(name)
    for reason in removed.left:
        print(f"left alone: {with_flags(reason)}")
    verb = "would be removed" if args.dry_run else "removed"
    print(f"{len(removed.names)} files and folders {verb} from {loaded.out}")
    return 0
