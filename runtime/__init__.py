"""Run engines and measure them; no torch."""

from __future__ import annotations

from .bench import benchmark
from .engine import Engine, load_engine
from .images import Prediction

__all__ = ["Engine", "Prediction", "benchmark", "load_engine"]
