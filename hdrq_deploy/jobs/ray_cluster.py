"""Jobs as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import HdrqError
from .job import RETRIES, Job, Pool
from .waiting import shorten_idle_spinning

__all__ = ["RayTasks", "connected", "reach"]

_REACH_S = 5.0


class RayTasks(Pool):
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
        """See :meth:`.job.Pool.submit`."""
        self._jobs[self._task.remote(job, *self._extra)] = job
        return job

    def first(self, handles: Sequence[Job]) -> Job:
        """See :meth:`.job.Pool.first`."""
        (done,), _ = self._ray.wait(list(self._jobs), num_returns=1)
        try:
            self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            raise cause from error
        except self._ray.exceptions.RayError as error:
            raise HdrqError(
                f"{self._jobs[done].name}: Ray gave it up ({str(error).splitlines()[0]}); finished "
                "jobs are kept: call again to resume"
            ) from error
        return self._jobs.pop(done)


def _check_room(ray: Any, threads: int, gpus: float) -> None:
    """Refuse tasks that fit no node: they would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(n.get("CPU", 0) >= threads and n.get("GPU", 0) >= gpus for n in nodes):
        return
    sizes = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes)
    raise HdrqError(
        f"found no node with {threads} CPU and {gpus:g} GPU (there are: {sizes}); ask for "
        "fewer `threads` or `gpus`"
    )


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module ``ray``, connected to a cluster.

    Args:
        address: ``HOST:PORT``, ``ray://HOST:PORT``, ``auto``, or ``local`` for a cluster of this
            machine's cores.

    Raises:
        HdrqError: Ray is not installed, or does not answer at this address.
    """
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
                f"Ray at {address}: no cluster answers ({str(error).splitlines()[0]}); start one "
                "with `ray start --head`, or choose the address local for this machine"
            ) from error
    try:
        if main:  # Ray's own handler exits behind our back
            signal.signal(signal.SIGTERM, before)
        yield ray
    finally:
        ray.shutdown()


def reach(address: str) -> None:
    """Check that Ray is installed and an address answers; Ray's own client waits a minute.

    Raises:
        HdrqError: Ray is not installed, or nothing answers at this address.
    """
    if importlib.util.find_spec("ray") is None:
        raise HdrqError("a run on a cluster needs ray: pip install 'hdrq-deploy[ray]'")
    if address in {"local", "auto"}:
        return
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if not sign or not port.isdecimal():
        raise HdrqError(
            f"found the Ray address {address}; needed HOST:PORT, ray://HOST:PORT or auto"
        )
    try:
        socket.create_connection((host, int(port)), _REACH_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise HdrqError(
            f"Ray at {address} does not answer ({error}); needed the address of a running cluster "
            "(`ray start --head` prints it), or local for this machine"
        ) from error


def _work_shared(job: Job, threads: int, shared: str, token: str) -> None:
    """Do a job on a node of a cluster, if the node sees the folder of the results."""
    shorten_idle_spinning()
    mark, deadline = Path(shared) / f".{token}", time.monotonic() + _REACH_S
    while not mark.is_file():  # network file systems show a new file late
        if time.monotonic() > deadline:
            raise HdrqError(
                f"node {socket.gethostname()} does not see {shared}; needed a folder (and data and "
                "checkpoints) that every node of the cluster sees under the same path"
            )
        time.sleep(0.1)
    job.run(threads)
