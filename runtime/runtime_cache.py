"""Kernels that TensorRT-RTX compiled at run time, kept in a file for the next start."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ..errors import EngineError
from ..formats.atomic_files import check_output, write_bytes
from ..formats.file_kinds import RUNTIME_CACHE, RUNTIME_CACHE_MARK

__all__ = ["RuntimeCache"]

_log = logging.getLogger("hdrq_deploy")


class RuntimeCache:
    """One cache for all execution contexts of an engine, read at the first and written at the end.

    Args:
        path: The file; it need not be there yet.

    Raises:
        HdrqError: Something else lies there, or it cannot be written to.

    Source:
        docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/
        work-with-runtime-cache.html
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = check_output(path, RUNTIME_CACHE, label="cache")
        self._cache: Any = None

    def attach(self, settings: Any) -> None:
        """Let the execution context of an ``IRuntimeConfig`` read and fill the cache.

        A cache of another GPU, driver or version is rejected by the library; a line in the log
        says so, and kernels are compiled again.

        Raises:
            EngineError: This version of the library keeps no such cache.
        """
        if not hasattr(settings, "create_runtime_cache"):
            raise EngineError(
                "found `cache`; this version of TensorRT-RTX keeps no runtime cache: leave it out"
            )
        if self._cache is None:
            self._cache = settings.create_runtime_cache()
            known = self.path.read_bytes() if self.path.is_file() else b""
            kernels = known.removeprefix(RUNTIME_CACHE_MARK)
            if kernels and not self._cache.deserialize(kernels):
                _log.warning(
                    "%s: the runtime cache is of another GPU, driver or version; kernels are "
                    "compiled again, and the file is replaced",
                    self.path,
                )
        settings.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled; contexts that use the cache must still be there."""
        if self._cache is not None:
            kernels = bytes(self._cache.serialize())
            write_bytes(Path(self.path), RUNTIME_CACHE_MARK + kernels, RUNTIME_CACHE)
