"""Calibrate one adapted model for one domain; the only station that needs torch.

The functions are imported, and torch with them, where they are first used: the recipe of a
calibration is read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import calibrate, fake_quantized, folded_weights

__all__ = ["calibrate", "fake_quantized", "folded_weights"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(".pipeline", __name__), name)
