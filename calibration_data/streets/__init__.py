"""The streets benchmark: scenes drawn by :mod:`.drawing`, its models trained here."""

from __future__ import annotations

from .drawing import CLASSES, DOMAINS, SIZES, SOURCE, SPLITS, TARGETS, Split, make, write

__all__ = ["CLASSES", "DOMAINS", "SIZES", "SOURCE", "SPLITS", "TARGETS", "Split", "make", "write"]
