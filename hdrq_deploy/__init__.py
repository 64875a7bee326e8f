"""Merge-friendly post-training quantization, from PyTorch to INT8 and INT4 engines."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from . import _moved
from .errors import HdrqError

if TYPE_CHECKING:
    from .calibrate import calibrate
    from .formats.bundle import Bundle
    from .merge import merge

# Since 1.29 ONNX Runtime starts a thread that reports to its makers. Nobody who runs an engine has
# asked for it, and a process that was forked off waits for that thread for ever when it ends. It
# must be declined before ONNX Runtime is imported; a value that the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_moved.install()

__all__ = ["Bundle", "HdrqError", "calibrate", "merge"]


def __getattr__(name: str) -> Any:
    """Import ``Bundle``, ``calibrate``, and torch with it, and ``merge`` where they are used.

    An application that runs engines starts in half the time without them, and a command can be
    stopped from its first moment on.
    """
    if name == "Bundle":
        return importlib.import_module(".formats.bundle", __name__).Bundle
    if name == "__version__":
        from importlib.metadata import version

        return version("hdrq-deploy")
    if name not in {"calibrate", "merge"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .errors import ModelError

    try:
        return getattr(importlib.import_module(f".{name}", __name__), name)
    except ImportError as error:
        if name == "merge":
            raise
        raise ModelError(
            f"calibration needs {error.name}, which is not installed: "
            "pip install 'hdrq-deploy[calibrate]'"
        ) from error
