"""Packages that are named like the one function they are for.

``from hdrq_deploy import merge`` is promised to be a function, and ``hdrq_deploy.merge`` is a
package; once anything has imported the package, Python binds its name there. So the package can
be called too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["make_callable"]


class _CallableModule(ModuleType):
    _function: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The function of the package's name."""
        return self._function(*args, **options)


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Let the module ``name`` be called as ``function``."""
    module = sys.modules[name]
    module.__class__ = _CallableModule
    vars(module)["_function"] = function
