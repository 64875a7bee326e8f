"""Is an engine the model it was made from? The public door to the comparison of stages."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration_data.readers import Wanted, read
from ..comparison.differences import Stage, check
from ..errors import CheckFailed, DataError
from ..formats.bundle import Bundle
from ..formats.engine_folder import is_engine
from ..formats.file_kinds import VERIFY_JSON
from ..formats.records import Preprocessing, Tolerances
from ..typing import Array
from .stages import compare_engine, compare_stages

__all__ = ["Verification", "verify"]

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Verification:
    """How far the stages of one model differ, and how far they may.

    Attributes:
        stages: Neighbouring stages compared, in the order PyTorch, bundle, lowered graph, engine.
        tolerances: The tolerances of the manifest.
        max_flips: Share of decisions that may differ (0 to 1), in place of all tolerances.
        max_rms: Relative RMS by which outputs may differ, likewise.
    """

    stages: tuple[Stage, ...]
    tolerances: Tolerances
    max_flips: float | None = None
    max_rms: float | None = None

    @property
    def passed(self) -> bool:
        """Whether all stages lie within the tolerances."""
        try:
            self.check()
        except CheckFailed:
            return False
        return True

    def check(self) -> None:
        """Fail where two stages differ more than they may.

        Raises:
            CheckFailed: Names the stages, the figure, and the first layer that differs.
        """
        check(self.stages, self.tolerances, self.max_flips, self.max_rms)

    def record(self) -> dict[str, Any]:
        """Everything as plain data for JSON: what ``hdrq-verify --json`` writes."""
        given = {"decision_flips": self.max_flips, "output_rms": self.max_rms}
        return {
            "schema_version": 1,
            "kind": VERIFY_JSON.kind,
            "tolerances": {
                **self.tolerances.model_dump(),
                **{name: value for name, value in given.items() if value is not None},
            },
            "stages": [_plain(asdict(stage)) for stage in self.stages],
        }


def verify(
    bundle: AnyPath,
    engine: AnyPath | None = None,
    data: Mapping[str, AnyPath] | Array | None = None,
    *,
    images: int = 512,
    torch: bool | None = None,
    max_flips: float | None = None,
    max_rms: float | None = None,
) -> Verification:
    """Compare PyTorch, the bundle, the lowered graph and the engine on the same images.

    >>> verify("merged.hdrq", "engine").check()  # doctest: +SKIP

    Args:
        bundle: Bundle; or an engine folder alone, which is checked on its golden inputs.
        engine: Engine folder made of the bundle; None compares PyTorch with the bundle.
        data: Image folders or .npz files by name, or network inputs (N, C, H, W) float32. None
            takes the golden inputs that bundle and engine carry.
        images: Images of each data set at most.
        torch: Compare PyTorch too, leave it out, or (None) compare it where it can be; the
            log (``hdrq_deploy``, level INFO) says why it was left out.
        max_flips: Share of decisions that may differ (0 to 1), in place of the manifest's.
        max_rms: Relative RMS by which outputs may differ, likewise.

    Returns:
        The comparison. It does not fail by itself: see :meth:`Verification.check`.

    Raises:
        BundleError: The bundle cannot be read.
        DataError: There are no images, or images of another shape.
        EngineError: The engine cannot be loaded, or was made of another bundle.
        ModelError: ``torch`` is True and the model cannot be rebuilt.
        CheckFailed: A stage does not load or run.
    """
    if engine is None and is_engine(Path(bundle)):
        if data is not None:
            raise DataError(
                f"{bundle}: found an engine alone; images can be compared beside the bundle it "
                "was made of: name the bundle, then the engine"
            )
        stages, tolerances = compare_engine(Path(bundle))
    else:
        opened = Bundle.open(bundle)
        tolerances = opened.manifest.tolerances
        x = _inputs(opened.manifest.preprocessing, data, images)
        target = None if engine is None else Path(engine)
        stages = compare_stages(opened, target, x, torch)
    return Verification(tuple(stages), tolerances, max_flips, max_rms)


def _inputs(
    preprocessing: Preprocessing | None, data: Mapping[str, AnyPath] | Array | None, limit: int
) -> Array | None:
    if data is None or isinstance(data, np.ndarray):
        return data
    if not data:
        return None
    wanted = Wanted.like(preprocessing)
    return np.concatenate([read(Path(path), wanted, limit).x for path in data.values()])


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which stands where stages cannot be compared."""
    return {
        name: None if isinstance(value, float) and math.isinf(value) else value
        for name, value in record.items()
    }
