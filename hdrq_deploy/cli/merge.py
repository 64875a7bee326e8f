"""``hdrq-merge``: bundles of several domains become one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..merge import ROUNDINGS, merge
from .common import parser, progress_bar, run


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq-merge", "Merge calibrated bundles; needs neither torch nor data.")
    p.add_argument("bundles", nargs="+", help="two or more bundles of one model and source")
    p.add_argument("--weights", type=float, nargs="+", help="one per bundle, sum 1 (equal)")
    p.add_argument("--rounding", default="advanced", choices=ROUNDINGS)
    p.add_argument("--candidates", type=int, default=100, help="draws of advanced rounding")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("-o", "--output", required=True, help="bundle folder")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-merge``."""
    args = arguments().parse_args(argv)
    return run("hdrq-merge", lambda: _merge(args))


def _merge(args: argparse.Namespace) -> int:
    with progress_bar("merge") as progress:
        bundle = merge(
            args.bundles,
            args.output,
            args.weights,
            args.rounding,
            args.candidates,
            args.seed,
            lambda done, total: progress(done, total, ""),
        )
    print(bundle.path)
    return 0
