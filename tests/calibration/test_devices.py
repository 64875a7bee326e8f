"""What calibrations set for the process that they run in."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Page faults of six tensors of 8 MB that come and go together, after rounds that settle where the
# heap puts them.
PROGRAM = """
import resource
import torch
from hdrq_deploy.calibration.devices import keep_freed_memory
kept = keep_freed_memory()
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(1 << 21)
def rounds(count):
    for _ in range(count):
        y = [x + 1 for _ in range(6)]
        del y
rounds(64)
before = faults()
rounds(32)
print(kept, faults() - before)
"""


def run(**environment: str) -> tuple[bool, int]:
    given = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
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
    # glibc's default, said: by itself it would raise it as the heap happens to lie.
    returned, kept = run(MALLOC_MMAP_THRESHOLD_="131072"), run()
    # What the user set for malloc is not changed.
    assert not returned[0] and kept[0]
    assert kept[1] < returned[1] / 10
