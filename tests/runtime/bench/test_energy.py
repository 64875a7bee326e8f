"""Energy meters on recorded trees of sysfs and a fake NVML."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hdrq_deploy.runtime.bench.energy import (
    Ina3221,
    Nvml,
    Rapl,
    find_meters,
    measure_energy,
)

PACKAGE = "sys/class/powercap/intel-rapl:0"
X86 = {
    f"{PACKAGE}/name": "package-0",
    f"{PACKAGE}/energy_uj": "1000000",
    f"{PACKAGE}/max_energy_range_uj": "262143328850",
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "5",
    "sys/class/powercap/intel-rapl:0:0/max_energy_range_uj": "262143328850",
}
HWMON = "sys/class/hwmon/hwmon3"
ORIN = {
    "sys/class/hwmon/hwmon0/name": "thermal",
    f"{HWMON}/name": "ina3221",
    **{
        f"{HWMON}/in{i}_label": n for i, n in ((1, "VDD_IN"), (2, "VDD_CPU_GPU_CV"), (3, "VDD_SOC"))
    },
    **{f"{HWMON}/in{i}_input": "5000" for i in (1, 2, 3)},
    **{f"{HWMON}/curr{i}_input": str(400 * i) for i in (1, 2, 3)},
}


class FakeNvml(ModuleType):
    NVMLError = RuntimeError

    def __init__(self, gpus: int = 1) -> None:
        super().__init__("pynvml")
        self.gpus, self.mj = gpus, 7000

    def nvmlInit(self) -> None:
        if self.gpus < 0:
            raise RuntimeError("driver not loaded")

    def nvmlDeviceGetCount(self) -> int:
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA H100"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self.mj


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdrq_deploy.runtime.bench.energy._nvml", lambda: iter(()))


@pytest.mark.usefixtures("no_nvml")
def test_rapl_counts_packages_once_and_survives_a_wrap(tmp_path: Path, tree: Any) -> None:
    (meter,) = find_meters(tree(tmp_path, X86))
    assert isinstance(meter, Rapl) and meter.name == "rapl package-0"
    (tmp_path / PACKAGE / "energy_uj").write_text("3500000")
    assert meter.joules() == pytest.approx(2.5)
    (tmp_path / PACKAGE / "energy_uj").write_text("500000")  # beyond the end and again from 0
    assert meter.joules() == pytest.approx(2.5 + (262143328850 - 3500000 + 500000) / 1e6)


@pytest.mark.usefixtures("no_nvml")
def test_a_jetson_is_measured_at_its_input_and_integrated(tmp_path: Path, tree: Any) -> None:
    (meter,) = find_meters(tree(tmp_path, ORIN))
    assert meter.name == "ina3221 VDD_IN"
    now = [0.0]
    meter = Ina3221(tmp_path / HWMON, 1, clock=lambda: now[0])
    now[0] = 2.0
    assert meter.joules() == pytest.approx(2 * 5.0 * 0.4)
    (tmp_path / HWMON / "curr1_input").write_text("800")
    now[0] = 3.0
    assert meter.joules() == pytest.approx(4.0 + (2.0 + 4.0) / 2)


@pytest.mark.usefixtures("no_nvml")
def test_without_a_total_all_rails_are_counted(tmp_path: Path, tree: Any) -> None:
    root = tree(tmp_path, {**ORIN, f"{HWMON}/in1_label": "VDD_GPU"})
    assert [meter.name.split()[-1] for meter in find_meters(root)] == [
        "VDD_GPU",
        "VDD_CPU_GPU_CV",
        "VDD_SOC",
    ]


def test_nvml_counts_millijoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    meter = Nvml(nvml, 0)
    nvml.mj += 1500
    assert meter.name == "nvml NVIDIA H100" and meter.joules() == pytest.approx(1.5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for gpus, count in ((2, 2), (-1, 0)):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(gpus))
        assert len(find_meters(tmp_path)) == count


class Steady:
    """A device that takes 3 W, and 10 W while it works."""

    name = "steady"

    def __init__(self) -> None:
        self.total, self.at, self.busy, self.samples = 0.0, time.monotonic(), False, 0

    def joules(self) -> float:
        now = time.monotonic()
        self.total += (now - self.at) * (10.0 if self.busy else 3.0)
        self.at = now
        return self.total

    def sample(self) -> None:
        self.samples += 1


def test_idle_energy_is_subtracted_and_nothing_is_not_zero() -> None:
    meter = Steady()

    def call() -> Any:
        meter.joules()
        meter.busy = True
        time.sleep(0.01)
        meter.joules()
        meter.busy = False

    found = measure_energy(call, [meter], 20, idle_s=0.1, period_s=0.005)
    assert found is not None
    assert found.idle_watts == pytest.approx(3.0, rel=0.05)
    assert found.joules_per_inference == pytest.approx(0.07, rel=0.3)  # 7 W more for 10 ms
    assert meter.samples > 10 and found.rails.keys() == {"steady"}
    assert measure_energy(call, [], 20) is None
