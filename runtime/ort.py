"""Engines on ONNX Runtime: the CPU, or its CUDA and TensorRT providers where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..errors import EngineError
from ..formats.engine_folder import GRAPH, EngineManifest
from ..graph.processors import products_wrap, saturates
from ..graph.reference_session import session_options
from ..typing import Array
from .engine import Engine, Feeds

__all__ = ["OrtEngine", "open_engine", "saturates", "session_options"]

_PROVIDERS = {
    "auto": "CPUExecutionProvider",
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def open_engine(
    path: Path,
    manifest: EngineManifest,
    device: str,
    threads: int,
    cuda_graph: bool,
    throughput: bool,
    cache: object,
) -> Engine:
    """See :func:`~hdrq_deploy.runtime.loading.open_engine`.

    Raises:
        EngineError: See :class:`OrtEngine`.
    """
    return OrtEngine(path, manifest, threads, device)


class OrtEngine(Engine):
    """An engine on ONNX Runtime, whose ``run`` is thread safe: calls run side by side.

    Raises:
        EngineError: ONNX Runtime cannot load it, or has not the provider that was asked for.
    """

    def __init__(
        self, path: Path, manifest: EngineManifest, threads: int, device: str = "cpu"
    ) -> None:
        kind, _, number = device.partition(":")
        provider = _PROVIDERS[kind]
        on_cpu = provider == "CPUExecutionProvider"
        super().__init__(path, manifest, threads, "cpu" if on_cpu else f"{kind}:{number or 0}")
        self._session: onnxruntime.InferenceSession | None = None
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise EngineError(
                f"{path}: found no {provider} in this onnxruntime (it has "
                f"{', '.join(available)}); pip install onnxruntime-gpu, or take device cpu"
            )
        if on_cpu and manifest.scheme.grid == "e4m3":
            raise EngineError(
                f"{path}: found FP8 codes (grid e4m3); ONNX Runtime has no kernel on a CPU that "
                "multiplies FP8: load an engine of trt-rtx or trt, or take device tensorrt"
            )
        kernels = on_cpu and manifest.engine == "ort"
        if kernels:
            _check_products(path)
        options = session_options(threads, graph=path / GRAPH if kernels else None)
        if manifest.engine == "onnx" and on_cpu:
            # The portable graph keeps int8 activations, which x86 fuses into slow kernels.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        entry: Any = provider if on_cpu else (provider, {"device_id": str(number or 0)})
        try:
            session = onnxruntime.InferenceSession(str(path / GRAPH), options, providers=[entry])
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            text = " ".join(str(error).split())[:300]
            raise EngineError(f"{path}: ONNX Runtime cannot load it ({text})") from error
        if session.get_providers()[0] != provider:
            # ONNX Runtime only warns and goes on with the CPU.
            raise EngineError(
                f"{path}: {provider} did not start (ONNX Runtime fell back to "
                f"{session.get_providers()[0]}); check the driver and CUDA's libraries, or take "
                "device cpu"
            )
        self._session = session
        self._names = [port.name for port in manifest.outputs]

    def _execute(self, feeds: Feeds) -> dict[str, Array]:
        session = self._session
        if session is None:
            raise EngineError(f"{self.path}: the engine is closed; load it again")
        for name, x in feeds.items():
            if not isinstance(x, np.ndarray):
                raise EngineError(
                    f"{self.path}: found the input {name} in GPU memory; ONNX Runtime engines take "
                    "NumPy arrays: copy it to the host first"
                )
        try:
            results = session.run(self._names, dict(feeds))
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            text = " ".join(str(error).split())[:300]
            raise EngineError(f"{self.path}: ONNX Runtime cannot run it ({text})") from error
        return dict(zip(self._names, results, strict=True))

    def _release(self) -> None:
        self._session = None


def _check_products(path: Path) -> None:
    """Refuse an engine that was made on another processor and computes wrong sums on this one."""
    if not products_wrap():
        return
    from ..graph.products import holds_wrapping_weights  # half a second, where it is needed

    if holds_wrapping_weights(path / GRAPH):
        raise EngineError(
            f"{path}: found weights of -128, whose products ONNX Runtime adds wrongly on this ARM "
            "processor without dot product; export the bundle again on this machine, which holds "
            "them as uint8"
        )
