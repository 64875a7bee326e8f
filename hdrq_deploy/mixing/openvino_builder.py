"""Engines of a mixer that OpenVINO computes."""

from __future__ import annotations

from ..formats.engine_folder import Port
from ..graph.openvino_session import OpenVinoSession, library
from ..merging import Merger
from ..typing import Array
from .builder import EngineSettings, MixEngine
from .ort_builder import OrtBuilder

__all__ = ["MixSession", "OpenVinoBuilder"]


class OpenVinoBuilder(OrtBuilder):
    """Programs of OpenVINO, compiled in memory.

    Raises:
        EngineError: OpenVINO is not installed.
    """

    engine = "openvino"

    def __init__(self, merger: Merger, settings: EngineSettings) -> None:
        library()
        super().__init__(merger, settings)

    def open(self, data: bytes, port: Port, threads: int) -> MixEngine:
        """See :meth:`OrtBuilder.open`."""
        return MixSession(data, port, threads)


class MixSession:
    """A graph on OpenVINO."""

    def __init__(self, data: bytes, port: Port, threads: int) -> None:
        self._session: OpenVinoSession | None = OpenVinoSession(data, "mixer", threads)
        self.port = port

    def __call__(self, x: Array) -> Array:
        """See :class:`.builder.MixEngine`."""
        assert self._session is not None
        (output,) = self._session.outputs
        return self._session.run([output], {self.port.name: x})[0]

    def close(self) -> None:
        """See :class:`.builder.MixEngine`."""
        self._session = None
