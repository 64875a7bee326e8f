"""Whole files and folders, or nothing: temporary sibling, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import DataError, HdrqError

__all__ = [
    "check_parent",
    "make_directory",
    "mapped_file",
    "new_directory",
    "replaced",
    "sha256_bytes",
    "sha256_file",
    "write_bytes",
]


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one."""
    with replaced(path) as file:
        file.write(data)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary sibling file that takes the place of ``path`` when the block succeeds.

    Raises:
        HdrqError: No permission, or a full disk.
    """
    check_parent(path)
    with _explained(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what only the user can mend (full disk, no permission) into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}:
            raise
        raise HdrqError(
            f"cannot write {path} ({error.strerror}); nothing was changed: free space or choose "
            "another -o"
        ) from error


def make_directory(path: Path) -> None:
    """Make a directory and its parents.

    Raises:
        HdrqError: No permission, a file in the way, or a full disk.
    """
    check_parent(path)
    with _explained(path):
        path.mkdir(exist_ok=True)


@contextmanager
def new_directory(path: Path, marker: str = "manifest.json") -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its place when the block succeeds.

    An older result at ``path`` (a directory that holds ``marker``, or an empty one) is
    replaced; anything else there is left alone.

    Raises:
        HdrqError: ``path`` is a file or a directory with other content, or its parent
            cannot be written to.
    """
    check_parent(path)
    if path.exists() and not _replaceable(path, marker):
        raise HdrqError(
            f"found other content at {path}; needed a new, empty or earlier output directory "
            f"(with {marker}): choose another -o"
        )
    with _explained(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            _finish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(path.parent)


def _finish(temporary: Path, path: Path) -> None:
    """Everything on the disk, then in its place."""
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            file.chmod(0o666 & ~_umask())
        _sync(file)
    temporary.chmod(0o777 & ~_umask())
    _sync(temporary)
    _swap(temporary, path)


def _swap(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    path.replace(old)
    new.rename(path)
    shutil.rmtree(old)


def _replaceable(path: Path, marker: str) -> bool:
    return path.is_dir() and ((path / marker).is_file() or not any(path.iterdir()))


def check_parent(path: Path) -> None:
    """Make the folder that ``path`` will lie in, or say why it cannot be written to."""
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HdrqError(f"cannot create {parent} ({error.strerror}): choose another -o") from error
    if not os.access(parent, os.W_OK):
        raise HdrqError(f"found no write permission in {parent}: choose another -o")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def mapped_file(
    size: int, what: str, folder: Path | None = None, remedy: str = "pass fewer --images"
) -> mmap.mmap:
    """``size`` bytes of a file without a name, which vanishes with the process.

    Args:
        size: Bytes, all of them reserved.
        what: It holds, for the error.
        folder: Where it lies; the system's place for temporary files by default.
        remedy: What else helps, beside room on the disk.

    Raises:
        DataError: The disk has no room.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Without reserved blocks a full disk would be a bus error on a later write.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        raise DataError(
            f"found no room for {size / 1e9:.1f} GB of {what} on the disk of "
            f"{folder or tempfile.gettempdir()} ({error.strerror}); free some, {remedy}"
        ) from error
