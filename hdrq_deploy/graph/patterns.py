"""Patterns of module paths, as options take them; one that names nothing is refused."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence

from ..errors import ExportError

__all__ = ["check_patterns", "named"]

_SHOWN = 3


def named(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern (fnmatch) names this module path or node."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def check_patterns(
    option: str, patterns: Sequence[str], names: Collection[str], what: str = "layer"
) -> None:
    """Refuse a pattern that names none of ``names``.

    Args:
        option: Name of the option that the patterns were given to.
        patterns: Patterns of fnmatch.
        names: Module paths, and whatever else the option takes.
        what: What the names stand for, for the error.

    Raises:
        ExportError: A pattern names nothing; the message shows the names most like it.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(name, pattern) for name in names):
            near = _near(pattern, names)
            raise ExportError(
                f"found no {what} that {pattern!r} names (`{option}`); "
                + (f"near it are {', '.join(near)}; " if near else "")
                + "'hdrq inspect' lists the module paths"
            )


def _near(pattern: str, names: Collection[str]) -> list[str]:
    """Names that hold the pattern's letters, else those spelled alike."""
    bare = pattern.strip("*?.").lower()
    unique = list(dict.fromkeys(names))
    holding = [name for name in unique if bare and bare in name.lower()]
    lower = {name.lower(): name for name in unique}
    alike = difflib.get_close_matches(bare, list(lower), _SHOWN, 0.5)
    return (holding or [lower[name] for name in alike])[:_SHOWN]
