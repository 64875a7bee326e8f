"""Two benchmarks of one thing: what changed, and is it more than noise?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from ...errors import DataError
from ...formats.bench_result import BenchResult
from ...formats.records import first_fault
from ...typing import Array

__all__ = ["Change", "compare", "read_result"]

Verdict = Literal["better", "worse", "no difference shown"]
# A busy neighbour slows whole stretches: long blocks, and so few that an interval from them is
# too narrow by Student's factor (t with 9 degrees of freedom against the normal).
_BLOCKS, _WIDER = 10, 1.25
# Values that are drawn at a time.
_AT_ONCE = 1 << 20
_PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}


@dataclass(frozen=True)
class Change:
    """One metric of two runs.

    Attributes:
        metric: ``latency_ms p50``, ``accuracy night``, ``size_bytes`` ...
        base: Value of the first run.
        new: Value of the second run.
        change: Relative (new / base - 1) of latencies and sizes; of accuracies the difference.
        low, high: Interval of ``change`` that holds the true one with the given confidence.
        verdict: ``better`` or ``worse`` where the interval excludes 0.
        regression: Worse by more than the tolerance, wherever in the interval it lies.
    """

    metric: str
    base: float
    new: float
    change: float
    low: float
    high: float
    verdict: Verdict
    regression: bool


def read_result(path: str | Path) -> BenchResult:
    """Read the JSON of ``hdrq-bench`` for one engine.

    Raises:
        DataError: No file, or something else in it.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: found no file; needed the JSON of hdrq-bench")
    try:
        result = BenchResult.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        where, how = first_fault(error)
        raise DataError(
            f"{file}: not the JSON of hdrq-bench for one engine ({where}: "
            f"{how}); measure again with this version"
        ) from error
    wrong = _impossible(result)
    if wrong:
        raise DataError(f"{file}: found {wrong}; no measurement gives that: measure again")
    return result


def _impossible(result: BenchResult) -> str:
    """What no benchmark can have found, or ""."""
    samples = np.array(result.latency_ms.samples)
    if not (samples.size and np.isfinite(samples).all() and (samples > 0).all()):
        return f"{samples.size} latencies, not all of them above 0 and finite"
    if result.size_bytes < 1:
        return f"a size of {result.size_bytes} bytes"
    if result.accuracy is not None:
        for domain, share in result.accuracy.domains.items():
            images = result.accuracy.images.get(domain, 0)
            if not (0 <= share <= 1 and 1 <= images < 1 << 63):
                return f"an accuracy of {share} on {images} images of {domain}"
    return ""


def compare(
    base: BenchResult,
    new: BenchResult,
    tolerance: float = 0.02,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Change]:
    """Latencies, accuracies and size, with bootstrap intervals.

    Samples of one run depend on their neighbours (a busy moment slows many), so blocks of
    them are drawn. An accuracy is a share of independent images.

    Args:
        base: Before.
        new: Now.
        tolerance: Relative loss of a latency or size, and absolute loss of an accuracy, that
            is no regression.
        confidence: Confidence of the intervals, between 0 and 1.
        resamples: Bootstrap draws, 100 or more.
        seed: Seed of the draws.

    Raises:
        DataError: Values out of range, or runs of different batches or domains.

    Source:
        Künsch, Annals of Statistics 17 (1989): the moving-block bootstrap.
    """
    if not 0 < confidence < 1:
        raise DataError(f"found `confidence` {confidence}; needed 0 to 1, both excluded")
    if resamples < 100:
        raise DataError(f"found `resamples` {resamples}; needed 100 or more")
    if not tolerance >= 0:
        raise DataError(f"found `tolerance` {tolerance}; needed 0 or more")
    if base.latency_ms.batch != new.latency_ms.batch:
        raise DataError(
            f"found batches of {base.latency_ms.batch} and {new.latency_ms.batch}; needed runs of "
            "one batch"
        )
    rng = np.random.default_rng(seed)
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    return [
        *_latencies(base, new, tolerance, tails, resamples, rng),
        *_accuracies(base, new, tolerance, tails, resamples, rng),
        _size(base, new, tolerance),
    ]


def _latencies(
    base: BenchResult,
    new: BenchResult,
    tolerance: float,
    tails: list[float],
    resamples: int,
    rng: np.random.Generator,
) -> Iterator[Change]:
    samples = [np.array(run.latency_ms.samples) for run in (base, new)]
    measures: dict[str, Callable[[Array], Array]] = {
        name: lambda rows, p=p: np.percentile(rows, p, axis=-1)  # type: ignore[misc]
        for name, p in _PERCENTILES.items()
    }
    measures["mean"] = lambda rows: rows.mean(-1)
    drawn = [_Blocks(values, resamples, rng) for values in samples]
    for name, measure in measures.items():
        before, after = (float(measure(values)) for values in samples)
        ratios = drawn[1].measured(measure) / drawn[0].measured(measure) - 1
        change = after / before - 1
        low, high = (
            change + _WIDER * (v - change) for v in map(float, np.percentile(ratios, tails))
        )
        verdict: Verdict = "worse" if low > 0 else "better" if high < 0 else "no difference shown"
        yield Change(
            f"latency_ms {name}",
            before,
            after,
            change,
            low,
            high,
            verdict,
            low > tolerance,
        )


class _Blocks:
    """Resamples of a series, each made of ``_BLOCKS`` stretches of neighbours."""

    def __init__(self, values: Array, resamples: int, rng: np.random.Generator) -> None:
        count = len(values)
        self._values, self._length = values, max(1, count // _BLOCKS)
        self._starts = rng.integers(0, count, (resamples, -(-count // self._length)))

    def measured(self, measure: Callable[[Array], Array]) -> Array:
        """``measure`` of every resample; of a few at a time, as long series take room."""
        count = len(self._values)
        step = max(1, _AT_ONCE // count)
        parts = []
        for first in range(0, len(self._starts), step):
            starts = self._starts[first : first + step]
            places = (starts[:, :, None] + np.arange(self._length)) % count
            parts.append(measure(self._values[places.reshape(len(starts), -1)[:, :count]]))
        return np.concatenate(parts)


def _accuracies(
    base: BenchResult,
    new: BenchResult,
    tolerance: float,
    tails: list[float],
    resamples: int,
    rng: np.random.Generator,
) -> Iterator[Change]:
    if base.accuracy is None or new.accuracy is None:
        return
    if set(base.accuracy.domains) != set(new.accuracy.domains):
        raise DataError(
            f"found the domains {', '.join(base.accuracy.domains)} and "
            f"{', '.join(new.accuracy.domains)}; needed runs on the same `data`"
        )
    for domain, before in base.accuracy.domains.items():
        after = new.accuracy.domains[domain]
        counts = base.accuracy.images[domain], new.accuracy.images[domain]
        drawn = [
            rng.binomial(n, share, resamples) / n
            for n, share in zip(counts, (before, after), strict=True)
        ]
        low, high = (float(v) for v in np.percentile(drawn[1] - drawn[0], tails))
        verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        yield Change(
            f"accuracy {domain}",
            before,
            after,
            after - before,
            low,
            high,
            verdict,
            high < -tolerance,
        )


def _size(base: BenchResult, new: BenchResult, tolerance: float) -> Change:
    change = new.size_bytes / base.size_bytes - 1
    verdict: Verdict = "worse" if change > 0 else "better" if change < 0 else "no difference shown"
    return Change(
        "size_bytes",
        base.size_bytes,
        new.size_bytes,
        change,
        change,
        change,
        verdict,
        change > tolerance,
    )
