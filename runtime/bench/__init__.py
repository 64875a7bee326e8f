"""Measuring engines: latency, throughput, accuracy, energy, and what the device was doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...deprecations import warn_deprecated
from ...formats.bench_result import Accuracy, BenchResult, Latency, harmonic_mean
from .measurement import benchmark, benchmark_all, interleaved
from .timing import BenchPlan, measure

__all__ = [
    "Accuracy",
    "BenchPlan",
    "BenchResult",
    "Latency",
    "benchmark",
    "benchmark_all",
    "harmonic_mean",
    "interleaved",
    "measure",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Find ``Plan``, the name that :class:`BenchPlan` had in version 0.1."""
        if name != "Plan":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warn_deprecated("runtime.bench.Plan")
        return BenchPlan
