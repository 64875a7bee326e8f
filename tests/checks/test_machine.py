"""`hdrq doctor`: what a machine is told that it can build and run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hdrq_deploy.checks import machine
from hdrq_deploy.checks.machine import examine
from hdrq_deploy.cli import doctor
from hdrq_deploy.exporters import target_tensorrt, tensorrt_build

ORIN = "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags : fpu avx2 avx512_vnni amx_int8", "AVX2, VNNI, AMX"),
        ("flags : fpu avx2 avx_vnni", "AVX2, VNNI"),
        ("flags : fpu sse2", "none that integer kernels live by"),
        ("Features : fp asimd asimddp i8mm", "dot product, int8 matrix products"),
    ],
)
def test_instructions(tree: Any, tmp_path: Path, cpuinfo: str, expected: str) -> None:
    found = examine(tree(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert found.facts["instructions"] == expected
    assert ("INT8 gains little" in found.advice) == (expected.startswith("none"))


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        (ORIN, "6 (L4T R36.4): TensorRT 10.x from 6.1 on, no 11; DLA: Orin"),
        (ORIN.replace("R36", "R38"), "7.0 or 7.1 (L4T R38.4): TensorRT 10.13; DLA: none"),
        (ORIN.replace("R36", "R39"), "7.2 (L4T R39.4): TensorRT 10.16, and 11.4.1"),
        (ORIN.replace("R36", "R32"), "older than 5 (L4T R32.4): not supported"),
        ("a text", "unknown (a text)"),
    ],
)
def test_jetpack(tree: Any, tmp_path: Path, release: str, expected: str) -> None:
    found = examine(tree(tmp_path, {"etc/nv_tegra_release": release}))
    assert found.facts["JetPack"].startswith(expected)
    assert examine(tmp_path / "nothing").facts["JetPack"] == "none"


def test_engines_and_which_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_driver", lambda: False)
    monkeypatch.setattr(tensorrt_build, "library_version", lambda engine: "9.9")
    states = {state.name: state for state in examine().engines}
    assert states["ort"].runs and states["onnx"].builds
    assert (states["trt-rtx"].builds, states["trt-rtx"].runs) == (True, False)
    assert (states["trt"].builds, states["trt"].runs) == (False, False)
    # A GPU that TensorRT-RTX does not take: Orin.
    for module in (machine, target_tensorrt):
        monkeypatch.setattr(module, "has_driver", lambda: True)
    monkeypatch.setattr(machine, "_capability", lambda: (8, 7))
    found = examine()
    states = {state.name: state for state in found.engines}
    assert states["trt"].runs and "no compute capability 8.7" in states["trt-rtx"].why
    assert found.advice.startswith(
        "take trt (it runs on the GPU), or auto, which measures ort, trt"
    )
    # Nothing but the base install.
    monkeypatch.setattr(machine, "has_driver", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert examine().advice.startswith("take ort, the only one that runs here")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    told = capsys.readouterr().out
    for word in ("processor", "instructions", "JetPack", "meters", "ort ", "--engine: take "):
        assert word in told
    assert "`" not in told
    assert doctor.main(["--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in record["engines"]} >= {"ort", "openvino", "trt", "trt-rtx"}
    assert doctor.main(["--jetpacks"]) == 0
    assert "JetPack 6 (L4T R36): TensorRT 10.x" in capsys.readouterr().out
