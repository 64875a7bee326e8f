"""The engine folder and the bundle each have one owner, who tells them apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hdrq_deploy.errors import EngineError
from hdrq_deploy.exporters import ENGINES
from hdrq_deploy.formats.engine_folder import (
    GRAPH,
    KINDS,
    MANIFEST,
    PLAN,
    PRECISION,
    PrecisionReport,
    altered_file,
    is_engine,
    read_manifest,
    write_manifest,
)
from hdrq_deploy.runtime.tensorrt import LIBRARIES

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "corpus" / "schema-1"


def test_the_kinds_are_those_that_can_be_exported_and_run() -> None:
    assert set(KINDS) == set(ENGINES)
    assert {name for name, kind in KINDS.items() if kind.runs == PLAN} == set(LIBRARIES)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return shutil.copytree(CORPUS / "engine", tmp_path / "engine")


def test_an_engine_is_told_from_a_bundle(engine: Path, tmp_path: Path) -> None:
    assert is_engine(engine)
    assert not is_engine(CORPUS / "night.hdrq")
    assert not is_engine(tmp_path / "nothing")
    # A bundle whose text names an engine somewhere is a bundle.
    bundle = shutil.copytree(CORPUS / "night.hdrq", tmp_path / "bundle")
    record = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**record, "model": "hdrq-engine"}))
    assert not is_engine(bundle)
    # An engine is recognised where its manifest is damaged.
    (engine / MANIFEST).write_text("{")
    assert is_engine(engine)
    with pytest.raises(EngineError, match="not the manifest of an engine"):
        read_manifest(engine)


@pytest.mark.parametrize(
    "options",
    [
        {"graph": []},
        {"graph": None},
        {"build": "x"},
        {"build": {"batches": [1, 8]}},
        {"build": {"batches": 8}},
        {"build": {"batches": [1, 1, True]}},
    ],
)
def test_options_of_another_form_are_refused(engine: Path, options: dict[str, Any]) -> None:
    record = json.loads((engine / MANIFEST).read_text())
    (engine / MANIFEST).write_text(json.dumps({**record, "options": options}))
    with pytest.raises(
        EngineError, match="not the manifest of an engine .*found (options|batches)"
    ):
        read_manifest(engine)


def test_what_is_written_is_read_again(engine: Path) -> None:
    manifest = read_manifest(engine)
    assert write_manifest(engine, manifest.model_copy(update={"files": {}})) == manifest
    assert read_manifest(engine) == manifest
    report = PrecisionReport.read(engine)
    (engine / PRECISION).unlink()
    report.write(engine)
    assert PrecisionReport.read(engine) == report


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_file_is_named(engine: Path, damage: str) -> None:
    if damage == "missing":
        (engine / GRAPH).unlink()
    else:
        (engine / GRAPH).write_bytes(b"x")
    assert altered_file(engine, read_manifest(engine, check=False)) == (GRAPH, damage)
    with pytest.raises(EngineError, match=f"{GRAPH}: {damage}; the engine is damaged"):
        read_manifest(engine)


def test_a_graph_that_the_manifest_does_not_describe_is_refused(engine: Path) -> None:
    record = json.loads((engine / MANIFEST).read_text())
    record["outputs"][0]["name"] = "other"
    (engine / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(EngineError, match="the manifest names"):
        read_manifest(engine)
