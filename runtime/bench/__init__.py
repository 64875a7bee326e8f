"""Measuring engines: latency, throughput, accuracy, energy, and what the device was doing."""

from __future__ import annotations

from .measurement import (
    Accuracy,
    BenchResult,
    Latency,
    Plan,
    benchmark,
    benchmark_all,
    harmonic_mean,
    interleaved,
    measure,
)

__all__ = [
    "Accuracy",
    "BenchResult",
    "Latency",
    "Plan",
    "benchmark",
    "benchmark_all",
    "harmonic_mean",
    "interleaved",
    "measure",
]
