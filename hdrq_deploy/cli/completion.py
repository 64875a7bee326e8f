"""Shell completion: scripts made once from the parsers, so that TAB starts no Python."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..errors import HdrqError
from ..formats.atomic_files import check_outputs, make_directory, write_bytes
from ..formats.file_kinds import COMPLETION, COMPLETION_MARK
from .start import Parser

__all__ = ["SHELLS", "InstallCompletion", "PrintCompletion", "install", "scripts"]

SHELLS = ("bash", "zsh")
# Console scripts of their own, beside ``hdrq``.
_PROGRAMS = ("calibrate", "merge", "export", "bench", "verify")


def scripts(shell: str, commands: Mapping[str, str]) -> dict[str, str]:
    """The completion scripts of all programs, by the name of the program.

    Args:
        shell: One of ``SHELLS``.
        commands: What each command of ``hdrq`` does.

    Raises:
        HdrqError: Another shell.
    """
    if shell not in SHELLS:
        raise HdrqError(
            f"found the shell {shell or 'of an unknown name'}; needed one of {', '.join(SHELLS)}: "
            "name it after the flag"
        )
    try:
        import shtab
    except ImportError as error:
        raise HdrqError(
            "completion needs shtab, which is not installed: pip install shtab"
        ) from error
    parsers = {name: _parser(name, shtab.FILE) for name in commands}
    umbrella = Parser(prog="hdrq")
    subparsers = umbrella.add_subparsers()
    for name, text in commands.items():
        subparsers.add_parser(name, help=text)
        subparsers.choices[name] = parsers[name]
    made = {"hdrq": shtab.complete(umbrella, shell)}
    for name in _PROGRAMS:
        made[f"hdrq-{name}"] = shtab.complete(parsers[name], shell)
    return {name: _marked(text) for name, text in made.items()}


def _parser(name: str, files: Any) -> Parser:
    """The parser of a command; values that are neither numbers nor choices may be ``files``."""
    parser: Parser = importlib.import_module(f".{name}", __package__).arguments()
    for action in parser._actions:
        if action.choices is not None:
            action.choices = list(action.choices)  # a mapping is taken for subcommands
        elif action.type in (None, Path) and action.nargs != 0:
            action.complete = files  # type: ignore[attr-defined]
    return parser


def _marked(script: str) -> str:
    """The script with our mark; zsh wants its own first line first."""
    first, _, rest = script.partition("\n")
    if first.startswith("#compdef"):
        return f"{first}\n{COMPLETION_MARK}\n{rest}"
    return f"{COMPLETION_MARK}\n{script}"


def install(shell: str, commands: Mapping[str, str]) -> list[Path]:
    """Write the scripts where the shell looks for those of a user.

    Returns:
        The files.

    Raises:
        HdrqError: Another shell, or a file is in the way that is not ours.
    """
    made = scripts(shell, commands)
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    if shell == "bash":
        own = os.environ.get("BASH_COMPLETION_USER_DIR")
        folder = Path(own or data / "bash-completion") / "completions"
        files = {folder / name: text for name, text in made.items()}
    else:
        folder = data / "zsh" / "site-functions"
        files = {folder / f"_{name}": text for name, text in made.items()}
    check_outputs([(path, COMPLETION, "completion script") for path in files])
    make_directory(folder)
    for path, text in files.items():
        write_bytes(path, text.encode(), COMPLETION)
    return list(files)


class PrintCompletion(argparse.Action):
    """Prints the script of ``hdrq`` for a shell, and ends the command."""

    def __init__(self, *args: Any, commands: Mapping[str, str], **options: Any) -> None:
        super().__init__(*args, **{"default": argparse.SUPPRESS, **options})
        self._commands = commands

    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, values: Any, *rest: Any
    ) -> NoReturn:
        """Print and leave with exit code 0."""
        for script in scripts(values, self._commands).values():
            print(script)
        parser.exit()


class InstallCompletion(PrintCompletion):
    """Writes the scripts of all programs, and ends the command."""

    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, values: Any, *rest: Any
    ) -> NoReturn:
        """Write, say what is left to do, and leave with exit code 0."""
        shell = values or Path(os.environ.get("SHELL", "")).name
        files = install(shell, self._commands)
        for file in files:
            print(file)
        if shell == "zsh":
            print(f"add to ~/.zshrc, before compinit: fpath=({files[0].parent} $fpath)")
        else:
            print("new shells complete hdrq where the package bash-completion is installed")
        parser.exit()
