"""What calibrations set for the process that they run in."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Page faults of tensors of 16 MB that come and go.
PROGRAM = """
import resource, sys
import torch
from hdrq_deploy.calibration.devices import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(1 << 22)
for _ in range(3):
    y = [x + 1, x * 2]
    del y
before = faults()
for _ in range(8):
    y = [x + 1, x * 2]
    del y
print(kept, faults() - before)
"""


def run(how: str, **environment: str) -> tuple[bool, int]:
    given = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env=given | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone returns memory so")
def test_tensors_that_come_and_go_take_no_new_pages() -> None:
    usual, kept = run("leave"), run("keep")
    assert not usual[0] and kept[0]
    assert kept[1] < usual[1] / 4
    # What the user set for malloc is not changed.
    assert not run("keep", MALLOC_ARENA_MAX="1")[0]
