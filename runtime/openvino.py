"""Engines on OpenVINO's CPU plugin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError
from ..formats.engine_folder import GRAPH, EngineManifest
from ..graph.openvino_session import OpenVinoSession
from ..graph.processors import saturates
from ..typing import Array
from .engine import Engine, Feeds, Pending, StillRunning

__all__ = ["OpenVinoEngine", "open_engine"]


def open_engine(
    path: Path,
    manifest: EngineManifest,
    device: str,
    threads: int,
    cuda_graph: bool,
    throughput: bool,
    cache: str | os.PathLike[str] | None,
) -> Engine:
    """See :func:`~hdrq_deploy.runtime.loading.open_engine`.

    Raises:
        EngineError: See :class:`OpenVinoEngine`; or another device than the CPU was asked for.
    """
    if device not in {"auto", "cpu"}:
        raise EngineError(
            f"{path}: found device {device!r} for an OpenVINO engine, which runs on the CPU; take "
            "cpu, or export with `engine` trt"
        )
    return OpenVinoEngine(path, manifest, threads, throughput, cache)


class OpenVinoEngine(Engine):
    """An engine on OpenVINO; calls run side by side.

    Args:
        path: Engine folder.
        manifest: Manifest of the engine.
        threads: Threads of all calls together.
        throughput: Many calls at once, each on few threads.
        cache: Folder for compiled graphs.

    Raises:
        EngineError: OpenVINO is not installed, cannot load the graph, or would compute wrong sums
            on this processor.
    """

    def __init__(
        self,
        path: Path,
        manifest: EngineManifest,
        threads: int,
        throughput: bool = False,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, manifest, threads, "cpu")
        _check_products(path)
        self._session: OpenVinoSession | None = OpenVinoSession(
            path / GRAPH, path, threads, throughput, cache
        )
        self._names = [port.name for port in manifest.outputs]
        if manifest.preprocessing or all(isinstance(d, int) for d in manifest.inputs[0].shape[1:]):
            self._session.prepare([self.input_shape(port) for port in manifest.inputs])

    @property
    def in_flight(self) -> int:
        """See :attr:`Engine.in_flight`."""
        return max(super().in_flight, self._loaded().at_once())

    def run_async(self, x: Any) -> Pending:
        """See :meth:`Engine.run_async`."""
        feeds = self._checked(x)
        wait = self._loaded().start(self._names, self._on_host(feeds))

        def collect(timeout: float | None) -> dict[str, Array]:
            results = wait(timeout)
            if results is None:
                raise StillRunning(f"{self.path}: no result within {timeout} s")
            return dict(zip(self._names, results, strict=True))

        return Pending(collect, isinstance(x, Mapping), self._owner)

    def _execute(self, feeds: Feeds) -> dict[str, Array]:
        results = self._loaded().run(self._names, self._on_host(feeds))
        return dict(zip(self._names, results, strict=True))

    def _loaded(self) -> OpenVinoSession:
        session = self._session
        if session is None:
            raise EngineError(f"{self.path}: the engine is closed; load it again")
        return session

    def _on_host(self, feeds: Feeds) -> Feeds:
        for name, x in feeds.items():
            if not isinstance(x, np.ndarray):
                raise EngineError(
                    f"{self.path}: found the input {name} in GPU memory; OpenVINO engines take "
                    "NumPy arrays: copy it to the host first"
                )
        return feeds

    def _release(self) -> None:
        self._session = None


def _check_products(path: Path) -> None:
    """Refuse an engine that was made on another processor and computes wrong sums on this one."""
    if not saturates():
        return
    from ..graph.products import holds_saturating_products  # half a second, where it is needed

    if holds_saturating_products(path / GRAPH):
        raise EngineError(
            f"{path}: found products of 8-bit codes that OpenVINO adds wrongly on this x86 "
            "processor without VNNI; export the bundle again on this machine, which adds such "
            "layers in two halves"
        )
