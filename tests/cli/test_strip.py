"""``hdrq strip`` takes statistics out of a bundle and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hdrq_deploy import Bundle
from hdrq_deploy.cli import export, inspect, strip, verify
from hdrq_deploy.formats.bundle import STATISTICS
from hdrq_deploy.formats.file_kinds import BUNDLE


@pytest.fixture
def bundle(make: Any, tmp_path: Path) -> Bundle:
    """A bundle with statistics that a test may change."""
    shutil.copytree(make(statistics="auto").path, tmp_path / "night.hdrq")
    return Bundle.open(tmp_path / "night.hdrq")


def test_a_stripped_bundle_is_the_same_bundle(
    bundle: Bundle, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, engine = str(bundle.path), tmp_path / "engine"
    assert export.main([path, "--engine", "ort", "-o", str(engine)]) == 0
    made = {file.name: file.stat().st_mtime_ns for file in engine.iterdir()}
    assert STATISTICS not in made
    assert inspect.main([path]) == 0
    shown = capsys.readouterr().out
    size = (bundle.path / STATISTICS).stat().st_size
    assert "rank 8 (auto), 4 layers, " in shown and f"{size:,} bytes, " in shown
    assert strip.main([path]) == 0
    assert f"{size:,} bytes of statistics removed" in capsys.readouterr().out
    assert {f.name for f in bundle.path.iterdir()} == {*bundle.manifest.files, "manifest.json"}
    plain = make()
    assert (bundle.path / "manifest.json").read_bytes() == (
        plain.path / "manifest.json"
    ).read_bytes()
    assert Bundle.open(path).manifest_sha256 == bundle.manifest_sha256
    # The engine that was exported before is up to date, and no orphan.
    assert export.main([path, "--engine", "ort", "-o", str(engine)]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in engine.iterdir()} == made
    assert verify.main([path, str(engine)]) == 0
    capsys.readouterr()
    assert strip.main([path]) == 0
    assert "holds no statistics" in capsys.readouterr().out
    assert inspect.main([path]) == 0
    assert "none: merges average" in capsys.readouterr().out


def test_a_copy_without_statistics_leaves_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in bundle.path.iterdir()}
    out = tmp_path / "small.hdrq"
    assert strip.main([str(bundle.path), "-o", str(out)]) == 0
    assert {file.name: file.read_bytes() for file in bundle.path.iterdir()} == before
    assert Bundle.open(out).manifest_sha256 == bundle.manifest_sha256
    assert Bundle.open(out).statistics() is None and not (out / STATISTICS).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert strip.main([str(bundle.path), "-o", str(tmp_path / "mine")]) == 2
    assert strip.main([str(bundle.path), "-o", str(bundle.path)]) == 2


def test_a_crash_between_manifest_and_file_leaves_a_whole_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", crash)
        bundle.strip()
    assert (bundle.path / STATISTICS).exists()
    reopened = Bundle.open(bundle.path)
    assert reopened.statistics() is None and BUNDLE.stranger(bundle.path) == ""
    assert reopened.strip() > 0 and not (bundle.path / STATISTICS).exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "weights"])
def test_damaged_statistics_can_be_removed(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    file = bundle.path / STATISTICS
    if damage == "weights":  # what is left is damaged: nothing is removed
        (bundle.path / "weights.safetensors").write_bytes(b"")
        assert strip.main([str(bundle.path)]) == 2
        assert "damaged" in capsys.readouterr().err and file.exists()
        return
    file.write_bytes(file.read_bytes()[:-1])
    if damage == "missing":
        file.unlink()
    assert strip.main([str(bundle.path)]) == 0
    assert Bundle.open(bundle.path).statistics() is None
