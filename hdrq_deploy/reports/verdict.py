"""What a comparison of engines comes to, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..formats.bench_result import BenchResult

__all__ = ["Rows", "and_joined", "did_it_pay", "headline", "verdict"]

Rows = Sequence[tuple[str, BenchResult]]


def headline(rows: Rows) -> tuple[str, BenchResult]:
    """The row that a report is about.

    It is the one with the highest harmonic mean among quantized merges, or among all quantized
    rows, or among all; of equal ones the fastest. Without accuracies it is the fastest.
    """
    merged = [row for row in rows if row[1].wbits is not None and len(row[1].domains) > 1]
    quantized = [row for row in rows if row[1].wbits is not None]
    return max(merged or quantized or rows, key=lambda row: (_mean(row[1]), -row[1].latency_ms.p50))


def verdict(rows: Rows) -> str:
    """What was reached, beside what, at what size and speed: two sentences about the headline."""
    name, result = headline(rows)
    accuracy = result.accuracy
    if accuracy is None:
        first = f"{name} takes {result.latency_ms.p50:.2f} ms a call; no accuracy was measured."
    else:
        what = "mIoU" if accuracy.metric == "miou" else "accuracy"
        domains = and_joined(list(accuracy.domains))
        if len(accuracy.domains) == 1:
            reached = f"reaches {100 * _mean(result):.1f}% {what} on {domains}"
        else:
            engines = "one engine" if result.domains else "an engine for each"
            reached = (
                f"serves {domains} with {engines} at {100 * _mean(result):.1f}% {what} "
                "(harmonic mean)"
            )
        alike = [row for row in rows if row[0] != name and _alike(row[1], result)]
        floats = [row for row in alike if row[1].wbits is None]
        # Without a model in float, what one engine for each domain reaches is the measure.
        apart = [row for row in alike if not row[1].domains and row[1].abits == result.abits]
        others = [f"{other} {100 * _mean(row):.1f}%" for other, row in floats or apart]
        beside = f", beside {and_joined(others)}" if others else ""
        first = f"{name} {reached}{beside}."
    return f"{first} {_cost(name, result, rows)}"


def _cost(name: str, result: BenchResult, rows: Rows) -> str:
    size = f"It takes {_size(result.size_bytes)}"
    gain = result.speedup
    base = next(((n, r) for n, r in rows if gain and r.path == gain.against and n != name), None)
    if gain is None or base is None:
        return f"{size} and {result.latency_ms.p50:.2f} ms a call."
    smaller = f"{base[1].size_bytes / result.size_bytes:.1f} times smaller than {base[0]}"
    if gain.verdict == "no difference shown":
        return f"{size}, {smaller}; no difference in speed was shown."
    how = f"{gain.ratio:.2f} times as fast ({gain.low:.2f} to {gain.high:.2f}, 95%)"
    return f"{size}, {smaller}, and is {how}."


def did_it_pay(rows: Rows) -> list[str]:
    """One sentence an engine: is it faster than the base, how much smaller, what it cost."""
    by_path = {result.path: (name, result) for name, result in rows}
    sentences = []
    for name, result in rows:
        gain = result.speedup
        if gain is None:
            continue
        base_name, base = by_path.get(gain.against, (gain.against, None))
        if gain.verdict == "no difference shown":
            speed = (
                f"no difference in speed shown ({gain.low:.2f} to {gain.high:.2f} times as fast)"
            )
        else:
            speed = (
                f"{gain.ratio:.2f} times as fast as {base_name} "
                f"({gain.low:.2f} to {gain.high:.2f}, 95% over {gain.rounds} rounds)"
            )
        parts = [speed]
        if base is not None:
            parts.append(f"{base.size_bytes / result.size_bytes:.1f} times smaller")
            parts += _accuracy_change(base, result)
        paid = ""
        if base is not None and base.wbits is None and result.wbits is not None:
            faster = gain.verdict == "faster"
            paid = "quantization paid: " if faster else "quantization did not pay in speed: "
        sentences.append(f"{name}: {paid}{', '.join(parts)}")
    return sentences


def _accuracy_change(base: BenchResult, result: BenchResult) -> Iterator[str]:
    first, second = base.accuracy, result.accuracy
    if first is None or second is None or first.domains.keys() != second.domains.keys():
        return
    if first.harmonic_mean is not None and second.harmonic_mean is not None:
        change = 100 * (second.harmonic_mean - first.harmonic_mean)
        worst = min(first.domains, key=lambda d: second.domains[d] - first.domains[d])
        loss = 100 * (second.domains[worst] - first.domains[worst])
        yield f"harmonic mean {change:+.1f} points (worst: {worst} {loss:+.1f})"


def _mean(result: BenchResult) -> float:
    """The harmonic mean of the accuracies, 0 to 1; -1 where none was measured."""
    accuracy = result.accuracy
    return -1.0 if accuracy is None or accuracy.harmonic_mean is None else accuracy.harmonic_mean


def _alike(a: BenchResult, b: BenchResult) -> bool:
    """Whether accuracies of the same domains were measured."""
    return bool(
        a.accuracy and b.accuracy and a.accuracy.domains.keys() == b.accuracy.domains.keys()
    )


def and_joined(words: Sequence[str]) -> str:
    """Words as a sentence lists them.

    >>> and_joined(["night"]), and_joined(["night", "day", "snow"])
    ('night', 'night, day and snow')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 10**7 else f"{size / 1000:.0f} KB"
