"""Build TensorRT and TensorRT-RTX engines in a subprocess, through the API both share."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from ..errors import ExportError
from ..formats.atomic_files import check_output, scratch_folder
from ..formats.file_kinds import TIMING_CACHE
from ..typing import Progress
from .lint import lint
from .options import BuildOptions, profile

__all__ = ["MODULES", "BuildResult", "build", "device", "library_version"]

MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}
_INSTALL = {
    "trt": "pip install 'hdrq-deploy[trt]' on a machine with an NVIDIA GPU (on Jetson, use the "
    "TensorRT of JetPack)",
    "trt-rtx": "pip install 'hdrq-deploy[trt-rtx]'",
}


@dataclass(frozen=True)
class BuildResult:
    """What a build gave beside the plan.

    Attributes:
        version: Version of the library.
        dump: Layer dump of the builder, or "".
        inspector: JSON of its inspector, or "".
        seconds: Time that the build took.
        peak_bytes: Largest resident size of the builder's process.
    """

    version: str
    dump: str
    inspector: str
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class _BuilderState:
    """What the process of the builder was doing when it last reported."""

    stage: str = ""
    node: str = ""
    phase: str = ""
    errors: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        if self.phase:
            return f"{self.stage}, {self.phase}"
        return f"{self.stage} node {self.node}" if self.node else self.stage or "importing"


def library_version(engine: str) -> str:
    """Version of the installed library.

    Raises:
        ExportError: It is not installed; says how to.
    """
    module = MODULES[engine]
    if importlib.util.find_spec(module) is None:
        raise ExportError(
            f"`engine` {engine} needs the Python package {module}, which is not installed: "
            f"{_INSTALL[engine]}"
        )
    for name in (module, module.replace("_", "-"), f"{module}-cu12", f"{module}-cu13"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def device(engine: str) -> str:
    """What a plan is built for: this GPU, or for TensorRT-RTX the GPUs of its default list."""
    if engine == "trt-rtx":
        return "compute capability 8.0, 8.6, 8.9, 12.0 and later"
    try:
        from cuda.bindings import runtime
    except ImportError:
        return "unknown"
    error, properties = runtime.cudaGetDeviceProperties(0)
    if int(error):
        return "none"
    name = bytes(properties.name).split(b"\0")[0].decode()
    return f"{name}, compute capability {properties.major}.{properties.minor}"


def build(
    engine: str,
    onnx: Path,
    plan: Path,
    options: BuildOptions,
    ports: Mapping[str, Sequence[Any]],
    progress: Progress | None = None,
) -> BuildResult:
    """Build ``plan`` from ``onnx``.

    Args:
        engine: ``trt`` or ``trt-rtx``.
        onnx: Lowered graph.
        plan: File to write.
        options: Options of the builder.
        ports: Shape of every input by name; a dimension that is no int is free.
        progress: Called with (steps done, steps in all, what).

    Raises:
        ExportError: The library or a GPU is missing, lint, parser or builder refuse the
            graph, or the builder crashed.
    """
    library_version(engine)
    lint(onnx)
    profiles = {name: profile(name, shape, options) for name, shape in ports.items()}
    if options.timing_cache is not None:
        check_output(options.timing_cache, TIMING_CACHE, label="timing_cache")
    with scratch_folder() as scratch:
        answer = scratch / "answer.json"
        job = scratch / "job.json"
        fields = {
            **options.model_dump(exclude={"shapes", "batches"}),
            "module": MODULES[engine],
            "onnx": str(onnx),
            "plan": str(plan),
            "answer": str(answer),
            "profiles": {
                name: (rows.smallest, rows.best, rows.largest)
                for name, rows in profiles.items()
                if rows is not None
            },
        }
        job.write_text(json.dumps(fields))
        command = [sys.executable, "-m", "hdrq_deploy.exporters.trt_worker", str(job)]
        code, state = _follow(command, progress)
        if not answer.is_file():
            raise ExportError(_crash(engine, code, state))
        result = json.loads(answer.read_text())
    error = result.pop("error")
    if error is not None:
        raise ExportError(f"{engine} {result['version']} refuses the graph: {error}")
    return BuildResult(**result)


def _follow(command: Sequence[str], progress: Progress | None) -> tuple[int, _BuilderState]:
    """Run the worker; what it says on stdout goes to ``progress``."""
    state = _BuilderState()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        # Both pipes are read at once: a full one would stop the builder.
        reader = threading.Thread(target=_collect, args=(process.stderr, state.errors))
        reader.start()
        try:
            for line in process.stdout:
                _hear(line, state, progress)
            process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            reader.join()
    return process.returncode, state


def _collect(stream: IO[str], lines: list[str]) -> None:
    lines += [line.strip() for line in stream if line.strip()]


def _hear(line: str, state: _BuilderState, progress: Progress | None) -> None:
    try:
        words = json.loads(line)
    except ValueError:  # the native library prints to stdout too
        return
    if not isinstance(words, dict):
        return
    if "stage" in words:
        state.stage, state.node, state.phase = words["stage"], "", ""
    state.node = words.get("node", state.node)
    state.phase = words.get("phase", state.phase)
    if progress and "phase" in words:
        progress(words["done"], max(words["total"], 1), words["phase"])


def _crash(engine: str, code: int, state: _BuilderState) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    last = state.errors[-1][:300] if state.errors else "no message"
    return (
        f"the {engine} builder {how} while {state.place} ({last}); check that {MODULES[engine]} "
        "imports and finds a GPU driver on this machine, or change the model there"
    )
