"""NVIDIA's management library, which knows a GPU's clock, name and energy."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

__all__ = ["open_nvml"]


def open_nvml() -> Any:
    """NVML, initialised; None without the package or a driver."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
