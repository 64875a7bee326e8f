"""Temporary siblings of a result, and what killed processes left of them.

A temporary is called ``.NAME.XXXXXXXX.hdrq-tmp`` and is locked (``flock``) as long as its writer
lives. The next writer of the same result removes those that nobody locks: their writers were
killed, and nothing goes on from them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "abandoned",
    "held",
    "result_of",
    "sibling_folder",
    "temporary_file",
    "temporary_folder",
]

_SUFFIX = ".hdrq-tmp"
_DRAWN = r"[a-z0-9_]{8}"


@contextmanager
def temporary_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Yield a new file beside ``path`` and its place; it goes if it is there when the block ends.

    Raises:
        OSError: No permission, or no room.
    """
    _sweep(path)
    while True:
        descriptor, name = tempfile.mkstemp(_SUFFIX, f".{path.name}.", path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "w+b") as file:
            if not _locked(descriptor, temporary):
                continue
            try:
                yield file, temporary
            finally:
                temporary.unlink(missing_ok=True)
            return


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``; it goes if it is there when the block ends.

    Raises:
        OSError: No permission, or no room.
    """
    _sweep(path)
    while True:
        temporary = sibling_folder(path)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            if not _locked(descriptor, temporary):
                continue
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return
        finally:
            os.close(descriptor)


def sibling_folder(path: Path, prefix: str = "") -> Path:
    """A new empty folder beside ``path``, with ``prefix`` behind the result's name.

    Raises:
        OSError: No permission, or no room.
    """
    return Path(tempfile.mkdtemp(_SUFFIX, f".{path.name}.{prefix}", path.parent))


@contextmanager
def held(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Lock a folder, so that nobody takes it for abandoned or works in it too.

    Yields:
        False where another process holds the lock, and this one does not ``wait`` for it.
    """
    descriptor, free = os.open(folder, os.O_RDONLY), True
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                free = False
        yield free
    finally:
        os.close(descriptor)


def result_of(name: str) -> str | None:
    """Name of the result that a temporary stands for; None for what is no temporary.

    >>> result_of(".run.json.ab12_xyz.hdrq-tmp"), result_of("run.json")
    ('run.json', None)
    """
    found = re.fullmatch(rf"\.(.+)\.{_DRAWN}{_SUFFIX}", name)
    return found[1] if found else None


def abandoned(path: Path, prefix: str = "") -> Iterator[Path]:
    """Temporary siblings of ``path`` that nobody locks; each is locked while it is yielded."""
    pattern = re.compile(rf"\.{re.escape(path.name + '.' + prefix)}{_DRAWN}{_SUFFIX}")
    for temporary in path.parent.iterdir():
        if not pattern.fullmatch(temporary.name):
            continue
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue  # a link, another user's, or gone in the meantime
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
        except OSError:
            continue  # its writer lives, or the file system has no locks
        finally:
            os.close(descriptor)


def _sweep(path: Path) -> None:
    for temporary in abandoned(path):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _locked(descriptor: int, temporary: Path) -> bool:
    """Lock a new temporary; False where another writer swept it away before the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return True  # a file system without locks: nobody can sweep there
    return temporary.exists()
