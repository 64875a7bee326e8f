"""Domains mixed while an application runs."""

from __future__ import annotations

from .domain_mixer import Adapted, DomainMixer, Output

__all__ = ["Adapted", "DomainMixer", "Output"]
