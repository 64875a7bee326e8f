"""``hdrq emit``: configuration for Triton, DeepStream or ROS 2 from an engine's manifest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .start import importing, run

with importing("hdrq emit"):
    from ..runtime.serving.emit import TARGETS, emit
    from .common import parser

__all__ = ["arguments", "main"]

_EXAMPLE = """\
hdrq emit triton engine --max-batch 8 -o models
hdrq emit ros2 engine --topic /camera/image_raw -o launch"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser(
        "hdrq emit",
        "Write what a server needs to run an engine: a Triton model repository, a DeepStream "
        "nvinfer configuration, or ROS 2 launch and parameter files.",
        _EXAMPLE,
    )
    p.add_argument("target", choices=TARGETS, help="what the files are for")
    p.add_argument("engine", help="engine folder from hdrq-export")
    p.add_argument("-o", "--output", required=True, help="folder to write")
    p.add_argument("--name", help="name of the model or node (default: the engine folder's name)")
    p.add_argument("--max-batch", type=int, help="triton: largest batch the server may form")
    p.add_argument("--interval", type=int, help="deepstream: batches skipped between two")
    p.add_argument(
        "--approximate",
        action="store_true",
        help="deepstream: one factor for standard deviations that differ",
    )
    p.add_argument("--topic", help="ros2: images that the node subscribes to")
    return p


_FLAGS = {
    "triton": ("name", "max_batch"),
    "deepstream": ("interval", "approximate"),
    "ros2": ("name", "topic"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq emit``."""
    return run("hdrq emit", lambda: _emit(argv))


def _emit(argv: Sequence[str] | None) -> int:
    p = arguments()
    args = p.parse_args(argv)
    flags = {flag: getattr(args, flag) for flag in dict.fromkeys(sum(_FLAGS.values(), ()))}
    given = {
        flag: value for flag, value in flags.items() if value is not None and value is not False
    }
    foreign = [flag for flag in given if flag not in _FLAGS[args.target]]
    if foreign:
        p.error(f"--{foreign[0].replace('_', '-')} is not for {args.target}")
    folder = emit(args.target, args.engine, args.output, **given)
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        print(file)
    return 0
