"""Jobs in this process, or in several processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process

from ..errors import HdrqError
from ..formats.notes import show_notes
from .job import RETRIES, Job, Pool
from .waiting import shorten_idle_spinning

__all__ = ["InProcess", "Processes"]

_GRACE_S = 5.0


class InProcess(Pool):
    """Jobs run one after another in this process."""

    room = 1

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def submit(self, job: Job) -> Job:
        """See :meth:`.job.Pool.submit`."""
        return job

    def first(self, handles: Sequence[Job]) -> Job:
        """See :meth:`.job.Pool.first`."""
        handles[0].run(self._threads)
        return handles[0]


class Processes(Pool):
    """Processes of this machine; a killed process is replaced and its job repeated."""

    def __init__(self, workers: int, threads: int) -> None:
        self.room, self._threads = workers, threads
        self._jobs: dict[Future[None], Job] = {}
        self._lost = 0
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        return ProcessPoolExecutor(self.room, context, _begin_worker)

    def submit(self, job: Job) -> Job:
        """See :meth:`.job.Pool.submit`."""
        try:
            with _no_interrupt():  # a new process inherits this
                future = self._pool.submit(job.run, self._threads)
        except BrokenProcessPool as error:
            self._restart(error)
            return self.submit(job)
        self._jobs[future] = job
        return job

    def first(self, handles: Sequence[Job]) -> Job:
        """See :meth:`.job.Pool.first`."""
        while True:
            done, _ = wait(self._jobs, return_when=FIRST_COMPLETED)
            future = next(iter(done))
            try:
                future.result()
            except BrokenProcessPool as error:
                self._restart(error)
                continue
            return self._jobs.pop(future)

    def _restart(self, error: BrokenProcessPool) -> None:
        """A killed process breaks the pool: all jobs that ran begin again and resume."""
        self._lost += 1
        if self._lost > RETRIES:
            raise HdrqError(
                f"found {self._lost} workers killed (out of memory?); finished jobs are kept: "
                "use fewer `workers` and call again"
            ) from error
        again, self._jobs = list(self._jobs.values()), {}
        self._pool = self._start()
        for job in again:
            self.submit(job)

    def close(self, failed: bool) -> None:
        """End the workers; at once where the run failed."""
        if failed:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block; a process that begins in it never receives it.

    A terminal sends Ctrl-C to workers too, which would print a traceback while they import.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """Set how a new process waits, where its notes go, and how it ends."""
    shorten_idle_spinning()
    show_notes("hdrq")
    # Ctrl-C is for the process that waits for the workers; it ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _unwind)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _unwind(*_: object) -> None:
    raise SystemExit(143)  # temporary folders go


def _leave_with_parent() -> None:
    """End this worker with its parent: it would write where the next run does."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        os._exit(1)
