"""Bundles that are made once: again only where what they are made from has changed.

Beside ``night.hdrq`` lies ``.night.hdrq.inputs.json``: options, and path, size and time of the
checkpoints and images. Where it is equal and the bundle whole, the bundle is kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..calibration.graph_cache import GraphCache
from ..calibration.request import CalibrationRequest
from ..calibration_data.readers import ImageSet
from ..errors import HdrqError, SpecError
from ..formats.atomic_files import remove_file, remove_folder, write_bytes
from ..formats.bundle import Bundle
from ..formats.file_kinds import CELL_INPUTS, PARTIAL

__all__ = ["forget", "inputs_of", "is_merged", "make_bundle", "stamp"]

# Arguments of a calibration that are recorded as they are.
_PLAIN = (
    "model", "domain", "method", "wbits", "abits", "per_channel", "grid", "fold", "seed", "images",
    "skip_corrupt", "device",
)  # fmt: skip


def make_bundle(request: CalibrationRequest, graphs: GraphCache | None = None) -> None:
    """Calibrate where the bundle is missing or stale; resume the same run where it was stopped.

    Args:
        request: What to calibrate, ``data`` as a path; its ``resume`` is not looked at.
        graphs: Shared by the domains of one model.

    Raises:
        HdrqError: As :func:`hdrq_deploy.calibration.calibrate`.
    """
    from ..calibration.pipeline import run_calibration

    output = Path(request.output)
    record, inputs = inputs_of(output), _inputs(request)
    if _recorded(record) == inputs and _is_whole(output):
        return
    remove_file(record, CELL_INPUTS)
    try:
        run_calibration(replace(request, resume=True), graphs)
    except SpecError:  # unfinished blocks of another run
        run_calibration(replace(request, resume=False), graphs)
    write_bytes(record, (json.dumps(inputs, indent=1) + "\n").encode(), CELL_INPUTS)


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


def _inputs(request: CalibrationRequest) -> dict[str, Any]:
    """What a bundle is made from, as JSON gives it back."""
    record: dict[str, Any] = {key: getattr(request, key) for key in _PLAIN}
    for key in ("options", "wanted"):
        value = getattr(request, key)
        record[key] = None if value is None else asdict(value)
    assert not isinstance(request.data, ImageSet)
    record |= {"data": stamp(request.data), "weights": stamp(request.weights)}
    record["base"] = stamp(request.base)
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def _recorded(path: Path) -> dict[str, Any] | None:
    """What the record beside a bundle says; a key that it leaves out had its default."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    defaults = {field.name: field.default for field in fields(CalibrationRequest)}
    return {**{key: defaults[key] for key in _PLAIN}, **record}
