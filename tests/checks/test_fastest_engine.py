"""`--engine auto`: every engine that runs here is built and measured, the fastest is kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hdrq_deploy.checks import export_fastest, fastest_engine, verify
from hdrq_deploy.cli import export as export_command
from hdrq_deploy.errors import CheckFailed, ExportError
from hdrq_deploy.exporters.target_openvino import OpenVinoTarget
from hdrq_deploy.exporters.target_ort import OrtTarget
from hdrq_deploy.formats.engine_folder import read_manifest

pytest.importorskip("openvino")


def measured(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["build"]["measured"]
    return found


def figures(monkeypatch: pytest.MonkeyPatch, **ms: float) -> list[int]:
    """Let engines take so many ms; the threads of each measurement."""
    seen: list[int] = []

    def interleaved(paths: Any, x: Any, warmup: int, calls: int, threads: int) -> list[Any]:
        seen.append(threads)
        return [SimpleNamespace(p50=ms.get(path.name, 99.0)) for path in paths]

    monkeypatch.setattr(fastest_engine, "interleaved", interleaved)
    return seen


def test_the_fastest_is_kept_and_its_manifest_says_why(make: Any, tmp_path: Path) -> None:
    said: list[str] = []
    bundle, out = make("Tiny", wbits=8), tmp_path / "engine"
    export_fastest(bundle, out, threads=1, say=said.append)
    record, manifest = measured(out), read_manifest(out)
    assert set(record["median_ms"]) == {"ort", "openvino"} and record["threads"] == 1
    assert manifest.engine == min(record["median_ms"], key=record["median_ms"].get)
    assert "NVIDIA" in record["left_out"]["trt-rtx"] or "tensorrt" in record["left_out"]["trt-rtx"]
    assert f"{manifest.engine} is the fastest" in said[-1] and "1 thread(s)" in said[-1]
    verify(bundle.path, out, torch=False).check()


def test_the_choice_follows_the_figures_and_is_made_once(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, out = make("Tiny", wbits=8), tmp_path / "engine"
    seen = figures(monkeypatch, ort=2.0, openvino=1.0)
    export_fastest(bundle, out, threads=2)
    assert read_manifest(out).engine == "openvino" and seen == [2]
    said: list[str] = []
    export_fastest(bundle, out, threads=2, say=said.append)
    assert said == [f"{out}: up to date"] and seen == [2]
    figures(monkeypatch, ort=1.0, openvino=2.0)
    export_fastest(bundle, out, threads=1)  # other threads are another question
    assert read_manifest(out).engine == "ort"
    figures(monkeypatch, ort=3.0, openvino=2.0)
    export_fastest(bundle, out, threads=1)
    assert read_manifest(out).engine == "ort"
    export_fastest(bundle, out, threads=1, force=True)
    assert read_manifest(out).engine == "openvino"
    (out / "model.onnx").write_bytes(b"damaged")
    export_fastest(bundle, out, threads=1)
    assert read_manifest(out).engine == "openvino"


def test_what_fails_is_left_out_and_nothing_is_an_error(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, out = make("Tiny", wbits=8), tmp_path / "engine"
    figures(monkeypatch, ort=2.0, openvino=1.0)

    def refuse(self: Any, *_: Any) -> Any:
        raise CheckFailed("found codes that differ")

    monkeypatch.setattr(OpenVinoTarget, "run", refuse)
    export_fastest(bundle, out, threads=1)
    assert read_manifest(out).engine == "ort"
    assert measured(out)["left_out"]["openvino"] == "found codes that differ"
    monkeypatch.setattr(OrtTarget, "run", refuse)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(ExportError, match=r"no engine that can be built and run .*ort: found"):
        export_fastest(bundle, out, threads=1, force=True)
    assert (out / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine"]


def test_the_command(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures(monkeypatch, ort=2.0, openvino=1.0)
    out = tmp_path / "engine"
    base = [str(make("Tiny", wbits=8).path), "--engine", "auto", "-o", str(out)]
    for flags, message in (
        (["--no-build"], "found --engine auto and --no-build"),
        (["--threads", "-1"], "found --threads -1; needed 0"),
    ):
        assert export_command.main([*base, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not out.exists()
    assert export_command.main([*base, "--threads", "1", "--verify"]) == 0
    told = capsys.readouterr()
    assert "openvino is the fastest (openvino 1 ms, ort 2 ms" in told.err
    assert "3/3 Conv, 1/1 Gemm INT8" in told.out
    options = ["--engine", "auto", "--batch", "2", "--threads", "1", "--force"]
    assert export_command.main([str(make("Tiny", wbits=8).path), *options, "-o", str(out)]) == 0
    assert measured(out)["images"] == 2
