"""Lowering of bundles to engines, one small set of rewrites per target."""

from __future__ import annotations

from .export import ENGINES, export
from .options import BuildOptions, GraphOptions, parse_shapes

__all__ = ["ENGINES", "BuildOptions", "GraphOptions", "export", "parse_shapes"]
