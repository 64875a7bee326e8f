"""Engines belong to the process that loaded them.

Their threads do not exist in a process that was forked off, so that whoever waited for one there
would wait for ever; and native code may crash when it ends threads that are not there.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

from ..errors import EngineError

__all__ = ["Owner"]

_owned: weakref.WeakSet[Any] = weakref.WeakSet()


class Owner:
    """The process that owns a resource.

    Args:
        resource: Never freed in a process that is forked off, where freeing it may crash.
        what: Names it in errors.
        again: What to do in another process.
    """

    def __init__(self, resource: Any, what: object, again: str) -> None:
        self._pid, self._what, self._again = os.getpid(), what, again
        _owned.add(resource)

    @property
    def here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse work in another process.

        Raises:
            EngineError: This process was forked off.
        """
        if not self.here:
            raise EngineError(
                f"{self._what}: found process {os.getpid()}, forked from process {self._pid} that "
                f"owns it; {self._again}"
            )


def _keep_all() -> None:
    """One reference more than anybody gives back, in a process that was just forked off."""
    for resource in list(_owned):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(resource))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_all)
