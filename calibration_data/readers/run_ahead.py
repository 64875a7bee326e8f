"""Work on threads that runs a bounded number of items ahead of its reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["run_ahead"]

Result = TypeVar("Result")


def run_ahead(
    work: Callable[..., Result], items: Iterable[tuple[Any, ...]], workers: int, ahead: int
) -> Iterator[Result]:
    """``work(*item)`` of all items, in order.

    Args:
        work: Called on threads; what it raises is raised at the item's turn.
        items: Arguments of each call.
        workers: Number of threads.
        ahead: The largest number of calls that are begun and not yet handed out.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        todo = iter(items)
        try:
            while True:
                while len(waiting) < ahead and (item := next(todo, None)) is not None:
                    waiting.append(pool.submit(work, *item))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
