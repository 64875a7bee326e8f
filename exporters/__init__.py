"""Lowering of bundles to engines, one small set of rewrites per target."""

from __future__ import annotations

from .export import ENGINES, export

__all__ = ["ENGINES", "export"]
