"""What commands say, and how they end: pipes, terminals of few characters, signals, numbers."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.cli import common, start
from hdrq_deploy.cli.common import parser
from hdrq_deploy.errors import HdrqError

ENTRIES = {
    "hdrq": "hdrq_deploy.cli.main",
    "hdrq-calibrate": "hdrq_deploy.cli.calibrate",
    "hdrq-merge": "hdrq_deploy.cli.merge",
    "hdrq-export": "hdrq_deploy.cli.export",
    "hdrq-bench": "hdrq_deploy.cli.bench",
    "hdrq-verify": "hdrq_deploy.cli.verify",
}
LINES = {
    "hdrq": ["inspect", "absent"],
    "hdrq-calibrate": ["--model", "m:M", "--data", "d", "--domain", "d", "-o", "o"],
    "hdrq-merge": ["a", "b", "-o", "o"],
    "hdrq-export": ["a", "-o", "o"],
    "hdrq-bench": ["a"],
    "hdrq-verify": ["a"],
}


def script(folder: Path, command: str) -> list[str]:
    """A console script as pip writes it."""
    file = folder / command
    file.write_text(
        f"import sys\nfrom {ENTRIES[command]} import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    return [sys.executable, str(file)]


def slow(folder: Path, module: str, body: str = "time.sleep(60)") -> dict[str, str]:
    """An environment in which one module takes a minute to be imported, and says so."""
    (folder / "sitecustomize.py").write_text(
        "import builtins, sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {module!r}:\n"
        "            print('importing', flush=True)\n"
        f"            {body}\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    return {**os.environ, "PYTHONPATH": str(folder)}


def interrupted(command: list[str], environment: dict[str, str], cwd: Path) -> tuple[int, str]:
    """Exit code and errors of a command that gets Ctrl-C when it says so."""
    with subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("command", ENTRIES)
def test_control_c_while_modules_are_imported(command: str, tmp_path: Path) -> None:
    argv = [*script(tmp_path, command), *LINES[command]]
    code, errors = interrupted(argv, slow(tmp_path, "numpy"), tmp_path)
    assert code == 130
    name = "hdrq inspect" if command == "hdrq" else command
    assert errors == f"{name}: interrupted; nothing was written\n"


def test_control_c_while_torch_is_imported(work: Path, tmp_path: Path) -> None:
    # Native modules turn the exception of a handler into an ImportError.
    body = "\n            ".join(
        ("try: time.sleep(60)", "except KeyboardInterrupt: raise ImportError('no module')")
    )
    argv = [*script(tmp_path, "hdrq-calibrate"), *LINES["hdrq-calibrate"]]
    argv += ["--method", "rtn"]
    code, errors = interrupted(argv, slow(tmp_path, "torch", body), tmp_path)
    assert (code, errors) == (130, "hdrq-calibrate: interrupted; nothing was written\n")


def test_an_entry_is_light_until_it_is_guarded() -> None:
    probe = (
        "import sys, hdrq_deploy.cli.start\n"
        "heavy = {'numpy', 'onnx', 'torch', 'onnxruntime', 'rich', 'pydantic', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", probe],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"
    from hdrq_deploy import Bundle  # still there, imported when it is asked for

    assert Bundle.__name__ == "Bundle"


def test_control_c_in_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return 0

    def converted() -> int:
        try:
            return work()
        except KeyboardInterrupt as error:
            raise ImportError("what a native module makes of it") from error

    for body in (work, converted):
        assert start.run("hdrq x", body, "no bundle was written") == 130
        assert capsys.readouterr().err == "hdrq x: interrupted; no bundle was written\n"

    def terminated() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return 0

    assert start.run("hdrq x", terminated) == 143
    # A step of another command unwinds to that command, which says it once.
    assert start.run("hdrq demo", lambda: start.run("hdrq-merge", work)) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("hdrq demo: interrupted")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert before[0] is signal.default_int_handler

    # Whoever ignores it (nohup, a background job of a script) still does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert start.run("hdrq x", lambda: os.kill(os.getpid(), signal.SIGINT) or 0) == 0
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Another thread has no signals, and can run a command all the same.
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(start.run("hdrq x", lambda: 3)))
    thread.start()
    thread.join()
    assert codes == [3]


def test_errors_are_one_line_and_bugs_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Any:
        def body() -> int:
            raise error

        return body

    assert start.run("hdrq x", fail(HdrqError("found a\nb"))) == 2
    assert capsys.readouterr().err == "hdrq x: found a b\n"
    for number, text in ((28, "no space left"), (13, "permission denied"), (36, "name too long")):
        assert start.run("hdrq x", fail(OSError(number, os.strerror(number), "/x/y"))) == 2
        said = capsys.readouterr().err
        assert text in said and "/x/y; needed" in said and said.count("\n") == 1
    assert start.run("hdrq x", fail(MemoryError("Unable to allocate 9 TiB"))) == 2
    assert "ran out of memory (Unable" in capsys.readouterr().err
    assert start.run("hdrq x", fail(RuntimeError("[enforce fail] No space left on device"))) == 2
    assert "free some" in capsys.readouterr().err
    for absent in (
        ModuleNotFoundError("No module named 'skimage'", name="skimage"),
        ImportError("libcudart.so.12: cannot open shared object file"),
        ImportError("cannot import name 'x' from 'runtimes'", name="runtimes"),
    ):
        assert start.run("hdrq x", fail(absent)) == 2
        said = capsys.readouterr().err
        assert str(absent) in said and "pip install" in said and said.count("\n") == 1
    for bug in (
        ValueError("bug"),
        FileNotFoundError(2, "bug"),
        KeyError("bug"),
        ImportError("bug", name="hdrq_deploy.merging"),
        ModuleNotFoundError("bug", name="runtime"),
    ):
        with pytest.raises(type(bug)):
            start.run("hdrq x", fail(bug))
    assert not start._running


def run_script(
    folder: Path, command: str, argv: list[str], **how: Any
) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, **how}
    return subprocess.run([*script(folder, command), *argv], **options)


@pytest.fixture
def engine(make: Any, tmp_path: Path) -> Path:
    from hdrq_deploy.cli import export

    assert export.main([str(make().path), "-o", str(tmp_path / "engine")]) == 0
    return tmp_path / "engine"


def test_a_reader_that_leaves_ends_nothing(make: Any, engine: Path, tmp_path: Path) -> None:
    bundle = str(make().path)
    lines = [
        ("hdrq", ["inspect", bundle]),
        ("hdrq", ["inspect", bundle, "--json"]),
        ("hdrq", ["--help"]),
        ("hdrq-bench", ["--schema"]),
        ("hdrq-bench", [str(engine), "--iterations", "3", "--json", str(tmp_path / "o.json")]),
        ("hdrq-verify", [bundle, str(engine), "--no-torch"]),
        ("hdrq-export", [bundle, "-o", str(tmp_path / "again"), "--layers"]),
    ]
    for command, argv in lines:
        unbuffered = {"PYTHONUNBUFFERED": "1"} if "--json" in argv else {}
        with subprocess.Popen(
            [*script(tmp_path, command), *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **unbuffered},
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            errors = process.stderr.read()
            assert process.wait() == 0, errors
        assert not any(word in errors for word in ("Traceback", "Exception", "BrokenPipe")), errors
    # The work was done all the same.
    assert json.loads((tmp_path / "o.json").read_text())["kind"] == "hdrq-bench"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_terminal_that_takes_nothing(make: Any, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        for argv in (["inspect", str(make().path)], ["--help"]):
            run = run_script(
                tmp_path, "hdrq", argv, capture_output=False, stdout=full, stderr=subprocess.PIPE
            )
            assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
            assert "cannot write to the terminal or pipe (No space left" in run.stderr


def test_closed_streams(make: Any, tmp_path: Path) -> None:
    command = [*script(tmp_path, "hdrq"), "inspect", str(make().path)]
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    assert subprocess.run(closed, check=False).returncode == 0


def test_a_stream_has_a_character_for_everything() -> None:
    raw = io.BytesIO()
    stream = start._Stream(io.TextIOWrapper(raw, "ascii"))
    assert stream.write("né\udcff…") == 4
    stream.writelines(["a", "b"])
    stream.flush()
    assert raw.getvalue() == b"n\\xe9\\udcff\\u2026ab"
    assert stream.encoding == "ascii" and stream.isatty() is False


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


def test_names_beyond_ascii(make: Any, work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "größe ñ"
    folder.mkdir()
    for domain, name in (("night", "nächt.hdrq"), ("day", "tag é.hdrq")):
        shutil.copytree(make(domain=domain).path, folder / name)
    shutil.copy(work / "data.npz", folder / "bilder ü.npz")
    for name in "abcd":
        shutil.copytree(work / "images" / name, folder / "klassen" / f"{name}ß")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHON"))}
    environment |= {**ASCII, "PYTHONPATH": str(work)}
    data = ["--data", "nacht=bilder ü.npz"]
    calibrated = ["--model", "tiny_models:Tiny", "--method", "rtn", "--data", "klassen"]
    lines = [
        ("hdrq-calibrate", [*calibrated, "--domain", "nächt", "-o", "neu-ö.hdrq"]),
        ("hdrq-merge", ["nächt.hdrq", "tag é.hdrq", "-o", "gemischt-ö.hdrq"]),
        ("hdrq-export", ["gemischt-ö.hdrq", "-o", "motor-ö", "--layers"]),
        ("hdrq-export", ["neu-ö.hdrq", "-o", "motor2-ö"]),
        ("hdrq-verify", ["gemischt-ö.hdrq", "motor-ö", "--json", "v-ö.json", *data]),
        ("hdrq-bench", ["motor-ö", *data, "--iterations", "3", "--json", "ö.json", "--csv", "ö"]),
        ("hdrq", ["emit", "triton", "motor2-ö", "-o", "triton-ö"]),
    ]
    for command, argv in lines:
        run = run_script(tmp_path, command, argv, cwd=folder, env=environment, text=False)
        assert run.returncode == 0, run.stderr
        assert b"Traceback" not in run.stderr
        assert run.stdout.isascii() and run.stderr.isascii()
    assert json.loads((folder / "ö.json").read_text())["path"] == "motor-ö"
    manifest = json.loads((folder / "motor2-ö" / "manifest.json").read_text())
    assert manifest["domains"] == {"nächt": 1.0} and manifest["classes"][0] == "aß"
    labels = next((folder / "triton-ö").glob("*/labels.txt"))
    assert labels.read_bytes().decode("utf-8").split() == ["aß", "bß", "cß", "dß"]
    latin = {**environment, "PYTHONIOENCODING": "latin-1"}
    argv = ["inspect", "fehlt-ö…"]
    missing = run_script(tmp_path, "hdrq", argv, cwd=folder, env=latin, text=False)
    assert missing.returncode == 2 and missing.stderr.count(b"\n") == 1
    assert b"fehlt-\xf6\\u2026" in missing.stderr


def test_names_that_no_library_takes(make: Any, tmp_path: Path) -> None:
    """A folder whose name is no UTF-8, and a start that is no console script."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.hdrq")
    shutil.copytree(make().path, odd)
    run = run_script(tmp_path, "hdrq-export", [odd, "-o", str(tmp_path / "engine")])
    assert run.returncode in {0, 2} and run.stderr.count("\n") <= 1, run.stderr
    run = run_script(tmp_path, "hdrq-export", [str(make().path), "-o", odd + "-engine"])
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    folder = tmp_path / "ö"
    shutil.copytree(make().path, folder)
    program = "import sys; from hdrq_deploy.cli.export import main; sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder), "-o", str(tmp_path / "engine-ö")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ASCII},
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "needed UTF-8: set PYTHONUTF8=1" in run.stderr


