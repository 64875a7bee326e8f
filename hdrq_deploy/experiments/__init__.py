"""The paper's experiments, cell by cell: what they need, what they make, and their table."""

from __future__ import annotations
