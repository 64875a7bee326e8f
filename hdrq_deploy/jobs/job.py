"""Jobs, and the order in which a pool runs them.

A job is a function and its arguments. It writes its result to disk completely or not at all, and
returns at once where the result exists. So a run that was stopped, or lost a worker, resumes, and
the bytes of a result do not depend on where its job ran.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..graph.reference_session import session_threads
from ..typing import Progress

__all__ = ["RETRIES", "Job", "Pool", "run_jobs"]

# How often work is begun again after its process was killed.
RETRIES = 3


@dataclass(frozen=True)
class Job:
    """A function of a module (workers import it) and its arguments.

    Attributes:
        name: Unique among the jobs of a run.
        work: Called with ``arguments``; returns nothing.
        after: Names of jobs whose results it reads.
        limit_threads: A context in which the libraries that the job uses run on this number of
            threads; by default those of ONNX Runtime.
    """

    name: str
    work: Callable[..., None]
    arguments: Mapping[str, Any]
    after: tuple[str, ...] = ()
    limit_threads: Callable[[int], AbstractContextManager[Any]] = session_threads

    def run(self, threads: int) -> None:
        """Do the work in this process."""
        with self.limit_threads(threads):
            self.work(**self.arguments)


class Pool(ABC):
    """A place where jobs run, ``room`` at a time."""

    room: int

    @abstractmethod
    def submit(self, job: Job) -> Any:
        """Begin a job; returns what :meth:`first` takes."""

    @abstractmethod
    def first(self, handles: Sequence[Any]) -> Any:
        """Wait for one of them to end; raises what the job raised."""


def run_jobs(
    jobs: Sequence[Job],
    pool: Pool,
    progress: Progress | None = None,
    begun: Callable[[str], None] | None = None,
) -> None:
    """Run all jobs in the given order, each after those whose results it reads.

    Args:
        jobs: What is done.
        pool: Where.
        progress: Called when a job has ended, with its name.
        begun: Called with the name of a job that a worker may begin.

    Raises:
        HdrqError: What the first failing job raised; results of finished jobs stay on disk.
    """
    waiting, done, running = list(jobs), set[str](), list[Job]()
    while waiting or running:
        for job in [job for job in waiting if done.issuperset(job.after)]:
            if len(running) == pool.room:
                break
            waiting.remove(job)
            running.append(pool.submit(job))
            if begun:
                begun(job.name)
        ended = pool.first(running)
        running.remove(ended)
        done.add(ended.name)
        if progress:
            progress(len(done), len(jobs), ended.name)
