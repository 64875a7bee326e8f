"""Engines of a mixer that TensorRT computes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..errors import EngineError
from ..exporters import export
from ..exporters.export import lowered
from ..merging import Merger
from ..runtime.loading import load_engine
from ..runtime.tensorrt import TensorRtEngine
from ..typing import Array
from .builder import EngineSettings, Mix, MixEngine

__all__ = ["TensorRtBuilder"]


class TensorRtBuilder:
    """TensorRT engines: built in a process of their own, or refitted."""

    def __init__(self, merger: Merger, settings: EngineSettings) -> None:
        self._merger, self._settings = merger, settings
        self._scratch = tempfile.TemporaryDirectory(prefix="hdrq-mixer-")
        self._count = 0

    def make(self, mix: Mix, spare: MixEngine | None) -> MixEngine:
        """Build an engine, or replace the weights of ``spare`` where the engine allows that."""
        if isinstance(spare, LoadedEngine) and spare.refittable and self._refit(spare, mix):
            return spare
        if spare is not None:
            spare.close()
        self._count += 1
        scratch = Path(self._scratch.name)
        merged = self._merger.write(scratch / f"{self._count}.hdrq", mix, statistics=False)
        target = scratch / f"{self._count}-engine"
        s = self._settings
        export(merged, target, s.engine, options=s.graph, build=s.build, say=_silent)
        loaded = LoadedEngine(target)
        for folder in (merged.path, target):  # the plan is in memory
            shutil.rmtree(folder)
        return loaded

    def close(self) -> None:
        """Remove bundles and plans."""
        self._scratch.cleanup()

    def _refit(self, spare: LoadedEngine, mix: Mix) -> bool:
        """Whether the engine took the weights; it refuses scales that do not fit its fusions."""
        weights = self._weights(mix)
        if weights is None:
            return False
        try:
            spare.refit(weights)
        except EngineError:
            return False  # partly changed: the caller builds another one
        return True

    def _weights(self, mix: Mix) -> dict[str, Array] | None:
        """Initializers of the lowered graph; None where NumPy has no type for one."""
        tensors = self._merger.tensors(mix)
        model, _ = lowered(
            self._merger.parents[0], self._settings.engine, self._settings.graph, tensors
        )
        weights = {}
        for name, value in model.graph.initializers.items():
            assert value.const_value is not None
            if value.dtype in {ir.DataType.INT4, ir.DataType.UINT4}:
                return None
            weights[name] = np.asarray(value.const_value.numpy(), order="C")
        return weights


class LoadedEngine:
    """A TensorRT engine whose weights may be replaced."""

    def __init__(self, folder: Path) -> None:
        engine = load_engine(folder)
        assert isinstance(engine, TensorRtEngine)
        self._engine = engine
        self.port = engine.inputs[0]
        self.refittable = engine.refittable

    def __call__(self, x: Array) -> Array:
        """See :class:`.builder.MixEngine`."""
        return self._engine(x)

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Replace the weights; no call may be running."""
        self._engine.refit(weights)

    def close(self) -> None:
        """See :class:`.builder.MixEngine`."""
        self._engine.close()


def _silent(text: str) -> None:
    """A build in the background reports nothing; errors reach the caller of ``set``."""
