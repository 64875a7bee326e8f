"""A look at checkpoints, images and libraries before hours of work depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..calibration_data.readers import Wanted, read
from ..calibration_data.readers.street_scenes import is_scenes
from ..checks.fastest_engine import AUTO
from ..errors import DataError
from ..exporters.engines import target_of
from ..exporters.options import BuildOptions
from .bundles import CalibrateStage
from .loading import Loaded
from .plan import Planned
from .schema import named_engines
from .stage import importable

__all__ = ["preflight"]

_LOOKED_AT = 2


def preflight(loaded: Loaded, planned: Sequence[Planned]) -> None:
    """Find early what would stop a run later: only what stale stages read is looked at.

    Args:
        loaded: The run file.
        planned: Its stages.

    Raises:
        HdrqError: A library of an engine is not installed, a checkpoint does not fit the model,
            or images cannot be read, are too few or have no labels; file and line are named.
    """
    kinds = {row.stage.kind for row in planned if row.why}
    if "export" in kinds:
        for i, (engine, _) in enumerate(named_engines(loaded.file)):
            if engine != AUTO:
                with loaded.at("engines", i):
                    target_of(engine).ingredients(BuildOptions(), False)
    if kinds & {"adapt", "calibrate"}:
        _look_at_images(loaded, "calibration", _images_of_a_batch(planned))
        _look_at_checkpoints(loaded)
    if kinds & {"accuracy", "verify"}:
        _look_at_images(loaded, "test", _LOOKED_AT)


def _images_of_a_batch(planned: Sequence[Planned]) -> int:
    """Images that the calibrations to come need of a domain."""
    stages = [row.stage for row in planned if row.why]
    requests = [stage.request for stage in stages if isinstance(stage, CalibrateStage)]
    return max([_LOOKED_AT, *(request.learning.batch for request in requests if request.learns)])


def _look_at_images(loaded: Loaded, key: str, needed: int) -> None:
    given = loaded.file.preprocess
    size = given.resize or given.size
    mean, std = (None if v is None else tuple(v) for v in (given.mean, given.std))
    wanted = Wanted((size[0], size[1]) if size else None, mean, std)
    for name, domain in loaded.file.domains.items():
        path = getattr(domain, key)
        if path is None:
            continue
        with loaded.at("domains", name, key):
            images = read(path, wanted, needed, skip_corrupt=given.skip_corrupt)
            if key == "calibration" and len(images) < needed:
                raise DataError(
                    f"domains.{name}.calibration: found {len(images)} images in {path}; needed "
                    f"{needed} or more (one batch): add images, or choose a smaller calibrate.batch"
                )
            if key == "test" and images.y is None and not is_scenes(Path(path)):
                raise DataError(
                    f"domains.{name}.test: found images without labels in {path}; accuracy needs "
                    "one folder per class, or y in the .npz"
                )


def _look_at_checkpoints(loaded: Loaded) -> None:
    from ..calibration.loading import load_model, load_state

    with importable(str(loaded.document.path.parent)):
        with loaded.at("model"):
            network = load_model(loaded.file.model)
        with loaded.at("source"):
            load_state(network, loaded.file.source, "source")
        for name, domain in loaded.file.domains.items():
            if domain.checkpoint is not None:
                with loaded.at("domains", name, "checkpoint"):
                    load_state(network, domain.checkpoint, "adapted")
