"""Is an engine the model it was made from, and which is the fastest; sensitivity of layers."""

from __future__ import annotations

from .fastest_engine import export_fastest
from .measured_precision import export_measured
from .verification import Verification, verify

__all__ = ["Verification", "export_fastest", "export_measured", "verify"]
