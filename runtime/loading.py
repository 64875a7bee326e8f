"""Load an engine folder, whatever it runs on."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from ..errors import EngineError
from ..formats.engine_folder import EngineManifest, read_manifest
from .engine import Engine

__all__ = ["BACKENDS", "load_engine", "open_engine"]

# The module that runs each kind of engine. It has a function ``open_engine`` and is imported
# when the first engine of that kind is loaded.
BACKENDS = {
    "ort": ".ort",
    "onnx": ".ort",
    "trt": ".tensorrt",
    "trt-rtx": ".tensorrt",
    "openvino": ".openvino",
}
_DEVICES = "auto, cpu, cuda, cuda:N, tensorrt or tensorrt:N"


def load_engine(
    path: str | os.PathLike[str],
    device: str = "auto",
    threads: int = 0,
    cuda_graph: bool = True,
    throughput: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> Engine:
    """Open an engine folder.

    Args:
        path: Folder written by ``hdrq-export``.
        device: ``auto`` is the CPU for ``ort``, ``onnx`` and ``openvino`` engines and the first
            GPU for TensorRT's. ``cpu``; ``cuda`` or ``cuda:N``; ``tensorrt`` or ``tensorrt:N`` is
            ONNX Runtime's TensorRT provider. Nothing falls back to another device.
        threads: Threads inside an operator on the CPU; 0, one per core.
        cuda_graph: Replay TensorRT's work as a CUDA graph, captured per shape.
        throughput: Compute many calls at once rather than each as soon as can be: OpenVINO runs
            them in streams of a few threads. Other engines do the same in both cases.
        cache: Where what is compiled at load is kept and looked for: a folder of OpenVINO, a file
            of TensorRT-RTX (its runtime cache). It is made where it is missing; None keeps nothing.

    Raises:
        EngineError: Not an engine, damaged, built for another device or version, or of a kind
            that this machine cannot run.
    """
    manifest = read_manifest(path)
    return open_engine(Path(path), manifest, device, threads, cuda_graph, throughput, cache)


def open_engine(
    path: Path,
    manifest: EngineManifest,
    device: str = "auto",
    threads: int = 0,
    cuda_graph: bool = True,
    throughput: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> Engine:
    """Load an engine whose manifest was read; the files are not hashed again.

    Args:
        path: Engine folder.
        manifest: Manifest of the engine.
        device: See :func:`load_engine`.
        threads: See :func:`load_engine`.
        cuda_graph: See :func:`load_engine`.
        throughput: See :func:`load_engine`.
        cache: See :func:`load_engine`.

    Raises:
        EngineError: As :func:`load_engine`.
    """
    if threads < 0:
        raise EngineError(f"found threads={threads}; needed 0 (one per core) or more")
    kind, _, number = device.partition(":")
    if kind not in {"auto", "cpu", "cuda", "tensorrt"} or (number and not number.isdecimal()):
        raise EngineError(f"found device {device!r}; needed {_DEVICES}")
    if manifest.engine not in BACKENDS:
        raise EngineError(
            f"{path}: found an engine of the kind {manifest.engine!r}; this version runs "
            f"{', '.join(BACKENDS)}"
        )
    if cache is not None and manifest.engine not in {"openvino", "trt-rtx"}:
        raise EngineError(
            f"{path}: found `cache` for an engine of the kind {manifest.engine!r}; only openvino "
            "and trt-rtx engines keep what they compile: leave it out"
        )
    backend = importlib.import_module(BACKENDS[manifest.engine], __package__)
    cores = threads or os.cpu_count() or 1
    engine: Engine = backend.open_engine(
        path, manifest, device, cores, cuda_graph, throughput, cache
    )
    return engine
