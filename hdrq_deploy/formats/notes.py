"""What a run found out and the user should know: one line each, through the standard log.

The library writes them to the logger ``hdrq_deploy`` at level INFO, which nobody sees by
default; commands and their workers print them on stderr.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import one_line

__all__ = ["notes_of", "show_notes"]


class _Notes(logging.Handler):
    """One line on stderr, whatever stderr is by then."""

    def __init__(self, command: str) -> None:
        super().__init__(logging.INFO)
        self._command = command

    def emit(self, record: logging.LogRecord) -> None:
        line = one_line(record.getMessage())
        print(f"{self._command}: {line}", file=sys.stderr, flush=True)


def show_notes(command: str) -> list[logging.Handler]:
    """Print notes from now on, in front of each ``command``; returns whose turn it was before."""
    logger = logging.getLogger("hdrq_deploy")
    before = [handler for handler in logger.handlers if isinstance(handler, _Notes)]
    for handler in before:
        logger.removeHandler(handler)
    logger.addHandler(_Notes(command))
    logger.setLevel(logging.INFO)
    return list(before)


@contextmanager
def notes_of(command: str) -> Iterator[None]:
    """Print notes inside the block; a command inside a command prints its own."""
    logger = logging.getLogger("hdrq_deploy")
    level, before = logger.level, show_notes(command)
    try:
        yield
    finally:
        logger.handlers = [h for h in logger.handlers if not isinstance(h, _Notes)] + before
        logger.setLevel(level)
