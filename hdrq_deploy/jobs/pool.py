"""Independent pieces of work: on this machine's cores, or on a Ray cluster.

A job is a function and its arguments; what it makes, it writes to disk, whole or not at all, and
a job whose result is there returns at once. So a run that was stopped, or lost a worker, goes on
where it was, and where a job ran does not change a byte of its result.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import secrets
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from ..errors import HdrqError
from ..formats.atomic_files import write_bytes
from ..formats.notes import show_notes
from ..graph.reference_session import session_threads
from .waiting import shorten_idle_spinning

__all__ = ["Job", "open_pool", "reach", "run_jobs"]

Report = Callable[[int, int, str], None]
RETRIES = 3
_REACH_S = 5.0


@dataclass(frozen=True)
class Job:
    """A function of a module (workers import it) and its arguments.

    Attributes:
        name: Unique among the jobs of a run.
        work: Called with ``arguments``; returns nothing.
        after: Names of jobs whose results it reads.
    """

    name: str
    work: Callable[..., None]
    arguments: Mapping[str, Any]
    after: tuple[str, ...] = ()


class Pool(ABC):
    """Where jobs run, ``room`` at a time."""

    room: int

    @abstractmethod
    def submit(self, job: Job) -> Any:
        """Begin a job; returns what :meth:`first` takes."""

    @abstractmethod
    def first(self, handles: Sequence[Any]) -> Any:
        """Wait for one of them to end; raises what it raised."""


class _Here(Pool):
    """One after another, in this process."""

    room = 1

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def submit(self, job: Job) -> Job:
        return job

    def first(self, handles: Sequence[Job]) -> Job:
        _work(handles[0], self._threads)
        return handles[0]


class _Processes(Pool):
    """Processes of this machine; a killed one takes its job's time, not its result."""

    def __init__(self, workers: int, threads: int) -> None:
        self.room, self._threads = workers, threads
        self._jobs: dict[Future[None], Job] = {}
        self._lost = 0
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        return ProcessPoolExecutor(self.room, context, _begin_worker)

    def submit(self, job: Job) -> Job:
        try:
            with _no_interrupt():  # a new process inherits this
                future = self._pool.submit(_work, job, self._threads)
        except BrokenProcessPool as error:
            self._begin_again(error)
            return self.submit(job)
        self._jobs[future] = job
        return job

    def first(self, handles: Sequence[Job]) -> Job:
        while True:
            done, _ = wait(self._jobs, return_when=FIRST_COMPLETED)
            future = next(iter(done))
            try:
                future.result()
            except BrokenProcessPool as error:
                self._begin_again(error)
                continue
            return self._jobs.pop(future)

    def _begin_again(self, error: BrokenProcessPool) -> None:
        """A killed process breaks the pool: all that ran begins again behind its last block."""
        self._lost += 1
        if self._lost > RETRIES:
            raise HdrqError(
                f"found {self._lost} workers killed (out of memory?); finished cells are kept: "
                "pass fewer --workers and call again"
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
    """Ctrl-C waits for the end of the block; a process that begins in it never gets any.

    A terminal sends it to workers too, which would answer with a traceback as long as they import.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """In a new process: how its threads wait, where its notes go, and how it ends."""
    shorten_idle_spinning()
    show_notes("hdrq")
    # Ctrl-C is for the process that waits for the workers; it ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _unwind)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _unwind(*_: object) -> None:
    raise SystemExit(143)  # temporary folders go


def _leave_with_parent() -> None:
    """A worker whose parent was killed would go on, and write where the next run does."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_REACH_S)
        os._exit(1)


class _Ray(Pool):
    """Tasks of a Ray cluster, whose nodes see the same files."""

    def __init__(self, ray: Any, threads: int, gpus: float, shared: Path, token: str) -> None:
        self._ray = ray
        _check_room(ray, threads, gpus)
        cores = ray.cluster_resources().get("CPU", 1)
        self.room = max(1, int(cores // threads))
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)
        self._task = task(_work_shared)
        self._extra = (threads, str(shared), token)
        self._jobs: dict[Any, Job] = {}

    def submit(self, job: Job) -> Job:
        self._jobs[self._task.remote(job, *self._extra)] = job
        return job

    def first(self, handles: Sequence[Job]) -> Job:
        (done,), _ = self._ray.wait(list(self._jobs), num_returns=1)
        try:
            self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            raise cause from error
        except self._ray.exceptions.RayError as error:
            raise HdrqError(
                f"{self._jobs[done].name}: Ray gave it up ({str(error).splitlines()[0]}); finished "
                "cells are kept: call again to go on"
            ) from error
        return self._jobs.pop(done)


def _check_room(ray: Any, threads: int, gpus: float) -> None:
    """A task that fits no node would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(n.get("CPU", 0) >= threads and n.get("GPU", 0) >= gpus for n in nodes):
        return
    found = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes)
    raise HdrqError(
        f"found no node with {threads} CPU and {gpus:g} GPU (there are: {found}); pass fewer "
        "--threads or --gpus"
    )


@contextlib.contextmanager
def open_pool(
    workers: int, threads: int, ray: str | None, shared: Path, gpus: float = 0.0
) -> Iterator[Pool]:
    """A place for jobs.

    Args:
        workers: Processes on this machine; 1 is this process.
        threads: Of each job; part of what decides its bytes.
        ray: Address of a Ray cluster (``HOST:PORT``, ``ray://HOST:PORT``, ``auto``), ``local``
            for one of this machine's cores, or None.
        shared: Folder that all jobs write to; every node of a cluster must see it.
        gpus: Of each job on Ray.

    Raises:
        HdrqError: Ray is not installed, or does not answer at this address.
    """
    if ray is None:
        if workers == 1:
            yield _Here(threads)
            return
        pool = _Processes(workers, threads)
        failed = True
        try:
            yield pool
            failed = False
        finally:
            pool.close(failed)
        return
    with _connected(ray) as client:
        token = secrets.token_hex(8)
        mark = shared / f".{token}"
        write_bytes(mark, token.encode())
        try:
            yield _Ray(client, threads, gpus, shared, token)
        finally:
            mark.unlink(missing_ok=True)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    reach(address)
    ray: Any = importlib.import_module("ray")
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    how = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        ray.init(address="local", include_dashboard=False, **how)
    else:
        try:
            ray.init(address=address, **how)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise HdrqError(
                f"--ray {address}: no cluster answers ({str(error).splitlines()[0]}); start one "
                "with `ray start --head`, or pass --ray alone for this machine"
            ) from error
    try:
        if main:  # Ray's own handler exits behind our back
            signal.signal(signal.SIGTERM, before)
        yield ray
    finally:
        ray.shutdown()


def reach(address: str) -> None:
    """Is Ray there, and does this address answer? Its own client would wait a minute.

    Raises:
        HdrqError: No.
    """
    if importlib.util.find_spec("ray") is None:
        raise HdrqError("--ray needs ray: pip install 'hdrq-deploy[ray]'")
    if address in {"local", "auto"}:
        return
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if not sign or not port.isdecimal():
        raise HdrqError(f"found --ray {address}; needed HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), _REACH_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise HdrqError(
            f"--ray {address}: does not answer ({error}); needed the address of a running cluster "
            "(`ray start --head` prints it), or --ray alone for this machine"
        ) from error


def run_jobs(jobs: Sequence[Job], pool: Pool, progress: Report | None = None) -> None:
    """Run all jobs, each behind those it waits for, in the given order where that is free.

    Raises:
        HdrqError: What the first failing job raised; what others finished is kept.
    """
    waiting, done, running = list(jobs), set[str](), list[Job]()
    while waiting or running:
        for job in [job for job in waiting if done.issuperset(job.after)]:
            if len(running) == pool.room:
                break
            waiting.remove(job)
            running.append(pool.submit(job))
        ended = pool.first(running)
        running.remove(ended)
        done.add(ended.name)
        if progress:
            progress(len(done), len(jobs), ended.name)


def _work(job: Job, threads: int) -> None:
    from ..calibration.pipeline import torch_threads

    with torch_threads(threads), session_threads(threads):
        job.work(**job.arguments)


def _work_shared(job: Job, threads: int, shared: str, token: str) -> None:
    """On a node of a cluster: only where it sees the folder that results go to."""
    shorten_idle_spinning()
    mark, deadline = Path(shared) / f".{token}", time.monotonic() + _REACH_S
    while not mark.is_file():  # network file systems show a new file late
        if time.monotonic() > deadline:
            raise HdrqError(
                f"node {socket.gethostname()} does not see {shared}; needed a folder (and data and "
                "checkpoints) that every node of the cluster sees under the same path"
            )
        time.sleep(0.1)
    _work(job, threads)
