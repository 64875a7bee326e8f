"""The form of all help texts: short and whole, defaults that are real, examples line by line.

Imports nothing but the standard library, like :mod:`.start`, whose parsers use it.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["HelpFormatter", "help_text", "shown"]

_OLD_SUFFIX = " (default: %(default)s)"


def shown(value: Any) -> str:
    """A default as help texts write it.

    >>> shown(1e-4), shown(True), shown((1, 1, 8)), shown("auto")
    ('0.0001', 'yes', '1 1 8', 'auto')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return " ".join(shown(item) for item in value)
    return str(value)


class HelpFormatter(argparse.HelpFormatter):
    """Shows a default where there is one; keeps the lines of an indented paragraph.

    The usage line holds what a command needs, and ``[options]`` for all else. Python versions
    write flags and defaults differently; this class writes them in one way.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, **options})

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        """Add the line of what a command needs."""
        if usage is None:
            usage = self._needed(list(actions))
        super().add_usage(usage, [], [], prefix)

    def _needed(self, actions: list[argparse.Action]) -> str:
        words = [self._prog]
        words += [
            self._format_args(action, self._get_default_metavar_for_positional(action))
            for action in actions
            if not action.option_strings
        ]
        words += [
            f"{action.option_strings[0]} "
            + self._format_args(action, self._get_default_metavar_for_optional(action))
            for action in actions
            if action.option_strings and action.required
        ]
        line = " ".join([*words, "[options]"]).replace("%", "%%")
        indent = " " * len(f"usage: {self._prog} ")
        return textwrap.fill(
            line,
            self._width - len("usage: "),
            subsequent_indent=indent,
            break_on_hyphens=False,
            break_long_words=False,
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        if action.nargs == 0:
            return names
        metavar = self._get_default_metavar_for_optional(action)
        return f"{names} {self._format_args(action, metavar)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        # Python before 3.13 adds the default of --flag/--no-flag by itself, as True or False.
        text = (action.help or "").removesuffix(_OLD_SUFFIX)
        default = action.default
        nothing = default is None or default is False or default == argparse.SUPPRESS
        if action.required or nothing or default in ([], (), "") or "default:" in text:
            return text
        return f"{text} (default: {shown(default).replace('%', '%%')})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            paragraph if "\n  " in paragraph else self._wrapped(paragraph, width, indent)
            for paragraph in text.strip("\n").split("\n\n")
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return self._wrapped(text, width).splitlines()

    @staticmethod
    def _wrapped(text: str, width: int, indent: str = "") -> str:
        """Lines of whole words; a hyphen is part of a flag or a name."""
        return textwrap.fill(
            " ".join(text.split()),
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )


def help_text(
    parser: argparse.ArgumentParser,
    last: argparse._ArgumentGroup,
    left_out: Sequence[argparse._ArgumentGroup] = (),
) -> str:
    """The help of a command, its groups of arguments in the order in which they were made.

    Args:
        parser: The command's parser.
        last: Group that comes at the end.
        left_out: Groups that are not shown; a last line says how to see them.
    """
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, parser._actions, [])
    formatter.add_text(parser.description)
    groups = [group for group in parser._action_groups if group is not last]
    for group in (*groups, last):
        if group not in left_out:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
    formatter.add_text(parser.epilog)
    more = sum(len(group._group_actions) for group in left_out)
    if more:
        count = "one more flag" if more == 1 else f"{more} more flags"
        formatter.add_text(f"'{parser.prog} --help' shows {count}")
    return formatter.format_help()
