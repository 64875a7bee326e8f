"""What can go wrong, named by what the user would do about it.

Every message is one line: what was found, what was needed, what to do. The command line
prints it and exits with ``exit_code``; any other exception is a bug of ours.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CheckFailed",
    "DataError",
    "EngineError",
    "ExportError",
    "HdrqError",
    "MergeError",
    "ModelError",
    "OtherRunError",
    "SpecError",
    "one_line",
]

_LONGEST = 1000


class HdrqError(Exception):
    """The user's input is wrong; the message says how to mend it."""

    exit_code = 2


class SpecError(HdrqError):
    """A bit-width, grid, scale or option is out of range."""


class OtherRunError(SpecError):
    """Unfinished work on disk is that of another run, so that it cannot be resumed."""


class BundleError(HdrqError):
    """A bundle on disk is missing, truncated, altered or of another schema."""


class DataError(HdrqError):
    """Images or labels cannot be read or do not fit the model."""


class ModelError(HdrqError):
    """A model or checkpoint cannot be loaded, captured or quantized."""


class MergeError(HdrqError):
    """Bundles cannot be merged with each other."""


class ExportError(HdrqError):
    """A bundle cannot be lowered to, or built for, the requested engine."""


class EngineError(HdrqError):
    """An engine cannot be loaded or run on this machine."""


class CheckFailed(HdrqError):
    """The work was done and a check of its result failed (parity, precision, accuracy)."""

    exit_code = 3


def one_line(text: object) -> str:
    """``text`` for a terminal: in one line, of bounded length, its control characters shown.

    >>> one_line("a  b\\n\\x1b[31mc")
    'a b \\\\x1b[31mc'
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(str(text).split())
    )
    if len(shown) <= _LONGEST:
        return shown
    return f"{shown[: _LONGEST * 2 // 3]} [...] {shown[-_LONGEST // 4 :]}"
