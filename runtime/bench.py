"""Latency and accuracy of engines, with what repeats the measurement."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from ..calibration_data.readers import ImageSet, Wanted, read, relabel
from ..errors import DataError
from ..frames import decisions, feed
from .engine import Engine, load_engine
from .power import Energy, find_meters, measure_energy

__all__ = [
    "Accuracy",
    "BenchResult",
    "Latency",
    "benchmark",
    "harmonic_mean",
    "interleaved",
    "measure",
]

_BATCH = 64
# Files of an engine folder that running it does not take.
_NOT_NEEDED = {"precision.json", "golden.safetensors"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Latency(_Frozen):
    """Times of single calls in ms: one batch of ``batch`` images, array in, array out."""

    p50: float
    p90: float
    p99: float
    mean: float
    batch: int
    warmup: int
    iterations: int
    samples: tuple[float, ...]


class Accuracy(_Frozen):
    """Top-1 accuracy per domain, 0 to 1, and their harmonic mean."""

    domains: dict[str, float]
    harmonic_mean: float | None
    images: dict[str, int]


class BenchResult(_Frozen):
    """``--json`` of hdrq-bench. The schema is ``BenchResult.model_json_schema()``."""

    schema_version: Literal[1] = 1
    kind: Literal["hdrq-bench"] = "hdrq-bench"
    created: str
    engine: str
    path: str
    model: str
    method: str
    domains: dict[str, float]
    wbits: int | None
    abits: int | None
    size_bytes: int
    precision: str
    accuracy: Accuracy | None
    latency_ms: Latency
    throughput_images_per_s: float
    threads: int
    cpu_per_wall: float
    energy: Energy | Literal["unavailable"] = "unavailable"
    environment: dict[str, Any]


def harmonic_mean(values: Sequence[float]) -> float:
    """n / sum(1 / v); 0 when a value is 0.

    >>> round(harmonic_mean([0.951, 0.94]), 4)
    0.9455
    """
    if not values or min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


def measure(
    call: Callable[[], object], times: int, clock_ns: Callable[[], int] = time.perf_counter_ns
) -> tuple[float, ...]:
    """Latency of each call in ms."""
    latencies = []
    for _ in range(times):
        start = clock_ns()
        call()
        latencies.append((clock_ns() - start) / 1e6)
    return tuple(latencies)


def benchmark(
    path: str | os.PathLike[str],
    data: Mapping[str, str | Path] | None = None,
    warmup: int = 10,
    iterations: int = 100,
    batch: int = 1,
    threads: int = 0,
    skip_corrupt: bool = False,
    energy: bool = False,
) -> BenchResult:
    """Measure one engine.

    Args:
        path: Engine folder.
        data: Labelled images of each domain: folder or .npz.
        warmup: Calls before the clock counts.
        iterations: Timed calls.
        batch: Images a call.
        threads: Threads inside an operator; 0, one per core.
        skip_corrupt: Leave out images that cannot be decoded.
        energy: Measure joules per call too, where the device has a meter.

    Raises:
        EngineError: The engine cannot be loaded or fed.
        DataError: Data cannot be read, have no labels, or do not fit the engine.
    """
    if warmup < 0 or iterations < 1 or batch < 1:
        raise DataError(
            f"found warmup={warmup}, iterations={iterations}, batch={batch}; needed 0, 1, 1 or more"
        )
    with load_engine(path, threads=threads) as engine:
        sets = {
            name: _labelled(engine, name, where, skip_corrupt)
            for name, where in (data or {}).items()
        }
        x = _timing_input(engine, sets, batch)
        measure(lambda: engine(x), warmup)
        cpu, wall = time.process_time(), time.perf_counter()
        samples = measure(lambda: engine(x), iterations)
        busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
        used = None
        if energy:
            used = measure_energy(lambda: engine(x), find_meters(), iterations)
        accuracy = _accuracy(engine, sets) if sets else None
        manifest = engine.manifest
    return BenchResult(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        engine=manifest.engine,
        path=str(path),
        model=manifest.model,
        method=manifest.method,
        domains=manifest.domains,
        wbits=manifest.scheme.wbits,
        abits=manifest.scheme.abits,
        size_bytes=sum(
            record.bytes for name, record in manifest.files.items() if name not in _NOT_NEEDED
        ),
        precision=manifest.precision,
        accuracy=accuracy,
        latency_ms=_latency(samples, batch, warmup),
        throughput_images_per_s=batch * 1000 / statistics.fmean(samples),
        threads=engine.threads,
        cpu_per_wall=busy,
        energy=used or "unavailable",
        environment=environment(),
    )


def interleaved(
    paths: Sequence[str | os.PathLike[str]],
    x: npt.NDArray[np.float32],
    warmup: int = 10,
    iterations: int = 100,
) -> list[Latency]:
    """Latencies of several engines called in turn, so that a noisy moment meets them all.

    One thread each: idle thread pools of other engines would disturb a measurement.
    """
    engines = [load_engine(path, threads=1) for path in paths]
    samples: list[list[float]] = [[] for _ in engines]
    for i in range(warmup + iterations):
        for engine, mine in zip(engines, samples, strict=True):
            (time_ms,) = measure(lambda engine=engine: engine(x), 1)  # type: ignore[misc]
            if i >= warmup:
                mine.append(time_ms)
    for engine in engines:
        engine.close()
    return [_latency(tuple(mine), len(x), warmup) for mine in samples]


def _latency(samples: tuple[float, ...], batch: int, warmup: int) -> Latency:
    p50, p90, p99 = (float(v) for v in np.percentile(samples, [50, 90, 99]))
    return Latency(
        p50=p50,
        p90=p90,
        p99=p99,
        mean=statistics.fmean(samples),
        batch=batch,
        warmup=warmup,
        iterations=len(samples),
        samples=samples,
    )


def _labelled(engine: Engine, name: str, where: str | Path, skip_corrupt: bool) -> ImageSet:
    manifest = engine.manifest
    wanted = Wanted.like(manifest.preprocessing) if manifest.preprocessing else Wanted()
    images = relabel(read(where, wanted, skip_corrupt=skip_corrupt), manifest.classes, where)
    if images.y is None:
        raise DataError(
            f"{where}: found images of {name} without labels; accuracy needs one folder per "
            "class, or y in the .npz"
        )
    return images


def _timing_input(engine: Engine, sets: Mapping[str, ImageSet], batch: int) -> npt.NDArray[Any]:
    """Real images where there are any, so that the data's zeros and extremes are real too."""
    if sets:
        x = next(iter(sets.values())).x
        rows = np.ascontiguousarray(x[np.arange(batch) % len(x)])
        return feed(rows, engine.manifest)
    (port,) = engine.manifest.inputs
    shape = port.shape
    if isinstance(shape[0], int) and shape[0] != batch:
        raise DataError(f"{engine.path}: found --batch {batch}; the engine takes {shape[0]} only")
    free = [d for d in shape[1:] if isinstance(d, str)]
    if free:
        raise DataError(f"{engine.path}: found free dimensions {free}; pass --data to fix them")
    sides = [d for d in shape[1:] if isinstance(d, int)]
    rng = np.random.default_rng(0)
    if port.dtype == "uint8":
        return rng.integers(0, 256, (batch, *sides), np.uint8)
    return rng.random((batch, *sides), dtype=np.float32)


