"""Build TensorRT and TensorRT-RTX engines in a subprocess, through the API both share."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import ExportError

__all__ = ["MODULES", "Built", "build"]

MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}
_INSTALL = {
    "trt": "pip install 'hdrq-deploy[trt]' on a machine with an NVIDIA GPU (on Jetson, use the "
    "TensorRT of JetPack)",
    "trt-rtx": "pip install 'hdrq-deploy[trt-rtx]'",
}


@dataclass(frozen=True)
class Built:
    """What the builder said: its version, its layer dump, or its inspector's JSON."""

    version: str
    dump: str
    inspector: str


def build(engine: str, onnx: Path, plan: Path, batches: tuple[int, int, int]) -> Built:
    """Build ``plan`` from ``onnx``.

    Args:
        engine: ``trt`` or ``trt-rtx``.
        onnx: Lowered graph.
        plan: File to write.
        batches: Smallest, best and largest batch of the optimization profile.

    Raises:
        ExportError: The library or a GPU is missing, the parser or builder refuses the graph,
            or the builder crashed.
    """
    module = MODULES[engine]
    if importlib.util.find_spec(module) is None:
        raise ExportError(
            f"--engine {engine} needs the Python package {module}, which is not installed: "
            f"{_INSTALL[engine]}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        job = Path(scratch) / "job.json"
        fields = {
            "module": module,
            "onnx": str(onnx),
            "plan": str(plan),
            "batches": batches,
            "answer": str(answer),
        }
        job.write_text(json.dumps(fields))
        command = [sys.executable, "-m", "hdrq_deploy.exporters.trt_worker", str(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not answer.is_file():
            raise ExportError(_crash(engine, done))
        said = json.loads(answer.read_text())
    if said["error"] is not None:
        raise ExportError(f"{engine} {said['version']} refuses the graph: {said['error']}")
    return Built(said["version"], said["dump"], said["inspector"])


def _crash(engine: str, done: subprocess.CompletedProcess[str]) -> str:
    how = (
        f"was killed by {signal.Signals(-done.returncode).name}"
        if done.returncode < 0
        else f"ended with code {done.returncode}"
    )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "no message"
    return (
        f"the {engine} builder {how} ({last}); check that {MODULES[engine]} imports and finds a "
        "GPU driver on this machine"
    )
