"""Engines of a mixer that ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnxruntime

from ..comparison.golden import Exported, MixCheck
from ..exporters.export import lowered
from ..exporters.io_signature import port_of
from ..formats.engine_folder import Port
from ..graph.model_files import serialized
from ..graph.reference_session import session_options, session_threads
from ..merging import Merger
from ..typing import Array
from .builder import EngineSettings, Mix, MixEngine

__all__ = ["OrtBuilder", "OrtSession"]


class OrtBuilder:
    """Sessions of ONNX Runtime, made in memory.

    Attributes:
        engine: What graphs are lowered for.
    """

    engine = "ort"

    def __init__(self, merger: Merger, settings: EngineSettings) -> None:
        options = settings.graph
        self._merger, self._options, self._threads = merger, options, settings.threads
        self._requested: dict[str, str] = {}
        if options.weights_only or options.keep_float:
            _, layers = lowered(merger.parents[0], self.engine, options)
            self._requested = {layer.node: layer.requested for layer in layers}

    def make(self, mix: Mix, spare: MixEngine | None) -> MixEngine:
        """Build a session while the graph of the bundle computes what it must give.

        A spare session is closed: making a session is as fast as changing one would be.
        """
        if spare is not None:
            spare.close()
        first, options = self._merger.parents[0], self._options
        tensors = self._merger.tensors(mix)
        with ThreadPoolExecutor(1, thread_name_prefix="mixer-check") as checker:
            expected = checker.submit(self._check_of, tensors)
            model, _ = lowered(first, self.engine, options, tensors)
            (value,) = model.graph.inputs
            data = serialized(model)
            session = self.open(data, port_of(value, options.fold_preprocess), self._threads)
            try:
                expected.result()(session)
            except BaseException:
                session.close()
                raise
        return session

    def open(self, data: bytes, port: Port, threads: int) -> MixEngine:
        """A session of a lowered graph."""
        return OrtSession(data, port, threads)

    def _check_of(self, tensors: Mapping[str, Array]) -> MixCheck:
        options, bundle = self._options, self._merger.parents[0]
        exported = Exported(
            Path(),
            self._requested,
            options.batch,
            options.fold_preprocess,
            options.exact,
            options.postprocess,
        )
        with session_threads(self._threads):
            return MixCheck(bundle, tensors, exported)

    def close(self) -> None:
        """Building leaves no files."""


class OrtSession:
    """A session of ONNX Runtime on the CPU."""

    def __init__(self, data: bytes, port: Port, threads: int) -> None:
        self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
            data, session_options(threads), providers=["CPUExecutionProvider"]
        )
        self.port = port

    def __call__(self, x: Array) -> Array:
        """See :class:`.builder.MixEngine`."""
        assert self._session is not None
        result: Array = self._session.run(None, {self.port.name: x})[0]
        return result

    def close(self) -> None:
        """See :class:`.builder.MixEngine`."""
        self._session = None
