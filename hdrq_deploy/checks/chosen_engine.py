"""An engine folder that was chosen by measuring: its input, its figures, how it is known again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..comparison import golden
from ..errors import EngineError
from ..exporters.first_run import has_driver
from ..formats.atomic_files import new_directory
from ..formats.bundle import Bundle
from ..formats.engine_folder import (
    KINDS,
    MANIFEST,
    PLAN,
    PRECISION,
    EngineManifest,
    PrecisionReport,
    altered_file,
    read_manifest,
    write_manifest,
)
from ..formats.file_kinds import ENGINE
from ..formats.preprocessing import feed
from ..typing import Array

__all__ = ["digest", "golden_input", "is_chosen", "keep_engine", "not_here"]


def not_here(engine: str) -> str:
    """Why an engine of this kind cannot be measured on this machine; "" where it can be."""
    if not KINDS[engine].built:
        return "the portable graph is for no runtime of its own"
    if KINDS[engine].runs == PLAN and not has_driver():
        return "this machine has no NVIDIA driver"
    return ""


def golden_input(bundle: Bundle, manifest: EngineManifest) -> Array:
    """A golden input as an engine takes it, one image or as many as it is fixed to."""
    fixed = manifest.inputs[0].shape[0]
    rows, _ = golden.inputs(bundle)
    count = fixed if isinstance(fixed, int) else 1
    return feed(np.ascontiguousarray(np.resize(rows, (count, *rows.shape[1:]))), manifest)


def digest(record: Mapping[str, Any]) -> str:
    """A hash of what a choice was made of."""
    text = json.dumps(record, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_chosen(goal: Path, name: str, asked: str) -> bool:
    """Whether the engine there was chosen of what ``asked`` is the :func:`digest` of.

    Args:
        goal: Engine folder.
        name: Key of the figures in ``build`` of its manifest.
        asked: Digest of what is asked now.
    """
    if not (goal / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(goal, check=False)
    except EngineError:
        return False
    figures = manifest.build.get(name)
    same = isinstance(figures, Mapping) and figures.get("asked") == asked
    return same and altered_file(goal, manifest) == ("", "")


def keep_engine(
    chosen: Path, goal: Path, name: str, figures: Mapping[str, Any], reasons: Mapping[str, str]
) -> None:
    """Put an engine into its place, with the figures in its manifest.

    Args:
        chosen: Engine folder that is copied.
        goal: Where it belongs.
        name: Key of the figures in ``build`` of the manifest.
        figures: What was measured.
        reasons: Reasons that the precision report gives for layers, by their ONNX nodes.
    """
    manifest = read_manifest(chosen, check=False)
    with new_directory(goal, ENGINE) as folder:
        for file in manifest.files:
            if file != PRECISION or not reasons:
                shutil.copyfile(chosen / file, folder / file)
        if reasons:
            report = PrecisionReport.read(chosen)
            rows = [
                row.model_copy(update={"reason": reasons.get(row.node, row.reason)})
                for row in report.layers
            ]
            report.model_copy(update={"layers": tuple(rows)}).write(folder)
        build = {**manifest.build, name: dict(figures)}
        write_manifest(folder, manifest.model_copy(update={"build": build}))
