"""From a bundle to an engine folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir

from ..bundle import Bundle
from ..errors import CheckFailed, ExportError
from ..files import new_directory, sha256_bytes, sha256_file, write_bytes
from ..manifest import EngineManifest, FileRecord, Port, PrecisionReport
from . import graph, precision, trt
from .lowering import lower_ort, lower_portable

__all__ = ["ENGINES", "export"]

ENGINES = ("ort", "onnx", "trt", "trt-rtx")
MODEL = "model.onnx"
PLAN = "model.plan"


def export(
    bundle: Bundle | str | os.PathLike[str],
    output: str | os.PathLike[str],
    engine: str = "ort",
    batches: tuple[int, int, int] = (1, 1, 8),
    allow_float: Sequence[str] = (),
) -> Path:
    """Lower a bundle for one engine, build it, and report what it executes.

    Args:
        bundle: Bundle or its path.
        output: Engine folder to make: ``manifest.json``, ``model.onnx`` with external data,
            ``precision.json`` and, for TensorRT, ``model.plan``.
        engine: One of ``ENGINES``.
        batches: Smallest, best and largest batch of a TensorRT engine.
        allow_float: Patterns (fnmatch) of layers that may run in float.

    Returns:
        The engine folder.

    Raises:
        ExportError: The engine is unknown, missing, or refuses the graph.
        CheckFailed: A layer does not run in the precision that was requested.
    """
    if engine not in ENGINES:
        raise ExportError(f"found engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise ExportError(f"found batches {batches}; needed 1 <= smallest <= best <= largest")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    model = graph.load(bundle)
    model = lower_ort(model) if engine == "ort" else lower_portable(model)
    target = Path(output).absolute()
    with new_directory(target) as folder:
        graph.save(model, folder / MODEL)
        _check_onnx(folder / MODEL)
        report, versions = _realize(engine, folder, bundle, batches)
        precision.check(report, allow_float)
        write_bytes(folder / "precision.json", (report.model_dump_json(indent=1) + "\n").encode())
        manifest = _manifest(bundle, engine, model, report, batches, versions, folder)
        write_bytes(folder / "manifest.json", (manifest.model_dump_json(indent=1) + "\n").encode())
    return target


def _check_onnx(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise CheckFailed(
            f"the lowered graph does not pass onnx.checker ({str(error).splitlines()[0]}); "
            "please report the bundle"
        ) from error


def _realize(
    engine: str, folder: Path, bundle: Bundle, batches: tuple[int, int, int]
) -> tuple[PrecisionReport, dict[str, str]]:
    """Build what there is to build and read back what it executes."""
    layers = bundle.manifest.layers
    if engine == "onnx":
        return precision.requested_only(engine, layers), {}
    if engine == "ort":
        return precision.from_ort(folder / MODEL, layers), {"onnxruntime": version("onnxruntime")}
    built = trt.build(engine, folder / MODEL, folder / PLAN, batches)
    if built.dump:
        report = precision.from_trt_log(engine, built.dump, layers)
    elif built.inspector:
        report = precision.from_trt_inspector(engine, built.inspector, layers)
    else:
        raise CheckFailed(
            f"{engine} {built.version} built an engine but reports no layers, so its precision "
            "cannot be shown; use another version of the library"
        )
    return report, {trt.MODULES[engine]: built.version}


def _manifest(
    bundle: Bundle,
    engine: str,
    model: ir.Model,
    report: PrecisionReport,
    batches: tuple[int, int, int],
    versions: dict[str, str],
    folder: Path,
) -> EngineManifest:
    origin = bundle.manifest
    files = sorted(f for f in folder.iterdir() if f.name != "manifest.json")
    return EngineManifest(
        engine=engine,
        model=origin.model,
        method=origin.method,
        domains=origin.domains,
        scheme=origin.scheme,
        bundle_sha256=sha256_bytes(origin.to_json()),
        inputs=tuple(_port(v) for v in model.graph.inputs),
        outputs=tuple(_port(v) for v in model.graph.outputs),
        preprocessing=origin.preprocessing,
        classes=origin.classes,
        precision=report.summary,
        options={"batches": batches} if engine in trt.MODULES else {},
        versions={"hdrq-deploy": version("hdrq-deploy"), "onnx": onnx.__version__, **versions},
        files={f.name: FileRecord(bytes=f.stat().st_size, sha256=sha256_file(f)) for f in files},
    )


def _port(value: ir.Value) -> Port:
    shape = tuple(d if isinstance(d, int) else "batch" for d in (value.shape or ()))
    return Port(name=value.name or "", shape=shape, dtype=str(value.dtype or "FLOAT").lower())
