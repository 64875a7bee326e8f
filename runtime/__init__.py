"""Run engines and measure them; no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .loading import load_engine
from .predictions import Prediction

if TYPE_CHECKING:
    from .bench import benchmark

__all__ = ["Engine", "Prediction", "benchmark", "load_engine"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import ``benchmark`` where it is used: an application that runs engines needs none."""
        if name != "benchmark":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(".bench", __name__).benchmark
