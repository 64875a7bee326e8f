"""Whether an artefact is up to date: one rule for all that is made once and kept.

An artefact keeps a record of what it was made from: its inputs, its options, the versions of the
libraries, and a hash of the code of this package that makes it. It is stale where the record of
today differs, and :func:`first_change` says in words where. A record that is missing, or of an
older form that lacks an entry, makes the artefact stale too. Files that are large or many are
compared by the names, sizes and times of all of them first (:func:`stamp`); where only those
differ, and the record holds hashes of the contents (:func:`contents_of`), the contents decide.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .atomic_files import FolderKind, read_json, sha256_file, write_record

__all__ = [
    "CALIBRATION",
    "WRITTEN",
    "change_in",
    "change_since",
    "code_of",
    "contents_of",
    "contents_sha256",
    "fingerprint",
    "first_change",
    "is_stamp",
    "plain",
    "record_written",
    "stamp",
    "versions_of",
    "with_contents",
    "written_change",
]

_PACKAGE = "hdrq_deploy"
# Rooms whose code makes bundles, the models of this package included.
CALIBRATION = ("calibration", "models", "calibration_data.models")
# The entry of a record that says what was written: a hash of the contents.
WRITTEN = "written_sha256"
# Bytes of files and folders whose contents are hashed.
_LARGEST_HASHED = 4 << 30
# Entries whose values are hashes or stamps, which are not for reading.
_CONTENTS = {
    "adapted_sha256": "the adapted checkpoint",
    "base": "the source checkpoint",
    "bundle": "the bundle",
    "code": "the code of hdrq-deploy",
    "data": "the images",
    "data_sha256": "the images",
    "exporter": "the code of hdrq-deploy",
    "guides": "the float models",
    "parents": "the parents",
    "source_sha256": "the source checkpoint",
    "tests": "the test images",
    "weights": "the adapted checkpoint",
}
# Entries that are said by their bare name; any other one is an option.
_BARE = {
    "device",
    "hdrq-deploy",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "versions",
}


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first difference of two records in words, or "" where they are equal.

    >>> first_change({"data": [1, 2], "seed": 0}, {"data": [1, 3], "seed": 1})
    'the images changed'
    >>> first_change({"seed": 0}, {"seed": 1})
    'option seed: 0, now 1'
    """
    return _difference(json.loads(json.dumps(before)), json.loads(json.dumps(now)), ())


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], path: tuple[str, ...]) -> str:
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "versions" and name not in before:
            return "versions were not recorded"
        if name in _CONTENTS and not path:
            return f"{_CONTENTS[name]} changed"
        if isinstance(old, dict) and isinstance(new, dict):
            return _difference(old, new, (*path, name))
        words = " ".join((*path, name)).removeprefix("versions ").removeprefix("options ")
        kind = "" if (*path, name)[0] in _BARE else "option "
        return f"{kind}{words}: {_shown(old)}, now {_shown(new)}"
    return ""


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def change_since(record: Path, now: Mapping[str, Any]) -> str:
    """The first difference between a record on disk and today's; "" for an artefact up to date."""
    return change_in(read_json(record), now)


def change_in(before: Any, now: Mapping[str, Any]) -> str:
    """The first difference between a record that was read and today's; "" where there is none.

    Args:
        before: What :func:`with_contents` gave, and perhaps the record's kind and files, and a hash
            of what was written.
        now: What it would be made from now.
    """
    if not isinstance(before, dict):
        return "no record says what it was made from"
    contents = before.get("contents")
    before = {k: v for k, v in before.items() if k not in {"contents", "kind", "files", WRITTEN}}
    now = json.loads(json.dumps(now))
    if isinstance(contents, dict) and before != now:
        before = _with_equal_contents(before, now, contents)
    return first_change(before, now)


def _with_equal_contents(before: Any, now: Any, contents: Mapping[str, Any]) -> Any:
    """``before`` with today's stamps in the place of those whose contents are the same."""
    if is_stamp(before) and is_stamp(now):
        known = contents.get(before[0])
        same = before != now and before[1:3] == now[1:3] and known is not None
        return now if same and known == _contents(*now) else before
    if isinstance(before, dict) and isinstance(now, dict):
        return {k: _with_equal_contents(v, now.get(k), contents) for k, v in before.items()}
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = zip(before, now, strict=True)
        return [_with_equal_contents(old, new, contents) for old, new in pairs]
    return before


