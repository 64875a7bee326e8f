"""Threads of the jobs that calibrate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..graph.reference_session import session_threads

__all__ = ["calibration_threads"]


@contextmanager
def calibration_threads(count: int) -> Iterator[None]:
    """Run torch and ONNX Runtime on ``count`` threads; torch is imported here, not before."""
    from ..calibration.pipeline import torch_threads

    with torch_threads(count), session_threads(count):
        yield
