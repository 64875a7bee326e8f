"""Calibrate one adapted model for one domain; the only station that needs torch."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .pipeline import calibrate, fake_quantized, folded_weights

__all__ = ["calibrate", "fake_quantized", "folded_weights"]


class _Callable(ModuleType):
    """``from hdrq_deploy import calibrate`` finds this module once anything has imported it."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """:func:`calibrate`, whichever way it was reached."""
        return calibrate(*args, **options)


sys.modules[__name__].__class__ = _Callable
