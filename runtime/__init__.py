"""Run engines and measure them; no torch."""

from __future__ import annotations

from .bench.measurement import benchmark
from .engine import Engine, load_engine
from .predictions import Prediction

__all__ = ["Engine", "Prediction", "benchmark", "load_engine"]
