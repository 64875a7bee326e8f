"""Merge-friendly post-training quantization, from PyTorch to INT8 and INT4 engines."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from . import _moved
from .errors import HdrqError, ModelError

if TYPE_CHECKING:
    from .calibration import calibrate
    from .checks import verify
    from .exporters import export
    from .formats.bundle import Bundle
    from .merging import merge
    from .runtime import benchmark, load_engine

    __version__: str

# Since 1.29 ONNX Runtime starts a thread that reports to its makers. Nobody who runs an engine has
# asked for it, and a process that was forked off waits for that thread for ever when it ends. It
# must be declined before ONNX Runtime is imported; a value that the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_moved.install()

__all__ = [
    "Bundle",
    "HdrqError",
    "benchmark",
    "calibrate",
    "export",
    "load_engine",
    "merge",
    "verify",
]

# Public name to the module that has it.
_DOORS = {
    "Bundle": "formats.bundle",
    "benchmark": "runtime",
    "calibrate": "calibration",
    "export": "exporters",
    "load_engine": "runtime",
    "merge": "merging",
    "verify": "checks",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name where it is used; ``calibrate`` imports torch.

        An application that runs engines starts in half the time, and a command can be stopped from
        its first moment on.
        """
        if name == "__version__":
            from importlib.metadata import version

            return version("hdrq-deploy")
        if name not in _DOORS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f".{_DOORS[name]}", __name__), name)
        except ImportError as error:
            if name != "calibrate":
                raise
            raise ModelError(
                f"calibration needs {error.name}, which is not installed: "
                "pip install 'hdrq-deploy[calibrate]'"
            ) from error
