"""What a measurement ran on, and what disturbed it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .nvml import open_nvml

__all__ = ["Reading", "Watch", "environment", "read"]

# Beyond these a run is marked.
CLOCK_CHANGE = 0.1
NEIGHBOURS = 0.05
STOLEN = 0.02
# docs.nvidia.com/deploy/nvml-api, nvmlClocksThrottleReasons: those that slow a busy GPU down.
_GPU_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_PACKAGES = ("hdrq-deploy", "onnxruntime", "openvino", "onnx", "numpy", "safetensors")
_GPU_PACKAGES = ("tensorrt", "tensorrt-rtx", "cuda-python", "onnxruntime-gpu")


@dataclass(frozen=True)
class Reading:
    """What the machine says of itself at one moment; None where it does not say.

    Attributes:
        clock_mhz: Clock of the fastest core.
        temperature_c: Temperature of the hottest zone.
        throttled: Throttling events so far.
        cooling: Steps of passive cooling in force: above 0 a clock is held down.
        busy_s: CPU seconds that all processes have used, stolen ones left out.
        stolen_s: CPU seconds that the hypervisor gave to others.
        own_s: CPU seconds of this process.
        at: Seconds of a clock that does not jump.
        gpu_clock_mhz: Clock of the GPU's multiprocessors.
        gpu_reasons: Bits of NVML that say why the GPU is slower than it could be.
    """

    clock_mhz: float | None
    temperature_c: float | None
    throttled: int | None
    cooling: int | None
    busy_s: float | None
    stolen_s: float | None
    own_s: float
    at: float
    gpu_clock_mhz: float | None = None
    gpu_reasons: int = 0


def read(root: Path = Path("/"), nvml: Any = None, gpu: int = 0) -> Reading:
    """One reading.

    Args:
        root: Folder that holds ``sys`` and ``proc``.
        nvml: The module, initialised, where there is a GPU.
        gpu: Number of the GPU.
    """
    busy, stolen = _cpu_seconds(root)
    clock, reasons = _gpu(nvml, gpu)
    return Reading(
        _clock(root),
        _temperature(root),
        _throttled(root),
        _cooling(root),
        busy,
        stolen,
        time.process_time(),
        time.monotonic(),
        clock,
        reasons,
    )


@dataclass
class Watch:
    """Readings around the stretches of a measurement.

    Args:
        root: Folder that holds ``sys`` and ``proc``.
        nvml, gpu: See :func:`read`.
    """

    root: Path = Path("/")
    nvml: Any = None
    gpu: int = 0
    stretches: list[tuple[Reading, Reading]] = field(default_factory=list)
    _begun: Reading | None = None

    @classmethod
    def of(cls, device: str) -> Watch:
        """A watch of this machine, and of the GPU where ``device`` (``cuda:N``) is one."""
        return cls() if device == "cpu" else cls(nvml=open_nvml(), gpu=_number(device))

    def __enter__(self) -> Watch:
        self._begun = read(self.root, self.nvml, self.gpu)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._begun is not None
        self.stretches.append((self._begun, read(self.root, self.nvml, self.gpu)))

    @property
    def cpu_per_wall(self) -> float:
        """Threads that really worked: CPU time of this process over wall time."""
        wall = sum(end.at - begin.at for begin, end in self.stretches)
        return sum(end.own_s - begin.own_s for begin, end in self.stretches) / max(wall, 1e-9)

    def facts(self) -> dict[str, Any]:
        """Clock, temperature, other load: first and last, for the report."""
        if not self.stretches:
            return {}
        first, last = self.stretches[0][0], self.stretches[-1][1]
        neighbours, stolen = self._shares()
        return {
            "clock_mhz": _pair(first.clock_mhz, last.clock_mhz),
            "temperature_c": _pair(first.temperature_c, last.temperature_c),
            "other_processes_cores": None if neighbours is None else round(neighbours, 2),
            "stolen_cores": None if stolen is None else round(stolen, 2),
            **(
                {"gpu_clock_mhz": _pair(first.gpu_clock_mhz, last.gpu_clock_mhz)}
                if last.gpu_clock_mhz is not None
                else {}
            ),
        }

    def marks(self) -> list[str]:
        """What makes the measurement doubtful, one line each; empty where nothing does."""
        return list(self._marks())

    def _marks(self) -> Iterator[str]:
        readings = [reading for stretch in self.stretches for reading in stretch]
        for what, values in (
            ("clock", [r.clock_mhz for r in readings if r.clock_mhz]),
            ("GPU clock", [r.gpu_clock_mhz for r in readings if r.gpu_clock_mhz]),
        ):
            if values and min(values) < (1 - CLOCK_CHANGE) * max(values):
                yield f"{what} change: {max(values):.0f} and {min(values):.0f} MHz"
        events = sum(
            max((end.throttled or 0) - (begin.throttled or 0), 0) for begin, end in self.stretches
        )
        steps = max((reading.cooling or 0 for reading in readings), default=0)
        if events or steps:
            yield f"thermal throttling: {events} event(s), cooling step {steps}"
        reasons = 0
        for reading in readings:
            reasons |= reading.gpu_reasons
        named = [name for bit, name in _GPU_REASONS.items() if reasons & bit]
        if named:
            yield f"GPU throttling: {', '.join(named)}"
        cores = os.cpu_count() or 1
        neighbours, stolen = self._shares()
        if neighbours is not None and neighbours > NEIGHBOURS * cores:
            yield f"noisy neighbour: other processes used {neighbours:.1f} of {cores} cores"
        if stolen is not None and stolen > STOLEN * cores:
            yield f"noisy neighbour: the hypervisor took {stolen:.2f} of {cores} cores"

    def _shares(self) -> tuple[float | None, float | None]:
        """Cores that others used, and cores that were stolen, on average."""
        others = stolen = wall = 0.0
        for begin, end in self.stretches:
            if begin.busy_s is None or end.busy_s is None:
                return None, None
            assert begin.stolen_s is not None and end.stolen_s is not None
            others += (end.busy_s - begin.busy_s) - (end.own_s - begin.own_s)
            stolen += end.stolen_s - begin.stolen_s
            wall += end.at - begin.at
        # The kernel counts in ticks of 10 ms: a short stretch says nothing.
        if wall < 0.2:
            return None, None
        return max(others / wall, 0.0), stolen / wall


def _pair(first: float | None, last: float | None) -> list[float] | None:
    return None if first is None or last is None else [round(first, 1), round(last, 1)]


def environment(root: Path = Path("/"), device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge or repeat the figures."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(root),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "governor": _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "power_mode": _text(root / "var/lib/nvpmodel/status"),
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "board": _text(root / "proc/device-tree/model"),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }
    if device != "cpu":
        facts |= {name: _version(name) for name in _GPU_PACKAGES}
        facts |= _gpu_facts(_number(device))
    return facts


def _number(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _gpu(nvml: Any, gpu: int) -> tuple[float | None, int]:
    if nvml is None:
        return None, 0
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
        clock = float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        return clock, int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    except nvml.NVMLError:
        return None, 0


def _gpu_facts(gpu: int) -> dict[str, Any]:
    nvml = open_nvml()
    if nvml is None:
        return {"gpu": None, "driver": None}
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
        texts = nvml.nvmlDeviceGetName(handle), nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError:
        return {"gpu": None, "driver": None}
    name, driver = (t.decode() if isinstance(t, bytes) else str(t) for t in texts)
    return {"gpu": name, "driver": driver}


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip("\0\n ")
    except OSError:
        return None


def _numbers(root: Path, pattern: str) -> list[int]:
    texts = (_text(path) for path in root.glob(pattern))
    return [int(t) for t in texts if t and t.lstrip("-").isdecimal()]


def _clock(root: Path) -> float | None:
    khz = _numbers(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    if khz:
        return max(khz) / 1000
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    mhz = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return max(mhz) if mhz else None


def _temperature(root: Path) -> float | None:
    degrees = _numbers(root, "sys/class/thermal/thermal_zone*/temp")
    return max(degrees) / 1000 if degrees else None


def _throttled(root: Path) -> int | None:
    counts = _numbers(root, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")
    return sum(counts) if counts else None


def _cooling(root: Path) -> int | None:
    """Fans are no sign of throttling: only what holds a clock down counts."""
    steps = []
    for device in root.glob("sys/class/thermal/cooling_device*"):
        kind = (_text(device / "type") or "").lower()
        if any(word in kind for word in ("cpu", "gpu", "processor", "devfreq")):
            steps += _numbers(device, "cur_state")
    return max(steps) if steps else None


def _cpu_seconds(root: Path) -> tuple[float | None, float | None]:
    """docs.kernel.org/filesystems/proc.html: user nice system idle iowait irq softirq steal."""
    first = (_text(root / "proc/stat") or "").split("\n")[0].split()
    if len(first) < 9 or first[0] != "cpu":
        return None, None
    user, nice, system, _, _, irq, softirq, steal = map(int, first[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name(root: Path) -> str:
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
