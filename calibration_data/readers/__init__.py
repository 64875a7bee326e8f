"""Readers of data sets: image folders, arrays and street scenes; no torch."""

from __future__ import annotations

from .folder import ImageSet, Wanted, cut, numbered, read, relabel

__all__ = ["ImageSet", "Wanted", "cut", "numbered", "read", "relabel"]
