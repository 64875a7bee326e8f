"""The public surface is what the record says; bundles and engines of earlier versions open."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle
from hdrq_deploy.cli import export, verify
from hdrq_deploy.runtime import load_engine

CORPUS = Path(__file__).with_name("corpus")


def _module() -> Any:
    path = Path(__file__).with_name("surface.py")
    spec = importlib.util.spec_from_file_location("surface", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_public_surface_is_recorded() -> None:
    """A difference is a change for users: record it (python tests/surface.py) and say so."""
    module = _module()
    assert json.loads(module.text()) == json.loads(module.RECORD.read_text())


@pytest.mark.parametrize("name", ["night.hdrq", "merged.hdrq"])
def test_bundles_of_schema_1_open_verify_and_export(tmp_path: Path, name: str) -> None:
    copy = tmp_path / name
    shutil.copytree(CORPUS / "schema-1" / name, copy)
    bundle = Bundle.open(copy)
    assert sorted(p.name for p in copy.iterdir()) == _module().FILES["bundle"]
    golden = bundle.golden()
    assert export.main([str(copy), "-o", str(tmp_path / "engine")]) == 0
    assert sorted(p.name for p in (tmp_path / "engine").iterdir()) == _module().FILES["ort engine"]
    assert verify.main([str(copy), str(tmp_path / "engine"), "--no-torch"]) == 0
    with load_engine(tmp_path / "engine", threads=1) as engine:
        got = engine(golden["input"])
    assert got.shape == (2, 4)
    if "output" in golden:  # a merge of this schema does not record it
        np.testing.assert_allclose(got, golden["output"], atol=0.05)


def test_engines_of_schema_1_open_and_verify(tmp_path: Path) -> None:
    shutil.copytree(CORPUS / "schema-1" / "engine", tmp_path / "engine")
    assert verify.main([str(tmp_path / "engine")]) == 0
