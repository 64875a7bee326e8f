"""The digits benchmark: images drawn and read by :mod:`.images`, its models trained here."""

from __future__ import annotations

from .images import CLASSES, DOMAINS, SIZES, SOURCE, SPLITS, TARGETS, Split, make, write

__all__ = ["CLASSES", "DOMAINS", "SIZES", "SOURCE", "SPLITS", "TARGETS", "Split", "make", "write"]
