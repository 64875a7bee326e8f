"""What may be written where: nothing of the user's is ever replaced, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, safe_open, save_file

from hdrq_deploy.cli import (
    adapt,
    analyze,
    bench,
    calibrate,
    compare,
    demo,
    emit,
    export,
    merge,
    reproduce,
    sensitivity,
    verify,
)
from hdrq_deploy.errors import DataError, HdrqError, SpecError
from hdrq_deploy.formats import atomic_files as files
from hdrq_deploy.formats import file_kinds as kinds
from hdrq_deploy.formats.atomic_files import (
    FolderKind,
    check_container,
    check_name,
    check_output,
    check_outputs,
    new_directory,
    remove_folder,
    write_bytes,
    write_record,
)
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.merging import merge as merge_bundles
from hdrq_deploy.merging import merge_checkpoints
from hdrq_deploy.numerics.spec import check_seed

KIND = FolderKind("hdrq-test", "record.json", before=("old.txt",))


def contents(root: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: bytes of files, targets of links, None for the rest."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def ours(folder: Path, kind: FolderKind = KIND, names: tuple[str, ...] = ("a.txt",)) -> Path:
    """A folder as one of our commands leaves it."""
    with new_directory(folder, kind) as new:
        for name in names:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text("old")
        write_record(new, kind, {})
    return folder


def record(folder: Path, **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KIND.marker).write_text(json.dumps(fields))


# One folder each, and a word of the refusal.
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shop's manifest": (
        lambda p: (ours(p), (p / "record.json").write_text('{"name": "shop"}')),
        "none that we know",
    ),
    "no record": (lambda p: (p.mkdir(), (p / "thesis.txt").write_text("x")), "thesis.txt"),
    "another kind": (lambda p: record(p, kind="hdrq-other", files=[]), "of kind 'hdrq-other'"),
    "a list as record": (
        lambda p: (p.mkdir(), (p / "record.json").write_text("[1]")),
        "no record.json of ours",
    ),
    "a broken record": (
        lambda p: (p.mkdir(), (p / "record.json").write_text("{")),
        "no record.json of ours",
    ),
    "a deep record": (
        lambda p: (p.mkdir(), (p / "record.json").write_text("[" * 100_000)),
        "no record.json of ours",
    ),
    "a record that is a folder": (lambda p: (p / "record.json").mkdir(parents=True), "record.json"),
    "one file more": (lambda p: (ours(p), (p / "thesis.txt").write_text("x")), "thesis.txt"),
    "a hidden file more": (lambda p: (ours(p), (p / ".git").write_text("x")), ".git"),
    "a folder more": (lambda p: (ours(p), (p / "empty").mkdir()), "folder empty"),
    "a folder in a file's place": (
        lambda p: (ours(p), (p / "a.txt").unlink(), (p / "a.txt").mkdir()),
        "folder a.txt",
    ),
    "a link in a file's place": (
        lambda p: (ours(p), (p / "a.txt").unlink(), (p / "a.txt").symlink_to("/etc/hosts")),
        "link a.txt",
    ),
    "a pipe": (lambda p: (ours(p), (p / "a.txt").unlink(), os.mkfifo(p / "a.txt")), "a.txt"),
    "a file more in our sub-folder": (
        lambda p: (ours(p, names=("sub/a.txt",)), (p / "sub" / "b.txt").write_text("x")),
        "sub/b.txt",
    ),
    "names outside": (
        lambda p: (record(p, kind="hdrq-test", files=["../x"]), (p / "x").write_text("x")),
        "file x",
    ),
    "a file": (lambda p: p.write_text("x"), "a file at"),
    "a link to our folder": (
        lambda p: (ours(p.with_name("real")), p.symlink_to("real")),
        "a link at",
    ),
    "a link that leads nowhere": (lambda p: p.symlink_to("nowhere"), "a link at"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_that_is_not_wholly_ours_stays(case: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    spoil, text = FOREIGN[case]
    spoil(target)
    before = contents(tmp_path)
    with pytest.raises(HdrqError, match="needed nothing, an empty folder or") as caught:
        check_output(target, KIND)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(HdrqError), new_directory(target, KIND):
        raise AssertionError("not reached")
    with pytest.raises(HdrqError):
        remove_folder(target, KIND)
    assert contents(tmp_path) == before


def test_an_own_folder_of_the_kind_is_replaced(tmp_path: Path) -> None:
    for names in (("a.txt",), ("deep/er/a.txt", "b.txt"), ()):
        target = ours(tmp_path / "out", names=names)
        (target / "record.json").chmod(0o400)
        ours(target, names=("new.txt",))
        assert sorted(contents(tmp_path)) == ["out", "out/new.txt", "out/record.json"]
    # An empty folder, one with a file missing, and a record of an earlier version.
    (tmp_path / "empty").mkdir()
    ours(tmp_path / "empty")
    (tmp_path / "out" / "new.txt").unlink()
    ours(tmp_path / "out")
    record(tmp_path / "early", kind="hdrq-test")
    (tmp_path / "early" / "old.txt").write_text("x")
    ours(tmp_path / "early")
    assert not (tmp_path / "early" / "old.txt").exists()


def test_a_failed_swap_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ours(tmp_path / "out")
    before = contents(tmp_path)
    rename = Path.rename

    def refuse(self: Path, goal: Any) -> Any:
        if goal == target and ".old." not in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, goal)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(HdrqError, match="No space left"):
            ours(target)
    assert contents(tmp_path) == before

    def interrupt(self: Path, goal: Any) -> Any:
        if goal == target and ".old." not in self.name:
            raise KeyboardInterrupt
        return rename(self, goal)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ours(target)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="stop"), new_directory(target, KIND):
        raise ValueError("stop")
    assert contents(tmp_path) == before


def test_what_comes_while_we_work_is_not_deleted(tmp_path: Path) -> None:
    target = ours(tmp_path / "out")
    with pytest.raises(HdrqError, match="thesis.txt"), new_directory(target, KIND) as new:
        write_record(new, KIND, {})
        (target / "thesis.txt").write_text("mine")
    assert (target / "thesis.txt").read_text() == "mine" and (target / "a.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(HdrqError, match="a file at"), new_directory(tmp_path / "new", KIND) as new:
        write_record(new, KIND, {})
        (tmp_path / "new").write_text("mine")
    assert (tmp_path / "new").read_text() == "mine"


def test_what_came_at_the_last_moment_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ours(tmp_path / "out")
    replace = Path.replace

    def late(self: Path, goal: Any) -> Any:
        (self / "thesis.txt").write_text("mine")
        return replace(self, goal)

    new = ours(tmp_path / "new")
    monkeypatch.setattr(Path, "replace", late)
    with pytest.raises(HdrqError, match="thesis.txt.*nothing was changed"):
        files._swap(new, target, KIND)
    assert (target / "thesis.txt").read_text() == "mine" and (target / "a.txt").exists()


def test_outputs_lie_apart_from_inputs(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(data)
    cases = [
        (data, "equal to"),
        (data / "deep" / "out", "inside"),
        (tmp_path, "around"),
        (tmp_path / "link" / "out", "inside"),
        (tmp_path / "x" / ".." / "data", "equal to"),
    ]
    for output, how in cases:
        with pytest.raises(HdrqError, match=f"{how} the input .*apart"):
            check_output(output, KIND, [None, data])
    # Through a link on the input's side, and by another name of the same file.
    with pytest.raises(HdrqError, match="inside"):
        check_output(data / "out", KIND, [tmp_path / "link"])
    (tmp_path / "a.json").write_text('{"kind": "hdrq-verify"}')
    (tmp_path / "b.json").hardlink_to(tmp_path / "a.json")
    with pytest.raises(HdrqError, match="equal to"):
        check_output(tmp_path / "b.json", kinds.VERIFY_JSON, [tmp_path / "a.json"])
    assert check_output(tmp_path / "data2", KIND, [data]) == tmp_path / "data2"
    with pytest.raises(HdrqError, match="`csv` .* and `json` .* in one place"):
        same = [(tmp_path / "o", kinds.BENCH_JSON, "json"), (tmp_path / "o", KIND, "csv")]
        check_outputs(same)


def test_places_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HdrqError, match="found no folder at .*file"):
        check_output(tmp_path / "file" / "deep" / "out", KIND)
    for name in ("", "..", "/"):
        with pytest.raises(HdrqError, match="needed the name of a file or folder"):
            check_output(name, KIND)
    for name in ("n" * 250, "ä" * 120, "/".join(["folder"] * 800)):
        with pytest.raises(HdrqError, match="choose a shorter one"):
            check_output(tmp_path / name, KIND)
    assert check_output(tmp_path / ("n" * 230), KIND)
    monkeypatch.chdir(ours(tmp_path / "here"))
    with pytest.raises(HdrqError, match="the folder that this command runs in"):
        check_output(".", KIND)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(HdrqError, match="no write permission"):
        check_output(tmp_path / "none" / "out", KIND)
    assert not (tmp_path / "none").exists()


def test_a_container_keeps_what_is_not_ours(tmp_path: Path) -> None:
    outputs = [("cells/a.hdrq", KIND), ("results.json", kinds.RUN_RESULTS)]
    (tmp_path / "thesis.txt").write_text("x")
    assert check_container(tmp_path, outputs) == tmp_path
    ours(tmp_path / "cells" / "b.hdrq")
    check_container(tmp_path, outputs)
    (tmp_path / "results.json").write_text('{"rows": 3}')
    with pytest.raises(HdrqError, match="another file at .*results.json"):
        check_container(tmp_path, outputs)
    (tmp_path / "results.json").unlink()
    (tmp_path / "real").mkdir()
    shutil.rmtree(tmp_path / "cells")
    (tmp_path / "cells").symlink_to("real")
    with pytest.raises(HdrqError, match="a link at .*cells"):
        check_container(tmp_path, outputs)
    with pytest.raises(HdrqError, match="a link at"):
        check_container(tmp_path / "cells", outputs)
    with pytest.raises(HdrqError, match="a file at"):
        check_container(tmp_path / "thesis.txt", outputs)


def png(path: Path, ours: bool) -> None:
    from hdrq_deploy.runtime.bench.segmentation_images import write_picture

    picture = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    if ours:
        write_picture(path, picture)
    else:
        picture.save(path, "PNG")


def checkpoint(path: Path, key: str | None) -> None:
    notes = {key: json.dumps({"method": "mean"})} if key else None
    save_file({"w": np.zeros(3, np.float32)}, path, notes)


def adapting(path: Path, ours: bool) -> None:
    state = {"w": torch.zeros(2)}
    run = {"seed": 0, "source_sha256": "a", "data_sha256": "b"}
    torch.save({"run": run, "epoch": 1, "model": state} if ours else state, path)


CSV = "name,path,engine,device,scenario,batch,threads,accuracy_d,joules_per_call,precision,marks\n"
MARKS: dict[
    str, tuple[files.FileKind, Callable[[Path], object], list[Callable[[Path], object]]]
] = {
    "json": (
        kinds.VERIFY_JSON,
        lambda p: p.write_text('{"kind": "hdrq-verify"}'),
        [
            lambda p: p.write_text('{"kind": "hdrq-bench"}'),
            lambda p: p.write_text("{}"),
            lambda p: p.write_text("my notes"),
            lambda p: p.write_text(""),
            lambda p: p.write_text("[]"),
            lambda p: p.write_text('[{"kind": "hdrq-verify"}, {"mine": 1}]'),
        ],
    ),
    "several results": (
        kinds.BENCH_JSON,
        lambda p: p.write_text('[{"kind": "hdrq-bench"}, {"kind": "hdrq-bench"}]'),
        [lambda p: p.write_text('[{"kind": "hdrq-bench"}, {"kind": "hdrq-verify"}]')],
    ),
    "an earlier result": (
        kinds.RUN_RESULTS,
        lambda p: p.write_text('{"kind": "hdrq-demo", "rows": {}}'),
        [lambda p: p.write_text('{"rows": {}}')],
    ),
    "csv": (
        kinds.BENCH_CSV,
        lambda p: p.write_text(CSV + "a,b\n"),
        [lambda p: p.write_text("name,path\n"), lambda p: p.write_text(f"# {CSV}")],
    ),
    "html": (
        kinds.BENCH_HTML,
        lambda p: p.write_text(f"<!doctype html>{kinds.generator('hdrq-bench')}<body>"),
        [
            lambda p: p.write_text("<!doctype html><title>hdrq-bench</title>"),
            lambda p: p.write_text(f"<!doctype html>{kinds.generator('hdrq demo')}<body>"),
        ],
    ),
    "picture": (kinds.PICTURE, lambda p: png(p, True), [lambda p: png(p, False)]),
    "merged checkpoint": (
        kinds.MERGED,
        lambda p: checkpoint(p, "merged"),
        [lambda p: checkpoint(p, None), lambda p: checkpoint(p, "adapted")],
    ),
    "adapted checkpoint": (
        kinds.ADAPTED,
        lambda p: checkpoint(p, "adapted"),
        [
            lambda p: checkpoint(p, None),
            lambda p: checkpoint(p, "merged"),
            lambda p: p.write_bytes(b"\xff" * 40),
            lambda p: p.write_bytes(b"\x04\0\0\0\0\0\0\0null"),
        ],
    ),
    "unfinished adaptation": (
        kinds.ADAPTING,
        lambda p: adapting(p, True),
        [lambda p: adapting(p, False), lambda p: p.write_bytes(b"PK\x03\x04broken")],
    ),
    "timing cache": (
        kinds.TIMING_CACHE,
        lambda p: p.write_bytes(b"ptrtd\0\0\0\x98\0"),
        [lambda p: p.write_text("thesis"), lambda p: p.write_bytes(b"\0" * 20)],
    ),
    "run file": (
        kinds.DEMO_FILE,
        lambda p: p.write_text("# The run of hdrq demo: three domains\nseed: 0\n"),
        [lambda p: p.write_text("# A run\nseed: 0\n")],
    ),
    "table": (
        kinds.REPRODUCE_TABLE,
        lambda p: p.write_text(
            "| setting | method | bits | single | merge | a | merged | published |\n| --- |\n"
        ),
        [lambda p: p.write_text("| setting |\n")],
    ),
}


@pytest.mark.parametrize("case", MARKS)
def test_a_file_is_replaced_only_with_our_mark(case: str, tmp_path: Path) -> None:
    kind, good, others = MARKS[case]
    target = tmp_path / "out"
    write_bytes(target, b"new", kind)
    target.unlink()
    good(target)
    write_bytes(target, b"new", kind)
    assert target.read_bytes() == b"new"
    for spoil in others:
        target.unlink()
        spoil(target)
        before = contents(tmp_path)
        with pytest.raises(HdrqError, match="found another file at .*needed nothing, an earlier"):
            write_bytes(target, b"new", kind)
        assert contents(tmp_path) == before
    target.unlink()
    for make, found in (
        (lambda: target.mkdir(), "a folder"),
        (lambda: target.symlink_to(tmp_path / "elsewhere"), "a link"),
        (lambda: os.mkfifo(target), "a special file"),
    ):
        make()
        with pytest.raises(HdrqError, match=f"found {found} at"):
            write_bytes(target, b"new", kind)
        target.rmdir() if stat.S_ISDIR(target.lstat().st_mode) else target.unlink()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (kinds.BENCH_JSON, "hdrq-bench"),
        (kinds.COMPARE_JSON, "hdrq-compare"),
        (kinds.VERIFY_JSON, "hdrq-verify"),
        (kinds.RUN_RESULTS, "hdrq-run-results"),
        (kinds.REPRODUCE_JSON, "hdrq-reproduce"),
        (kinds.CELL_ROW, "hdrq-row"),
    ],
)
def test_the_kind_that_is_written_is_the_one_that_is_read(
    kind: files.FileKind, text: str, tmp_path: Path
) -> None:
    assert kind.kind == text
    (tmp_path / "x.json").write_text(json.dumps({"kind": kind.kind}))
    assert kind.is_ours(tmp_path / "x.json")


def test_the_demo_writes_over_its_own_file_unless_it_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise HdrqError("the work would begin")

    monkeypatch.setattr("hdrq_deploy.cli.demo._write_data", stop)

    def said(*flags: str) -> str:
        assert demo.main(["--out", str(tmp_path / "out"), *flags]) == 2
        return capsys.readouterr().err

    for flags in ([], ["--quick", "--seed", "7"], []):
        assert "the work would begin" in said(*flags)
    file = tmp_path / "out" / "hdrq.yaml"
    assert file.read_text() in {demo.run_file(False, 0, rtx) for rtx in (False, True)}
    file.write_text(file.read_text().replace("iters: 150", "iters: 151"))
    assert "hdrq.yaml edited; run it with hdrq run" in said()
    assert "iters: 151" in file.read_text()


# The command lines: what is asked for is not there at all, so a refusal that names the output
# comes before anything was imported, opened or read.
NONE = "absent.hdrq"
CALIBRATE = ["--model", "absent:M", "--method", "rtn", "--data", "absent.npz"]
DATA = "d=absent.npz"
Line = Callable[[str], list[str]]
FOLDERS: dict[str, tuple[Callable[[list[str]], int], FolderKind, Line]] = {
    "calibrate": (
        calibrate.main,
        kinds.BUNDLE,
        lambda out: [*CALIBRATE, "--domain", "d", "-o", out],
    ),
    "merge": (merge.main, kinds.BUNDLE, lambda out: [NONE, NONE, "-o", out]),
    "export": (export.main, kinds.ENGINE, lambda out: [NONE, "-o", out]),
    "analyze": (
        analyze.main,
        kinds.ANALYSIS,
        lambda out: [NONE, NONE, "--data", DATA, "-o", out],
    ),
    "sensitivity": (
        sensitivity.main,
        kinds.SENSITIVITY,
        lambda out: [NONE, "--data", DATA, "-o", out],
    ),
    **{
        f"emit {target}": (
            emit.main,
            kind,
            lambda out, target=target: [target, "absent", "-o", out],  # type: ignore[misc]
        )
        for target, kind in kinds.EMITTED.items()
    },
}
FILES: dict[str, tuple[Callable[[list[str]], int], Line]] = {
    "merge": (merge.main, lambda out: ["a.safetensors", "b.safetensors", "-o", out]),
    "adapt": (
        adapt.main,
        lambda out: ["--model", "absent:M", "--weights", "w", "--data", "d.npz", "-o", out],
    ),
    "verify": (verify.main, lambda out: [NONE, "--json", out]),
    "compare": (compare.main, lambda out: ["a.json", "b.json", "--json", out]),
    **{
        f"bench {flag}": (bench.main, lambda out, flag=flag: ["absent", flag, out])  # type: ignore[misc]
        for flag in ("--json", "--csv", "--html")
    },
    "export": (export.main, lambda out: [NONE, "-o", "engine", "--timing-cache", out]),
}


def refused(
    main: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line of a refusal; nothing below the current folder has changed."""
    before = contents(Path.cwd())
    capsys.readouterr()
    assert main(argv) == 2, argv
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == "", said.err
    assert contents(Path.cwd()) == before
    return said.err


