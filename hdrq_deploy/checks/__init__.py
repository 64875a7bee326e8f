"""Is an engine the model it was made from: verification, and sensitivity of layers."""

from __future__ import annotations

from .verification import Verification, verify

__all__ = ["Verification", "verify"]
