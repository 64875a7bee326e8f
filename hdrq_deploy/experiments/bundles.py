"""Bundles that are made once: again only where what they are made from has changed.

Beside ``night.hdrq`` lies ``.night.hdrq.inputs.json``: options, and path, size and time of the
checkpoints and images. Where it is equal and the bundle whole, the bundle is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import HdrqError, SpecError
from ..formats.atomic_files import remove_file, remove_folder, write_bytes
from ..formats.bundle import Bundle
from ..formats.file_kinds import CELL_INPUTS, PARTIAL

__all__ = ["forget", "inputs_of", "is_merged", "make_bundle", "stamp"]


def make_bundle(**arguments: Any) -> None:
    """Calibrate where that was not done yet; go on behind the last block of the same run.

    Args:
        arguments: Keyword arguments of ``calibrate``.
    """
    from ..calibration import calibrate

    record, inputs = inputs_of(arguments["output"]), _inputs(arguments)
    if record.is_file() and record.read_bytes() == inputs and _is_whole(arguments["output"]):
        return
    remove_file(record, CELL_INPUTS)
    given = {**arguments, "resume": True}
    try:
        calibrate(**given)
    except SpecError:  # unfinished blocks of another run
        calibrate(**{**given, "resume": False})
    write_bytes(record, inputs, CELL_INPUTS)


def _is_whole(path: Path) -> bool:
    try:
        Bundle.open(path)
    except HdrqError:
        return False
    return True


def forget(output: Path) -> None:
    """Let the bundle at ``output`` be made from its first block on."""
    remove_file(inputs_of(output), CELL_INPUTS)
    remove_folder(output.with_name(f"{output.name}.partial"), PARTIAL)


def is_merged(path: Path, parents: Sequence[Bundle]) -> bool:
    """Whether the bundle at ``path`` is whole and was merged from these."""
    try:
        bundle = Bundle.open(path)
    except HdrqError:
        return False
    recorded = [parent.manifest_sha256 for parent in bundle.manifest.parents]
    return recorded == [parent.manifest_sha256 for parent in parents]


def stamp(path: str | Path | None) -> list[Any] | None:
    """Path, files, bytes and time of the last change of a file or of all files of a folder."""
    if path is None:
        return None
    path = Path(path)
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    found = [f.stat() for f in files if f.exists()]
    newest = max((f.st_mtime_ns for f in found), default=0)
    return [str(path.absolute()), len(found), sum(f.st_size for f in found), newest]


def inputs_of(output: Path) -> Path:
    """The file beside a bundle that says what it was made from."""
    return output.with_name(f".{output.name}.inputs.json")


def _inputs(arguments: Mapping[str, Any]) -> bytes:
    plain = {"model", "domain", "method", "wbits", "abits", "per_channel", "grid", "fold", "seed"}
    plain |= {"images", "skip_corrupt", "device"}
    record = {key: arguments[key] for key in sorted(plain & set(arguments))}
    for key in ("options", "wanted"):
        record[key] = asdict(arguments[key]) if arguments.get(key) is not None else None
    record |= {key: stamp(arguments.get(key)) for key in ("data", "weights", "base")}
    return (json.dumps(record, indent=1) + "\n").encode()
