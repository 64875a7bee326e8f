"""Whole files and folders, or nothing; and never in the place of what is not ours.

What is written goes to a temporary sibling, is synced, and takes its place by a rename. What is
there already is replaced only where it is wholly ours and of the kind that is written
(:class:`FolderKind`, :class:`FileKind`): :func:`check_output` says so before any work begins, and
the same check is made again when the old content has been moved aside.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError, HdrqError
from .temporary import (
    abandoned,
    held,
    result_of,
    sibling_folder,
    temporary_file,
    temporary_folder,
)

__all__ = [
    "FileKind",
    "FolderKind",
    "Kind",
    "alone_in",
    "check_container",
    "check_name",
    "check_output",
    "check_outputs",
    "check_parent",
    "check_scratch",
    "environment_error",
    "explained",
    "make_directory",
    "mapped_file",
    "new_directory",
    "read_json",
    "remove_file",
    "remove_folder",
    "replaced",
    "scratch_folder",
    "sha256_bytes",
    "sha256_file",
    "write_bytes",
    "write_record",
]

# Our own additions to an output's name: ``.NAME.old.XXXXXXXX.hdrq-tmp``, ``.NAME.inputs.json``.
_ADDED = 24
_OLD = "old."
_LONGEST_PATH = 4096 - 256
_LONGEST_RECORD = 64 << 20
_DOMAIN = re.compile(r"\w[\w.+ -]{0,63}")
# What only the user can mend; any other OSError is a mistake of ours.
_ENVIRONMENT = {
    errno.EACCES: "needed permission",
    errno.EPERM: "needed permission",
    errno.EROFS: "needed a place that can be written to",
    errno.ENOSPC: "needed room: free some, or choose another place",
    errno.EDQUOT: "needed room: free some, or choose another place",
    errno.EFBIG: "needed room: choose another file system",
    errno.ENAMETOOLONG: "needed a shorter name",
    errno.EBUSY: "needed a place that nothing is mounted at: choose a folder inside it",
    errno.ELOOP: "needed links that lead somewhere",
    errno.EIO: "needed a device that works",
    errno.ESTALE: "needed a network file system that answers",
    errno.EMFILE: "needed more open files: raise `ulimit -n`",
    errno.ENFILE: "needed more open files on this machine",
    errno.ENOMEM: "needed more memory",
}


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


@dataclass(frozen=True)
class FolderKind:
    """A folder that one command writes whole.

    Temporaries of its files are ours too: a process that was killed while it wrote leaves them.

    Attributes:
        kind: Value of ``kind`` in its record.
        marker: The record: a JSON file that names the kind and, as ``files``, all other files.
        before: Files of a record without ``files``, as earlier versions wrote it.
        keys: Keys that tell a record without ``kind``, as earlier versions wrote it.
        more: Pattern of files that come and go, and are not in the record.
        places: Folders of such files.
        beside: Names and kinds of files that another command may add, each with its own mark.
    """

    kind: str
    marker: str
    before: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()
    more: str = r"(?!)"
    places: tuple[str, ...] = ()
    beside: tuple[tuple[str, FileKind], ...] = ()

    def stranger(self, folder: Path) -> str:
        """Why a folder is not wholly ours and of this kind; "" for ours and for an empty one."""
        try:
            entries = _entries(folder)
            first = next(entries, None)
            if first is None:
                return ""
            record = read_json(folder / self.marker)
            if not isinstance(record, dict):
                if all(result_of(name) == self.marker for name, _ in [first, *entries]):
                    return ""  # its writer was killed before the record was there
                return f"other content ({first[0]}, and no {self.marker} of ours)"
            kind = record.get("kind")
            if kind != self.kind and not (kind is None and self.keys and self.keys <= set(record)):
                what = repr(kind)[:60] if kind is not None else "none that we know"
                return f"other content ({self.marker} is of kind {what})"
            return self._unnamed([first, *entries], record, folder)
        except OSError as error:
            return f"a folder that cannot be read ({error.strerror})"

    def _unnamed(
        self, entries: Iterable[tuple[str, str]], record: Mapping[str, Any], folder: Path
    ) -> str:
        files = record.get("files")
        named = set(files) if isinstance(files, (dict, list)) else set(self.before)
        named = {name for name in named if isinstance(name, str)} | {self.marker}
        folders = {name[:i] for name in named for i, c in enumerate(name) if c == "/"}
        folders.update(self.places)
        beside = {name for name, _ in self.beside}
        for name, what in entries:
            result = _result_of(name)
            own = result or name
            if what == "file" and (own in named or re.fullmatch(self.more, own)):
                continue
            if what == "file" and result in beside:
                continue
            if what == "folder" and name in folders:
                continue
            if what == "file" and any(
                name == known and not kind.stranger(folder / name) for known, kind in self.beside
            ):
                continue
            return f"other content ({what} {name}, which {self.marker} does not name)"
        return ""


@dataclass(frozen=True)
class FileKind:
    """A file that one command writes.

    Attributes:
        name: What it is, for the error.
        is_ours: Whether the file at a path bears our mark of this kind.
        kind: Value of ``kind`` in a JSON file.
    """

    name: str
    is_ours: Callable[[Path], bool]
    kind: str = ""

    def stranger(self, path: Path) -> str:
        """Why a file is not ours and of this kind; "" for ours."""
        try:
            return "" if self.is_ours(path) else "another file"
        except OSError as error:
            return f"a file that cannot be read ({error.strerror})"


Kind = FolderKind | FileKind


def _result_of(name: str) -> str | None:
    """:func:`result_of` of a name with folders before it."""
    folder, slash, last = name.rpartition("/")
    result = result_of(last)
    return result and f"{folder}{slash}{result}"


def _entries(folder: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Relative name and type of all that is in a folder; links are not followed."""
    with os.scandir(folder / prefix) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = f"{prefix}{entry.name}"
            if entry.is_symlink():
                yield name, "link"
            elif entry.is_dir(follow_symlinks=False):
                yield name, "folder"
                yield from _entries(folder, f"{name}/")
            else:
                yield name, "file" if entry.is_file(follow_symlinks=False) else "special file"


