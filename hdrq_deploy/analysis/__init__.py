"""Why a merge works or fails: barriers, curvature, distances, rounding."""

from __future__ import annotations

from .analyze import Settings, analyze

__all__ = ["Settings", "analyze"]
