"""What the files of several servers have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...formats.engine_folder import EngineManifest

__all__ = ["Files", "identifier", "largest_batch"]

# Texts by file name, and files of the engine that are copied, by their new name.
Files = tuple[dict[str, str], dict[str, Path]]


def identifier(text: str) -> str:
    """A name that servers accept: letters, digits and underscores, 64 at most."""
    return re.sub(r"\W+", "_", text).strip("_")[:64] or "model"


def largest_batch(manifest: EngineManifest) -> int:
    """The largest batch that an engine was built for; 8 where it takes any."""
    fixed = manifest.inputs[0].shape[0]
    if isinstance(fixed, int):
        return fixed
    build: Mapping[str, Any] = manifest.options.get("build") or {}
    batches = build.get("batches") or (1, 1, 8)
    return int(batches[2])