def with_contents(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """A record to keep: what something was made from, and hashes of the files among it."""
    return {**ingredients, "contents": contents_of(ingredients)}


def contents_of(ingredients: Any) -> dict[str, str]:
    """Hashes of the contents of all files and folders whose stamps are in a record, by path.

    What is larger than 4 GB is left out: its stamp alone decides.
    """
    return {stamp[0]: sha for stamp in _stamps(ingredients) if (sha := _contents(*stamp))}


def _stamps(value: Any) -> Iterator[list[Any]]:
    if is_stamp(value):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        inside: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
        for entry in inside:
            yield from _stamps(entry)


def is_stamp(value: Any) -> bool:
    """Whether a value is a stamp; earlier versions ended theirs with the newest time alone."""
    kinds: tuple[type | tuple[type, ...], ...] = (str, int, int, (str, int))
    return (
        isinstance(value, list)
        and len(value) == len(kinds)
        and all(isinstance(part, kind) for part, kind in zip(value, kinds, strict=True))
    )


@cache
def _contents(path: str, files: int, size: int, state: str) -> str | None:
    """Hash of the names and contents of a file or folder that has this stamp."""
    place = Path(path)
    if size > _LARGEST_HASHED or not files:
        return None
    digest = hashlib.sha256()
    for name, file in _files(place):
        digest.update(f"{name}\0{sha256_file(file)}\0".encode())
    return digest.hexdigest()


def _files(place: Path) -> list[tuple[str, Path]]:
    """Names and places of a file, or of all files in a folder; links to folders are followed."""
    if not place.is_dir():
        return [("", place)] if place.exists() else []
    found = []
    for folder, inside, names in os.walk(place, followlinks=True):
        real = Path(folder).resolve()
        # A link to a folder around it leads round in a circle.
        inside[:] = [n for n in inside if not real.is_relative_to(Path(folder, n).resolve())]
        files = (Path(folder, name) for name in names)
        found += [(f.relative_to(place).as_posix(), f) for f in files if f.is_file()]
    return sorted(found)


def plain(value: Any) -> Any:
    """Options as JSON holds them: records become mappings, paths texts."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def contents_sha256(path: Path, without: str = "") -> str:
    """Hash of a file, or of the names and contents of all files of a folder but for one name."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        name = str(file.relative_to(path))
        if name != without:
            digest.update(f"{name}\0".encode())
            digest.update(bytes.fromhex(sha256_file(file)))
    return digest.hexdigest()


def record_written(folder: Path, kind: FolderKind, record: Mapping[str, Any]) -> None:
    """The record of a new folder, as :func:`write_record`, with a hash of all files there."""
    write_record(folder, kind, {**record, WRITTEN: contents_sha256(folder, kind.marker)})


def written_change(folder: Path, kind: FolderKind, now: Mapping[str, Any]) -> str:
    """Why a folder is to be written, in words; "" where it holds what was written.

    Args:
        folder: Where it lies.
        kind: What it is; its marker is what :func:`record_written` wrote.
        now: What it would be made from now.
    """
    if not folder.is_dir():
        return "it is missing"
    record = read_json(folder / kind.marker)
    if change := change_in(record, now):
        return change
    if WRITTEN not in record:
        return "its record does not say what was written"
    is_whole = record[WRITTEN] == contents_sha256(folder, kind.marker)
    return "" if is_whole else "it is damaged"


def stamp(path: str | Path | None) -> list[Any] | None:
    """Path, files, bytes, and a hash of the name, size and time of the file or of all in a folder.

    A file that moved, or whose time went back, changes it too; contents are not read.
    """
    if path is None:
        return None
    path, digest, size = Path(path), hashlib.sha256(), 0
    files = _files(path)
    for name, file in files:
        found = file.stat()
        size += found.st_size
        digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return [str(path.absolute()), len(files), size, digest.hexdigest()[:16]]


def fingerprint(path: str | Path | None) -> str | list[Any] | None:
    """What tells a file or folder from others wherever it lies: a hash of names and contents.

    Of what is larger than 4 GB, its :func:`stamp`.
    """
    found = stamp(path)
    return found and (_contents(*found) or found)


def versions_of(*packages: str) -> dict[str, str | None]:
    """Versions of this package and of others, by name; None for what is not installed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in ("hdrq-deploy", *packages)}


@cache
def code_of(*rooms: str) -> str:
    """Hash of all modules in rooms of this package, and of all that those import from it.

    Args:
        rooms: Names below ``hdrq_deploy``, such as ``exporters`` or ``calibration_data.digits``.
    """
    digest = hashlib.sha256()
    for module, path in sorted(_closure(rooms).items()):
        digest.update(f"{module}\0{_source_sha256(path)}\0".encode())
    return digest.hexdigest()[:12]


def _closure(rooms: tuple[str, ...]) -> dict[str, Path]:
    """Modules and their files: those inside the rooms, and what they import at any depth.

    Imports inside functions count; what is imported by a computed name does not, unless it lies
    in the same room.
    """
    modules: dict[str, Path] = {}
    waiting = [f"{_PACKAGE}.{name}" for room in rooms for name in _inside(room)]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if path is None or name in modules:
            continue
        modules[name] = path
        waiting += _imported(path, name)
        # A package runs its __init__ before its modules; the outermost one only names doors.
        parent = name.rpartition(".")[0]
        if parent != _PACKAGE:
            waiting.append(parent)
    return modules


def _inside(room: str) -> Iterator[str]:
    """The room and all modules below it."""
    yield room
    path = _file(f"{_PACKAGE}.{room}")
    if path is not None and path.name == "__init__.py":
        for file in path.parent.rglob("*.py"):
            parts = file.relative_to(path.parent).with_suffix("").parts
            yield ".".join((room, *(part for part in parts if part != "__init__")))


@cache
def _file(module: str) -> Path | None:
    """The file of a module of this package; nothing of it is run."""
    package, *parts = module.split(".")
    if package != _PACKAGE or not parts:
        return None
    spec = importlib.util.find_spec(f"{package}.{parts[0]}")
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    place = origin.parent.joinpath(*parts[1:])
    if len(parts) == 1:
        return origin
    files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in files if file.is_file()), None)


@cache
def _imported(path: Path, name: str) -> list[str]:
    """What a module may import from this package; names of attributes are among them."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.startswith(f"{_PACKAGE}.")]


def _source_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
