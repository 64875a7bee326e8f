"""Run files: one file names all that is to be made, and a run makes what is stale of it."""

from __future__ import annotations
