"""Bundles that are made once: again only where what they are made from has changed.

Beside ``night.hdrq`` lies ``.night.hdrq.inputs.json``: options, versions, and path, size and time
of the checkpoints and images. Where it is equal and the bundle is valid, the bundle stays.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..calibration.graph_cache import GraphCache
from ..calibration.request import CalibrationRequest
from ..calibration_data.readers import ImageSet
from ..errors import HdrqError, OtherRunError
from ..formats.atomic_files import read_json, remove_file, remove_folder, write_bytes
from ..formats.bundle import Bundle
from ..formats.file_kinds import CELL_INPUTS, PARTIAL, partial_of
from ..formats.staleness import (
    CALIBRATION,
    change_in,
    change_since,
    code_of,
    is_stamp,
    plain,
    stamp,
    versions_of,
    with_contents,
)

__all__ = [
    "bundle_change",
    "finished_change",
    "forget",
    "inputs_of",
    "is_merged",
    "is_valid",
    "make_bundle",
    "record_ingredients",
    "recorded_change",
    "resume_or_restart",
    "whole_bundle",
]

# Arguments that name what is read, and those that say only where and how the work is done.
_READ = ("weights", "base")
_PLACES = {"output", "resume", "cache_gb"}
_log = logging.getLogger("hdrq_deploy")


def make_bundle(
    request: CalibrationRequest,
    graphs: GraphCache | None = None,
    read_from: Sequence[Any] | None = None,
) -> None:
    """Calibrate where the bundle is missing or stale; resume the same run where it was stopped.

    Args:
        request: What to calibrate; its ``resume`` is not looked at.
        graphs: Shared by the domains of one model.
        read_from: The record of where images came from that ``data`` holds, as JSON; by default
            ``data`` is a path, or paths, and their stamps are the record.

    Raises:
        HdrqError: As :func:`hdrq_deploy.calibration.calibrate`.
    """
    from ..calibration.pipeline import run_calibration

    output, ingredients = Path(request.output), _ingredients(request, read_from)
    record = inputs_of(output)
    change = recorded_change(output, ingredients, is_valid)
    if not change:
        return
    if record.is_file():
        _log.info("%s: %s; calibrating again", output, change)
    remove_file(record, CELL_INPUTS)
    resume_or_restart(lambda resume: run_calibration(replace(request, resume=resume), graphs))
    record_ingredients(output, ingredients)


def resume_or_restart(work: Callable[[bool], object]) -> None:
    """Go on with unfinished work, or begin anew where it is that of another run.

    Args:
        work: Does it, and resumes if it is called with True.
    """
    try:
        work(True)
    except OtherRunError as error:
        _log.info("%s; starting anew", error)
        work(False)


def bundle_change(request: CalibrationRequest) -> str:
    """Why :func:`make_bundle` would calibrate; "" where the bundle is up to date."""
    return recorded_change(Path(request.output), _ingredients(request), is_valid)


def finished_change(request: CalibrationRequest) -> str:
    """The first difference between a request and what a finished bundle was made from, in words.

    Code, versions, the device, files of the same names that are gone, options that the bundle's
    record does not have, and statistics, which change no figure, are not compared: what is finished
    stays what it is. "" where there is no record.
    """
    before = read_json(inputs_of(Path(request.output)))
    if not isinstance(before, dict):
        return ""
    now = json.loads(json.dumps(_ingredients(request)))
    gone = {name for name in (*_READ, "data") if _is_gone(now[name], before.get(name))}
    for name in {"versions", "code", "device", "statistics", *gone}:
        before.pop(name, None)
    return change_in(before, _alike(now, before))


def _is_gone(now: Any, before: Any) -> bool:
    """Whether no file of a stamp is there any more, and an earlier stamp is of the same name.

    The folder of a run may have moved, so that a name is that of a file and of the two folders
    around it; of checkpoints that were brought and are gone nobody knows more than the domain.
    """
    if not (is_stamp(now) and is_stamp(before)) or now[1]:
        return False
    there, named = Path(before[0]), Path(now[0])
    return there.parts[-3:] == named.parts[-3:] or (not named.suffix and there.stem == named.name)


def _alike(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``now`` that ``before`` has too, at any depth."""
    return {
        name: _alike(value, before[name])
        if isinstance(value, dict) and isinstance(before[name], dict)
        else value
        for name, value in now.items()
        if name in before
    }


def recorded_change(
    output: Path, ingredients: Mapping[str, Any], is_whole: Callable[[Path], bool]
) -> str:
    """Why an output that has a record beside it is stale, in words; "" where it is up to date.

    Args:
        output: File or folder.
        ingredients: All that it would be made from now.
        is_whole: Whether what lies at a path can be used.
    """
    if not output.exists():
        return "it is missing"
    change = change_since(inputs_of(output), ingredients)
    return change or ("" if is_whole(output) else "it is damaged")


def record_ingredients(output: Path, ingredients: Mapping[str, Any]) -> None:
    """Write beside a bundle what it was made from."""
    record = {"kind": CELL_INPUTS.kind, **with_contents(ingredients)}
    text = json.dumps(record, indent=1)
    write_bytes(inputs_of(output), f"{text}\n".encode(), CELL_INPUTS)


def whole_bundle(path: Path) -> Bundle | None:
    """The bundle at ``path``; None where there is no whole one."""
    try:
        return Bundle.open(path)
    except HdrqError:
        return None


def is_valid(path: Path) -> bool:
    """Whether a whole bundle lies at ``path``."""
    return whole_bundle(path) is not None


def forget(output: Path) -> None:
    """Let the bundle at ``output`` be made from its first block on."""
    remove_file(inputs_of(output), CELL_INPUTS)
    remove_folder(partial_of(output), PARTIAL)


def is_merged(path: Path, parents: Sequence[Bundle]) -> bool:
    """Whether the bundle at ``path`` is whole and was merged from these."""
    bundle = whole_bundle(path)
    if bundle is None:
        return False
    recorded = [parent.manifest_sha256 for parent in bundle.manifest.parents]
    return recorded == [parent.manifest_sha256 for parent in parents]


def inputs_of(output: Path) -> Path:
    """The file beside a bundle that says what it was made from."""
    return output.with_name(f".{output.name}.inputs.json")


def _ingredients(
    request: CalibrationRequest, read_from: Sequence[Any] | None = None
) -> dict[str, Any]:
    """All that a bundle depends on: the request but for its place, libraries and code."""
    names = sorted({field.name for field in fields(request)} - _PLACES - {*_READ, "data"})
    images = [stamp(source) for source in request.sources if not isinstance(source, ImageSet)]
    if read_from is None:
        assert len(images) == len(request.sources)
        read_from = images[0] if len(images) == 1 else images
    return {
        "data": read_from,
        **{name: stamp(getattr(request, name)) for name in _READ},
        "versions": versions_of("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "pillow"),
        "code": code_of(*CALIBRATION),
        **{name: plain(getattr(request, name)) for name in names},
    }
