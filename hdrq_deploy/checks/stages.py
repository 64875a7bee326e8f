"""The stages of one model in their order, each compared with the one before.

The stages are PyTorch, the bundle's graph, the lowered graph as written, and the engine that runs
it. :mod:`..comparison.differences` compares two of them; :mod:`.verification` is the public door.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..comparison import golden, openvino_tap
from ..comparison.differences import Stage, Stepwise, difference, measure_spread, rows_at_once
from ..comparison.taps import Shows
from ..errors import DataError, HdrqError, ModelError
from ..formats.bundle import Bundle
from ..formats.engine_folder import GRAPH, EngineManifest, PrecisionReport, read_manifest
from ..formats.golden_inputs import GOLDEN, read_golden
from ..formats.preprocessing import feed
from ..formats.records import Tolerances
from ..numerics.batches import in_batches
from ..runtime import load_engine
from ..typing import Array

__all__ = ["compare_engine", "compare_stages"]

_LOG = logging.getLogger("hdrq_deploy")


def compare_stages(
    bundle: Bundle,
    engine: str | Path | None = None,
    x: Array | None = None,
    torch: bool | None = None,
) -> list[Stage]:
    """Every two neighbouring stages that are at hand, compared.

    Args:
        bundle: Calibrated or merged.
        engine: Engine folder made of it, or None.
        x: Network inputs (N, C, H, W) float32; None takes the golden ones.
        torch: Compare PyTorch too, leave it out, or (None) compare it where it can be.

    Raises:
        DataError: No images and no golden inputs, or images of another shape.
        ModelError: ``torch`` is True and the model cannot be rebuilt.
        EngineError: The engine cannot be loaded, or was made of another bundle.
        CheckFailed: A stage does not load or run.
    """
    x = _inputs(bundle, x)
    stages: list[Stage] = []
    first = _torch(bundle, x[:2], torch is True) if torch is not False else None
    exported = _exported(Path(engine), bundle) if engine is not None else None
    if exported is not None and exported[1].frames:
        x = golden.from_pixels(x, bundle.manifest.preprocessing)
    if first is not None:
        size = rows_at_once(bundle.manifest.input_shape)
        rows = list(in_batches(x, size))
        stages.append(
            difference(
                first,
                golden.bundle_tap(bundle),
                lambda: zip(rows, rows, strict=True),
                Stepwise.of_bundle(bundle),
            )
        )
    if exported is not None:
        manifest, facts = exported
        both = golden.Comparison(bundle, facts, x)
        stages.append(both.to_lowered())
        if manifest.built:
            stages.append(both.to_engine(_engine(Path(str(engine)), manifest)))
    return stages


def compare_engine(path: str | Path) -> tuple[list[Stage], Tolerances]:
    """An engine on this machine against its own graph and what its bundle computed at export.

    Raises:
        DataError: The engine carries no golden inputs.
        EngineError: It cannot be loaded.
        CheckFailed: A stage does not load or run.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if GOLDEN not in manifest.files:
        raise DataError(f"{path}: holds no golden inputs; verify it beside its bundle, with `data`")
    facts = _facts(path, manifest)
    record = read_golden(path / GOLDEN)
    if "output" not in record:
        raise DataError(f"{path / GOLDEN}: found no outputs; export the engine again")
    x, output = (golden.whole_batches(record[name], facts.batch) for name in ("input", "output"))
    size = facts.batch or len(x)
    fed = [feed(rows, manifest) for rows in in_batches(x, size)]
    outputs = list(in_batches(output, size))
    recorded = golden.recorded_tap("record", fed, outputs, manifest.postprocess)

    def batches() -> Any:
        return zip(fed, fed, strict=True)

    report = PrecisionReport.read(path)
    lowered = golden.file_tap(path / GRAPH, "lowered graph", [row.node for row in report.layers])
    how = Stepwise.like(lowered, report.layers, golden.engine_fidelity(lowered, manifest.code_ties))
    engine = _engine(path, manifest)
    stages = [difference(recorded, engine, batches, how)]
    measure_spread(stages[0], lowered, lambda: iter(fed), how)
    if manifest.built:
        stages.append(difference(lowered, engine, batches, how))
    return stages, manifest.tolerances


def _inputs(bundle: Bundle, x: Array | None) -> Array:
    if x is None:
        recorded = bundle.golden()
        if not recorded:
            raise DataError(
                f"{bundle.path}: holds no golden inputs (an older bundle); compare with `data`"
            )
        return recorded["input"]
    needed = bundle.manifest.input_shape
    if x.shape[1:] != needed or not len(x):
        raise DataError(
            f"found images of shape {x.shape}; needed (N, {', '.join(map(str, needed))}) with N of "
            "1 or more, as the bundle was calibrated with"
        )
    return x


def _exported(path: Path, bundle: Bundle) -> tuple[EngineManifest, golden.Exported]:
    manifest = read_manifest(path)
    if manifest.bundle_sha256 != bundle.manifest_sha256:
        raise DataError(
            f"{path}: made of another bundle than {bundle.path}; export this bundle, or name the "
            "one it was made of"
        )
    return manifest, _facts(path, manifest)


def _facts(path: Path, manifest: EngineManifest) -> golden.Exported:
    report = PrecisionReport.read(path)
    return golden.Exported.of(path / GRAPH, manifest, report)


def _engine(path: Path, manifest: EngineManifest) -> Shows:
    engine = load_engine(path)
    if manifest.engine == "ort":
        return golden.EngineTap(
            golden.file_tap(path / GRAPH, "engine", (), fused=True), lambda x: engine(x)
        )
    if manifest.engine == "openvino":
        return openvino_tap.of_file(path / GRAPH, lambda x: engine(x))
    return golden.CallTap("engine", lambda x: engine(x))


def _torch(bundle: Bundle, example: Array, must: bool) -> Shows | None:
    try:
        from ..calibration.parity_check import torch_stage

        return torch_stage(bundle, example)
    except ImportError as error:
        if must:
            raise ModelError(
                f"comparing PyTorch needs {error.name}: pip install 'hdrq-deploy[calibrate]'"
            ) from error
    except HdrqError as error:
        if must:
            raise
        _LOG.info("PyTorch is left out: %s", error)
    return None
