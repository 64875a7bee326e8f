"""Processors whose integer kernels add products wrongly; graphs are looked at in :mod:`.products`.

This is asked whenever an engine is loaded, so it imports nothing.

==============================  =============================================================
processor                       what its kernels do
==============================  =============================================================
x86 without VNNI                add two products of a uint8 and an int8 code in int16, which
                                saturates. ONNX Runtime and OpenVINO (oneDNN) do it alike
64-bit ARM without dot product  add two products of int8 codes in int16, which wraps where all
                                four are -128. Only ONNX Runtime up to 1.32 does
                                (github.com/microsoft/onnxruntime/issues/31573)
==============================  =============================================================
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["products_wrap", "saturates"]

_CPUINFO = Path("/proc/cpuinfo")


def saturates(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether the sum of two products of u8 and s8 can saturate: x86 without VNNI."""
    flags = _flags(cpuinfo, "flags")
    return bool(flags) and not any("vnni" in flag for flag in flags[0])


def products_wrap(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether two products of -128 and -128 can wrap: 64-bit ARM without dot product.

    Zeros behind a ReLU are -128 to ONNX Runtime's kernel for int8 weights, so that weights of -128
    give wrong sums. Another kernel takes uint8 weights.
    """
    return any("asimd" in f and "asimddp" not in f for f in _flags(cpuinfo, "Features"))


def _flags(cpuinfo: Path, key: str) -> list[list[str]]:
    """What each core tells of itself in such lines."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return []
    lines = [line.partition(":") for line in text.splitlines()]
    return [value.split() for name, _, value in lines if name.strip() == key]
