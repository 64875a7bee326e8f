"""Statistics of a merged model: what its layers see where every parent's inputs come.

A merge of merges is then solved and rounded like a merge of all their parents at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..formats.bundle import Bundle
from ..formats.statistics import Histogram, LayerRecord, Rank, Statistics, StatisticsFile
from ..numerics.layer_statistics import InputStatistics, mixture

__all__ = ["common_layers", "in_turn", "merged_histogram", "merged_statistics"]


def common_layers(
    files: Sequence[StatisticsFile],
) -> tuple[dict[str, LayerRecord], dict[str, str]]:
    """Layers that all parents saw alike, by weight; and why others are not among them."""
    common: dict[str, LayerRecord] = {}
    missing: dict[str, str] = {}
    for name in sorted({weight for file in files for weight in file.weights}):
        records = [file.record.layer(name) for file in files]
        first = records[0]
        lacking = next((f for f, r in zip(files, records, strict=True) if r is None), None)
        if first is None or lacking is not None:
            where = (lacking or files[0]).path.parent.name
            missing[name] = f"no statistics in {where}"
        elif len({_shape(record) for record in records if record is not None}) > 1:
            missing[name] = "statistics of different shapes"
        else:
            common[name] = first
    return common, missing


def _shape(record: LayerRecord) -> tuple[object, ...]:
    return record.layout, record.groups, record.features, record.bias


def in_turn(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Call ``work`` with every name, one after the other."""
    for name in names:
        work(name)


def merged_statistics(
    parents: Sequence[Bundle],
    merge_weights: Sequence[float],
    each: Callable[[Callable[[str], None], Sequence[str]], None],
) -> Statistics | None:
    """The weighted statistics of the parents; None where not all of them hold some.

    Args:
        parents: Bundles that fit each other.
        merge_weights: One per parent, sum 1.
        each: Calls a function with every name; perhaps on several threads.
    """
    files = [file for file in (parent.statistics() for parent in parents) if file is not None]
    if len(files) < len(parents):
        return None
    records, _ = common_layers(files)
    layers: dict[str, InputStatistics] = {}

    def one(name: str) -> None:
        parts = [file.layer(name) for file in files]
        layers[name] = mixture(parts, merge_weights)

    each(one, list(records))
    histograms = [n for n in files[0].record.histograms if all(_has(file, n) for file in files)]
    return Statistics(
        rank=_widest([file.record.rank for file in files]),
        layouts={name: (record.bias, record.layout) for name, record in records.items()},
        layers={name: layers[name] for name in records},
        histograms={
            name: merged_histogram([file.histogram(name) for file in files], merge_weights)
            for name in histograms
        },
    )


def _widest(ranks: Sequence[Rank]) -> Rank:
    """``full`` before ``auto`` before the largest number."""
    numbers = [rank for rank in ranks if isinstance(rank, int)]
    if len(numbers) == len(ranks):
        return max(numbers)
    return "full" if "full" in ranks else "auto"


def _has(file: StatisticsFile, histogram: str) -> bool:
    return histogram in file.record.histograms


def merged_histogram(parts: Sequence[Histogram], shares: Sequence[float]) -> Histogram:
    """The histogram of values that come from every part with its share.

    The bins reach over all parts, as many as the most of one part; inside a bin values count as
    spread evenly. The counts have the sum of the parts' counts.

    >>> one, two = (Histogram(k, k + 2, np.ones(2, np.float32)) for k in (0, 2))
    >>> merged_histogram([one, two], [0.75, 0.25]).counts
    array([3., 1.], dtype=float32)
    """
    used = [(part, share) for part, share in zip(parts, shares, strict=True) if share > 0]
    low = min(part.low for part, _ in used)
    high = max(part.high for part, _ in used)
    edges = np.linspace(low, high, max(len(part.counts) for part, _ in used) + 1)
    whole = sum(float(part.counts.sum(dtype=np.float64)) for part, _ in used)
    below = np.zeros(len(edges))
    for part, share in used:
        own = np.linspace(part.low, part.high, len(part.counts) + 1)
        total = np.concatenate([[0.0], np.cumsum(part.counts, dtype=np.float64)])
        below += share * whole * np.interp(edges, own, total / max(float(total[-1]), 1e-30))
    return Histogram(low, high, np.diff(below).astype(np.float32))
