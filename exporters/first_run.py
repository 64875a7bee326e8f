"""A new TensorRT engine run once, in a process of its own, where this machine can."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ..formats.atomic_files import scratch_folder
from ..typing import Array

__all__ = ["has_driver", "run_apart"]

_DRIVERS = ("libcuda.so.1", "nvcuda.dll")


def run_apart(folder: Path, batches: Sequence[Array]) -> tuple[list[Array] | None, str]:
    """Outputs of an engine folder; runtime and exporter meet in files only.

    Args:
        folder: A whole engine folder.
        batches: Inputs as the engine takes them.

    Returns:
        One output a batch, or None and the reason why the engine does not run here.
    """
    if not has_driver():
        return None, "this machine has no NVIDIA driver"
    with scratch_folder() as place:
        names = [f"batch_{i}" for i in range(len(batches))]
        arrays = {n: np.ascontiguousarray(rows) for n, rows in zip(names, batches, strict=True)}
        save_file(arrays, place / "inputs.safetensors")
        job = {
            "engine": str(folder),
            "inputs": str(place / "inputs.safetensors"),
            "outputs": str(place / "outputs.safetensors"),
            "answer": str(place / "answer.json"),
        }
        (place / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "hdrq_deploy.runtime.once", str(place / "job.json")]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if not (place / "answer.json").is_file():
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1][:300]
            return None, f"running it ended with code {ended.returncode} ({last})"
        error = json.loads((place / "answer.json").read_text())
        if error is not None:
            return None, f"it does not run here ({error})"
        outputs = load_file(place / "outputs.safetensors")
        return [outputs[name] for name in names], ""


def has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded."""
    for name in _DRIVERS:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False
