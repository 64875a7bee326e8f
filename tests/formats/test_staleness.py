"""What was made once is kept, and made again where an ingredient of it changed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.errors import OtherRunError, SpecError
from hdrq_deploy.experiments import bundles, cells, tasks
from hdrq_deploy.experiments.grid import Merge, Run, bundle_path, row_path
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.formats import staleness
from hdrq_deploy.formats.engine_folder import MANIFEST
from hdrq_deploy.formats.staleness import change_since, code_of, contents_of, first_change, stamp
from hdrq_deploy.runtime.bench.accuracy import Accuracy

CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "schema-1"
CODE = "the code of hdrq-deploy changed"


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``edit("graph/qdq.py")`` stands for an edit of that module."""

    def edited(name: str) -> None:
        real = staleness._source_sha256

        def hashed(path: Path) -> str:
            return "another" if path.as_posix().endswith(f"/{name}") else real(path)

        monkeypatch.setattr(staleness, "_source_sha256", hashed)
        code_of.cache_clear()

    yield edited
    code_of.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """``install("torch", "9.9")`` stands for another version of a library."""

    def installed(name: str, number: str) -> None:
        real = staleness.version
        monkeypatch.setattr(staleness, "version", lambda n: number if n == name else real(n))

    return installed


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What the library logs."""
    messages: list[str] = []
    logger, handler = logging.getLogger("hdrq_deploy"), logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"seed": 0}, {"seed": 0}, ""),
        ({"size": [1, 2]}, {"size": (1, 2)}, ""),
        ({"seed": 0}, {"seed": 1}, "option seed: 0, now 1"),
        ({"seed": 0}, {}, "option seed: 0, now none"),
        ({}, {"grid": "int8"}, "option grid: none, now int8"),
        ({"graph": {"exact": True}}, {"graph": {"exact": False}}, "option graph exact: true, now"),
        ({"data": [1, "a"]}, {"data": [2, "a"]}, "the images changed"),
        ({"data_sha256": {"a": "1"}}, {"data_sha256": {"a": "2"}}, "the images changed"),
        ({"versions": {"onnx": "1"}}, {"versions": {"onnx": "2"}}, "onnx: 1, now 2"),
        ({"onnx": "1"}, {"onnx": "2"}, "onnx: 1, now 2"),
        ({}, {"versions": {"onnx": "2"}}, "versions were not recorded"),
        ({"code": "1"}, {"code": "2"}, CODE),
        ({}, {"code": "2"}, CODE),
    ],
)
def test_the_first_change_is_said_in_words(
    before: dict[str, Any], now: dict[str, Any], words: str
) -> None:
    change = first_change(before, now)
    assert change.startswith(words) and bool(change) == bool(words)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "[" * 10_000])
def test_a_record_that_cannot_be_read_is_stale(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    assert change_since(tmp_path / "record.json", {"seed": 0}).startswith("no record")


@pytest.mark.parametrize(
    ("room", "module"),
    [
        ("exporters", "exporters/trt_worker.py"),
        ("exporters", "graph/qdq.py"),
        ("exporters", "numerics/quantization.py"),
        ("exporters", "formats/engine_folder.py"),
        ("merging", "graph/reference_session.py"),
        ("calibration", "graph/biases.py"),
        ("calibration", "calibration_data/readers/decoding.py"),
        ("runtime", "formats/preprocessing.py"),
        ("calibration_data.digits", "digits/images.py"),
    ],
)
def test_code_is_hashed_at_any_depth(room: str, module: str, edit: Callable[[str], None]) -> None:
    before = code_of(room)
    assert code_of(room) == before
    edit(module)
    assert code_of(room) != before


def test_code_that_is_not_used_does_not_count(edit: Callable[[str], None]) -> None:
    before = code_of("exporters")
    edit("cli/export.py")
    assert code_of("exporters") == before


def test_engines(tmp_path: Path, edit: Callable[[str], None]) -> None:
    said: list[str] = []
    folder = tmp_path / "engine"

    def again(bundle: str = "night.hdrq", **options: Any) -> str:
        said.clear()
        export(CORPUS / bundle, folder, "onnx", say=said.append, **options)
        return " ".join(said)

    assert again() == ""
    assert again().endswith("up to date")
    assert "option graph exact: true, now false" in again(options=GraphOptions(exact=False))
    assert "the bundle changed" in again("merged.hdrq", options=GraphOptions(exact=False))
    edit("graph/qdq.py")
    assert CODE in again("merged.hdrq", options=GraphOptions(exact=False))
    assert again("merged.hdrq", options=GraphOptions(exact=False)).endswith("up to date")
    record = json.loads((folder / MANIFEST).read_text())
    record["options"] = {"bundle": record["options"]["bundle"], "onnx": "0.1"}
    (folder / MANIFEST).write_text(json.dumps(record))
    assert "built again" in again("merged.hdrq", options=GraphOptions(exact=False))


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[CalibrationRequest]:
    """Requests of every calibration, none of which is computed."""
    calls: list[CalibrationRequest] = []

    def calibrate(request: CalibrationRequest, graphs: object) -> None:
        calls.append(request)
        shutil.copytree(CORPUS / "night.hdrq", request.output, dirs_exist_ok=True)

    monkeypatch.setattr("hdrq_deploy.calibration.pipeline.run_calibration", calibrate)
    return calls


def test_only_blocks_of_another_run_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other error leaves what is finished, and is told once."""
    resumed: list[bool] = []
    errors = [OtherRunError("blocks of another run"), SpecError("bits out of range")]

    def calibrate(request: CalibrationRequest, graphs: Any = None) -> None:
        resumed.append(request.resume)
        if request.resume:
            raise errors.pop(0)
        shutil.copytree(CORPUS / "night.hdrq", request.output, dirs_exist_ok=True)

    monkeypatch.setattr("hdrq_deploy.calibration.pipeline.run_calibration", calibrate)
    (tmp_path / "data.npz").write_bytes(b"1")
    request = CalibrationRequest(
        "m:f", str(tmp_path / "data.npz"), "night", tmp_path / "night.hdrq", method="rtn"
    )
    bundles.make_bundle(request)
    assert resumed == [True, False]
    resumed.clear()
    with pytest.raises(SpecError, match="bits out of range"):
        bundles.make_bundle(replace(request, seed=1))
    assert resumed == [True]


