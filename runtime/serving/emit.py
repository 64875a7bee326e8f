"""Configuration for servers that run an engine, made from its manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import ExportError
from ...formats.atomic_files import check_output, new_directory, write_record
from ...formats.engine_folder import read_manifest
from ...formats.file_kinds import EMITTED
from .deepstream import deepstream_files
from .ros2_files import ros2_files
from .shared import Files
from .triton import triton_files

__all__ = ["TARGETS", "ServingTarget", "emit"]


@dataclass(frozen=True)
class ServingTarget:
    """A server that configuration can be written for.

    Attributes:
        files: Makes the files, from engine folder, manifest and options.
        options: Options of :func:`emit` that it takes.
    """

    files: Callable[..., Files]
    options: tuple[str, ...]


TARGETS = {
    "triton": ServingTarget(triton_files, ("name", "max_batch")),
    "deepstream": ServingTarget(deepstream_files, ("interval", "approximate")),
    "ros2": ServingTarget(ros2_files, ("name", "topic")),
}


def emit(
    target: str,
    engine: str | Path,
    output: str | Path,
    name: str | None = None,
    max_batch: int | None = None,
    interval: int | None = None,
    approximate: bool = False,
    topic: str | None = None,
) -> Path:
    """Write the configuration of one server.

    Args:
        target: One of ``TARGETS``.
        engine: Engine folder.
        output: Folder to make. For ``triton`` it is a model repository, the engine inside.
        name: Name of the model or node; see :func:`~.triton.triton_files` and
            :func:`~.ros2_files.ros2_files`.
        max_batch: See :func:`~.triton.triton_files`.
        interval: See :func:`~.deepstream.deepstream_files`.
        approximate: See :func:`~.deepstream.deepstream_files`.
        topic: See :func:`~.ros2_files.ros2_files`.

    Returns:
        The folder.

    Raises:
        EngineError: Not an engine folder.
        ExportError: The target is unknown or does not take an option that was given, or the
            server cannot run this engine as it is.
    """
    if target not in TARGETS:
        raise ExportError(f"found target {target!r}; choose one of {', '.join(TARGETS)}")
    server = TARGETS[target]
    options = {
        "name": name,
        "max_batch": max_batch,
        "interval": interval,
        "approximate": approximate or None,
        "topic": topic,
    }
    given = {option: value for option, value in options.items() if value is not None}
    foreign = [option for option in given if option not in server.options]
    if foreign:
        raise ExportError(
            f"found `{foreign[0]}` for {target}; it takes {', '.join(server.options)}"
        )
    folder = Path(engine).absolute()
    goal = check_output(output, EMITTED[target], [folder])
    manifest = read_manifest(folder)
    texts, copies = server.files(folder, manifest, **given)
    with new_directory(goal, EMITTED[target]) as scratch:
        record = {"target": target, "engine": str(folder), "bundle": manifest.bundle_sha256}
        for file, text in texts.items():
            (scratch / file).parent.mkdir(parents=True, exist_ok=True)
            (scratch / file).write_text(text, encoding="utf-8")
        for file, source in copies.items():
            (scratch / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, scratch / file)
        write_record(scratch, EMITTED[target], record)
    return goal