@pytest.mark.parametrize("command", FOLDERS)
def test_no_command_replaces_a_foreign_folder(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, kind, line = FOLDERS[command]
    monkeypatch.chdir(tmp_path)
    site = tmp_path / "site"
    (site / "src").mkdir(parents=True)
    (site / kind.marker).write_text('{"name": "shop"}')
    (site / "src" / "thesis.txt").write_text("x")
    assert "found other content" in refused(main, line("site"), capsys)
    ours(tmp_path / "more", kind)
    (tmp_path / "more" / "notes.txt").write_text("x")
    assert "file notes.txt" in refused(main, line("more"), capsys)
    other = kinds.ENGINE if kind is not kinds.ENGINE else kinds.BUNDLE
    # Of another kind, under the marker of this one.
    ours(tmp_path / "other", FolderKind(other.kind, kind.marker))
    assert f"is of kind '{other.kind}'" in refused(main, line("other"), capsys)
    ours(tmp_path / "mine", kind)
    (tmp_path / "link").symlink_to("mine")
    assert "found a link at" in refused(main, line("link"), capsys)
    assert "found a link at" in refused(main, line("link/"), capsys)
    (tmp_path / "file").write_text("x")
    assert "found a file at" in refused(main, line("file"), capsys)
    assert "found no folder at" in refused(main, line("file/out"), capsys)
    assert "shorter" in refused(main, line("n" * 300), capsys)
    assert "needed the name" in refused(main, line(""), capsys)
    for own in ("mine", "fresh"):  # free: the next thing that is missing is named
        assert str(tmp_path / own) not in refused(main, line(own), capsys)


@pytest.mark.parametrize("command", FILES)
def test_no_command_overwrites_a_foreign_file(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, line = FILES[command]
    monkeypatch.chdir(tmp_path)
    for name, text in (("notes.txt", "mine"), ("o.json", '{"kind": "mine"}'), ("w.bin", "\0\1")):
        (tmp_path / name).write_text(text)
        assert "found another file at" in refused(main, line(name), capsys)
    (tmp_path / "folder").mkdir()
    assert "found a folder at" in refused(main, line("folder"), capsys)
    (tmp_path / "link").symlink_to("notes.txt")
    assert "found a link at" in refused(main, line("link"), capsys)
    assert "found no folder at" in refused(main, line("notes.txt/out"), capsys)
    assert "shorter" in refused(main, line("n" * 300), capsys)


@pytest.mark.parametrize(
    ("command", "argv", "inputs"),
    [
        (calibrate.main, "--model a:M --data D --domain d --weights W --base B -o", "D W B"),
        (calibrate.main, "--model a:M --data D --domain d --recipe R -o", "D R"),
        (merge.main, "A B -o", "A B"),
        (merge.main, "A B --data d=D --re-estimate r=R -o", "A B D R"),
        (merge.main, "A.safetensors B.safetensors --base C -o", "A.safetensors B.safetensors C"),
        (export.main, "A -o", "A"),
        (emit.main, "triton A -o", "A"),
        (analyze.main, "A B --data d=D --base C -o", "A B C D"),
        (sensitivity.main, "A --data d=D --weights W -o", "A D W"),
        (adapt.main, "--model a:M --weights W --data D -o", "W D"),
        (verify.main, "A B --data d=D --json", "A B D"),
        (compare.main, "A B --json", "A B"),
        (bench.main, "A B --reference C --data d=D --json", "A B C D"),
        (bench.main, "A --data d=D --draw", "A D"),
        (reproduce.main, "office-home --data D --checkpoints C --out", "D C"),
    ],
)
def test_outputs_are_apart_from_inputs_in_every_command(
    command: Callable[[list[str]], int],
    argv: str,
    inputs: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if command is reproduce.main:
        made_office(tmp_path)
    for name in inputs.split():
        for output in (name, f"{name}/out", f"./x/../{name}"):
            text = refused(command, [*argv.split(), output], capsys)
            assert "the input" in text, (output, text)
    if command not in {reproduce.main, bench.main}:
        deep = [f"deep/{word}" if word in inputs.split() else word for word in argv.split()]
        deep = [w.replace("=", "=deep/") if "=" in w else w for w in deep]
        assert "around the input" in refused(command, [*deep, "deep"], capsys)


def made_office(folder: Path) -> None:
    """What reproduce looks for before it checks its outputs."""
    for name in ("Art", "Clipart", "Product", "Real World"):
        (folder / "D" / name).mkdir(parents=True)
    (folder / "C").mkdir()
    for name in ("source", "art", "clipart", "product"):
        (folder / "C" / f"{name}.pt").write_text("x")


def test_several_domains_go_only_where_each_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [
        "--model",
        "absent:M",
        "--data",
        "a.npz",
        "b.npz",
        "--domain",
        "night",
        "day",
        "-o",
        "out",
    ]
    for name in ("night.hdrq", "day.hdrq", "day.hdrq.partial"):
        spoiled = tmp_path / "out" / name
        spoiled.mkdir(parents=True)
        (spoiled / "thesis.txt").write_text("x")
        assert "thesis.txt, and no" in refused(calibrate.main, argv, capsys)
        shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".day.hdrq.inputs.json").write_text("{}")
    assert "found another file" in refused(calibrate.main, argv, capsys)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    assert "found a link at" in refused(calibrate.main, argv, capsys)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_unfinished_work_that_is_not_ours_stays(
    resume: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [*CALIBRATE, "--domain", "night", "-o", "n.hdrq", *resume]
    partial = tmp_path / "n.hdrq.partial"
    for names, text in (
        ({"run.json": "{}"}, "run.json is of kind"),
        ({"run.json": '{"kind": "other"}', "thesis.txt": "x"}, "of kind 'other'"),
        ({"thesis.txt": "x"}, "thesis.txt"),
        ({"run.json": '{"kind": "hdrq-partial"}', "thesis.txt": "x"}, "file thesis.txt"),
        ({"run.json": '{"kind": "hdrq-partial"}', "block-x.safetensors": "x"}, "block-x"),
    ):
        partial.mkdir()
        for name, content in names.items():
            (partial / name).write_text(content)
        assert text in refused(calibrate.main, argv, capsys)
        shutil.rmtree(partial)
    # Ours: blocks, what a killed process left of one, and the record of an earlier version.
    early = dict.fromkeys(kinds.PARTIAL.keys, 0)
    for fields in ({"kind": "hdrq-partial"}, early):
        partial.mkdir()
        (partial / "run.json").write_text(json.dumps(fields))
        (partial / "block-0003.safetensors").write_text("x")
        (partial / ".block-0004.safetensors.ab12_xyz").write_text("x")
        (partial / ".block-0004.safetensors.ab12_xyz.hdrq-tmp").write_text("x")
        assert "absent" in refused(calibrate.main, argv, capsys)
        (partial / ".thesis.txt.ab12_xyz.hdrq-tmp").write_text("x")
        assert "file .thesis.txt.ab12" in refused(calibrate.main, argv, capsys)
        shutil.rmtree(partial)
    # Killed before its record was there.
    partial.mkdir()
    (partial / ".run.json.ab12_xyz.hdrq-tmp").write_text("x")
    assert "absent" in refused(calibrate.main, argv, capsys)
    (partial / ".block-0004.safetensors.ab12_xyz.hdrq-tmp").write_text("x")
    assert "no run.json of ours" in refused(calibrate.main, argv, capsys)
    shutil.rmtree(partial)
    target = tmp_path / "a.safetensors"
    (tmp_path / "a.safetensors.partial").write_text("mine")
    line = ["--model", "absent:M", "--weights", "w", "--data", "d.npz", "-o", str(target), *resume]
    assert "found another file at" in refused(adapt.main, line, capsys)


def test_demo_and_reproduce_replace_only_what_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def stop(*_: object) -> None:
        raise HdrqError("the work would begin")

    monkeypatch.setattr("hdrq_deploy.cli.demo.make_directory", stop)
    monkeypatch.setattr("hdrq_deploy.cli.reproduce.make_directory", stop)
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    commands = {
        demo.main: (
            ["--quick", "--out"],
            ["data", "bundles/hdrq-w3a3-night.hdrq", "engines/float-merged-ort", "bundles"],
            ["results.json", "report.html", "hdrq.yaml"],
        ),
        reproduce.main: (
            ["office-home", "--made", "--bits", "w4a4", "--methods", "hdrq", "--out"],
            ["data/digits", "cells/float-night.hdrq", "cells/float-night.hdrq.partial", "rows"],
            ["results.json", "table.md", "rows/float-night.json"],
        ),
    }
    for main, (argv, folders, names) in commands.items():
        assert "a file at" in refused(main, [*argv, "file"], capsys)
        assert "a link at" in refused(main, [*argv, "link"], capsys)
        for name in [*folders, *names]:
            out = tmp_path / "out"
            out.mkdir()
            (out / "thesis.txt").write_text("x")  # beside what is ours
            assert "the work would begin" in refused(main, [*argv, "out"], capsys)
            place = out / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name in names or name in {"bundles", "rows"}:
                place.write_text("mine")
            else:
                place.mkdir()
                (place / "mine.png").write_text("mine")
            assert name in refused(main, [*argv, "out"], capsys)
            shutil.rmtree(out)


def test_made_data_are_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hdrq_deploy.experiments import tasks

    calls = []

    def write(folder: Path, *_: object) -> None:
        calls.append(folder)
        (folder / "night").mkdir()
        (folder / "night" / "0.png").write_text("x")

    monkeypatch.setattr(tasks.digits, "write", write)
    tasks.write_made("office-home", tmp_path)
    tasks.write_made("office-home", tmp_path)
    assert len(calls) == 1
    made = tmp_path / "data" / "digits"
    (made / "night" / "mine.png").write_text("x")
    with pytest.raises(HdrqError, match="night/mine.png"):
        tasks.write_made("office-home", tmp_path)
    # What an earlier version wrote is kept as it is.
    shutil.rmtree(made)
    made.mkdir()
    (made / "written").write_text("")
    tasks.write_made("office-home", tmp_path)
    assert len(calls) == 1


def test_results_are_written_again_over_themselves(
    make: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [str(make(domain=d).path) for d in ("night", "day")]
    engine, data = str(tmp_path / "engine"), f"d={work}/data.npz"
    names = ("j.json", "c.csv", "h.html", "v.json", "m.safetensors")
    json_, csv, html, verified, merged = (str(tmp_path / name) for name in names)
    floats = [f"{work}/Tiny-{d}.safetensors" for d in ("night", "day")]
    lines: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (merge.main, [*bundles, "-o", str(tmp_path / "m.hdrq")]),
        (export.main, [bundles[0], "-o", engine, "--force"]),
        (emit.main, ["triton", engine, "-o", str(tmp_path / "triton")]),
        (emit.main, ["triton", engine, "-o", str(tmp_path / "triton"), "--name", "other"]),
        (sensitivity.main, [bundles[0], "--data", data, "-o", str(tmp_path / "s")]),
        (verify.main, [bundles[0], engine, "--no-torch", "--json", verified]),
        (
            bench.main,
            [engine, "--iterations", "5", "--json", json_, "--csv", csv, "--html", html],
        ),
        (bench.main, [engine, engine, "--iterations", "5", "--json", json_, "--csv", csv]),
        (compare.main, [f"{tmp_path}/one.json"] * 2 + ["--json", f"{tmp_path}/cmp.json"]),
        (merge.main, [*floats, "-o", merged]),
    ]
    single = ["--iterations", "5", "--json", str(tmp_path / "one.json")]
    assert bench.main([engine, *single]) == 2  # there is no engine yet
    for main, argv in lines:
        if main is compare.main:
            assert bench.main([engine, *single]) == 0
        assert main(argv) == 0, capsys.readouterr().err
        assert main(argv) == 0, capsys.readouterr().err
    for folder, marker in (("s", "sensitivity.json"), ("triton", "hdrq-emit.json")):
        found = json.loads((tmp_path / folder / marker).read_text())
        there = {str(p.relative_to(tmp_path / folder)) for p in tmp_path.glob(f"{folder}/**/*.*")}
        assert found["kind"].startswith("hdrq-") and set(found["files"]) == there - {marker}
    # Results are no inputs: the engine's own manifest is not overwritten by a benchmark.
    assert bench.main([engine, "--json", f"{engine}/manifest.json"]) == 2
    assert verify.main([engine]) == 0


def test_a_merged_checkpoint_bears_a_mark_and_the_same_numbers(work: Path, tmp_path: Path) -> None:
    inputs = [work / f"Tiny-{d}.safetensors" for d in ("night", "day")]
    noted = tmp_path / "noted.safetensors"
    save_file(load_file(inputs[0]), noted, {"format": "pt", "adapted": '{"method": "SHOT"}'})
    target = merge_checkpoints([noted, inputs[1]], tmp_path / "m.safetensors")
    with safe_open(target, "numpy") as file:
        metadata = file.metadata()
        assert json.loads(metadata["merged"])["method"] == "mean"
        assert metadata["format"] == "pt" and "adapted" not in metadata
        a, b = load_file(inputs[0]), load_file(inputs[1])
        assert set(file.keys()) == set(a)
        for name in file.keys():  # noqa: SIM118
            if name.endswith("running_var") or a[name].dtype != np.float32:
                continue
            expected = (a[name].astype(np.float64) + b[name]) / 2
            np.testing.assert_allclose(file.get_tensor(name), expected, rtol=1e-6, atol=1e-7)
    assert int.from_bytes(target.read_bytes()[:8], "little") % 8 == 0
    with pytest.raises(HdrqError, match="another file"):
        merge_checkpoints(inputs, shutil.copy(inputs[0], tmp_path / "user.safetensors"))
    with pytest.raises(HdrqError, match="equal to the input"):
        merge_checkpoints(inputs, inputs[0])


def test_the_library_refuses_too(make: Any, work: Path, tmp_path: Path) -> None:
    from hdrq_deploy.exporters import export as export_bundle
    from hdrq_deploy.runtime.serving.emit import emit as emit_files

    bundles = [make(domain=d) for d in ("night", "day")]
    copy = tmp_path / "copy.hdrq"
    shutil.copytree(bundles[0].path, copy)
    before = contents(tmp_path)
    with pytest.raises(HdrqError, match="equal to the input"):
        merge_bundles([copy, bundles[1]], copy)
    with pytest.raises(HdrqError, match="is of kind 'hdrq-bundle'"):
        export_bundle(bundles[1], copy)
    with pytest.raises(HdrqError, match="inside the input"):
        export_bundle(copy, copy / "engine")
    assert contents(tmp_path) == before
    engine = export_bundle(bundles[0], tmp_path / "engine")
    with pytest.raises(HdrqError, match="inside the input"):
        emit_files("ros2", engine, engine / "ros")
    with pytest.raises(HdrqError, match="is of kind 'hdrq-engine'"):
        merge_bundles(bundles, engine)
    # Earlier versions of ours have no mark beside kind and files: they are replaced.
    manifest = json.loads((copy / "manifest.json").read_text())
    assert set(manifest["files"]) | {"manifest.json"} == {f.name for f in copy.iterdir()}
    merge_bundles(bundles, copy)
    assert set(Bundle.open(copy).manifest.domains) == {"night", "day"}


def test_names_of_domains_are_names_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("night", "Real World", "d_1", "a.b-c", "n+d", "nächte", "夜", "x" * 64):
        assert check_name(name) == name
    bad = ("../evil", "/etc", "a/b", "a\\b", ".hidden", "..", "", " a", "a ", "a.", "-a", "a\nb")
    bad = (*bad, "a\0b", "x" * 65, "夜" * 64, "a:b", "a*", "\udcff", "a\tb")
    for name in bad:
        with pytest.raises(HdrqError, match="give it another name"):
            check_name(name)
    monkeypatch.chdir(tmp_path)
    for name in ("../evil", ".x", "a/b", "x" * 300):
        one = ["--model", "absent:M", "--data", "d.npz", "--domain", name, "-o", "o.hdrq"]
        two = [*one[:3], "a.npz", "b.npz", "--domain", "night", name, "-o", "out"]
        for argv in (one, two):
            assert "give it another name" in refused(calibrate.main, argv, capsys)
        for main, argv in (
            (merge.main, [NONE, NONE, "--weights", "auto", "--data", f"{name}=d", "-o", "m"]),
            (merge.main, [NONE, NONE, "--re-estimate", f"{name}=d", "-o", "m"]),
            (bench.main, ["absent", "--data", f"{name}=d", "--draw", "pictures"]),
            (verify.main, [NONE, "--data", f"{name}=d"]),
            (analyze.main, [NONE, NONE, "--data", f"{name}=d", "-o", "r"]),
            (sensitivity.main, [NONE, "--data", f"{name}=d"]),
        ):
            assert "give it another name" in refused(main, argv, capsys)
    assert "without NAME=" in refused(verify.main, [NONE, "--data", "odd:name"], capsys)
    from hdrq_deploy.calibration import calibrate as library

    with pytest.raises(HdrqError, match="give it another name"):
        library("absent:M", "d.npz", "../evil", tmp_path / "o.hdrq")


def test_files_of_a_manifest_stay_in_their_folder(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    assert export.main([str(make().path), "-o", str(engine)]) == 0
    bundle = tmp_path / "copy.hdrq"
    shutil.copytree(make().path, bundle)
    for folder, argv in (
        (engine, ["triton", str(engine), "-o", str(tmp_path / "repository")]),
        (bundle, [str(bundle), "-o", str(tmp_path / "again")]),
    ):
        manifest = json.loads((folder / "manifest.json").read_text())
        entry = next(iter(manifest["files"].values()))
        for name in ("model.onnx/../../../evil", "../evil", "/evil", "..", ""):
            changed = {**manifest, "files": {**manifest["files"], name: entry}}
            (folder / "manifest.json").write_text(json.dumps(changed))
            main = emit.main if folder is engine else export.main
            assert main(argv) == 2
            assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "evil").exists() and not (tmp_path / "repository").exists()


def test_seeds_are_what_numpy_and_torch_take(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1, 2**32, 2**63 - 1):
        assert check_seed(seed) == seed
        np.random.default_rng(seed)
        torch.manual_seed(seed)
    for seed in (-1, 2**63, 10**20, 10**5000):
        with pytest.raises(SpecError, match="needed a whole number of 0 to"):
            check_seed(seed)
    monkeypatch.chdir(tmp_path)
    lines = {
        calibrate.main: "--model absent:M --data d.npz --domain d -o o --seed",
        merge.main: "a b -o o --seed",
        adapt.main: "--model absent:M --weights w --data d -o o.safetensors --seed",
        analyze.main: "a b --data d=d -o o --seed",
        sensitivity.main: "a --data d=d --seed",
        demo.main: "--seed",
        reproduce.main: "office-home --made --out o --seeds",
    }
    for main, line in lines.items():
        for seed in ("1" + "0" * 20, "-1", str(2**63)):
            assert "0 to 2**63 - 1" in refused(main, [*line.split(), seed], capsys)
        for seed in ("1.5", "x", "9" * 5000):
            with pytest.raises(SystemExit) as stopped:
                main([*line.split(), seed])
            text = capsys.readouterr().err
            assert stopped.value.code == 2 and text.count("\n") == 1 and len(text) < 500
            assert "needed a whole number of 0 to 2**63 - 1" in text
    (tmp_path / "r.yaml").write_text(f"seed: {10**20}\n")
    argv = [*lines[calibrate.main].split()[:-1], "--recipe", "r.yaml"]
    assert "0 to 2**63 - 1" in refused(calibrate.main, argv, capsys)
    # The largest seed goes all the way.
    argv = (
        f"--model tiny_models:Tiny --weights {work}/Tiny-night.safetensors --data {work}/data.npz"
    )
    argv += f" --epochs 1 --batch 16 -o {tmp_path}/a.safetensors --seed {2**63 - 1}"
    assert adapt.main(argv.split()) == 0


def test_a_full_disk_is_one_line(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(make().path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["hdrq_deploy.exporters.export"], "explain", full)
        assert "no space left on device at /tmp/x" in refused(
            export.main, [bundle, "-o", "engine"], capsys
        )
    for wrapper in (OSError, RuntimeError):  # as libraries pass it on
        with monkeypatch.context() as patch:

            def wrapped(*_: object, wrapper: type[Exception] = wrapper, **__: object) -> None:
                try:
                    full()
                except OSError as error:
                    raise wrapper("the write failed") from error

            patch.setattr("hdrq_deploy.cli.verify.verify", wrapped)
            assert "no space left on device at /tmp/x" in refused(verify.main, [bundle], capsys)
    monkeypatch.setattr("hdrq_deploy.formats.atomic_files.os.posix_fallocate", full)
    with pytest.raises(DataError, match="found no room for"):
        files.mapped_file(1 << 20, "images")


def test_tmpdir_is_looked_at_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = {name: (main, line("out")) for name, (main, _, line) in FOLDERS.items()}
    lines |= {"verify": (verify.main, [NONE]), "bench": (bench.main, ["absent"])}
    lines |= {"demo": (demo.main, ["--out", "out"])}
    (tmp_path / "file").write_text("x")
    for given, text in (("absent", "found no folder at TMPDIR="), ("file", "found no folder")):
        monkeypatch.setenv("TMPDIR", str(tmp_path / given))
        for name, (main, argv) in lines.items():
            if not name.startswith("emit"):  # it needs none
                assert text in refused(main, argv, capsys), name

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    for name, (main, argv) in lines.items():
        if not name.startswith("emit"):
            assert "cannot be written to (No space left on device)" in refused(main, argv, capsys)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to mount")
def test_a_full_tmpdir(make: Any, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=64k tmpfs {small} || exit 77\n"
        f"head -c 60000 /dev/zero > {small}/filled\n"
        f"export TMPDIR={small}\n"
        f"{sys.executable} -c 'from hdrq_deploy.cli.export import main; raise SystemExit(main())' "
        f"{make().path} -o {tmp_path}/engine\n"
    )
    command = ["unshare", "-m", "sh", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip("no permission to mount")
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "TMPDIR" in run.stderr and not (tmp_path / "engine").exists()