def test_bundles(
    tmp_path: Path,
    calibrated: list[CalibrationRequest],
    edit: Callable[[str], None],
    install: Callable[[str, str], None],
    log: list[str],
) -> None:
    data, output = tmp_path / "data.npz", tmp_path / "night.hdrq"
    data.write_bytes(b"1")
    request = CalibrationRequest("m:f", str(data), "night", output, method="rtn")

    def again(**changes: Any) -> str:
        """Why the bundle is made again; "" where it is kept."""
        count = len(calibrated)
        log.clear()
        bundles.make_bundle(replace(request, **changes))
        assert len(calibrated) - count == len(log)
        return " ".join(log)

    bundles.make_bundle(request)
    assert len(calibrated) == 1
    assert again() == ""
    assert "option seed: 0, now 1" in again(seed=1)
    assert "option fold: weights, now steps" in again(seed=1, fold="steps")
    assert again(seed=1, fold="steps", cache_gb=2.0) == ""
    data.write_bytes(b"22")
    assert "the images changed" in again(seed=1, fold="steps")
    request = replace(request, seed=1, fold="steps")
    install("torch", "9.9")
    assert ", now 9.9" in again()
    edit("graph/qdq.py")
    assert CODE in again()
    assert again() == ""
    # What version 0.1 wrote.
    record = bundles.inputs_of(output)
    older = {"domain": "night", "model": "m:f", "seed": 1, "options": None, "wanted": None}
    record.write_text(json.dumps({**older, "data": staleness.stamp(data)}))
    assert "versions were not recorded" in again()
    assert again() == ""
    (output / "model.onnx").unlink()
    assert "it is damaged" in again()


def _task(folder: Path) -> tasks.Task:
    (folder / "test").mkdir()
    (folder / "test" / "0.png").write_text("x")
    images = str(folder / "test")
    domains = tuple(tasks.Domain(n, "w", images, images) for n in ("night", "day"))
    return tasks.Task("tiny", "m:f", "s", domains)


