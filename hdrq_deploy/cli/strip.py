"""``hdrq strip``: a bundle without the statistics that only a merge reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .start import importing, run

with importing("hdrq strip"):
    from ..formats.bundle import Bundle
    from .common import parser

__all__ = ["arguments", "main"]


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser(
        "hdrq strip",
        "Remove the statistics of the layers' inputs from a bundle. Engines, weights and identity "
        "stay as they are; later merges of it average.",
        "hdrq strip merged.hdrq -o small.hdrq",
    )
    p.add_argument("bundle", help="calibrated or merged bundle")
    p.add_argument("-o", "--output", help="write a copy without statistics, and leave the bundle")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq strip``."""
    return run("hdrq strip", lambda: _strip(arguments().parse_args(argv)))


def _strip(args: argparse.Namespace) -> int:
    # Damaged statistics are no reason to keep them; what is left is checked.
    bundle = Bundle.open(args.bundle, check=False)
    kept = bundle.size_bytes
    saved = bundle.strip(args.output)
    place = Path(args.output) if args.output else bundle.path
    if saved:
        share = 100 * saved / (kept + saved)
        print(f"{place}: {saved:,} bytes of statistics removed ({share:.0f}% of the bundle)")
    else:
        print(f"{place}: holds no statistics")
    return 0
