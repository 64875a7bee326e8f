"""What an engine decided of every test image, as the row of a cell keeps it.

Of classes a bit for each image says whether it is right; of label maps the pixels of each image are
counted by class: hits, labelled, predicted. Intervals and paired tests need no more
(:mod:`hdrq_deploy.numerics.intervals`).
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..numerics.intervals import figure
from ..runtime.bench.accuracy import confusion
from ..typing import Array

__all__ = ["Decisions", "agrees", "packed", "unpacked"]

# Sums of floats in another order.
_ROUNDING = 1e-9


class Decisions:
    """Collects decisions while :func:`.accuracy.accuracy` runs; pass it as ``seen``."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {}

    def __call__(self, domain: str, labels: Array, predicted: Array, classes: int) -> None:
        """Take a batch of one domain."""
        parts = self._parts.setdefault(domain, [])
        if labels.ndim == 1:
            parts.append(labels == predicted)
        else:
            parts.append(
                np.stack([_counts(*pair, classes) for pair in zip(labels, predicted, strict=True)])
            )

    @property
    def measured(self) -> dict[str, Array]:
        """(N,) of right or wrong, or (N, classes, 3) counts, by domain."""
        return {domain: np.concatenate(parts) for domain, parts in self._parts.items()}


def _counts(labels: Array, predicted: Array, classes: int) -> Array:
    """Hits, labelled and predicted pixels of every class of one image, (classes, 3)."""
    table = confusion(labels[None], predicted[None], classes)
    return np.stack([np.diag(table), table.sum(1), table.sum(0)[:-1]], axis=1)


# Pixels of a class: hits, labelled, predicted.
_KINDS = 3


def packed(measured: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Measurements of every domain as JSON holds them."""
    return {domain: _packed(values) for domain, values in measured.items()}


def _packed(values: Array) -> dict[str, Any]:
    bits = values.ndim == 1
    raw = np.packbits(values.astype(bool)).tobytes() if bits else values.astype("<i4").tobytes()
    text = base64.b64encode(raw if bits else zlib.compress(raw, 9)).decode()
    return {"shape": list(values.shape), "bits" if bits else "counts": text}


def unpacked(record: Any) -> dict[str, Array] | None:
    """The measurements of a row; None where it holds none, or none that can be read."""
    try:
        return {domain: _unpacked(entry) for domain, entry in record.items()}
    except (AttributeError, KeyError, TypeError, ValueError, binascii.Error, zlib.error):
        return None


def agrees(record: Any, domains: Mapping[str, float]) -> bool:
    """Whether the decisions of a row can be read and give its accuracies, each in 0 to 1."""
    measured = unpacked(record)
    return measured is not None and (
        set(measured) == set(domains)
        and all(abs(figure({d: v}) - domains[d]) < _ROUNDING for d, v in measured.items())
    )


def _unpacked(entry: Mapping[str, Any]) -> Array:
    """Of classes (N,), of label maps (N, classes, 3).

    Raises:
        ValueError: Another shape, or not as many values.
    """
    shape = tuple(entry["shape"])
    if not shape or not all(type(side) is int and side > 0 for side in shape):
        raise ValueError(f"found the shape {shape}; needed numbers above 0")
    if "bits" in entry:
        (count,) = shape
        raw = np.frombuffer(base64.b64decode(entry["bits"], validate=True), np.uint8)
        if len(raw) != -(-count // 8):
            raise ValueError(f"found {8 * len(raw)} bits; needed {count}")
        return np.unpackbits(raw, count=count)
    raw = np.frombuffer(zlib.decompress(base64.b64decode(entry["counts"], validate=True)), "<i4")
    images, classes, kinds = shape
    if kinds != _KINDS:
        raise ValueError(f"found {kinds} counts of a class; needed {_KINDS}")
    return raw.reshape(images, classes, kinds)
