"""``hdrq doctor``: what this machine can build and run, and which engine to take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from .start import importing, run, with_flags

with importing("hdrq doctor"):
    from ..checks.machine import JETPACKS, examine
    from .common import parser

__all__ = ["arguments", "main"]


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser(
        "hdrq doctor",
        "Show what this machine can build and run, and which --engine to take. Nothing is built.",
        "hdrq doctor",
    )
    p.add_argument("--json", action="store_true", help="print it as JSON")
    p.add_argument(
        "--jetpacks", action="store_true", help="print what TensorRT and DLA each JetPack has"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq doctor``."""
    return run("hdrq doctor", lambda: _doctor(arguments().parse_args(argv)))


def _doctor(args: argparse.Namespace) -> int:
    if args.jetpacks:
        for row in JETPACKS:
            what = f"TensorRT {row.tensorrt}; DLA: {row.dla}"
            print(f"JetPack {row.version} (L4T R{row.release}): {what}")
        return 0
    machine = examine()
    if args.json:
        print(json.dumps(machine.record(), indent=1))
        return 0
    for name, text in machine.facts.items():
        print(f"{name:<26}{text}")
    print()
    for engine in machine.engines:
        does = " and ".join(
            word for word, can in (("builds", engine.builds), ("runs", engine.runs)) if can
        )
        why = f": {with_flags(engine.why)}" if engine.why else ""
        print(f"{engine.name:<10}{engine.version or '-':<13}{does or 'not here'}{why}")
    print(f"\n--engine: {machine.advice}")
    return 0
