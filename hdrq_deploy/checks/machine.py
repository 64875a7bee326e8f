"""What this machine can build and run, and which engine to take: what ``hdrq doctor`` shows."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from ..errors import ExportError
from ..exporters.engines import ENGINES, target_of
from ..exporters.first_run import has_driver
from ..exporters.options import BuildOptions
from ..formats.engine_folder import KINDS, PLAN
from ..runtime.bench.energy import find_meters
from ..runtime.bench.environment import environment

__all__ = ["JETPACKS", "EngineState", "JetPack", "Machine", "examine"]

# Flags of /proc/cpuinfo that integer kernels live by, and what each is.
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512_vnni": "VNNI",
    "avx_vnni": "VNNI",
    "amx_int8": "AMX",
    "asimddp": "dot product",
    "i8mm": "int8 matrix products",
}
_FAST_INT8 = {"VNNI", "AMX", "dot product", "int8 matrix products"}
# Compute capabilities that TensorRT-RTX's builder takes (asked of 1.7: 87, 90, 110 are refused).
_RTX = {(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)}


@dataclass(frozen=True)
class JetPack:
    """What NVIDIA's software for Jetson brings.

    Attributes:
        version: JetPack.
        release: L4T release that it begins with.
        tensorrt: TensorRT that runs on it.
        dla: Boards whose deep learning accelerators TensorRT uses.
    """

    version: str
    release: int
    tensorrt: str
    dla: str


# docs.nvidia.com/deeplearning/tensorrt: support matrices 10.10 to 10.16, migration guides and
# release notes 11.0 to 11.4; TensorRT 11.0 to 11.4.0 support no JetPack.
JETPACKS = (
    JetPack("7.2", 39, "10.16, and 11.4.1 (SBSA package) from 7.2.2 on", "AGX Orin, with 11.4.1"),
    JetPack("7.0 or 7.1", 38, "10.13", "none: Thor has no accelerators"),
    JetPack("6", 36, "10.x from 6.1 on, no 11", "Orin"),
    JetPack("5", 35, "8.x, older than this library needs", "Orin and Xavier"),
)


@dataclass(frozen=True)
class EngineState:
    """One value of ``engine`` on this machine.

    Attributes:
        name: The engine.
        version: Version of its library, or "".
        builds: It can be built here.
        runs: It can be run here.
        why: What is missing, or "".
    """

    name: str
    version: str
    builds: bool
    runs: bool
    why: str = ""


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        facts: Processor, instructions, board, JetPack, GPU, driver, providers, meters, by name.
        engines: One row for each engine.
        advice: Which ``engine`` to take, and why.
    """

    facts: dict[str, str]
    engines: tuple[EngineState, ...]
    advice: str

    def record(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return asdict(self)


def examine(root: Path = Path("/")) -> Machine:
    """Look at this machine; nothing is built, run or changed.

    Args:
        root: Folder that holds ``proc``, ``sys`` and ``etc``.
    """
    capability = _capability()
    engines = tuple(_state(name, capability) for name in ENGINES)
    instructions = _instructions(root)
    about = environment(root, "cuda:0" if has_driver() else "cpu")
    meters = ", ".join(sorted({type(meter).__name__ for meter in find_meters(root)}))
    facts = {
        "processor": f"{about['cpu']} ({about['machine']}), {os.cpu_count()} cores",
        "instructions": ", ".join(instructions) or "none that integer kernels live by",
        "board": about["board"] or "no board with a name",
        "JetPack": _jetpack(root),
        "GPU": about.get("gpu") or ("found a driver, and no NVML" if has_driver() else "none"),
        "compute capability": ".".join(map(str, capability)) if capability else "unknown",
        "driver": about.get("driver") or "none",
        "ONNX Runtime's providers": ", ".join(onnxruntime.get_available_providers()),
        "meters": meters or "none (--energy is unavailable)",
    }
    return Machine(facts, engines, _advice(engines, set(instructions)))


def _instructions(root: Path) -> list[str]:
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return []
    lines = [line for line in text.splitlines() if re.match(r"(flags|Features)\s*:", line)]
    flags = set(lines[0].split()) if lines else set()
    return list(dict.fromkeys(name for flag, name in _INSTRUCTIONS.items() if flag in flags))


def _jetpack(root: Path) -> str:
    """JetPack and what TensorRT it has, by the L4T release."""
    try:
        text = (root / "etc/nv_tegra_release").read_text()
    except OSError:
        return "none"
    found = re.search(r"R(\d+).*?REVISION: (\d+)", text)
    if found is None:
        return f"unknown ({' '.join(text.split())[:60]})"
    release, name = int(found[1]), f"L4T R{found[1]}.{found[2]}"
    for row in JETPACKS:
        if release >= row.release:
            return f"{row.version} ({name}): TensorRT {row.tensorrt}; DLA: {row.dla}"
    return f"older than 5 ({name}): not supported"


def _capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU; None where nothing tells."""
    if not has_driver() or importlib.util.find_spec("cuda") is None:
        return None
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    error, properties = runtime.cudaGetDeviceProperties(0)
    return None if int(error) else (properties.major, properties.minor)


def _state(name: str, capability: tuple[int, int] | None) -> EngineState:
    target = target_of(name)
    if not KINDS[name].built:
        return EngineState(name, "", True, True, "a portable graph, for a runtime of your choice")
    try:
        found = target.ingredients(BuildOptions(), False)
    except ExportError as error:
        return EngineState(name, "", False, False, str(error))
    version = str(found.get(target.libraries[0], ""))
    if KINDS[name].runs != PLAN:
        return EngineState(name, version, True, True)
    if not has_driver():
        alone = name == "trt-rtx"  # its builder needs no GPU
        return EngineState(name, version, alone, False, "this machine has no NVIDIA driver")
    if name == "trt-rtx" and capability is not None and capability not in _RTX:
        shown = ".".join(map(str, capability))
        return EngineState(name, version, True, False, f"it takes no compute capability {shown}")
    return EngineState(name, version, True, True)


def _advice(engines: tuple[EngineState, ...], instructions: set[str]) -> str:
    runs = [state.name for state in engines if state.runs and KINDS[state.name].built]
    gpu = [name for name in runs if KINDS[name].runs == PLAN]
    if gpu:
        return f"take {gpu[0]} (it runs on the GPU), or auto, which measures {', '.join(runs)}"
    fast = bool(instructions & _FAST_INT8)
    slow = "" if fast else "; without VNNI, AMX or dot product INT8 gains little"
    if len(runs) > 1:
        return f"take auto, which measures {', '.join(runs)} and keeps the fastest{slow}"
    return f"take {runs[0] if runs else 'onnx'}, the only one that runs here{slow}"
