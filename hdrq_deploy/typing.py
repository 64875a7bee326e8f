"""Types that every room uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

__all__ = ["Array", "Progress", "StepProgress", "no_progress"]

Array = npt.NDArray[Any]
# Called with the parts done, the parts in all, and what is done now.
Progress = Callable[[int, int, str], None]
# Called with the steps done, and the steps in all as far as is known.
StepProgress = Callable[[int, int], None]


def no_progress(done: int, total: int, what: str) -> None:
    """A :data:`Progress` that nobody watches."""
