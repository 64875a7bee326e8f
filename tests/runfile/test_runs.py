"""``hdrq run``, ``status``, ``clean`` and ``init`` on the tiny network."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from hdrq_deploy.calibration.loading import load_model, load_state
from hdrq_deploy.calibration.resume import Partial
from hdrq_deploy.calibration_data.readers import Wanted, read
from hdrq_deploy.cli import clean as clean_command
from hdrq_deploy.cli import init as init_command
from hdrq_deploy.cli import run as run_command
from hdrq_deploy.cli import status as status_command
from hdrq_deploy.cli.stage_table import StageTable
from hdrq_deploy.errors import ExportError, HdrqError
from hdrq_deploy.formats.atomic_files import alone_in
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.merging import Merger, choose_weights, weights_from_statistics
from hdrq_deploy.runfile.bundles import MergeStage
from hdrq_deploy.runfile.loading import load
from hdrq_deploy.runfile.plan import plan, stages_of
from hdrq_deploy.runfile.schema import Merge
from hdrq_deploy.runfile.stage import Stage
from hdrq_deploy.runtime import load_engine

FILE = """\
model: tiny_models:Tiny
source: Tiny-base.safetensors
domains:
  night: {checkpoint: Tiny-night.safetensors, calibration: data.npz, test: data.npz}
  day:
    checkpoint: Tiny-day.safetensors
    calibration: data.npz
    test: images
methods: rtn
bits: w8a8
bench: {iterations: 10, warmup: 1}
"""


def copied(work: Path, folder: Path) -> Path:
    """A folder with the user's files and a run file."""
    for name in ("Tiny-base", "Tiny-night", "Tiny-day", "Wide-day"):
        shutil.copy(work / f"{name}.safetensors", folder)
    shutil.copy(work / "data.npz", folder)
    shutil.copy(work / "tiny_models.py", folder)
    shutil.copytree(work / "images", folder / "images")
    (folder / "hdrq.yaml").write_text(FILE)
    return folder / "hdrq.yaml"


