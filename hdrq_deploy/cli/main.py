"""``hdrq``: all commands behind one name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .start import Parser, importing, run

with importing("hdrq"):
    import importlib.metadata

__all__ = ["COMMANDS", "arguments", "main"]

COMMANDS = {
    "init": "write a starter run file after a look at checkpoints and images",
    "run": "make what is stale of all that a run file asks for",
    "status": "what a run file asks for, and what of it is up to date",
    "clean": "remove what runs of a file wrote",
    "adapt": "a source model learns a domain from unlabelled images",
    "calibrate": "an adapted checkpoint becomes a bundle",
    "statistics": "what the layers of a float checkpoint read, for a merge",
    "merge": "bundles of several domains become one",
    "export": "a bundle becomes an engine",
    "bench": "measure engines",
    "emit": "configuration for Triton, DeepStream or ROS 2",
    "compare": "two benchmarks: what changed, and is it more than noise",
    "analyze": "show why a merge works or fails",
    "sensitivity": "rank layers by what their quantization costs",
    "inspect": "show a bundle",
    "card": "the README.md of a bundle or an engine, as model hubs take it",
    "strip": "remove a bundle's statistics, which only a merge reads",
    "doctor": "what this machine can build and run, which engine to take",
    "verify": "compare torch, bundle, lowered graph and engine",
    "reproduce": "the paper's two protocols, cell by cell",
    "demo": "the whole path on digits, no download",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq``; each command is imported only when it is called."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        with importing(f"hdrq {given[0]}"):
            module = importlib.import_module(f".{given[0]}", __package__)
        code: int = module.main(given[1:])
        return code
    return run("hdrq", lambda: _help(given))


def arguments() -> Parser:
    """The flags of ``hdrq`` without a command."""
    # Here, because every `hdrq COMMAND` passes this file and has no use for it.
    from .completion import SHELLS, InstallCompletion, PrintCompletion

    listing = "\n".join(f"  {name:<13}{text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="hdrq",
        description="Merge-friendly quantization, from PyTorch to edge engines.",
        epilog=f"commands:\n{listing}\n\n'hdrq COMMAND -h' shows the flags of a command that most "
        "calls need, 'hdrq COMMAND --help' all of them.",
    )
    version = importlib.metadata.version("hdrq-deploy")
    parser.about.add_argument(
        "--version", action="version", version=f"hdrq {version}", help="show the version"
    )
    completion = parser.add_argument_group("shell completion")
    completion.add_argument(
        "--install-completion",
        action=InstallCompletion,
        commands=COMMANDS,
        nargs="?",
        metavar="SHELL",
        help=f"write the scripts for {' or '.join(SHELLS)} (default: the shell of $SHELL)",
    )
    completion.add_argument(
        "--print-completion",
        action=PrintCompletion,
        commands=COMMANDS,
        metavar="SHELL",
        help="print them, for a place of your own",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


def _help(given: Sequence[str]) -> int:
    """Say what there is; anything else is refused."""
    flags = bool(given) and given[0].startswith("-")
    arguments().parse_args(given if flags else given[:1])
    return 0
