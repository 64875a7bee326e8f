"""Float merging of checkpoints, the honest upper row beside a merge of quantized models.

=================  =========================================================================
method             what is averaged (weights mix_i, sum 1)
=================  =========================================================================
mean               sum mix_i theta_i
task-arithmetic    theta_0 + scaling * sum mix_i (theta_i - theta_0); Ilharco et al., ICLR 2023
ties               the same after trimming, sign election and disjoint mean; Yadav et al.,
                   NeurIPS 2023
=================  =========================================================================

BatchNorm's running mean and variance are matched as moments in all of them. The kept merging
libraries (mergekit, peft) take language models of known layout and need torch; this is NumPy
and takes any safetensors checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import Span, read_header
from ..errors import MergeError
from ..files import check_output, replaced
from ..kinds import MERGED, with_metadata
from .bundles import check_mix, matched_variance, weighted_mean

__all__ = ["CHECKPOINT_METHODS", "merge_checkpoints"]

CHECKPOINT_METHODS = ("mean", "task-arithmetic", "ties")
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_OTHERS = {"I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}

Array = npt.NDArray[Any]


def merge_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    method: str = "mean",
    base: str | os.PathLike[str] | None = None,
    scaling: float = 1.0,
    density: float = 0.2,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Merge float checkpoints of one architecture into one.

    Args:
        paths: Two or more .safetensors files with the same names and shapes.
        output: .safetensors file to write; written whole or not at all.
        weights: One per file, >= 0, sum 1; equal by default.
        method: One of ``CHECKPOINT_METHODS``.
        base: The source checkpoint; needed by all but ``mean``.
        scaling: Factor of the merged task vector.
        density: Share of each task vector that ``ties`` keeps, > 0 to 1.
        progress: Called with (tensors done, tensors in all).

    Raises:
        MergeError: Fewer than two files, weights or options that do not fit, no base, or
            files that differ in a name, shape or dtype.
        BundleError: A file is not safetensors.
    """
    files = [Path(path) for path in paths]
    mix = check_mix(weights, len(files), "checkpoint")
    if method not in CHECKPOINT_METHODS:
        raise MergeError(f"found method {method!r}; choose one of {', '.join(CHECKPOINT_METHODS)}")
    if method != "mean" and base is None:
        raise MergeError(f"found no source checkpoint; {method} needs one: pass --base SOURCE")
    if not 0 < density <= 1 or not np.isfinite(scaling):
        raise MergeError(
            f"found density={density}, scaling={scaling}; needed a density above 0, up to 1, and "
            "a finite scaling"
        )
    sources = [*files, *([Path(base)] if base is not None and method != "mean" else [])]
    target = check_output(output, MERGED, sources)
    headers = [read_header(path) for path in sources]
    for path, header in zip(sources[1:], headers[1:], strict=True):
        _check_same(sources[0], headers[0], path, header)
    start = min((span.offset for span in headers[0].values()), default=0)
    notes = {"method": method, "weights": mix}
    with replaced(target, MERGED) as file:
        with files[0].open("rb") as origin:
            beginning = with_metadata(origin.read(start), "merged", notes)
        file.write(beginning)
        for done, name in enumerate(sorted(headers[0])):
            values = [
                _read(path, header[name]) for path, header in zip(sources, headers, strict=True)
            ]
            means = None
            if name.endswith("running_var"):
                mean = name.removesuffix("running_var") + "running_mean"
                means = [
                    _read(path, header[mean]) for path, header in zip(files, headers, strict=False)
                ]
            merged = _merge_one(values, means, mix, method, scaling, density)
            file.seek(headers[0][name].offset - start + len(beginning))
            file.write(merged.astype(values[0].dtype).tobytes())
            if progress:
                progress(done + 1, len(headers[0]))
    return target


def _merge_one(
    values: list[Array],
    means: list[Array] | None,
    mix: list[float],
    method: str,
    scaling: float,
    density: float,
) -> Array:
    models = values[: len(mix)]
    if models[0].dtype.kind != "f":
        return models[0]  # counters and tables; the first model's
    if means is not None:
        return matched_variance(models, means, mix)
    if method == "mean" or values[0].ndim == 0:
        return weighted_mean(models, mix)
    origin = values[-1].astype(np.float64)
    vectors = [model - origin for model in models]
    if method == "task-arithmetic":
        change = sum(m * v for m, v in zip(mix, vectors, strict=True))
    else:
        change = _ties(vectors, mix, density)
    merged: Array = origin + scaling * change
    return merged


def _ties(vectors: list[Array], mix: list[float], density: float) -> Array:
    """Trim, elect a sign, and average those that agree with it."""
    trimmed = []
    for vector in vectors:
        size = np.abs(vector)
        kept = max(1, round(density * vector.size))
        threshold = np.partition(size.ravel(), vector.size - kept)[vector.size - kept]
        trimmed.append(np.where(size >= threshold, vector, 0.0))
    elected = np.sign(sum(m * v for m, v in zip(mix, trimmed, strict=True)))
    total, share = np.zeros_like(trimmed[0]), np.zeros_like(trimmed[0])
    for m, vector in zip(mix, trimmed, strict=True):
        agrees = (np.sign(vector) == elected) & (vector != 0)
        total += np.where(agrees, m * vector, 0.0)
        share += np.where(agrees, m, 0.0)
    result: Array = total / np.where(share > 0, share, 1.0)
    return result


def _read(path: Path, span: Span) -> Array:
    dtype = {**_FLOATS, **_OTHERS}[span.dtype]
    count = span.length // np.dtype(dtype).itemsize
    with path.open("rb") as file:
        file.seek(span.offset)
        return np.frombuffer(file.read(span.length), dtype, count).reshape(span.shape)


def _check_same(first: Path, mine: dict[str, Span], other: Path, theirs: dict[str, Span]) -> None:
    for name in sorted({*mine, *theirs}):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            told = [f"{s.dtype} {s.shape}" if s else "nothing" for s in (a, b)]
            raise MergeError(
                f"found {name}: {told[0]} in {first}, {told[1]} in {other}; needed checkpoints "
                "of one architecture"
            )
        if a.dtype not in {**_FLOATS, **_OTHERS}:
            raise MergeError(
                f"{first}: found {name} of dtype {a.dtype}; needed float32 or float16: convert it"
            )
