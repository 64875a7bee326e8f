"""``hdrq card``: the README.md of a bundle or an engine, as model hubs take it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .start import importing, run

with importing("hdrq card"):
    from ..errors import HdrqError
    from ..formats.atomic_files import check_output, write_bytes
    from ..formats.file_kinds import MODEL_CARD, sealed
    from ..reports.model_card import model_card, read_results
    from .common import parser

__all__ = ["arguments", "main"]

_TEXT = """\
Write the card of a bundle or an engine: a README.md with the front matter that model hubs read.

A card says what the artefact is, its accuracy per domain where a measurement is given, what the
layers execute, the hashes of all that it was made from, and its limits. A README.md that somebody
wrote or edited stays as it is, unless --force is given."""
_EXAMPLE = """\
hdrq card engine --results bench.json --license apache-2.0
hdrq card merged.hdrq -o -"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq card", _TEXT, _EXAMPLE)
    p.add_argument("artefact", help="bundle or engine folder")
    p.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="JSON",
        help="measurements of hdrq-bench --json, or results.json of hdrq run",
    )
    p.add_argument("--name", default="", help="title of the card (default: the folder's name)")
    p.add_argument("--license", default="", help="licence of the model, by the hub's short name")
    p.add_argument(
        "-o", "--output", help="file to write; - prints it (default: README.md in the folder)"
    )
    p.add_argument("--force", action="store_true", help="replace a README.md that is not ours")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq card``."""
    return run("hdrq card", lambda: _card(arguments().parse_args(argv)))


def _card(args: argparse.Namespace) -> int:
    target = Path(args.output or Path(args.artefact) / "README.md").absolute()
    printed = args.output == "-"
    if not printed:
        _check(target, args)
    results = [result for file in args.results for result in read_results(file)]
    text = sealed(model_card(args.artefact, results, args.name, args.license))
    if printed:
        sys.stdout.write(text)
        return 0
    write_bytes(target, text.encode(), None if args.force else MODEL_CARD)
    print(target)
    return 0


def _check(target: Path, args: argparse.Namespace) -> None:
    """Whether the card may be written, before the files are read."""
    a_file = target.is_file() and not target.is_symlink()
    if args.force and a_file:
        return
    try:
        check_output(target, MODEL_CARD, args.results)
    except HdrqError as error:
        raise HdrqError(f"{error}{'; --force replaces it' if a_file else ''}") from error