def test_figures(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[str], None],
    install: Callable[[str, str], None],
) -> None:
    task = _task(tmp_path)
    (tmp_path / "rows").mkdir()
    shutil.copytree(CORPUS / "night.hdrq", bundle_path(tmp_path, "cell"))
    measured = []

    @contextmanager
    def engine_of(*_: Any) -> Iterator[None]:
        yield None

    def accuracy(*_: Any, **__: Any) -> Accuracy:
        measured.append(1)
        return Accuracy(metric="top1", domains={"night": 0.5}, harmonic_mean=0.5, images={})

    monkeypatch.setattr(cells, "engine_of", engine_of)
    monkeypatch.setattr(cells, "accuracy", accuracy)
    monkeypatch.setattr(cells, "labelled_set", lambda *_: None)

    def again() -> int:
        measured.clear()
        cells._measure(cells.CellContext(task, tmp_path), "cell", ("night",), {})
        return len(measured)

    assert (again(), again()) == (1, 0)
    (tmp_path / "test" / "0.png").write_text("xy")
    assert (again(), again()) == (1, 0)
    install("onnxruntime", "9.9")
    assert (again(), again()) == (1, 0)
    edit("runtime/predictions.py")
    assert (again(), again()) == (1, 0)
    row = json.loads(row_path(tmp_path, "cell").read_text())
    del row["versions"], row["code"]  # as version 0.1 wrote it
    row_path(tmp_path, "cell").write_text(json.dumps(row))
    assert (again(), again()) == (1, 0)


def test_merged_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[str], None]
) -> None:
    task = _task(tmp_path)
    merge = Merge(Run("paper", "rtn", 8, 8, 0), ("night", "day"), "advanced", 2)
    for member in merge.members:
        shutil.copytree(CORPUS / "night.hdrq", bundle_path(tmp_path, merge.run.single(member)))
    written = []

    def write(merger: object, target: Path, *_: object) -> None:
        target.mkdir(exist_ok=True)
        written.append(target)

    monkeypatch.setattr(cells, "write_merge", write)
    monkeypatch.setattr(cells, "Merger", lambda *_, **__: None)
    monkeypatch.setattr(cells, "_measure", lambda *_: None)
    monkeypatch.setattr(cells, "is_merged", lambda path, parents: True)

    def again() -> int:
        written.clear()
        cells.merge_cells(cells.CellContext(task, tmp_path), merge)
        return len(written)

    assert (again(), again()) == (2, 0)
    bundles.inputs_of(bundle_path(tmp_path, merge.cell(1))).unlink()
    assert (again(), again()) == (1, 0)
    edit("merging/rounding.py")
    assert (again(), again()) == (2, 0)


def test_made_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[str], None],
    install: Callable[[str, str], None],
    log: list[str],
) -> None:
    made = []

    def write(folder: Path, *_: object) -> None:
        made.append(folder)
        (folder / "0.png").write_text("x")

    monkeypatch.setattr(tasks.digits, "write", write)

    def again() -> int:
        made.clear()
        tasks.write_made("office-home", tmp_path)
        return len(made)

    assert (again(), again()) == (1, 0)
    install("pillow", "9.9")
    assert (again(), again()) == (1, 0)
    assert "digits: pillow: " in log[-1] and log[-1].endswith("; making it")
    edit("digits/images.py")
    assert (again(), again()) == (1, 0)
    # A record of version 0.1, which named neither versions nor code.
    marker = tmp_path / "data" / "digits" / tasks.DIGITS.marker
    record = json.loads(marker.read_text())
    marker.write_text(json.dumps({k: record[k] for k in ("kind", "splits", "files")}))
    assert (again(), again()) == (1, 0)


def test_blocks(tmp_path: Path, edit: Callable[[str], None]) -> None:
    from hdrq_deploy.calibration.resume import Partial

    output = tmp_path / "night.hdrq"
    run = {"model": "m:f", "method": "hdrq", "fold": "weights", "seed": 0, "wbits": 4}
    run |= {"versions": {"torch": "2"}, "source_sha256": "1", "data_sha256": {"night": "1"}}
    Partial.open(output, run, resume=False)
    Partial.open(output, run, resume=True)
    for change, words in (
        ({"seed": 1}, "option seed: 0, now 1"),
        ({"versions": {"torch": "3"}}, "torch: 2, now 3"),
        ({"data_sha256": {"night": "2"}}, "the images changed"),
    ):
        with pytest.raises(SpecError, match=f"blocks of another run .{words}.; resume needs"):
            Partial.open(output, {**run, **change}, resume=True)
    edit("calibration/noise.py")
    with pytest.raises(SpecError, match=CODE):
        Partial.open(output, run, resume=True)
    Partial.open(output, run, resume=False)
    Partial.open(output, run, resume=True)
    record = output.with_name("night.hdrq.partial") / "run.json"
    record.write_text(json.dumps(run))  # as version 0.1 wrote it
    with pytest.raises(SpecError, match=CODE):
        Partial.open(output, run, resume=True)


