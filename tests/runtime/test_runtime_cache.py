"""The kernels that TensorRT-RTX compiles at run time, kept in a file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from hdrq_deploy.errors import EngineError, HdrqError
from hdrq_deploy.runtime.runtime_cache import RuntimeCache


class Kernels:
    """``IRuntimeCache`` of one imaginary GPU."""

    def __init__(self) -> None:
        self.held = b""

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"gpu 0:"):
            return False
        self.held = blob
        return True

    def serialize(self) -> bytes:
        return self.held or b"gpu 0:compiled"


class Settings:
    """``IRuntimeConfig``."""

    def __init__(self) -> None:
        self.cache: Any = None

    def create_runtime_cache(self) -> Kernels:
        return Kernels()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


def test_it_is_read_by_every_context_and_written_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "kernels.cache"
    first, again = Settings(), Settings()
    cache = RuntimeCache(file)
    cache.attach(first)
    cache.attach(again)
    assert first.cache is again.cache and not file.exists()
    cache.save()
    next_start = Settings()
    other = RuntimeCache(file)
    other.attach(next_start)
    assert next_start.cache.held == b"gpu 0:compiled"


def test_a_rejected_cache_is_told_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kernels.cache"
    cache = RuntimeCache(file)
    cache.attach(Settings())
    cache._cache.held = b"gpu 1:compiled"
    cache.save()
    said: list[str] = []
    logger = logging.getLogger("hdrq_deploy")
    monkeypatch.setattr(logger, "warning", lambda text, *args: said.append(text % args))
    again = RuntimeCache(file)
    again.attach(Settings())
    assert len(said) == 1 and "is of another GPU, driver or version" in said[0]
    again.save()
    assert file.read_bytes().endswith(b"gpu 0:compiled")
    RuntimeCache(file).attach(Settings())
    assert len(said) == 1


def test_what_is_not_a_cache_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(HdrqError, match="found another file at"):
        RuntimeCache(file)
    assert file.read_text() == "mine"
    with pytest.raises(EngineError, match="keeps no runtime cache"):
        RuntimeCache(tmp_path / "new").attach(object())
