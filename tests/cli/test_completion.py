"""Completion scripts complete in a real shell, and replace nothing that is not ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hdrq_deploy.cli import main as umbrella
from hdrq_deploy.merging import ROUNDINGS

pytest.importorskip("shtab")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_DATA_HOME", "BASH_COMPLETION_USER_DIR", "SHELL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def call(*argv: str) -> int:
    try:
        return umbrella.main(argv)
    except SystemExit as stopped:
        return int(stopped.code or 0)


def completed(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    function = f"_shtab_{words[0].replace('-', '_')}"
    script = f'source {folder}/{words[0]}; COMP_WORDS=("${{@}}"); COMP_CWORD={len(words) - 1}; '
    script += f'{function}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash at hand")
def test_bash_completes_commands_flags_choices_and_files(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/bash")
    assert call("--install-completion") == 0
    folder = home / ".local" / "share" / "bash-completion" / "completions"
    assert f"{folder}/hdrq-merge" in capsys.readouterr().out
    assert completed(folder, "hdrq", "st") == ["status", "statistics", "strip"]
    assert completed(folder, "hdrq-export", "--keep") == ["--keep-float"]
    assert completed(folder, "hdrq", "merge", "--rounding", "") == list(ROUNDINGS)
    assert completed(folder, "hdrq-merge", "hdrq-v") == ["hdrq-verify"]
    assert completed(folder, "hdrq-calibrate", "--wbits", "") == []
    assert call("--install-completion", "bash") == 0  # ours are written again


def test_a_file_of_the_users_is_left_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = home / ".local" / "share" / "zsh" / "site-functions" / "_hdrq-bench"
    own.parent.mkdir(parents=True)
    own.write_text("#compdef hdrq-bench\n# mine\n")
    assert call("--install-completion", "zsh") == 2
    said = capsys.readouterr()
    assert "_hdrq-bench" in said.err and said.err.count("\n") == 1 and not said.out
    assert [path.name for path in own.parent.iterdir()] == [own.name]
    own.unlink()
    assert call("--install-completion", "zsh") == 0
    assert f"fpath=({own.parent} $fpath)" in capsys.readouterr().out
    assert own.read_text().startswith("#compdef hdrq-bench\n")


def test_other_shells_get_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--install-completion"], ["--print-completion", "fish"]):
        assert call(*argv) == 2
        assert "needed one of bash, zsh" in capsys.readouterr().err
    assert call("--print-completion", "bash") == 0
    assert "-F _shtab_hdrq_verify hdrq-verify\n" in capsys.readouterr().out
