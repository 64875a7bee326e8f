"""The clock: how often, in what order, and what the harness itself costs."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import DataError
from ...formats.bench_result import Latency, Scenario, Speedup
from ...numerics.batches import decides
from ...typing import Array
from ..engine import Engine, Feeds, Pending

__all__ = [
    "ROUNDS",
    "BenchPlan",
    "latency",
    "measure",
    "overhead_us",
    "phases",
    "run_offline",
    "speedup",
]

# Student's t, two-sided 95%, for 1 to 9 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Rounds in which several engines take turns.
ROUNDS = len(_T) + 1


@dataclass(frozen=True)
class BenchPlan:
    """How an engine is measured.

    Attributes:
        scenario: MLPerf's: see :class:`BenchResult`.
        warmup: Calls before the clock counts.
        iterations: Timed queries at least.
        duration: Seconds of timed queries at least.
        batch: Images a call; None takes 1, the streams of ``multistream``, 32 of ``offline``,
            or what the engine is fixed to.
        streams: Samples in one query of ``multistream``.
        percentiles: Further percentiles of the latency.

    Raises:
        DataError: A value is out of range.
    """

    scenario: Scenario = "singlestream"
    warmup: int = 10
    iterations: int = 100
    duration: float = 0.0
    batch: int | None = None
    streams: int = 8
    percentiles: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        least = {"warmup": 0, "iterations": 1, "batch": 1, "streams": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise DataError(f"found `{name}` {value}; needed {smallest} or more")
        if not 0 <= self.duration < math.inf:
            raise DataError(f"found `duration` {self.duration}; needed seconds, 0 or more")
        wrong = [p for p in self.percentiles if not 0 <= p <= 100]
        if wrong:
            raise DataError(f"found a percentile of {wrong[0]:g}; needed 0 to 100")

    def images(self, engine: Engine) -> int:
        """Images in one call.

        Raises:
            DataError: The engine takes another batch only.
        """
        wanted = self.batch or {"multistream": self.streams, "offline": 32}.get(self.scenario, 1)
        fixed = engine.inputs[0].shape[0]
        if not isinstance(fixed, int) or fixed == wanted:
            return wanted
        if self.batch is not None:
            raise DataError(f"{engine.path}: found `batch` {wanted}; the engine takes {fixed} only")
        return fixed

    def calls(self, images: int) -> int:
        """Calls in one query."""
        return math.ceil(self.streams / images) if self.scenario == "multistream" else 1


def measure(
    call: Callable[[], object],
    times: int,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
    duration: float = 0.0,
) -> tuple[float, ...]:
    """Latency in ms of each of ``times`` calls, and of more until ``duration`` s have gone."""
    latencies: list[float] = []
    until = duration * 1e9
    total = 0
    while len(latencies) < times or total < until:
        start = clock_ns()
        call()
        taken = clock_ns() - start
        total += taken
        latencies.append(taken / 1e6)
    return tuple(latencies)


def latency(
    samples: Sequence[float],
    batch: int,
    warmup: int,
    what: str = "one call: array in, array out",
    percentiles: Sequence[float] = (),
) -> Latency:
    """Samples and what they amount to."""
    p50, p90, p99 = (float(v) for v in np.percentile(samples, [50, 90, 99]))
    more = {f"{p:g}": float(np.percentile(samples, p)) for p in percentiles}
    return Latency(
        what=what,
        p50=p50,
        p90=p90,
        p99=p99,
        mean=statistics.fmean(samples),
        percentiles=more,
        batch=batch,
        warmup=warmup,
        iterations=len(samples),
        samples=tuple(samples),
    )


def run_offline(engine: Engine, x: Array, calls: int) -> tuple[tuple[float, ...], float]:
    """All samples at once: the engine's :attr:`~Engine.in_flight` calls are kept in flight.

    Returns:
        ms from each call's beginning to its end, and seconds from first to last.
    """
    flying: deque[tuple[int, Pending]] = deque()
    samples = []

    def land() -> None:
        began, pending = flying.popleft()
        pending.wait()
        samples.append((time.perf_counter_ns() - began) / 1e6)

    start = time.perf_counter()
    for _ in range(calls):
        if len(flying) == engine.in_flight:
            land()
        flying.append((time.perf_counter_ns(), engine.run_async(x)))
    while flying:
        land()
    return tuple(samples), time.perf_counter() - start


def phases(engine: Engine, frames: list[Array] | None, x: Array, times: int) -> dict[str, Latency]:
    """The parts of one answer, each with its samples.

    Args:
        engine: Warmed up.
        frames: Frames (H, W, C) uint8 of a camera; None where the manifest cannot prepare them.
        x: The network's input otherwise.
        times: Answers.
    """
    sizes = [frame.shape[:2] for frame in frames] if frames else [x.shape[-2:]] * len(x)
    samples: dict[str, list[float]] = {}

    def note(name: str, value: float | None) -> None:
        if value is not None:
            samples.setdefault(name, []).append(value)

    for _ in range(times):
        start = time.perf_counter_ns()
        given = engine.prepare(frames) if frames else x
        prepared = time.perf_counter_ns()
        results, inner = engine.timed(given)
        called = time.perf_counter_ns()
        output = next(iter(results.values()))
        answered = decides(output)
        if answered:
            engine.answers(output, sizes)
        end = time.perf_counter_ns()
        note("preprocess", (prepared - start) / 1e6 if frames else None)
        note("host_to_device", inner.host_to_device)
        note("compute", inner.compute)
        note("device_to_host", inner.device_to_host)
        note("postprocess", (end - called) / 1e6 if answered else None)
        note("end_to_end", (end - start) / 1e6)
    end_to_end = f"{'frame' if frames else 'array'} in, {'answer' if answered else 'array'} out"
    kind = "events on the engine's stream" if "host_to_device" in samples else "wall time"
    what = {
        "preprocess": "resize and normalise",
        "compute": f"the engine alone ({kind})",
        "postprocess": "scores to answers",
        "end_to_end": end_to_end,
    }
    return {
        name: latency(values, len(x), 0, what.get(name, f"copy ({kind})"))
        for name, values in samples.items()
    }


class _Idle(Engine):
    """The engine's own bookkeeping around no work at all."""

    def __init__(self, engine: Engine, results: dict[str, Array]) -> None:
        super().__init__(engine.path, engine.manifest, engine.threads, engine.device)
        self._results = results

    def _execute(self, feeds: Feeds) -> dict[str, Array]:
        return self._results

    def _release(self) -> None:
        self._results = {}


def overhead_us(engine: Engine, x: Array, times: int = 300) -> float:
    """What clock and loop add to one call, in µs (median)."""
    with _Idle(engine, {engine.outputs[0].name: x[:1]}) as idle:
        call = idle.bound(x)
        measure(call, 20)
        return 1000 * statistics.median(measure(call, times))


def speedup(ours: Sequence[float], theirs: Sequence[float], against: str) -> Speedup:
    """Ratio of medians, with an interval over the rounds that took turns.

    Args:
        ours: Median latency of every round, ms; two rounds or more.
        theirs: Median latency of the other engine in the same rounds, ms.
        against: Names the other engine.
    """
    logs = [math.log(b / a) for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.fmean(logs)
    t = _T[min(len(logs) - 2, len(_T) - 1)]
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(middle - half), math.exp(middle + half)
    return Speedup(
        against=against,
        ratio=math.exp(middle),
        low=low,
        high=high,
        rounds=len(logs),
        verdict="faster" if low > 1 else "slower" if high < 1 else "no difference shown",
    )
