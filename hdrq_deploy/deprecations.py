"""What still works for a while: one row each, with the version that removes it.

The policy is in ``docs/project/compatibility.md``. A test fails as soon as the package's version
reaches a row's ``remove_in``: the row and the code that it stands for are removed then.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["DEPRECATIONS", "Deprecation", "due", "warn_deprecated"]


@dataclass(frozen=True)
class Deprecation:
    """One thing that is going to be removed.

    Attributes:
        what: Its name, as a user writes it.
        instead: What to use in its place.
        since: Version that deprecated it.
        remove_in: Version that no longer has it.
    """

    what: str
    instead: str
    since: str
    remove_in: str

    @property
    def message(self) -> str:
        """The text of the warning."""
        return (
            f"{self.what} is now {self.instead}; the old name works until version {self.remove_in}"
        )


DEPRECATIONS: dict[str, Deprecation] = {
    "moved modules": Deprecation(
        "an import path of version 0.1", "the path that the warning names", "0.2", "0.3"
    ),
    "runtime.bench.Plan": Deprecation("hdrq_deploy.runtime.bench.Plan", "BenchPlan", "0.2", "0.3"),
}


def warn_deprecated(key: str, stacklevel: int = 2) -> None:
    """Warn of a row of ``DEPRECATIONS``; ``stacklevel`` is that of :func:`warnings.warn`."""
    warnings.warn(DEPRECATIONS[key].message, DeprecationWarning, stacklevel=stacklevel + 1)


def due(version: str, rows: Sequence[Deprecation] | None = None) -> list[Deprecation]:
    """The rows that a version should no longer have.

    >>> [row.what for row in due("0.3.0", [Deprecation("f", "g", "0.1", "0.3")])]
    ['f']
    >>> due("0.2.9", [Deprecation("f", "g", "0.1", "0.3")])
    []
    """
    rows = list(DEPRECATIONS.values()) if rows is None else rows
    return [row for row in rows if _release(version) >= _release(row.remove_in)]


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
