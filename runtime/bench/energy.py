"""Energy of a device while it works: RAPL on x86, INA3221 on Jetson, NVML on NVIDIA GPUs.

Counters (RAPL, NVML of Volta and later) are read before and after; power meters (INA3221) are
sampled and integrated. What idling takes in the same time is measured first and subtracted.
Where no meter can be read there is no figure: "unavailable" is not 0.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...formats.bench_result import Energy
from .nvml import open_nvml

__all__ = ["Meter", "find_meters", "measure_energy"]

PERIOD_S = 0.02


class Meter(Protocol):
    """One rail: a name and the energy it has counted since it was opened, in J."""

    name: str

    def joules(self) -> float:
        """Energy since the meter was made."""
        ...

    def sample(self) -> None:
        """Called every period while a run lasts."""
        ...


@dataclass
class Rapl:
    """A powercap zone: a counter in microjoules that wraps.

    Source:
        docs.kernel.org/power/powercap/powercap.html
    """

    path: Path
    name: str = ""
    _last: int = 0
    _total: int = 0

    def __post_init__(self) -> None:
        self.name = f"rapl {(self.path / 'name').read_text().strip()}"
        self._last = self._read()

    def _read(self) -> int:
        return int((self.path / "energy_uj").read_text())

    def joules(self) -> float:
        """See :class:`Meter`."""
        self.sample()
        return self._total / 1e6

    def sample(self) -> None:
        """Read often enough to see every wrap."""
        now = self._read()
        gone = now - self._last
        if gone < 0:
            gone += int((self.path / "max_energy_range_uj").read_text())
        self._total, self._last = self._total + gone, now


@dataclass
class Ina3221:
    """One channel of an INA3221: mV times mA, integrated by the trapezoidal rule.

    Source:
        docs.kernel.org/hwmon/ina3221.html
    """

    folder: Path
    channel: int
    name: str = ""
    clock: Callable[[], float] = time.monotonic
    _watts: float = 0.0
    _at: float = 0.0
    _total: float = 0.0

    def __post_init__(self) -> None:
        label = (self.folder / f"in{self.channel}_label").read_text().strip()
        self.name = f"ina3221 {label}"
        self._watts, self._at = self._read(), self.clock()

    def _read(self) -> float:
        volts = int((self.folder / f"in{self.channel}_input").read_text()) / 1e3
        return volts * int((self.folder / f"curr{self.channel}_input").read_text()) / 1e3

    def joules(self) -> float:
        """See :class:`Meter`."""
        self.sample()
        return self._total

    def sample(self) -> None:
        """One trapezium."""
        watts, now = self._read(), self.clock()
        self._total += (now - self._at) * (watts + self._watts) / 2
        self._watts, self._at = watts, now


@dataclass
class Nvml:
    """The energy counter of one NVIDIA GPU, in mJ.

    Source:
        docs.nvidia.com/deploy/nvml-api, nvmlDeviceGetTotalEnergyConsumption
    """

    nvml: Any
    index: int
    name: str = ""
    _first: int = 0
    _handle: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._handle = self.nvml.nvmlDeviceGetHandleByIndex(self.index)
        name = self.nvml.nvmlDeviceGetName(self._handle)
        self.name = f"nvml {name.decode() if isinstance(name, bytes) else name}"
        self._first = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def joules(self) -> float:
        """See :class:`Meter`."""
        now: int = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return (now - self._first) / 1e3

    def sample(self) -> None:
        """The GPU counts by itself."""


def find_meters(root: Path = Path("/")) -> list[Meter]:
    """Every meter that this machine lets us read.

    Args:
        root: Folder that holds ``sys``.
    """
    return [*_rapl(root), *_ina3221(root), *_nvml()]


def _rapl(root: Path) -> Iterator[Meter]:
    """Packages only: their sub-zones (cores, DRAM controllers) are inside them."""
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        if zone.name.count(":") == 1 and _readable(zone / "energy_uj"):
            yield Rapl(zone)


def _ina3221(root: Path) -> Iterator[Meter]:
    """VDD_IN or another total where there is one, else all channels."""
    channels: list[Meter] = []
    for hwmon in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        label = hwmon / "name"
        if not _readable(label) or label.read_text().strip() != "ina3221":
            continue
        for channel in (1, 2, 3):
            files = [hwmon / f"{part}{channel}_{end}" for part, end in _INA_FILES]
            if all(_readable(file) for file in files):
                channels.append(Ina3221(hwmon, channel))
    totals = [meter for meter in channels if meter.name.split()[-1] in {"VDD_IN", "POM_5V_IN"}]
    yield from totals or channels


_INA_FILES = (("in", "label"), ("in", "input"), ("curr", "input"))


def _nvml() -> Iterator[Meter]:
    nvml = open_nvml()
    if nvml is None:
        return
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            yield Nvml(nvml, index)
    except nvml.NVMLError:  # a GPU without a counter
        return


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def measure_energy(
    call: Callable[[], object],
    meters: Sequence[Meter],
    inferences: int,
    idle_s: float = 2.0,
    period_s: float = PERIOD_S,
    clock: Callable[[], float] = time.monotonic,
) -> Energy | None:
    """Energy of ``inferences`` calls, less what idling takes in the same time.

    Args:
        call: One inference (a batch counts as one).
        meters: From :func:`find_meters`.
        inferences: Calls to make.
        idle_s: How long to watch the idle device first.
        period_s: Between samples.
        clock: Seconds.

    Returns:
        None where there is no meter.
    """
    if not meters:
        return None
    idle, idle_time = _watch(lambda: time.sleep(idle_s), meters, period_s, clock)

    def work() -> None:
        for _ in range(inferences):
            call()

    busy, busy_time = _watch(work, meters, period_s, clock)
    idle_watts, spent = sum(idle.values()) / idle_time, sum(busy.values())
    return Energy(
        joules_per_inference=(spent - idle_watts * busy_time) / inferences,
        idle_watts=idle_watts,
        busy_watts=spent / busy_time,
        rails=busy,
        period_s=period_s,
        inferences=inferences,
    )


def _watch(
    work: Callable[[], None],
    meters: Sequence[Meter],
    period_s: float,
    clock: Callable[[], float],
) -> tuple[dict[str, float], float]:
    """Joules by rail and seconds while ``work`` runs, sampled from another thread."""
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(period_s):
            for meter in meters:
                meter.sample()

    before = {meter.name: meter.joules() for meter in meters}
    sampler = threading.Thread(target=sample, daemon=True)
    started = clock()
    sampler.start()
    try:
        work()
    finally:
        stop.set()
        sampler.join()
    seconds = clock() - started
    return {meter.name: meter.joules() - before[meter.name] for meter in meters}, seconds