@pytest.fixture(scope="module")
def ran(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file that was run once."""
    file = copied(work, tmp_path_factory.mktemp("ran"))
    assert run_command.main([str(file), "--threads", "1"]) == 0
    return file


@pytest.fixture
def again(ran: Path) -> Iterator[Path]:
    """The same, for a test that changes the file; what it says is put back."""
    yield ran
    ran.write_text(FILE)


def states(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: what is written again has others."""
    files = [f for f in out.rglob("*") if f.is_file()]
    return {str(f.relative_to(out)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def stale(file: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """Keys of the stages that would be made."""
    capsys.readouterr()
    assert run_command.main([str(file), "--dry-run", *flags]) == 0
    return [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]]


def test_a_run_ends_with_accuracies_that_numpy_counts_and_a_report(ran: Path) -> None:
    out = ran.parent / "hdrq-run"
    record = json.loads((out / "results.json").read_text())
    rows = {row["model"]: row["result"] for row in record["rows"]}
    assert list(rows) == ["RTN W8A8, a model per domain", "RTN merged W8A8"]
    with np.load(ran.parent / "data.npz") as data:
        x, y = data["x"], data["y"]
    for member, label in (("merged", "RTN merged W8A8"), ("night", next(iter(rows)))):
        with load_engine(out / "engines" / f"rtn-w8a8-{member}-ort") as engine:
            expected = float((engine(x).argmax(1) == y).mean())
        assert rows[label]["accuracy"]["domains"]["night"] == pytest.approx(expected)
        assert set(rows[label]["accuracy"]["domains"]) == {"night", "day"}
    one, merged = rows.values()
    assert one["size_bytes"] > 1.5 * merged["size_bytes"]
    page = (out / "report.html").read_text()
    assert "RTN merged W8A8" in page and 'content="hdrq run"' in page
    assert record["run_file"]["source"] == str(ran.parent / "Tiny-base.safetensors")
    merge = Bundle.open(out / "bundles" / "rtn-w8a8-merged.hdrq").manifest.options["merge"]
    # By default bundles hold statistics, and the best merge is taken.
    assert (merge["method"], merge["rounding"]) == ("regression", "compensated")


def test_a_second_run_does_nothing(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ran.parent / "hdrq-run"
    before = states(out)
    assert stale(ran, capsys) == [] == stale(out / "resolved.yaml", capsys)
    assert run_command.main([str(ran)]) == 0
    said = capsys.readouterr()
    assert "all 10 stages are up to date" in said.err and "RTN merged W8A8" in said.out
    changed = {name for name, state in states(out).items() if before.get(name) != state}
    assert changed == {"outputs.json", "resolved.yaml"}
    assert status_command.main([str(ran)]) == 0
    assert "10 of 10 stages are up to date" in capsys.readouterr().out


def test_nothing_is_written_or_removed_while_another_run_is_at_work(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ran.parent / "hdrq-run"
    before = states(out)
    with alone_in(out):
        for command in (run_command, clean_command):
            assert command.main([str(ran)]) == 2
            assert f"{out}: found another run at work in it; wait" in capsys.readouterr().err
        assert clean_command.main([str(ran), "--dry-run"]) == 0
    assert states(out) == before


def test_what_changed_remakes_what_depends_on_it(
    again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again.write_text(f"{FILE}merges: {{merged: {{method: mean, rounding: nearest}}}}\n")
    kinds = [key.split()[0] for key in stale(again, capsys)]
    assert kinds == ["merge", "export", "accuracy", "bench"]
    again.write_text(FILE.replace("iterations: 10", "iterations: 11"))
    assert stale(again, capsys) == ["bench results"]
    data = again.parent / "data.npz"
    with np.load(data) as arrays:
        x, y = arrays["x"], arrays["y"]
    whole = data.read_bytes()
    np.savez(data, x=x[:-1], y=y[:-1])
    try:
        again.write_text(FILE)
        keys = stale(again, capsys)
        assert {"calibrate rtn-w8a8-night", "accuracy rtn-w8a8-night-ort"} <= set(keys)
    finally:
        data.write_bytes(whole)
    # The time is another one, and the contents are what they were.
    assert stale(again, capsys) == []


def test_a_merge_is_measured_again_and_fitted(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied(work, tmp_path)
    asked = "re_estimate: true, re_estimate_images: 8, fit: true, fit_images: 16"
    asked += ", fit_to: float, fit_sweeps: 2"
    text = FILE.replace("methods: rtn", "methods: [float, rtn]")
    file.write_text(f"{text}merges: {{merged: {{{asked}}}}}\n")
    assert run_command.main([str(file), "--only", "merge"]) == 0
    folder = tmp_path / "hdrq-run" / "bundles" / "rtn-w8a8-merged.hdrq"
    options = Bundle.open(folder).manifest.options
    floats = [folder.with_name(f"float-{name}.hdrq") for name in ("night", "day")]
    assert options["fit"]["guides"] == [Bundle.open(path).manifest_sha256 for path in floats]
    assert options["fit"]["sweeps"] == 2
    # Float models are their own guides.
    own = Bundle.open(folder.with_name("float-merged.hdrq")).manifest.options["fit"]
    assert "guides" not in own
    assert options["re_estimate"]["images"] == {"night": 8, "day": 8}
    assert options["fit"]["images"] == {"night": 16, "day": 16}
    assert not [key for key in stale(file, capsys) if key.startswith("merge")]


def test_merges_at_weights_that_statistics_and_images_choose(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied(work, tmp_path)
    merges = "merged: {weights: statistics}, seen: {weights: auto, images: 16}"
    file.write_text(f"{FILE}merges: {{{merges}}}\n")
    assert run_command.main([str(file), "--only", "merge"]) == 0
    bundles = tmp_path / "hdrq-run" / "bundles"
    told = Bundle.open(bundles / "rtn-w8a8-merged.hdrq").manifest.options["merge"]
    parents = [bundles / f"rtn-w8a8-{name}.hdrq" for name in ("night", "day")]
    chosen = weights_from_statistics(Merger(parents, method="regression"))
    assert told["weights"] == list(chosen.weights)
    assert told["from_statistics"]["layers"] == list(chosen.layers)
    options = Bundle.open(bundles / "rtn-w8a8-seen.hdrq").manifest.options["merge"]
    assert "auto" not in told and "from_statistics" not in options
    wanted = Wanted.like(Bundle.open(parents[0]).manifest.preprocessing)
    data = tmp_path / "data.npz"
    images = {name: read(data, wanted, 16, 0).x for name in ("night", "day")}
    seen = choose_weights(Merger(parents, method="regression"), images)
    assert options["weights"] == list(seen.weights)
    assert options["auto"]["images_run"] == seen.runs
    assert not [key for key in stale(file, capsys) if key.startswith("merge")]


def test_a_merge_is_stale_where_what_it_is_fitted_to_changed(make: Any, tmp_path: Path) -> None:
    parents = {d: make("Tiny", d).path for d in ("night", "day")}
    stage = MergeStage(
        "merged", tmp_path / "m.hdrq", (), "", 1, parents, {}, Merge(fit=True, fit_to="float"), 0
    )
    floats, folded = (
        [make("Tiny", d, method).path for d in parents] for method in ("float", "float-folded")
    )
    found = [replace(stage, guides=guides).ingredients() for guides in ((), floats, folded)]
    assert [f.get("guides") for f in found] == [
        None, *([Bundle.open(p).manifest_sha256 for p in some] for some in (floats, folded))
    ]  # fmt: skip


def test_other_bits_leave_the_first_ones_alone_and_clean_takes_what_is_unused(
    again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = again.parent / "hdrq-run"
    before = states(out)
    again.write_text(FILE.replace("bits: w8a8", "bits: [w8a8, w4a8]"))
    keys = stale(again, capsys)
    assert "bench results" in keys
    assert all("w4a8" in key for key in keys if key != "bench results")
    assert run_command.main([str(again), "--only", "merge"]) == 0
    after = states(out)
    new = {name for name in after if before.get(name) != after[name]}
    assert any("rtn-w4a8-merged.hdrq/" in name for name in new)
    assert not any("w8a8" in name for name in new)
    assert not (out / "engines" / "rtn-w4a8-merged-ort").exists()
    again.write_text(FILE)
    assert clean_command.main([str(again), "--unused"]) == 0
    assert set(states(out)) == set(before)


def test_a_killed_run_resumes(work: Path, tmp_path: Path) -> None:
    file = copied(work, tmp_path)
    file.write_text(f"{FILE}out: here\n")
    first = tmp_path / "here" / "bundles" / ".rtn-w8a8-night.hdrq.inputs.json"
    command = [sys.executable, "-c", "from hdrq_deploy.cli.main import main; main()"]
    command += ["run", str(file), "--only", "merge"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    merged = tmp_path / "here" / "bundles" / "rtn-w8a8-merged.hdrq"
    assert first.exists() and not merged.exists()
    kept = first.stat().st_mtime_ns
    assert run_command.main([str(file), "--only", "merge"]) == 0
    assert first.stat().st_mtime_ns == kept
    assert set(Bundle.open(merged).manifest.domains) == {"night", "day"}


def refused(file: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line of an error, behind the path of the file."""
    capsys.readouterr()
    assert run_command.main([str(file), *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"hdrq run: {file}:")
    return line.removeprefix(f"hdrq run: {file}:")


def test_what_would_stop_a_run_later_is_found_before_any_work(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copied(work, tmp_path)
    with np.load(tmp_path / "data.npz") as data:
        np.savez(tmp_path / "unlabelled.npz", x=data["x"])
    (tmp_path / "text.npz").write_text("no archive")
    wrong = {
        FILE.replace("checkpoint: Tiny-day", "checkpoint: Wide-day"): (6, "does not fit the model"),
        FILE.replace("Tiny-base.safetensors", "text.npz"): (2, "text.npz"),
        FILE.replace("tiny_models:Tiny", "tiny_models:Tyni"): (1, "cannot import the model"),
        FILE.replace("test: images", "test: unlabelled.npz"): (8, "domains.day.test: found images"),
        FILE.replace("    calibration: data", "    calibration: text"): (
            7,
            "cannot be read as .npz",
        ),
    }
    for text, (number, words) in wrong.items():
        file.write_text(text)
        line = refused(file, capsys)
        assert line.startswith(f"{number}: ") and words in line, line

    def absent(*_: object) -> None:
        raise ExportError("the engine needs a library")

    monkeypatch.setattr("hdrq_deploy.exporters.target.Target.ingredients", absent)
    file.write_text(f"{FILE}engines:\n- ort\n- onnx\n")
    assert refused(file, capsys) == "14: the engine needs a library"
    assert not (tmp_path / "hdrq-run").exists()


def test_an_error_of_a_stage_names_its_line(
    again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(again.parent / "data.npz") as data:
        np.savez(again.parent / "nine.npz", x=data["x"], y=np.arange(len(data["x"])) % 10)
    again.write_text(FILE.replace("test: data.npz", "test: nine.npz"))
    line = refused(again, capsys)
    assert line.startswith("4: accuracy rtn-w8a8-night-ort: ")
    assert line.endswith("nine.npz: found labels 0 to 9; the model has 4 classes")

    class Broken(Stage):
        def change(self) -> str:
            raise HdrqError("`data` is damaged")

        make = outputs = change  # type: ignore[assignment]

    broken = Broken("a", again, (), f"{again}:7", 1)
    broken.__class__.kind = "merge"
    with pytest.raises(HdrqError, match=":7: merge a: data is damaged"):
        plan([broken])


def test_engines_by_bundle_the_fastest_one_and_verification(
    again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = again.parent / "hdrq-run"
    again.write_text(f"{FILE}engines: [auto, onnx: rtn-w8a8-merged]\nverify: rtn-w8a8-merged\n")
    capsys.readouterr()
    assert run_command.main([str(again), "--threads", "1"]) == 0
    said = capsys.readouterr().out
    record = json.loads((out / "results.json").read_text())
    assert [row["model"] for row in record["rows"]] == [
        "RTN W8A8, a model per domain",
        "RTN merged W8A8",
    ]
    engine = json.loads((out / "engines" / "rtn-w8a8-merged-auto" / "manifest.json").read_text())
    medians = engine["build"]["measured"]["median_ms"]
    assert "ort" in medians and engine["engine"] == min(medians, key=medians.__getitem__)
    assert not (out / "engines" / "rtn-w8a8-night-onnx").exists()
    assert "RTN merged W8A8 onnx: built (" in said
    assert "rtn-w8a8-merged-auto: 60 images: PyTorch to bundle 0 decisions differ" in said
    page = (out / "report.html").read_text()
    assert "<h2>Verified</h2>" in page and "rtn-w8a8-merged-auto: 60 images" in page
    assert stale(again, capsys) == []
    (out / "engines" / "rtn-w8a8-merged-auto" / "model.onnx").write_bytes(b"x")
    assert "export rtn-w8a8-merged-auto" in stale(again, capsys)
    again.write_text(FILE)
    assert clean_command.main([str(again), "--unused"]) == 0
    assert not [*out.rglob("*-auto*"), *out.rglob("*-onnx*")]


@pytest.mark.slow
def test_ray_makes_the_same_bundles(ran: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    flags = ["--only", "merge", "--ray", "--threads", "1"]
    assert run_command.main([str(ran), "--out", str(tmp_path), *flags]) == 0
    for name in ("rtn-w8a8-night", "rtn-w8a8-merged"):
        one, two = (
            Bundle.open(out / "bundles" / f"{name}.hdrq")
            for out in (ran.parent / "hdrq-run", tmp_path)
        )
        assert one.manifest_sha256 == two.manifest_sha256


def test_clean_leaves_what_is_not_ours(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(ran.parent / "hdrq-run", out)
    mine = out / "bundles" / "rtn-w8a8-night.hdrq" / "notes.txt"
    mine.write_text("of the user")
    (out / "beside.txt").write_text("of the user")
    escape = {"kind": "hdrq-run-outputs", "outputs": {}}
    outside = tmp_path / "engine"
    shutil.copytree(out / "engines" / "rtn-w8a8-day-ort", outside)
    escape["outputs"] = {
        name: {"stage": "export", "kind": "hdrq-engine"} for name in ("../engine", str(outside))
    }
    (out / "outputs.json").write_text(json.dumps(escape))
    flags = [str(ran), "--out", str(out)]
    assert clean_command.main([*flags, "--dry-run"]) == 0
    assert (out / "results.json").exists()
    assert clean_command.main([*flags, "--only", "bench"]) == 0
    assert not (out / "results.json").exists() and (out / "accuracy").exists()
    capsys.readouterr()
    assert clean_command.main(flags) == 0
    assert "left alone: found other content (file notes.txt" in capsys.readouterr().out
    left = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    assert {"beside.txt", "bundles/rtn-w8a8-night.hdrq/notes.txt"} <= left
    assert all(name == "beside.txt" or name.startswith("bundles/rtn-w8a8-night") for name in left)
    assert outside.exists() and (ran.parent / "data.npz").exists()


def test_a_run_does_not_write_over_the_users_files(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied(work, tmp_path)
    target = tmp_path / "hdrq-run" / "bundles" / "rtn-w8a8-merged.hdrq"
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("mine")
    assert run_command.main([str(file)]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert not (tmp_path / "hdrq-run" / "outputs.json").exists()


def test_init_looks_and_writes_a_file_that_runs(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(work, tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--from", "tiny_models:Tiny", "--source", "Tiny-base.safetensors", "--domain"]
    night = "night=Tiny-night.safetensors:images:images"
    assert init_command.main([*flags, night, "day=adapt:images", "-o", "new.yaml"]) == 0
    text = Path("new.yaml").read_text()
    assert "# 4 class folders: a, b, c, d" in text and "16 x 16" in text
    said = capsys.readouterr().out
    images = read("images")
    network = load_model("tiny_models:Tiny")
    load_state(network, "Tiny-night.safetensors", "adapted")
    right = int((network(torch.from_numpy(images.x)).argmax(1).numpy() == images.y).sum())
    assert f"recognise these test images: {right} of 12 of night; if you know" in said
    domains = load("new.yaml").file.domains
    assert domains["day"].adapt is not None and domains["night"].test == str(tmp_path / "images")
    refused = {
        "found something at hdrq.yaml": [*flags, night],
        "does not fit the model": [*flags, "day=Wide-day.safetensors:images", "-o", "x.yaml"],
        "needed NAME=CHECKPOINT:IMAGES": [*flags, "night", "-o", "x.yaml"],
    }
    for words, given in refused.items():
        capsys.readouterr()
        assert init_command.main(given) == 2
        assert words in capsys.readouterr().err
    assert Path("hdrq.yaml").read_text() == FILE and not Path("x.yaml").exists()
    (tmp_path / "images" / "e").mkdir()
    assert init_command.main([*flags, night, "-o", "x.yaml"]) == 0
    assert "note: night has 5 class folders, and the model 4" in capsys.readouterr().out


def test_the_table_of_stages_counts_and_estimates(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("hdrq_deploy.cli.stage_table.time.monotonic", lambda: now[0])
    file = copied(work, tmp_path)
    file.write_text(FILE.replace("methods: rtn", "methods: [hdrq, rtn]"))
    stages = {stage.key: stage for stage in stages_of(load(file))}
    shown = StageTable(stages, set(stages) - {"calibrate rtn-w8a8-day"})
    assert shown.seconds_left() is None
    shown.begun("calibrate rtn-w8a8-night")
    now[0] = 1.0
    shown.ended(1, 3, "calibrate rtn-w8a8-night")
    assert shown.seconds_left() is None  # round-to-nearest says nothing of hdrq
    shown.begun("calibrate hdrq-w8a8-night")
    now[0] = 11.0
    shown.ended(2, 3, "calibrate hdrq-w8a8-night")
    shown.begun("calibrate hdrq-w8a8-day")
    now[0] = 15.0
    # One calibration takes 10 s, and 4 s of the second are over.
    assert shown.seconds_left() == pytest.approx(6.0)
    console = Console(file=io.StringIO(), width=80)
    console.print(shown.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3/4" in text and "15.0 s, 6.0 s left" in text and "0/2" in text


def test_the_blocks_of_a_calibration_that_runs_are_shown(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copied(work, tmp_path)
    text = FILE.replace("rtn", "hdrq") + "calibrate: {iters: 2, batch: 8}\n"
    file.write_text(text)
    seen: list[str] = []
    save = Partial.save

    def stopped(self: Partial, index: int, *rest: object) -> None:
        save(self, index, *rest)  # type: ignore[arg-type]
        console = Console(file=io.StringIO(), width=100)
        shown = StageTable(stages, set(stages), console)
        shown.begun("calibrate hdrq-w8a8-night")
        console.print(shown.table())
        seen.append(console.file.getvalue())  # type: ignore[attr-defined]
        if index == 1:
            raise KeyboardInterrupt

    stages = {stage.key: stage for stage in stages_of(load(file))}
    assert stages["calibrate hdrq-w8a8-night"].reached() == ""
    monkeypatch.setattr(Partial, "save", stopped)
    assert run_command.main([str(file)]) == 130
    assert "hdrq-w8a8-night (2 of 3 blocks)" in seen[-1]
    capsys.readouterr()
    assert status_command.main([str(file)]) == 0
    assert "it is missing; 2 of 3 blocks are done" in capsys.readouterr().out


def test_a_terminal_shows_the_table_and_its_end(ran: Path) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    stages = {stage.key: stage for stage in stages_of(load(ran))}
    with StageTable(stages, {"calibrate rtn-w8a8-day"}, console) as shown:
        shown.begun("calibrate rtn-w8a8-day")
        shown.ended(1, 1, "calibrate rtn-w8a8-day")
    assert "2/2" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_engine_that_cannot_run_here_is_named(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(ran.parent / "hdrq-run", out)
    manifest = out / "engines" / "rtn-w8a8-merged-ort" / "manifest.json"
    record = json.loads(manifest.read_text())
    record["build"]["checked"]["engine_not_run"] = "this machine has no GPU"
    manifest.write_text(json.dumps(record))
    (out / "accuracy" / "rtn-w8a8-merged-ort.json").unlink()
    (out / "results.json").unlink()
    assert run_command.main([str(ran), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "INT8), not measured: this machine has no GPU" in said
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["RTN W8A8, a model per domain"]


def test_a_worker_makes_the_same_bundle(ran: Path, tmp_path: Path) -> None:
    flags = ["--only", "calibrate rtn-w8a8-night", "--workers", "2", "--threads", "1"]
    assert run_command.main([str(ran), "--out", str(tmp_path), *flags]) == 0
    name = "bundles/rtn-w8a8-night.hdrq"
    one, two = (Bundle.open(out / name) for out in (ran.parent / "hdrq-run", tmp_path))
    assert one.manifest_sha256 == two.manifest_sha256