def test_contents_decide_where_only_the_time_or_the_place_changed(tmp_path: Path) -> None:
    folder, moved = tmp_path / "images", tmp_path / "moved"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"one")
    (folder / "b.png").write_bytes(b"two")
    now = {"data": stamp(folder), "weights": [stamp(folder / "a.png")], "seed": 0}
    record = tmp_path / "inputs.json"
    record.write_text(json.dumps({"kind": "k", **now, "contents": contents_of(now)}))
    assert change_since(record, now) == ""
    for name in ("a.png", "b.png"):
        os.utime(folder / name, ns=(1, 1))
    touched = {**now, "data": stamp(folder), "weights": [stamp(folder / "a.png")]}
    assert touched != now and change_since(record, touched) == ""
    assert change_since(record, {**touched, "seed": 1}) == "option seed: 0, now 1"
    shutil.copytree(folder, moved)
    assert change_since(record, {**touched, "data": stamp(moved)}) == ""
    # As many bytes, and others.
    (moved / "b.png").write_bytes(b"six")
    assert change_since(record, {**touched, "data": stamp(moved)}) == "the images changed"
    assert staleness.fingerprint(moved) != staleness.fingerprint(folder)
    (moved / "b.png").write_bytes(b"two")
    assert staleness.fingerprint(moved) == staleness.fingerprint(folder)
    assert staleness.fingerprint(tmp_path / "none") == stamp(tmp_path / "none")
    # A record without hashes: the stamp decides, as ever.
    record.write_text(json.dumps({"kind": "k", **now}))
    assert change_since(record, touched) == "the images changed"


def test_names_and_every_time_count_and_links_are_followed(tmp_path: Path) -> None:
    folder, record = tmp_path / "images", tmp_path / "inputs.json"
    outside = tmp_path / "elsewhere"
    for name in ("dog", "horse"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_text(name[:3])
    outside.mkdir()
    (outside / "1.png").write_text("cat")
    (folder / "cat").symlink_to(outside)
    (folder / "cat" / "round").symlink_to(folder)
    made = {"data": stamp(folder)}
    record.write_text(json.dumps({"kind": "k", **made, "contents": contents_of(made)}))

    def change() -> str:
        return change_since(record, {"data": stamp(folder)})

    assert change() == ""
    # Two classes change their names; no file is written, and the newest time stays.
    (folder / "dog").rename(folder / "other")
    (folder / "horse").rename(folder / "dog")
    (folder / "other").rename(folder / "horse")
    assert change() == "the images changed"
    (folder / "dog").rename(folder / "other")
    (folder / "horse").rename(folder / "dog")
    (folder / "other").rename(folder / "horse")
    assert change() == ""
    # As many bytes, and an older time than that of another file.
    (folder / "dog" / "1.png").write_text("cow")
    os.utime(folder / "dog" / "1.png", ns=(1, 1))
    assert change() == "the images changed"
    (folder / "dog" / "1.png").write_text("dog")
    assert change() == ""
    (outside / "1.png").write_text("cow")
    assert change() == "the images changed"


def test_a_record_of_an_earlier_version_is_read_by_its_contents(tmp_path: Path) -> None:
    data, record = tmp_path / "data.npz", tmp_path / "inputs.json"
    data.write_text("1")
    contents = contents_of({"data": stamp(data)})
    older = [str(data), 1, 1, data.stat().st_mtime_ns]
    record.write_text(json.dumps({"kind": "k", "data": older, "contents": contents}))
    assert change_since(record, {"data": stamp(data)}) == ""
    data.write_text("2")
    assert change_since(record, {"data": stamp(data)}) == "the images changed"
