"""The stage that verifies an engine: do all forms of the model compute the same?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..checks.verification import verify
from ..formats.atomic_files import Kind, read_json, write_bytes
from ..formats.bundle import Bundle
from ..formats.engine_folder import read_manifest
from ..formats.file_kinds import VERIFY_JSON
from ..formats.staleness import code_of, stamp, versions_of
from .measuring import engine_sha256, not_run
from .stage import RecordedStage

__all__ = ["VerifyStage", "told"]

# Images of each domain.
_IMAGES = 512


@dataclass(frozen=True)
class VerifyStage(RecordedStage):
    """PyTorch, bundle, lowered graph and engine compared; see :func:`..checks.verify`.

    Attributes:
        bundle: The bundle.
        engine: Engine folder made of it.
        data: Images of each domain.
    """

    kind: ClassVar[str] = "verify"
    bundle: Path
    engine: Path
    data: Mapping[str, str]

    def ingredients(self) -> dict[str, Any]:
        """See :meth:`RecordedStage.ingredients`."""
        return {
            "data": {name: stamp(path) for name, path in self.data.items()},
            "engine": engine_sha256(self.engine),
            "bundle": Bundle.open(self.bundle).manifest_sha256,
            "versions": versions_of("numpy", "onnx", "onnxruntime", "torch"),
            "code": code_of("checks", "comparison", "runtime"),
        }

    def is_whole(self, path: Path) -> bool:
        """See :meth:`RecordedStage.is_whole`."""
        record = read_json(path)
        return isinstance(record, dict) and isinstance(record.get("stages"), list)

    def write(self) -> None:
        """See :meth:`RecordedStage.write`.

        Raises:
            CheckFailed: Two stages differ more than the manifest allows; nothing is written.
        """
        reason = not_run(read_manifest(self.engine))
        if reason:
            record: dict[str, Any] = {"kind": VERIFY_JSON.kind, "not_run": reason, "stages": []}
        else:
            found = verify(self.bundle, self.engine, self.data, images=_IMAGES)
            found.check()
            record = found.record()
        write_bytes(self.output, f"{json.dumps(record, indent=1)}\n".encode(), VERIFY_JSON)

    def outputs(self) -> list[tuple[Path, Kind]]:
        """See :meth:`RecordedStage.outputs`."""
        return self.recorded(VERIFY_JSON)


def told(path: Path) -> str:
    """What a :class:`VerifyStage` wrote, as a sentence without a subject."""
    record = read_json(path)
    if record.get("not_run"):
        return f"compared up to its lowered graph at export, for {record['not_run']}"
    stages = record["stages"]
    parts = (
        f"{stage['name']} {stage['decision_flips']} decisions differ, codes by "
        f"{stage['max_steps']} at most"
        for stage in stages
    )
    return f"{max(stage['images'] for stage in stages)} images: {'; '.join(parts)}"
