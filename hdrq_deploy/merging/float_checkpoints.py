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
and takes any safetensors checkpoint, and torch's own files where torch is installed.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MergeError
from ..formats.atomic_files import check_output, replaced
from ..formats.checkpoints import FLOATS, Checkpoint, Stored, from_float32, open_checkpoint
from ..formats.file_kinds import MERGED
from ..formats.safetensors_layout import with_metadata
from .bundles import check_different, check_mix, matched_variance, weighted_mean

__all__ = ["CHECKPOINT_METHODS", "merge_checkpoints"]

CHECKPOINT_METHODS = ("mean", "task-arithmetic", "ties")
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}

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

    Computed in float64, and written in the dtype that the parents have; where they differ, in
    the wider one (float32 for float16 beside bfloat16). Names and the state_dict that is taken
    are those of a calibration: see :mod:`hdrq_deploy.formats.checkpoints`.

    Args:
        paths: Two or more checkpoints with the same names and shapes: .safetensors, or torch
            files where torch is installed.
        output: .safetensors file to write; written whole or not at all.
        weights: One per file, >= 0, sum 1; equal by default.
        method: One of ``CHECKPOINT_METHODS``.
        base: The source checkpoint; needed by all but ``mean``.
        scaling: Factor of the merged task vector.
        density: Share of each task vector that ``ties`` keeps, > 0 to 1.
        progress: Called with (tensors done, tensors in all).

    Raises:
        MergeError: Fewer than two files, one named twice, weights or options that do not fit,
            no base, files that differ in a name, shape or kind of dtype, values that are not
            finite, or an output that is no .safetensors file.
        BundleError: A file is not safetensors.
        ModelError: A file is no checkpoint.
    """
    files = [Path(path) for path in paths]
    mix = check_mix(weights, len(files), "checkpoint")
    check_different(files)
    if method not in CHECKPOINT_METHODS:
        raise MergeError(f"found method {method!r}; choose one of {', '.join(CHECKPOINT_METHODS)}")
    if method != "mean" and base is None:
        raise MergeError(f"found no source checkpoint; {method} needs one: pass --base SOURCE")
    if not 0 < density <= 1 or not np.isfinite(scaling):
        raise MergeError(
            f"found density={density}, scaling={scaling}; needed a density above 0, up to 1, and "
            "a finite scaling"
        )
    if Path(output).suffix != ".safetensors":
        raise MergeError(
            f"found -o {output}; needed a .safetensors file, which is what a merge of checkpoints "
            "writes"
        )
    sources = [*files, *([Path(base)] if base is not None and method != "mean" else [])]
    target = check_output(output, MERGED, sources)
    opened = [open_checkpoint(path) for path in sources]
    for other in opened[1:]:
        _check_same(opened[0], other)
    entries = {name: _merged_type(name, opened[: len(files)]) for name in opened[0].tensors}
    header, order = _header(entries)
    with replaced(target, MERGED) as file:
        file.write(with_metadata(header, "merged", {"method": method, "weights": mix}))
        for done, name in enumerate(order):
            values = [_finite(checkpoint, name) for checkpoint in opened]
            means = _means(opened[: len(files)], name)
            merged = _merge_one(values, means, mix, method, scaling, density)
            file.write(_as_stored(merged, entries[name], name, target))
            if progress:
                progress(done + 1, len(order))
    return target


def _merged_type(name: str, models: Sequence[Checkpoint]) -> Stored:
    """The parents' dtype; the widest where they differ."""
    kinds = {model.tensors[name].dtype for model in models}
    shape = models[0].tensors[name].shape
    if len(kinds) == 1:
        return Stored(kinds.pop(), shape)
    return Stored("F64" if "F64" in kinds else "F32", shape)


def _header(entries: Mapping[str, Stored]) -> tuple[bytes, list[str]]:
    """Safetensors' length and header, and the order of the tensors behind it, wide ones first."""
    order = sorted(entries, key=lambda name: (-_BYTES.get(entries[name].dtype, 1), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        stored = entries[name]
        count = int(np.prod(stored.shape, dtype=np.int64))
        begin, end = end, end + count * _BYTES.get(stored.dtype, 1)
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text, order


def _finite(checkpoint: Checkpoint, name: str) -> Array:
    values = checkpoint.read(name)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise MergeError(
            f"{checkpoint.path}: found NaN or infinity in {name}; needed finite weights: export "
            "the checkpoint again"
        )
    return values


def _means(models: Sequence[Checkpoint], name: str) -> list[Array] | None:
    """The running means beside a running variance."""
    if not name.endswith("running_var") or models[0].tensors[name].dtype not in FLOATS:
        return None
    mean = name.removesuffix("running_var") + "running_mean"
    shape = models[0].tensors[name].shape
    if mean not in models[0].tensors or models[0].tensors[mean].shape != shape:
        raise MergeError(
            f"{models[0].path}: found {name} without {mean} of its shape; needed both of a "
            "BatchNorm: save the whole state_dict"
        )
    return [_finite(model, mean) for model in models]


def _as_stored(merged: Array, stored: Stored, name: str, target: Path) -> bytes:
    """The bytes of a merged tensor.

    Raises:
        MergeError: A value is beyond the dtype of the parents.
    """
    if stored.dtype not in FLOATS:
        return np.ascontiguousarray(merged).tobytes()
    with np.errstate(over="ignore"):
        values = np.asarray(merged).astype(FLOATS[stored.dtype])
    data = from_float32(values) if stored.dtype == "BF16" else values
    if not np.isfinite(values).all() or (stored.dtype == "BF16" and _endless(data)):
        raise MergeError(
            f"{target}: found merged values of {name} beyond what {stored.dtype} holds; needed a "
            "smaller --scaling, or parents in float32"
        )
    return np.ascontiguousarray(data).tobytes()


def _endless(bits: Array) -> bool:
    """Whether a bfloat16 was rounded up to infinity."""
    return bool(((bits & 0x7FFF) == 0x7F80).any())


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
        return matched_variance(models, means, mix, np.float64)
    if method == "mean" or values[0].ndim == 0 or values[0].size == 0:
        return weighted_mean(models, mix, np.float64)
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


def _check_same(mine: Checkpoint, theirs: Checkpoint) -> None:
    for name in sorted({*mine.tensors, *theirs.tensors}):
        a, b = mine.tensors.get(name), theirs.tensors.get(name)
        if a is not None and b is not None and a.shape == b.shape and _alike(a.dtype, b.dtype):
            continue
        told = [f"{s.dtype} {s.shape}" if s else "nothing" for s in (a, b)]
        raise MergeError(
            f"found {name}: {told[0]} in {mine.path}, {told[1]} in {theirs.path}; needed "
            "checkpoints of one architecture"
        )


def _alike(a: str, b: str) -> bool:
    return a == b or (a in FLOATS and b in FLOATS)
