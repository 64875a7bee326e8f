"""Where torch computes, with how many threads, and from what memory."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from ..errors import SpecError

__all__ = ["keep_freed_memory", "torch_device", "torch_threads"]

# mallopt(3): M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, and the largest of both that all glibc take.
_TRIM, _MMAP = -1, -3
_TRIM_MOST, _MMAP_MOST = (1 << 31) - 1, 1 << 25


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


@cache
def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors, where it runs on glibc.

    By default glibc returns blocks of a few MB to the system when they are freed, and every
    operator on large activations waits for new, zeroed pages. An iteration of a block of 96
    channels at 48 x 48, 32 images, takes 1.45 times as long then. The setting holds until the
    process ends; its peak of memory is the same. What the environment says of malloc stands.

    Returns:
        Whether it was set.
    """
    said = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if said or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP, _MMAP_MOST)) and bool(mallopt(_TRIM, _TRIM_MOST))
