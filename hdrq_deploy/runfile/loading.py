"""From a run file to what it means: types and names checked, paths absolute, defaults filled in."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import HdrqError
from ..merging import ROUNDINGS
from ..merging.merge_weights import check_merge_weights
from ..merging.ways import check_way
from .document import Document, Loc
from .schema import Domain, Merge, RunFile

__all__ = ["Loaded", "load", "meant"]

_MERGED = "merged"


@dataclass(frozen=True)
class Loaded:
    """A run file whose values fit each other.

    Attributes:
        file: What it says: paths are absolute, merges and their domains are named.
        document: Where it says that.
        out: Folder of all results.
    """

    file: RunFile
    document: Document
    out: Path

    def resolved(self) -> dict[str, Any]:
        """The whole file as plain values, defaults included; a run file like the given one."""
        values: dict[str, Any] = self.file.model_dump(mode="json", exclude_none=True)
        for name, domain in self.file.domains.items():
            values["domains"][name] = domain.model_dump(mode="json", exclude_none=True)
        if self.file.bench is None:
            values["bench"] = False
        # Null is no setting; a key that is left out would be the default one.
        values["calibrate"].setdefault("settings", None)
        return values

    @contextmanager
    def at(self, *loc: str | int) -> Iterator[None]:
        """Errors inside the block begin with file and line of this value."""
        try:
            yield
        except HdrqError as error:
            raise self.document.error(loc, str(error), type(error)) from error


def load(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, exists: bool = True
) -> Loaded:
    """Read and check a run file.

    Args:
        path: The file, YAML or JSON.
        out: Folder of all results; by default that of the file's key ``out``, else a folder
            beside the file that is named after it, such as ``hdrq-run`` for ``hdrq.yaml``.
        exists: Whether all checkpoints and images must be there already.

    Raises:
        HdrqError: In one line: file, line, what was found and what is needed.
    """
    document = Document.read(path)
    try:
        file = RunFile.model_validate(document.values)
    except ValidationError as error:
        raise _first_error(document, error) from error
    folder = document.path.parent
    named = folder / Path(file.out or f"{document.path.stem}-run").expanduser()
    place = Path(os.path.normpath(Path(out).absolute() if out is not None else named))
    checked = _Checks(document, folder, exists)
    file = checked.paths(file)
    file = file.model_copy(update={"out": str(place), "merges": checked.merges(file)})
    return Loaded(file, document, place)


def _first_error(document: Document, error: ValidationError) -> HdrqError:
    """The first mistake in the file; unknown keys come before what is missing for their sake."""
    rows = sorted(
        error.errors(),
        key=lambda row: (row["type"] != "extra_forbidden", document.line(row["loc"])),
    )
    row = rows[0]
    loc = tuple(part for part in row["loc"] if part != "[key]")
    name = ".".join(str(part) for part in loc)
    if row["type"] == "extra_forbidden":
        known = list(_section_at(RunFile, loc[:-1]).model_fields)
        hint = meant(str(loc[-1]), known)
        return document.error(
            loc, f"found the unknown key {name}; {hint}keys are {', '.join(known)}"
        )
    if row["type"] == "missing":
        return document.error(loc[:-1], f"found no {name}; add it")
    if row["type"] == "value_error":
        return document.error(loc, f"{name}: {row['ctx']['error']!s}")
    # A few lines of YAML can name a value of any size.
    value, needed = reprlib.repr(row["input"]), str(row["msg"])
    needed = needed.removeprefix("Input should be ").removesuffix(" or instance of Bench")
    return document.error(loc, f"{name}: found {value}; needed {needed}")


def _section_at(section: Any, loc: Sequence[str | int]) -> type[BaseModel]:
    """The class of the section that a value lies in."""
    for part in loc:
        annotation = section.model_fields[part].annotation if _is_section(section) else None
        section = _inner(annotation) if annotation is not None else section[1]
    kind: type[BaseModel] = section
    return kind


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _inner(annotation: Any) -> Any:
    """The section inside optional and annotated types; (key, section) of a mapping."""
    if _is_section(annotation):
        return annotation
    if getattr(annotation, "__origin__", None) is dict:
        key, section = annotation.__args__
        return key, _inner(section)
    inside = (_inner(part) for part in getattr(annotation, "__args__", ()))
    return next((part for part in inside if part is not None), None)


class _Checks:
    """What types cannot say: paths that exist, and names that fit each other."""

    def __init__(self, document: Document, folder: Path, exists: bool) -> None:
        self._document, self._folder, self._exists = document, folder, exists

    def paths(self, file: RunFile) -> RunFile:
        """The file with absolute paths."""
        domains = {}
        for name, domain in file.domains.items():
            loc: Loc = ("domains", name)
            if (domain.checkpoint is None) == (domain.adapt is None):
                found = "neither" if domain.checkpoint is None else "both"
                raise self._document.error(
                    loc,
                    f"domains.{name}: found {found} of checkpoint and adapt; give the adapted "
                    "checkpoint, or adapt: true to make it from the source",
                )
            given = {
                key: self._path((*loc, key), value)
                for key in ("checkpoint", "calibration", "unlabelled", "test")
                if (value := getattr(domain, key)) is not None
            }
            domains[name] = Domain.model_copy(domain, update=given)
        source = self._path(("source",), file.source)
        return file.model_copy(update={"source": source, "domains": domains})

    def _path(self, loc: Loc, text: str) -> str:
        path = Path(os.path.normpath(self._folder / Path(text).expanduser()))
        if not text or (self._exists and not path.exists()):
            name = ".".join(map(str, loc))
            raise self._document.error(
                loc,
                f"{name}: found nothing at {path}; needed an existing path, relative to the file",
            )
        return str(path)

    def merges(self, file: RunFile) -> dict[str, Merge]:
        """All merges, their domains named and their weights one per domain."""
        if file.merges is None:
            given = {_MERGED: Merge()} if len(file.domains) > 1 else {}
        else:
            given = dict(file.merges)
        return {name: self._merge(file, name, merge) for name, merge in given.items()}

    def _merge(self, file: RunFile, name: str, merge: Merge) -> Merge:
        loc: Loc = ("merges", name)
        if name in file.domains:
            raise self._document.error(
                loc, f"merges.{name}: found the name of a domain; give the merge another one"
            )
        members = merge.domains or list(file.domains)
        for i, member in enumerate(members):
            if member not in file.domains:
                hint = meant(member, file.domains)
                raise self._document.error(
                    (*loc, "domains", i),
                    f"merges.{name}: found the domain {member!r}; {hint}domains are "
                    f"{', '.join(file.domains)}",
                )
            if member in members[:i]:
                raise self._document.error(
                    (*loc, "domains", i), f"merges.{name}: found the domain {member!r} twice"
                )
        weights = self._weights(loc, merge.weights, members)
        self._check(loc, merge)
        if merge.fit_to is not None and merge.fit_to not in file.methods:
            raise self._document.error(
                (*loc, "fit_to"),
                f"merges.{name}: found fit_to: {merge.fit_to}, which is not among methods; add it "
                "there",
            )
        return merge.model_copy(update={"domains": members, "weights": weights})

    def _weights(self, loc: Loc, given: Any, members: Sequence[str]) -> Any:
        """A word for how they are chosen, a number for each member, or None."""
        place = (*loc, "weights")
        if isinstance(given, Mapping):
            if set(given) != set(members):
                raise self._document.error(
                    place,
                    f"{'.'.join(map(str, place))}: found weights of {', '.join(given)}; needed "
                    f"those of {', '.join(members)}",
                )
            given = [given[member] for member in members]
        try:
            numbers = None if isinstance(given, str) else given
            checked = check_merge_weights(numbers, len(members), "domain")
        except HdrqError as error:
            raise self._document.error(place, f"{'.'.join(map(str, place))}: {error}") from error
        return given if given is None or isinstance(given, str) else checked

    def _check(self, loc: Loc, merge: Merge) -> None:
        name = ".".join(map(str, loc))
        try:
            check_way(merge.method or "mean", merge.rounding or "nearest", merge.wbits is not None)
        except HdrqError as error:
            key = "method" if merge.method else "rounding"
            raise self._document.error((*loc, key), f"{name}: {error}") from error
        if merge.candidates is not None and merge.rounding != "advanced":
            raise self._document.error(
                (*loc, "candidates"),
                f"{name}: found candidates without rounding: advanced, whose draws they are",
            )
        if merge.criterion is not None and merge.weights != "auto":
            raise self._document.error(
                (*loc, "criterion"),
                f"{name}: found criterion without weights: auto, which reads it",
            )
        tosses = merge.rounding is not None and ROUNDINGS[merge.rounding].tosses
        if merge.weights == "statistics" and (merge.method == "mean" or tosses):
            found = f"rounding: {merge.rounding}" if tosses else "method: mean"
            raise self._document.error(
                (*loc, "weights"),
                f"{name}: found weights: statistics with {found}; they are those of regression: "
                f"leave {found.partition(':')[0]} out, or give numbers",
            )
        for key, given in (
            ("fit_to", merge.fit_to is not None),
            ("fit_sweeps", merge.fit_sweeps > 1),
        ):
            if given and not merge.fit:
                raise self._document.error(
                    (*loc, key), f"{name}: found {key} without fit: true, which it is for"
                )


def meant(word: str, known: Iterable[str]) -> str:
    """A question that names the nearest known word; "" where none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {near[0]}? " if near else ""
