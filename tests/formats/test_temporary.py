"""What killed writers leave goes at the next write; what lives, or is a user's, stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hdrq_deploy.formats.atomic_files import (
    FileKind,
    FolderKind,
    new_directory,
    remove_folder,
    replaced,
    write_record,
)
from hdrq_deploy.formats.temporary import abandoned, temporary_file, temporary_folder

KIND = FolderKind("hdrq-test", "record.json")

PARTIAL_FOLDER = """
with new_directory(target, KIND) as new:
    (new / "a.txt").write_text("half")
    stop()
"""
PARTIAL_FILE = """
with replaced(target) as file:
    file.write(b"half")
    stop()
"""
SCRATCH = """
with temporary_folder(target) as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text("half")
    stop()
"""
# Between the two renames of a swap, and behind them.
OLD_ASIDE = """
write(target)
rename = Path.rename
def renamed(self, goal):
    if goal == target and {when}: stop()
    rename(self, goal)
    if goal == target: stop()
Path.rename = renamed
write(target)
"""
# In the middle of the removal of an old folder: aside, and where it lies.
HALF_REMOVED = """
write(target)
unlink = Path.unlink
def unlinked(self, missing_ok=False):
    unlink(self, missing_ok)
    if self.suffix != ".hdrq-tmp": stop()
Path.unlink = unlinked
{action}
"""
START = """
import os, signal, sys
from pathlib import Path
from hdrq_deploy.formats.atomic_files import (
    FolderKind, new_directory, remove_folder, replaced, write_record
)
from hdrq_deploy.formats.temporary import temporary_folder
KIND = FolderKind("hdrq-test", "record.json")
target = Path(sys.argv[1])
def stop():
    os.kill(os.getpid(), signal.SIGKILL)
def write(target):
    with new_directory(target, KIND) as new:
        (new / "a.txt").write_text("old")
        write_record(new, KIND, {})
"""


def killed(program: str, target: Path) -> None:
    """Run the program, which kills itself at ``stop()``."""
    done = subprocess.run([sys.executable, "-c", START + program, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL


def write_folder(target: Path) -> None:
    with new_directory(target, KIND) as new:
        (new / "a.txt").write_text("whole")
        write_record(new, KIND, {})


def write_file(target: Path) -> None:
    with replaced(target) as file:
        file.write(b"whole")


@pytest.mark.parametrize(
    ("program", "write"),
    [
        (PARTIAL_FOLDER, write_folder),
        (PARTIAL_FILE, write_file),
        (SCRATCH, write_folder),
        (OLD_ASIDE.format(when="True"), write_folder),
        (OLD_ASIDE.format(when="False"), write_folder),
        (HALF_REMOVED.format(action="write(target)"), write_folder),
    ],
    ids=["folder", "file", "scratch", "old aside", "old left", "old half removed"],
)
def test_the_next_write_removes_what_a_killed_one_left(
    program: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    killed(program, target)
    assert [path for path in tmp_path.iterdir() if path != target]  # it does leave something
    write(target)
    write(target)  # an old folder that was aside goes when its successor is in place
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_was_half_removed_is_still_ours(tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed(HALF_REMOVED.format(action="remove_folder(target, KIND)"), target)
    assert [path.name for path in target.iterdir()] == [KIND.marker]
    write_folder(target)
    assert (target / "a.txt").read_text() == "whole"
    remove_folder(target, KIND)
    assert list(tmp_path.iterdir()) == []


def test_temporaries_of_what_a_folder_may_hold_are_ours(tmp_path: Path) -> None:
    kind = FolderKind(
        "hdrq-test",
        "record.json",
        more=r"cache/\w+\.blob",
        places=("cache",),
        beside=(("README.md", FileKind("card", lambda _: True)),),
    )
    with new_directory(tmp_path / "out", kind) as new:
        (new / "deep").mkdir()
        (new / "deep" / "a.txt").write_text("a")
        write_record(new, kind, {})
    (tmp_path / "out" / "cache").mkdir()
    for name in ("record.json", "README.md", "deep/a.txt", "cache/b.blob"):
        place = tmp_path / "out" / name
        temporary = place.with_name(f".{place.name}.ab12_xyz.hdrq-tmp")
        temporary.write_text("half")
        assert kind.stranger(tmp_path / "out") == ""
    for name in ("b.txt", "deep/README.md", "deep/record.json", "cache/b.txt"):
        place = tmp_path / "out" / name
        temporary = place.with_name(f".{place.name}.ab12_xyz.hdrq-tmp")
        temporary.write_text("mine")
        assert temporary.name in kind.stranger(tmp_path / "out")
        temporary.unlink()


def test_a_living_writers_temporary_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with temporary_folder(target) as folder, temporary_file(tmp_path / "file") as (_, file):
        write_folder(target)
        write_file(tmp_path / "file")
        assert folder.is_dir() and file.is_file()
    assert not folder.exists() and not file.exists()


def test_what_is_a_users_stays(tmp_path: Path) -> None:
    """Other names, links, and an old folder with a file that is not ours."""
    target = tmp_path / "out"
    killed(OLD_ASIDE.format(when="True"), target)
    (old,) = tmp_path.glob(".out.old.*")
    (old / "thesis.txt").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.txt").write_text("mine")
    (tmp_path / ".out.abcdefgh.hdrq-tmp").symlink_to(elsewhere)
    for name in (".out.abcdefgh", ".out.backup.hdrq-tmp", "out.abcdefgh.hdrq-tmp"):
        (tmp_path / name).mkdir()
    half = next(path for path in tmp_path.glob(".out.????????.hdrq-tmp") if not path.is_symlink())
    before = sorted(set(tmp_path.iterdir()) - {half})
    write_folder(target)
    write_folder(target)
    assert sorted(tmp_path.iterdir()) == sorted([*before, target])
    assert (old / "thesis.txt").exists() and (elsewhere / "a.txt").exists()


def test_a_temporary_that_is_swept_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer may sweep between the making of a temporary and its lock."""
    target = tmp_path / "out"
    swept: list[Path] = []
    make = os.open

    def late(path: Path, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        descriptor = make(path, flags, *rest, dir_fd=dir_fd)
        if not swept and str(path).endswith(".hdrq-tmp"):
            swept.append(Path(path))
            for found in abandoned(target):
                found.rmdir()
        return descriptor

    monkeypatch.setattr(os, "open", late)
    with temporary_folder(target) as folder:
        assert swept and folder != swept[0] and folder.is_dir()
    assert not list(tmp_path.iterdir())