def _accuracy(engine: Engine, sets: Mapping[str, ImageSet]) -> Accuracy:
    domains = {name: top1(engine, images) for name, images in sets.items()}
    return Accuracy(
        domains=domains,
        harmonic_mean=harmonic_mean(list(domains.values())),
        images={name: len(images.x) for name, images in sets.items()},
    )


def top1(engine: Engine, images: ImageSet) -> float:
    """Share of images whose highest output is their label."""
    assert images.y is not None
    right = 0
    fixed = engine.manifest.inputs[0].shape[0]
    step = fixed if isinstance(fixed, int) else _BATCH
    for first in range(0, len(images.x), step):
        rows = images.x[first : first + step]
        labels = images.y[first : first + step]
        # An engine of a fixed batch runs the last one filled up.
        filled = np.resize(rows, (step, *rows.shape[1:])) if isinstance(fixed, int) else rows
        output = engine(feed(filled, engine.manifest))[: len(rows)]
        if output.ndim != (1 if output.dtype.kind in "iu" else 2):
            raise DataError(
                f"{engine.path}: found outputs of shape {output.shape}; accuracy needs one row "
                "of class scores, or one label, an image"
            )
        if output.ndim == 2 and not 0 <= images.y.min() <= images.y.max() < output.shape[1]:
            raise DataError(
                f"found labels {images.y.min()} to {images.y.max()}; the model has "
                f"{output.shape[1]} classes"
            )
        right += int((decisions(output) == labels).sum())
    return right / len(images.x)


def environment() -> dict[str, Any]:
    """What a reader needs to judge or repeat the figures."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{
            name: _version(name)
            for name in ("hdrq-deploy", "onnxruntime", "onnx", "numpy", "safetensors")
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
