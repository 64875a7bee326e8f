"""Run stages, and remove what they made: the folder of a run, and what is written beside stages.

``OUT/resolved.yaml`` is the run file with all defaults and absolute paths; ``hdrq run`` accepts
it. ``OUT/outputs.json`` names all that runs wrote into the folder, with kinds, so that outputs of
an earlier form of the file can be removed too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HdrqError, ModelError
from ..experiments.threads import calibration_threads
from ..formats.atomic_files import (
    FolderKind,
    Kind,
    check_container,
    check_scratch,
    make_directory,
    read_json,
    remove_file,
    remove_folder,
    write_bytes,
)
from ..formats.file_kinds import RUN_FILE, RUN_LEDGER
from ..graph.reference_session import session_threads
from ..jobs.job import Job, Pool, run_jobs
from ..typing import Progress
from .document import emitted
from .loading import Loaded
from .plan import KINDS, Planned
from .stage import Stage, run_stage

__all__ = ["Removed", "check", "clean", "execute", "prepare"]

_RESOLVED, _LEDGER = "resolved.yaml", "outputs.json"
_HEADING = "# The resolved file of hdrq run. Edit the file that it was made from.\n"


def check(loaded: Loaded, stages: Sequence[Stage]) -> None:
    """Whether all may be written where it goes, and is installed; before any work.

    Raises:
        HdrqError: What is in the way, or missing.
    """
    places = [
        (str(path.relative_to(loaded.out)), kind)
        for stage in stages
        for path, kind in stage.outputs()
    ]
    own: list[tuple[str, Kind]] = [(_RESOLVED, RUN_FILE), (_LEDGER, RUN_LEDGER)]
    inputs = [loaded.document.path, Path(loaded.file.source)]
    for domain in loaded.file.domains.values():
        given = (domain.checkpoint, domain.calibration, domain.unlabelled, domain.test)
        inputs += [Path(path) for path in given if path is not None]
    # The resolved file of an earlier run may be run again: it is left as it is.
    if loaded.document.path == loaded.out / _RESOLVED:
        inputs, own = inputs[1:], own[1:]
    check_container(loaded.out, [*own, *places], inputs, "out")
    check_scratch()
    if any(stage.learns for stage in stages) and importlib.util.find_spec("torch") is None:
        raise ModelError("calibration needs torch: pip install 'hdrq-deploy[calibrate]'")


def prepare(loaded: Loaded, stages: Sequence[Stage]) -> None:
    """Make the folder of a run; write the resolved file and the record of all outputs.

    Raises:
        HdrqError: The folder cannot be written to.
    """
    make_directory(loaded.out)
    if loaded.document.path != loaded.out / _RESOLVED:
        text = _HEADING + emitted(loaded.resolved())
        write_bytes(loaded.out / _RESOLVED, text.encode(), RUN_FILE)
    outputs = {entry.name: entry.record for entry in [*_recorded(loaded.out)]}
    outputs |= {entry.name: entry.record for entry in _planned(loaded.out, stages)}
    record = {"kind": RUN_LEDGER.kind, "outputs": outputs}
    write_bytes(loaded.out / _LEDGER, f"{json.dumps(record, indent=1)}\n".encode(), RUN_LEDGER)


def execute(
    loaded: Loaded,
    planned: Sequence[Planned],
    pool: Pool,
    progress: Progress | None = None,
    begun: Callable[[str], None] | None = None,
) -> None:
    """Make what is stale, in order.

    Args:
        loaded: The run file.
        planned: Stages, each after those whose outputs it reads.
        pool: Where the work is done.
        progress: Called when a stage has ended, with its key.
        begun: Called with the key of a stage that begins.

    Raises:
        HdrqError: What the first failing stage raised, with file and line in front; what was
            finished is kept.
    """
    stale = [row.stage for row in planned if row.why]
    keys = {stage.key for stage in stale}
    folder = str(loaded.document.path.parent)
    jobs = [
        Job(
            stage.key,
            run_stage,
            {"stage": stage, "folder": folder},
            tuple(key for key in stage.after if key in keys),
            calibration_threads if stage.learns else session_threads,
        )
        for stage in stale
    ]
    for stage in stale:
        make_directory(stage.output.parent)
    run_jobs(jobs, pool, progress, begun)


@dataclass(frozen=True)
class _Entry:
    """An output in the folder of a run: relative path, kind of the stage, and mark."""

    name: str
    stage: str
    kind: Kind

    @property
    def record(self) -> dict[str, str]:
        return {"stage": self.stage, "kind": _mark(self.kind)}


def _mark(kind: Kind) -> str:
    return kind.kind if isinstance(kind, FolderKind) else kind.name


def _planned(out: Path, stages: Sequence[Stage]) -> Iterator[_Entry]:
    for stage in stages:
        for path, kind in stage.outputs():
            yield _Entry(str(path.relative_to(out)), stage.kind, kind)


def _recorded(out: Path) -> Iterator[_Entry]:
    """What earlier runs wrote, as far as the record can be believed."""
    from ..formats import file_kinds

    kinds = {
        _mark(kind): kind
        for name in file_kinds.__all__
        if isinstance(kind := getattr(file_kinds, name), Kind)
    }
    record: Any = read_json(out / _LEDGER)
    outputs = record.get("outputs") if isinstance(record, dict) else None
    for name, entry in (outputs if isinstance(outputs, dict) else {}).items():
        path, mark = Path(name), entry.get("kind") if isinstance(entry, dict) else None
        # Nothing outside the folder is ours, whatever the record says.
        if mark in kinds and path.parts and not path.is_absolute() and ".." not in path.parts:
            yield _Entry(name, str(entry.get("stage")), kinds[mark])


@dataclass(frozen=True)
class Removed:
    """What was removed, or would be, and what was left alone.

    Attributes:
        names: Paths in the folder of the run.
        left: Why something stays, in words.
    """

    names: tuple[str, ...]
    left: tuple[str, ...]


def clean(
    loaded: Loaded,
    stages: Sequence[Stage],
    only: Sequence[str] = (),
    unused: bool = False,
    dry_run: bool = False,
) -> Removed:
    """Remove outputs of stages that bear our marks; anything else stays.

    Args:
        loaded: The run file.
        stages: All its stages.
        only: Kinds of stages whose outputs are removed; all by default, and then the record and
            the resolved file too.
        unused: Only outputs that no stage of the file has.
        dry_run: Remove nothing.

    Raises:
        HdrqError: No such kind of stage.
    """
    unknown = [kind for kind in only if kind not in KINDS]
    if unknown:
        raise HdrqError(f"found `only` {unknown[0]!r}; choose among {', '.join(KINDS)}")
    now = {entry.name: entry for entry in _planned(loaded.out, stages)}
    entries = {entry.name: entry for entry in _recorded(loaded.out)}
    entries = {k: v for k, v in entries.items() if k not in now} if unused else {**entries, **now}
    if not only and not unused:
        entries[_LEDGER] = _Entry(_LEDGER, "", RUN_LEDGER)
        if loaded.document.path != loaded.out / _RESOLVED:
            entries[_RESOLVED] = _Entry(_RESOLVED, "", RUN_FILE)
    names, left = [], []
    for name, entry in entries.items():
        path = loaded.out / name
        if (only and entry.stage not in only) or not (path.exists() or path.is_symlink()):
            continue
        try:
            _remove(loaded.out, path, entry.kind, dry_run)
            names.append(name)
        except HdrqError as error:
            left.append(str(error))
    if not dry_run:
        _remove_empty(loaded.out, list(entries))
    return Removed(tuple(names), tuple(left))


def _remove(out: Path, path: Path, kind: Kind, dry_run: bool) -> None:
    # A link among the folders could lead out of the run.
    check_container(out, [(str(path.relative_to(out)), kind)], label="out")
    if dry_run:
        return
    if isinstance(kind, FolderKind):
        remove_folder(path, kind)
    else:
        remove_file(path, kind)


def _remove_empty(out: Path, names: Sequence[str]) -> None:
    """Remove folders that hold nothing any more."""
    folders = {parent for name in names for parent in (out / name).parents}
    inside = [f for f in folders if f == out or out in f.parents]
    for folder in sorted(inside, key=lambda f: len(f.parts), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()