def test_numbers_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    made = parser("hdrq x", "")
    made.add_argument("--images", type=int)
    made.add_argument_group("more").add_argument("--lr", type=float, nargs="+")
    found = made.parse_args(["--images", "-3", "--lr", "1e-3", "2"])
    assert found.images == -3 and found.lr == [1e-3, 2.0]
    for argv in (
        ["--images", "1" + "0" * 20],
        ["--images", "9" * 6000],
        ["--images", "1.5"],
        ["--images", "x\ny"],
        ["--lr", "nan"],
        ["--lr", "1e999"],
        ["--lr", "1", "two"],
        ["--lr"],
        ["--other"],
        ["--images"],
    ):
        with pytest.raises(SystemExit) as stopped:
            made.parse_args(argv)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and len(said) < 400
        assert said.startswith("hdrq x: ") and "'hdrq x --help' shows the flags" in said


def test_a_command_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    from hdrq_deploy.cli.main import main

    for argv in (["fly"], [], ["--fly"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "sensitivity" in capsys.readouterr().out


def test_installed_scripts_are_these_entries() -> None:
    import importlib.metadata

    scripts = importlib.metadata.entry_points(group="console_scripts")
    found = {s.name: s.value for s in scripts if s.name.startswith("hdrq")}
    assert found == {name: f"{module}:main" for name, module in ENTRIES.items()}
    assert sysconfig.get_path("scripts")


def test_numbers_beyond_memory(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hdrq_deploy.cli import bench

    def refuse(*_: object, **__: object) -> None:
        np.empty(1 << 62, np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hdrq_deploy.cli.bench.benchmark_all", refuse)
        assert bench.main([str(engine)]) == 2
    assert "ran out of memory" in capsys.readouterr().err


def test_control_c_while_workers_start(work: Path, tmp_path: Path) -> None:
    """A terminal sends it to all processes of the group; one line is said for all of them."""
    names = ["night", "day"]
    argv = ["--model", "tiny_models:Tiny", "--method", "rtn", "--domain", *names, "--workers", "2"]
    argv += ["--data", *[f"{work}/images"] * 2, "-o", str(tmp_path / "out")]
    environment = slow(tmp_path, "tiny_models", "time.sleep(4)")
    environment["PYTHONPATH"] += f"{os.pathsep}{work}"
    with subprocess.Popen(
        [*script(tmp_path, "hdrq-calibrate"), *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        deadline = time.monotonic() + 60
        while not _children(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # they import
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("hdrq-calibrate: interrupted;") and errors.count("\n") == 1, errors


def _children(pid: int) -> list[str]:
    """Processes that a process started."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return file.read_text().split() if file.exists() else []


def test_lines_of_pieces_tell_the_time_since_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pieces that ran side by side end one second apart: the second did not take one second."""
    now = iter([0.0, 0.5, 600.5, 601.5, 1201.5])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(now))
    with common.progress_lines("pacs") as report:
        for done, name in enumerate(("kept", "first", "second", "third"), 1):
            report(done, 6, name)
    assert capsys.readouterr().err.splitlines() == [
        "pacs 1/6 kept: 0 s so far",
        "pacs 2/6 first: 600 s so far, 2400 s left",
        "pacs 3/6 second: 602 s so far, 902 s left",
        "pacs 4/6 third: 1202 s so far, 801 s left",
    ]


def test_the_time_left_of_cells_is_not_that_of_the_search_before_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells that are there already end at once behind a search of an hour: none takes an hour."""
    now = iter([0.0, 1800.0, 3600.0, 3600.5, 3601.0, 3661.0])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(now))
    with common.progress_lines("camvid") as report:
        for done, name in ((1, "lr0.01"), (2, "lr0.1")):
            report(done, 2, name)
        for done, name in enumerate(("kept", "kept too", "made"), 1):
            report(done, 5, name)
    assert capsys.readouterr().err.splitlines() == [
        "camvid 1/2 lr0.01: 1800 s so far, 1800 s left",
        "camvid 2/2 lr0.1: 3600 s so far, 0 s left",
        "camvid 1/5 kept: 3600 s so far",
        "camvid 2/5 kept too: 3601 s so far",
        "camvid 3/5 made: 3661 s so far, 120 s left",
    ]
