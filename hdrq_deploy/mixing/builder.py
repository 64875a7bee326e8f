"""What a mixer needs of an engine, and of what makes engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..exporters import BuildOptions, GraphOptions
from ..formats.engine_folder import Port
from ..typing import Array

__all__ = ["EngineBuilder", "EngineSettings", "Mix", "MixEngine"]

Mix = tuple[float, ...]


@dataclass(frozen=True)
class EngineSettings:
    """How all engines of a mixer are made.

    Attributes:
        engine: ``ort``, ``openvino``, ``trt`` or ``trt-rtx``.
        graph: Options of the lowered graph.
        build: Options of the builder of a TensorRT engine.
        threads: Threads inside an operator of ONNX Runtime or OpenVINO; 0, one per core.
    """

    engine: str
    graph: GraphOptions
    build: BuildOptions
    threads: int


class MixEngine(Protocol):
    """An engine with the merge weights of one mix."""

    @property
    def port(self) -> Port:
        """Its input port."""
        ...

    def __call__(self, x: Array) -> Array:
        """Outputs of a batch; the caller has checked that it fits the port."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class EngineBuilder(Protocol):
    """Makes engines of one kind."""

    def make(self, mix: Mix, spare: MixEngine | None) -> MixEngine:
        """The engine of a mix.

        Args:
            mix: Merge weight of every domain.
            spare: An idle engine that may be refitted instead of building a new one; it belongs
                to the builder from here on, whether building succeeds or not.
        """
        ...

    def close(self) -> None:
        """Remove the files that building left."""
        ...
