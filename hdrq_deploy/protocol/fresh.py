"""Is a bundle that is there the one that these arguments would make?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..bundle import MANIFEST, Bundle
from ..errors import HdrqError

__all__ = ["is_calibrated", "is_merged"]

_COMPARED = ("model", "method", "wbits", "abits", "per_channel", "grid", "fold", "seed")


def is_calibrated(arguments: Mapping[str, Any]) -> bool:
    """Whether the bundle at ``output`` is whole, of these options, and newer than its checkpoints.

    Args:
        arguments: Keyword arguments of ``calibrate``; those left out are not compared.
    """
    try:
        bundle = Bundle.open(arguments["output"])
    except HdrqError:
        return False
    manifest = bundle.manifest
    found = {**manifest.options, **dict(manifest.scheme), "method": manifest.method}
    found |= {"seed": manifest.seed, "model": manifest.model}
    asked = {key: arguments[key] for key in _COMPARED if key in arguments}
    if manifest.method == "float":
        asked = {key: value for key, value in asked.items() if key in {"model", "method", "seed"}}
    else:
        asked |= asdict(arguments["options"])
        if asked.get("fold") == "steps":
            asked["per_channel"] = True
    if arguments.get("images") is not None and found.get("images", 0) > arguments["images"]:
        return False
    if any(found.get(key) != value for key, value in asked.items()):
        return False
    made = (bundle.path / MANIFEST).stat().st_mtime
    files = [arguments.get(name) for name in ("weights", "base")]
    return all(_newest(Path(file)) <= made for file in files if file)


def _newest(path: Path) -> float:
    """Time of the last change of a file, or of the newest file of a folder."""
    if not path.exists():
        return float("inf")  # the calibration itself says what is missing
    parts = path.iterdir() if path.is_dir() else [path]
    return max((part.stat().st_mtime for part in parts), default=float("inf"))


def is_merged(path: Path, parents: Sequence[Bundle]) -> bool:
    """Whether the bundle at ``path`` is whole and was merged from these."""
    try:
        bundle = Bundle.open(path)
    except HdrqError:
        return False
    recorded = [parent.manifest_sha256 for parent in bundle.manifest.parents]
    return recorded == [parent.manifest_sha256 for parent in parents]
