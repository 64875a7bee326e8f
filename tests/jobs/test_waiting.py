"""Idle OpenMP threads of commands and workers sleep soon, where the user says nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hdrq_deploy.jobs.job import Job, run_jobs
from hdrq_deploy.jobs.pool import open_pool
from hdrq_deploy.runtime.ort import session_options

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
CALIBRATE = (
    "from hdrq_deploy.cli.calibrate import main; "
    "main('--model nothing_of_the_kind:Net --data x.npz --domain night --method rtn -o x.hdrq'"
    ".split())"
)


def spoken(code: str, **setting: str) -> str:
    """What a process without any of the variables but ``setting`` says, libgomp included."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **setting, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what torch brings on Linux")
@pytest.mark.parametrize(
    ("setting", "spins"),
    [
        ({}, "1000"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
    ],
)
def test_torchs_own_libgomp_has_the_setting(setting: dict[str, str], spins: str) -> None:
    said = spoken(CALIBRATE, **setting)
    assert "hdrq-calibrate: cannot import the model nothing_of_the_kind:Net" in said
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said)
    assert found and set(found) == {spins}


SHOW = """
import json, os
from hdrq_deploy.cli.common import run
run("x", lambda: print(json.dumps({k: os.environ.get(k) for k in %r})) or 0)
"""


@pytest.mark.parametrize("name", VARIABLES)
def test_a_user_who_has_set_one_of_them_has_decided(name: str) -> None:
    value = {"OMP_WAIT_POLICY": "active", "KMP_LIBRARY": "turnaround"}.get(name, "7")
    said = spoken(SHOW % (VARIABLES,), **{name: value})
    line = next(line for line in said.splitlines() if line.startswith("{"))
    assert json.loads(line) == {**dict.fromkeys(VARIABLES), name: value}


def test_a_library_changes_no_environment_and_the_number_of_threads_stays() -> None:
    code = "import os; before = dict(os.environ); import hdrq_deploy.calibration, torch; "
    late = "from hdrq_deploy.jobs.waiting import shorten_idle_spinning as s; assert not s(); "
    count = "print('threads', torch.get_num_threads())"
    plain = spoken(code + late + "assert dict(os.environ) == before; " + count)
    settled = spoken(late.replace("not ", "") + "import torch; " + count)
    assert re.findall(r"threads \d+", settled) == re.findall(r"threads \d+", plain)


def _tell(path: str) -> None:
    Path(path).write_text(json.dumps({name: os.environ.get(name) for name in VARIABLES}))


def test_workers_have_it_and_their_parent_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    jobs = [Job(f"{i}", _tell, {"path": str(tmp_path / f"{i}.json")}) for i in range(2)]
    with open_pool(2, 1, None, tmp_path) as pool:
        run_jobs(jobs, pool)
    for i in range(2):
        told = json.loads((tmp_path / f"{i}.json").read_text())
        assert told["GOMP_SPINCOUNT"] == "1000" and told["KMP_BLOCKTIME"] == "1"
    assert not any(name in os.environ for name in VARIABLES)


def test_sessions_that_are_only_checked_do_not_spin() -> None:
    key = "session.intra_op.allow_spinning"
    assert session_options(1, spin=False).get_session_config_entry(key) == "0"
    with pytest.raises(RuntimeError):  # an engine's session has ONNX Runtime's own default
        session_options(1).get_session_config_entry(key)
