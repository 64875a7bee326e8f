"""Where torch computes, and with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import SpecError

__all__ = ["torch_device", "torch_threads"]


def torch_device(name: str) -> torch.device:
    """The device of a name: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        SpecError: Another name, or ``cuda`` without such a device.
    """
    if name not in {"auto", "cpu", "cuda"}:
        raise SpecError(f"found device {name!r}; choose auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SpecError(
            "found no CUDA device; choose `device` cpu, or install a GPU build of torch"
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads; the number is part of what decides a calibration's bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
