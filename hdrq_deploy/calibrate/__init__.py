"""Calibrate one adapted model for one domain; the only station that needs torch."""

from __future__ import annotations

from ..callable import make_callable
from .pipeline import calibrate, fake_quantized, folded_weights

__all__ = ["calibrate", "fake_quantized", "folded_weights"]

make_callable(__name__, calibrate)
