"""Merge methods: one file each, and one table.

To add a method, write a file like ``mean.py`` here and add one line to ``METHODS``; the page
CONTRIBUTING.md shows it with complete code. Library and command read the table.
"""

from __future__ import annotations

from ...errors import MergeError
from .base import MergeMethod, MethodOptions
from .mean import MEAN
from .regression import REGRESSION
from .task_arithmetic import TASK_ARITHMETIC
from .ties import TIES

__all__ = ["METHODS", "MergeMethod", "MethodOptions", "method_of"]

METHODS: dict[str, MergeMethod] = {
    "mean": MEAN,
    "regression": REGRESSION,
    "task-arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
}


def method_of(name: str) -> MergeMethod:
    """The method of a name.

    Raises:
        MergeError: The table has no such method.
    """
    if name not in METHODS:
        raise MergeError(f"found method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]
