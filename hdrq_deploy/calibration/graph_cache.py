"""Graphs that the domains of one model share, so that a model is captured once."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..formats.bundle_manifest import Layer
    from .capture import Capture

__all__ = ["GraphCache"]

# A grid alternates between settings and bits.
_GRAPHS = 8


class GraphCache:
    """The last captured graph, and the last ONNX graphs (without weights, so small).

    Whoever calibrates several domains makes one and passes it to every calibration; without it
    a calibration shares nothing. A worker process has one copy of it, which begins empty and stays
    from job to job. Results do not depend on it.
    """

    def __init__(self, owner: str | None = None) -> None:
        self._owner = owner or uuid.uuid4().hex
        self._captured: tuple[str, Capture] | None = None
        self._written: dict[str, tuple[bytes, list[Layer]]] = {}

    def __reduce__(self) -> Any:
        return _copy_in_this_process, (self._owner,)

    def captured(self, key: str) -> Capture | None:
        """The captured graph of ``key``, or None."""
        return self._captured[1] if self._captured and self._captured[0] == key else None

    def keep(self, key: str, capture: Capture) -> None:
        """Hold ``capture`` instead of the graph before it."""
        self._captured = (key, capture)

    def written(
        self, key: str, write: Callable[[], tuple[bytes, list[Layer]]]
    ) -> tuple[bytes, list[Layer]]:
        """The ONNX graph of ``key`` and its layers; ``write`` makes them where they are new."""
        found = self._written.pop(key, None) or write()
        self._written[key] = found  # to the end: the first was not asked for longest
        if len(self._written) > _GRAPHS:
            del self._written[next(iter(self._written))]
        return found


# Of a worker process only: the copy of the cache whose owner sends the jobs.
_copies: dict[str, GraphCache] = {}


def _copy_in_this_process(owner: str) -> GraphCache:
    if owner not in _copies:
        _copies.clear()
        _copies[owner] = GraphCache(owner)
    return _copies[owner]
