"""Engines on a real GPU; everywhere else these tests are skipped."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import export, load_engine, verify


def _gpus() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _gpus(), reason="no NVIDIA GPU"),
]


@pytest.mark.parametrize("kind", ["trt-rtx", "trt"])
def test_an_engine_on_the_gpu_is_its_bundle(
    make: Any, inputs: Any, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("tensorrt_rtx" if kind == "trt-rtx" else "tensorrt")
    bundle = make()
    path = export(bundle, tmp_path / "engine", kind)
    verification = verify(bundle.path, path, inputs, torch=False)
    assert [stage.name for stage in verification.stages][-1].endswith("engine")
    verification.check()


def test_the_gpu_answers_as_the_cpu_does(make: Any, inputs: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = make()
    with (
        load_engine(export(bundle, tmp_path / "cpu")) as cpu,
        load_engine(export(bundle, tmp_path / "gpu", "trt-rtx")) as gpu,
    ):
        expected, answer = cpu(inputs), gpu(inputs)
    assert np.sqrt(np.mean((answer - expected) ** 2) / np.mean(expected**2)) < 0.05
