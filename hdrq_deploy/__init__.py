"""Merge-friendly post-training quantization, from PyTorch to INT8 and INT4 engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bundle import Bundle
from .errors import HdrqError
from .merge import merge

if TYPE_CHECKING:
    from .calibrate import calibrate

__all__ = ["Bundle", "HdrqError", "calibrate", "merge"]


def __getattr__(name: str) -> Any:
    """Import ``calibrate``, and torch with it, only where it is used."""
    if name != "calibrate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from .errors import ModelError

    try:
        return importlib.import_module(".calibrate", __name__).calibrate
    except ImportError as error:
        raise ModelError(
            f"calibration needs {error.name}, which is not installed: "
            "pip install 'hdrq-deploy[calibrate]'"
        ) from error
