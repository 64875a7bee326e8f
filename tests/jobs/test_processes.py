"""Processes that are killed are replaced; jobs that fail end the run.

Workers import this module, so that it needs nothing that takes long to import.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hdrq_deploy.errors import DataError, HdrqError
from hdrq_deploy.jobs.job import Job, run_jobs
from hdrq_deploy.jobs.pool import open_pool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _workers_import_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_a_killed_process_is_replaced(tmp_path: Path) -> None:
    work = [Job(str(i), suicide, {"mark": tmp_path / str(i), "kills": i == 1}) for i in range(3)]
    with open_pool(2, 1, None, tmp_path) as pool:
        run_jobs(work, pool)
    assert all((tmp_path / str(i)).read_text() == "done" for i in range(3))


def test_workers_that_are_killed_again_and_again_are_given_up(tmp_path: Path) -> None:
    work = [Job("a", suicide, {"mark": tmp_path / "none" / "a", "kills": True})]
    killed = pytest.raises(HdrqError, match="4 workers killed.*fewer `workers`")
    with killed, open_pool(2, 1, None, tmp_path) as pool:
        run_jobs(work, pool)


def suicide(mark: Path, kills: bool) -> None:
    """Killed the first time, where asked to."""
    if kills and not mark.exists():
        if mark.parent.is_dir():
            mark.write_text("begun")
        os.kill(os.getpid(), signal.SIGKILL)
    mark.write_text("done")


def fail(message: str) -> None:
    raise DataError(message)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_job_ends_the_run_with_its_line(workers: int, tmp_path: Path) -> None:
    work = [
        Job("good", suicide, {"mark": tmp_path / "good", "kills": False}),
        Job("bad", fail, {"message": "no images"}, ("good",)),
        Job("after", suicide, {"mark": tmp_path / "after", "kills": False}, ("bad",)),
    ]
    with pytest.raises(DataError, match="no images"), open_pool(workers, 1, None, tmp_path) as p:
        run_jobs(work, p)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["good"]
