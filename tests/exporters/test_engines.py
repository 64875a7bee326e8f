"""One table of engines on each side of the engine folder, and no other list of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.errors import ExportError
from hdrq_deploy.exporters import ENGINES, GraphOptions, export
from hdrq_deploy.exporters.engines import TARGETS, target_of
from hdrq_deploy.exporters.target import Target
from hdrq_deploy.formats.engine_folder import KINDS, EngineKind
from hdrq_deploy.runtime import load_engine
from hdrq_deploy.runtime.loading import BACKENDS


def test_every_kind_of_engine_is_exported_and_run() -> None:
    assert tuple(TARGETS) == ENGINES == tuple(KINDS) == tuple(BACKENDS)
    for name, module in BACKENDS.items():
        assert target_of(name).name == name
        assert callable(importlib.import_module(f"hdrq_deploy.runtime{module}").open_engine)
    with pytest.raises(ExportError, match=r"found engine 'trl'; choose one of ort, onnx, trt, "):
        target_of("trl")


class Mirror(Target):
    """A portable graph that depends on a library of its own."""

    libraries = ("mirror",)

    def ingredients(self, *_: Any) -> dict[str, Any]:
        return {"mirror": "1.2"}

    def remark(self, options: GraphOptions) -> str:
        return "mirrored"


def test_an_engine_is_one_row(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "mirror", EngineKind("mirror", "model.onnx", built=False))
    monkeypatch.setitem(TARGETS, "mirror", Mirror("mirror"))
    monkeypatch.setitem(BACKENDS, "mirror", ".ort")
    path = export(make(), tmp_path / "engine", "mirror")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["engine"] == "mirror" and manifest["versions"]["mirror"] == "1.2"
    assert manifest["build"]["checked"]["engine_not_run"] == "the graph is portable"
    report = json.loads((path / "precision.json").read_text())
    assert report["source"] == "graph; mirrored"
    with load_engine(path, threads=1) as engine:
        x = np.zeros(engine.input_shape(engine.inputs[0]), np.float32)
        assert engine(x).shape == (1, 4)