def read_json(path: Path) -> Any:
    """What a plain JSON file of sensible size holds; None for anything else."""
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > _LONGEST_RECORD:
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def check_name(name: str, what: str = "`domain`") -> str:
    """A domain's name, which may become part of a file name.

    Args:
        name: What was given.
        what: The parameter, for the error.

    Raises:
        HdrqError: Not 1 to 64 of the characters that every file system takes.
    """
    short = len(os.fsencode(name)) <= 128 if name.isprintable() else False
    if short and _DOMAIN.fullmatch(name) and not name.endswith((" ", ".")):
        return name
    shown = name if len(name) <= 64 else f"{name[:61]}..."
    raise HdrqError(
        f"found {what} {shown!r}; needed 1 to 64 letters, digits and . _ + - or spaces, of which "
        "the first is a letter, digit or _ and the last no space or dot: give it another name"
    )


def check_output(
    path: str | os.PathLike[str],
    kind: Kind,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    label: str = "output",
) -> Path:
    """Whether an output may be written, before any work; nothing is created.

    Args:
        path: The output.
        kind: What is to be written there.
        inputs: What is read; None is left out. The output must be apart from all of it.
        label: Name of the parameter, for the error.

    Returns:
        The absolute path.

    Raises:
        HdrqError: The place is taken by something that is not ours and of this kind, is a link,
            equal to an input, inside or around it, too long, or cannot be written to.
    """
    target = _place(path, label)
    _check_apart(target, inputs, label)
    _check_free(target, kind, label)
    return target


