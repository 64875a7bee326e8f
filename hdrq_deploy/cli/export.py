"""``hdrq-export``: a bundle becomes an engine folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ..exporters import ENGINES, export
from .common import parser, run


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq-export", "Lower a bundle for an engine and show what the engine executes.")
    p.add_argument("bundle", help="calibrated or merged bundle")
    p.add_argument("--engine", default="ort", choices=ENGINES)
    p.add_argument(
        "--batches",
        type=int,
        nargs=3,
        default=(1, 1, 8),
        metavar=("MIN", "OPT", "MAX"),
        help="batch sizes of a TensorRT engine",
    )
    p.add_argument(
        "--allow-float",
        action="append",
        default=[],
        metavar="PATTERN",
        help="module paths that may run in float although INT8 was requested",
    )
    p.add_argument("-o", "--output", required=True, help="engine folder")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-export``."""
    args = arguments().parse_args(argv)
    return run("hdrq-export", lambda: _export(args))


def _export(args: argparse.Namespace) -> int:
    path = export(args.bundle, args.output, args.engine, tuple(args.batches), args.allow_float)
    print(f"{path}: {json.loads((path / 'precision.json').read_text())['summary']}")
    return 0
