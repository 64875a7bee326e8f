"""Run engines and measure them; no torch."""

from __future__ import annotations

from .bench import benchmark
from .engine import Engine, load_engine

__all__ = ["Engine", "benchmark", "load_engine"]
