"""Where jobs run: this process, processes of this machine, or a Ray cluster."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from ..formats.atomic_files import write_bytes
from .job import Pool
from .processes import InProcess, Processes
from .ray_cluster import RayTasks, connected

__all__ = ["open_pool"]


@contextlib.contextmanager
def open_pool(
    workers: int, threads: int, ray: str | None, shared: Path, gpus: float = 0.0
) -> Iterator[Pool]:
    """A place for jobs.

    Args:
        workers: Processes on this machine; 1 is this process.
        threads: Threads of each job; they are part of what decides its bytes.
        ray: Address of a Ray cluster (``HOST:PORT``, ``ray://HOST:PORT``, ``auto``), ``local``
            for one of this machine's cores, or None for processes of this machine.
        shared: Folder that all jobs write to; every node of a cluster must see it.
        gpus: GPUs of each job on Ray.

    Raises:
        HdrqError: Ray is not installed, or does not answer at this address.
    """
    if ray is None:
        if workers == 1:
            yield InProcess(threads)
            return
        pool = Processes(workers, threads)
        failed = True
        try:
            yield pool
            failed = False
        finally:
            pool.close(failed)
        return
    with connected(ray) as client:
        token = secrets.token_hex(8)
        mark = shared / f".{token}"
        write_bytes(mark, token.encode())
        try:
            yield RayTasks(client, threads, gpus, shared, token)
        finally:
            mark.unlink(missing_ok=True)