def check_outputs(
    outputs: Sequence[tuple[str | os.PathLike[str], Kind, str]],
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """:func:`check_output` of several (path, kind, label); they must be apart from each other."""
    inputs = list(inputs)
    for i, (path, kind, label) in enumerate(outputs):
        check_output(path, kind, inputs, label)
        for other, _, name in outputs[:i]:
            if _overlap(os.path.realpath(path), os.path.realpath(other)):
                raise HdrqError(
                    f"found `{label}` {path} and `{name}` {other} in one place; needed two: "
                    f"choose another `{label}`"
                )


def check_container(
    path: str | os.PathLike[str],
    outputs: Sequence[tuple[str, Kind]],
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    label: str = "output",
) -> Path:
    """Whether several outputs may be written into a folder that may hold other things too.

    Args:
        path: The folder.
        outputs: Name inside it and kind of every output.
        inputs: What is read.
        label: Name of the parameter, for the error.

    Returns:
        The absolute path.

    Raises:
        HdrqError: See :func:`check_output`.
    """
    inputs = list(inputs)
    folder = _place(path, label)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        obstacle = "a link" if folder.is_symlink() else "a file"
        raise HdrqError(f"found {obstacle} at {folder}; needed a folder: choose another `{label}`")
    for name, kind in outputs:
        target = folder / name
        for between in list(target.parents)[: name.count("/")]:
            if between.is_symlink() or (between.exists() and not between.is_dir()):
                obstacle = "a link" if between.is_symlink() else "a file"
                raise HdrqError(
                    f"found {obstacle} at {between}; needed a folder: choose another `{label}`"
                )
        check_output(target, kind, inputs, label)
    return folder


def _place(path: str | os.PathLike[str], label: str) -> Path:
    """The absolute path, where a file system could hold it."""
    text = os.fspath(path)
    target = Path(text).absolute()
    if not text or target.name in {"", ".."}:
        raise HdrqError(f"found `{label}` {text!r}; needed the name of a file or folder to write")
    length, name = len(os.fsencode(target)), len(os.fsencode(target.name))
    longest = max(len(os.fsencode(part)) for part in target.parts)
    if length > _LONGEST_PATH or longest > 255 or name > _longest_name(target) - _ADDED:
        raise HdrqError(
            f"found `{label}` with a name of {longest} bytes in a path of {length}; needed at most "
            f"{_longest_name(target) - _ADDED} and {_LONGEST_PATH}: choose a shorter one"
        )
    return target


def _longest_name(path: Path) -> int:
    """Bytes of a name in the file system that ``path`` will lie in."""
    for folder in path.parents:
        with contextlib.suppress(OSError, ValueError):
            return os.pathconf(folder, "PC_NAME_MAX")
    return 255


def _check_apart(target: Path, inputs: Iterable[str | os.PathLike[str] | None], label: str) -> None:
    mine = os.path.realpath(target)
    for given in inputs:
        if given is None:
            continue
        relation = _overlap(mine, os.path.realpath(given))
        if relation:
            raise HdrqError(
                f"found `{label}` {target} {relation} the input {os.fspath(given)}; needed a place "
                f"apart from all inputs: choose another `{label}`"
            )


def _overlap(a: str, b: str) -> str:
    """How path ``a`` lies to path ``b``, both without links; "" for apart."""
    if a == b:
        return "equal to"
    # Another name of the same file; where one is not there, the paths alone decide.
    with contextlib.suppress(OSError):
        if Path(a).samefile(b):
            return "equal to"
    if Path(b) in Path(a).parents:
        return "inside"
    return "around" if Path(a) in Path(b).parents else ""


def _check_free(target: Path, kind: Kind, label: str = "output") -> None:
    """Nothing there, or ours and of this kind, in a folder that can be written to."""
    _check_ancestor(target.parent, label)
    try:
        about = target.lstat()
    except FileNotFoundError:
        return
    folder = isinstance(kind, FolderKind)
    obstacle = ""
    if stat.S_ISLNK(about.st_mode):
        obstacle = "a link"
    elif folder and not stat.S_ISDIR(about.st_mode):
        obstacle = "a file"
    elif not folder and not stat.S_ISREG(about.st_mode):
        obstacle = "a folder" if stat.S_ISDIR(about.st_mode) else "a special file"
    elif folder and _overlap(os.path.realpath(target), str(Path.cwd())) in {"equal to", "around"}:
        obstacle = "the folder that this command runs in"
    obstacle = obstacle or kind.stranger(target)
    if obstacle:
        what = f"an earlier {kind.name if isinstance(kind, FileKind) else kind.kind}"
        what = f"an empty folder or {what}" if folder else what
        raise HdrqError(
            f"found {obstacle} at {target}; needed nothing, {what} there: choose another "
            f"`{label}`, or move it away"
        )


def _check_ancestor(folder: Path, label: str) -> None:
    """The nearest folder that is there is one, and can be written to."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise HdrqError(f"found no folder at {folder}; needed one: choose another `{label}`")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HdrqError(f"found no write permission in {folder}; choose another `{label}`")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, kind: FileKind | None = None) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one.

    Raises:
        HdrqError: See :func:`replaced`.
    """
    with replaced(path, kind) as file:
        file.write(data)


@contextmanager
def replaced(path: Path, kind: FileKind | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary sibling file that takes the place of ``path`` when the block succeeds.

    Args:
        path: The file.
        kind: What it is; a file of another kind is left alone. None is for places of our own,
            inside a new folder.

    Raises:
        HdrqError: Another file is there, no permission, or a full disk.
    """
    if kind is not None:
        _check_free(path, kind)
    check_parent(path)
    with explained(path):
        with temporary_file(path) as (file, temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            if kind is not None:
                _check_free(path, kind)
            temporary.replace(path)
        _sync(path.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what only the user can mend (full disk, no permission) into one line."""
    try:
        yield
    except OSError as error:
        line = environment_error(error)
        if line is None:
            raise
        name = error.filename
        if isinstance(name, str) and not name.startswith(str(path.parent)):
            raise HdrqError(line) from error  # of another place, such as TMPDIR
        raise HdrqError(
            f"cannot write {path} ({error.strerror}); nothing was changed: free space or choose "
            "another `output`"
        ) from error


def environment_error(error: OSError) -> str | None:
    """One line about a fault of disk, permission or limits; None for a mistake of ours."""
    needed = _ENVIRONMENT.get(error.errno or 0)
    if needed is None:
        return None
    name = error.filename
    place = f" at {os.fsdecode(name)}" if isinstance(name, (str, bytes, os.PathLike)) else ""
    if len(place) > 200:
        place = f"{place[:197]}..."
    return f"found {(error.strerror or str(error)).lower()}{place}; {needed}"


def make_directory(path: Path) -> None:
    """Make a directory and its parents.

    Raises:
        HdrqError: No permission, a file in the way, or a full disk.
    """
    check_parent(path)
    if os.path.lexists(path) and not path.is_dir():
        raise HdrqError(f"found a file at {path}; needed a folder: move the file away")
    with explained(path):
        path.mkdir(exist_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder of a run, as long as the block lasts.

    A file system without locks keeps nobody out.

    Raises:
        HdrqError: Another process is at work there.
    """
    with held(folder, wait=False) as free:
        if not free:
            raise HdrqError(
                f"{folder}: found another run at work in it; wait until it ends, or choose another "
                "`out`"
            )
        yield


@contextmanager
def new_directory(path: Path, kind: FolderKind, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its place when the block succeeds.

    An older result at ``path`` (wholly ours and of this kind, or an empty folder) is replaced;
    anything else there is left alone.

    Args:
        path: The folder.
        kind: What it is.
        sync: Wait until every file is on the disk.

    Raises:
        HdrqError: ``path`` is a file, a link or a folder with other content, or its parent
            cannot be written to.
    """
    _check_free(path, kind)
    check_parent(path)
    with explained(path):
        with temporary_folder(path) as temporary:
            yield temporary
            _finish(temporary, sync)
            _swap(temporary, path, kind)
        _sync(path.parent)


def write_record(folder: Path, kind: FolderKind, record: Mapping[str, Any]) -> None:
    """The record of a new folder: its kind, what is given, and all files that are there."""
    names = [name for name, what in _entries(folder) if what == "file"]
    text = json.dumps({"kind": kind.kind, **record, "files": names}, indent=1)
    write_bytes(folder / kind.marker, f"{text}\n".encode())


def _finish(temporary: Path, sync: bool) -> None:
    """Modes as the user's umask has them, and everything on the disk."""
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            file.chmod(0o666 & ~_umask())
        if sync:
            _sync(file)
    temporary.chmod(0o777 & ~_umask())
    _sync(temporary)


def _swap(new: Path, path: Path, kind: FolderKind) -> None:
    """Put ``new`` in the place of ``path``; where that fails, the old folder is there again."""
    _check_free(path, kind)
    if not path.exists():
        new.rename(path)
        return
    with held(path):
        _replace(new, path, kind)
    for old in abandoned(path, _OLD):
        if not kind.stranger(old):
            with contextlib.suppress(OSError):
                _remove(old, kind)


def _replace(new: Path, path: Path, kind: FolderKind) -> None:
    old = sibling_folder(path, _OLD)
    ours = False
    try:
        path.replace(old)
        stranger = kind.stranger(old)  # what came in the meantime is not deleted
        if stranger:
            raise HdrqError(
                f"found {stranger} at {path}; nothing was changed: choose another `output`"
            )
        ours = True
        new.rename(path)
    except BaseException:
        if not path.exists():
            old.rename(path)
        elif ours:  # stopped when the new folder was in its place
            with contextlib.suppress(OSError):
                _remove(old, kind)
        else:
            with contextlib.suppress(OSError):
                old.rmdir()
        raise
    with contextlib.suppress(OSError):
        _remove(old, kind)


def _remove(folder: Path, kind: FolderKind) -> None:
    """Remove a folder, its record last: what a killed process leaves of it is known as ours."""
    for entry in sorted(folder.iterdir(), key=lambda entry: (entry.name == kind.marker, entry)):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    folder.rmdir()


def remove_folder(path: Path, kind: FolderKind) -> None:
    """Remove a folder of ours; nothing where there is none.

    Raises:
        HdrqError: It is a link, a file, or holds other content.
    """
    if os.path.lexists(path):
        _check_free(path, kind)
        with explained(path):
            _remove(path, kind)


def remove_file(path: Path, kind: FileKind) -> None:
    """Remove a file of ours; nothing where there is none.

    Raises:
        HdrqError: It is a link, a folder, or another file.
    """
    if os.path.lexists(path):
        _check_free(path, kind)
        with explained(path):
            path.unlink()


def check_parent(path: Path) -> None:
    """Make the folder that ``path`` will lie in, or say why it cannot be written to."""
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HdrqError(
            f"cannot create {parent} ({error.strerror}): choose another `output`"
        ) from error
    if not os.access(parent, os.W_OK):
        raise HdrqError(f"found no write permission in {parent}: choose another `output`")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_scratch() -> None:
    """Whether the place for temporary files can be written to, before any work.

    Raises:
        HdrqError: ``TMPDIR`` names no folder, or one that is full or cannot be written to.
    """
    given = os.environ.get("TMPDIR")
    if given and not Path(given).is_dir():
        raise HdrqError(f"found no folder at TMPDIR={given}; make it, or set TMPDIR to another one")
    try:
        # Python would fall back to /tmp; who sets TMPDIR has a reason.
        with tempfile.TemporaryFile(dir=given or None) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        place = f"TMPDIR={given}" if given else "the folder for temporary files"
        raise HdrqError(
            f"found {place} that cannot be written to ({error.strerror}); free some space there, "
            "or set TMPDIR to another folder"
        ) from error


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files, which goes when the block ends.

    Raises:
        HdrqError: See :func:`check_scratch`.
    """
    check_scratch()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR") or None) as folder:
        yield Path(folder)


def mapped_file(
    size: int, what: str, folder: Path | None = None, remedy: str = "pass fewer `images`"
) -> mmap.mmap:
    """``size`` bytes of a file without a name, which vanishes with the process.

    Args:
        size: Bytes, all of them reserved.
        what: It holds, for the error.
        folder: The folder of the file; by default the system's folder for temporary files.
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
