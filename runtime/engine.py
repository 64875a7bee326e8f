"""Load an engine folder and run it."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from pydantic import ValidationError

from ..errors import EngineError
from ..files import sha256_file
from ..manifest import EngineManifest, Port

__all__ = ["Engine", "OrtEngine", "check_input", "load_engine", "read_manifest", "session_options"]

Array = npt.NDArray[Any]
_DTYPES = {"float": np.float32, "float16": np.float16, "uint8": np.uint8}


class OrtEngine:
    """An engine on ONNX Runtime's CPU provider; a context manager.

    One instance may be called from several threads (ONNX Runtime's ``run`` is thread safe).
    """

    def __init__(self, path: Path, manifest: EngineManifest, threads: int) -> None:
        options = session_options(threads)
        if manifest.engine == "onnx":
            # The portable graph keeps int8 activations, which x86 fuses into slow kernels.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
                str(path / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            text = " ".join(str(error).split())[:300]
            raise EngineError(f"{path}: ONNX Runtime cannot load it ({text})") from error
        self.path = path
        self.manifest = manifest
        self.threads = threads

    def __call__(self, x: Array) -> Array:
        """Run a batch.

        Args:
            x: Inputs as the manifest's port says, (N, C, H, W) float32.

        Raises:
            EngineError: Closed engine, another shape or dtype, or values that are not finite.
        """
        if self._session is None:
            raise EngineError(f"{self.path}: the engine is closed; load it again")
        (port,) = self.manifest.inputs
        check_input(x, port, self.path)
        result: Array = self._session.run([self.manifest.outputs[0].name], {port.name: x})[0]
        return result

    def close(self) -> None:
        """Free the session; later calls raise EngineError."""
        self._session = None

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_input(x: Array, port: Port, where: object) -> None:
    """Refuse what an engine does not take; ``where`` names the engine.

    Raises:
        EngineError: Another shape or dtype, an empty batch, or values that are not finite.
    """
    dtype = _DTYPES.get(port.dtype, np.float32)
    fits = x.ndim == len(port.shape) and all(
        isinstance(want, str) or want == got for want, got in zip(port.shape, x.shape, strict=True)
    )
    if x.dtype != dtype or not fits or len(x) == 0:
        raise EngineError(
            f"{where}: found an input of shape {x.shape}, {x.dtype}; needed "
            f"{port.shape}, {np.dtype(dtype)} (batch 1 or more)"
        )
    # A sum meets every NaN and infinity and reads the data once.
    if not np.isfinite(x.sum(dtype=np.float64)) and not np.isfinite(x).all():
        raise EngineError(f"{where}: found NaN or infinity in the input")


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """ONNX Runtime's options for an engine on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if saturates(Path("/proc/cpuinfo")):
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def saturates(cpuinfo: Path) -> bool:
    """Whether a product of u8 and s8 can saturate: x86 with AVX2 but without VNNI.

    ONNX Runtime's remedy takes twice the time, so it is not for CPUs that need none.
    """
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return " avx2" in flags and "vnni" not in flags


Engine = OrtEngine


def read_manifest(path: str | os.PathLike[str]) -> EngineManifest:
    """The manifest of an engine folder, its files checked.

    Raises:
        EngineError: No engine there, or a file is missing or altered.
    """
    folder = Path(path)
    file = folder / "manifest.json"
    if not file.is_file():
        raise EngineError(
            f"{folder}: found no manifest.json; needed an engine folder from hdrq-export"
        )
    try:
        manifest = EngineManifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise EngineError(
            f"{file}: not the manifest of an engine ({error.errors()[0]['msg'].lower()}); "
            "a bundle becomes an engine with hdrq-export"
        ) from error
    for name, record in manifest.files.items():
        part = folder / name
        if not part.is_file() or sha256_file(part) != record.sha256:
            state = "altered" if part.is_file() else "missing"
            raise EngineError(f"{part}: {state}; the engine is damaged, export it again")
    return manifest


def load_engine(path: str | os.PathLike[str], threads: int = 0) -> OrtEngine:
    """Open an engine folder.

    Args:
        path: Folder written by ``hdrq-export --engine ort`` or ``onnx``.
        threads: Threads inside an operator; 0, one per core.

    Raises:
        EngineError: Not an engine, damaged, or of a kind that this machine cannot run.
    """
    manifest = read_manifest(path)
    if manifest.engine not in {"ort", "onnx"}:
        raise EngineError(
            f"{path}: found a {manifest.engine} engine, which needs an NVIDIA GPU; this version "
            "runs ort and onnx engines: measure the plan with trtexec "
            "--loadEngine=model.plan, or export with --engine ort"
        )
    if threads < 0:
        raise EngineError(f"found threads={threads}; needed 0 (one per core) or more")
    return OrtEngine(Path(path), manifest, threads or os.cpu_count() or 1)
