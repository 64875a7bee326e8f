"""Merge float checkpoints: the reference that a merge of quantized models is compared with.

Parameters are merged by one of :data:`hdrq_deploy.merging.methods.METHODS`; BatchNorm's running
mean and variance are matched as moments, but for means behind layers that a regression solves.
Merging libraries (mergekit, peft) take language models of known layout and need torch; this is
NumPy and takes any safetensors checkpoint, and torch's own files where torch is installed.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MergeError
from ..formats.atomic_files import check_output, replaced
from ..formats.checkpoints import FLOATS, Checkpoint, Stored, from_float32, open_checkpoint
from ..formats.file_kinds import MERGED
from ..formats.safetensors_layout import with_metadata
from ..typing import Array, StepProgress
from .checkpoint_layers import CheckpointLayers
from .merge_weights import check_different, check_merge_weights
from .methods import METHODS, MergeMethod, MethodOptions, method_of
from .methods.base import float64
from .methods.mean import MEAN, matched_variance

__all__ = ["CHECKPOINT_METHODS", "merge_checkpoints"]

CHECKPOINT_METHODS = tuple(METHODS)
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def merge_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    method: str = "mean",
    base: str | os.PathLike[str] | None = None,
    scaling: float = 1.0,
    density: float = 0.2,
    progress: StepProgress | None = None,
    *,
    statistics: Sequence[str | os.PathLike[str]] = (),
    alpha: float = MethodOptions.alpha,
    ridge: float = MethodOptions.ridge,
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
        method: Name of one of ``METHODS``.
        base: The source checkpoint; only the methods that need one read it.
        scaling: Factor of the merged task vector.
        density: Share of each task vector that ``ties`` keeps, > 0 to 1.
        progress: Called with (tensors done, tensors in all).
        statistics: Of the inputs of each checkpoint's layers, as ``hdrq statistics`` writes them,
            for a method that reads them; BatchNorm stays apart, and layers are solved behind it.
        alpha: What ``regression`` keeps of the products of different inputs, 0 to 1.
        ridge: What ``regression`` adds to its diagonal, as a share of the mean.

    Raises:
        MergeError: Fewer than two files, one named twice, weights or options that do not fit,
            no base, files that differ in a name, shape or kind of dtype, values that are not
            finite, or an output that is no .safetensors file.
        BundleError: A file is not safetensors.
        ModelError: A file is no checkpoint.
    """
    files = [Path(path) for path in paths]
    merge_weights = check_merge_weights(weights, len(files), "checkpoint")
    check_different(files)
    chosen = method_of(method)
    if statistics and not chosen.needs_statistics:
        raise MergeError(
            f"found `statistics` with method {method!r}, which does not read them; choose "
            "regression, or leave them out"
        )
    options = MethodOptions(scaling, density, alpha, ridge)
    sources = [*files, *_base_of(method, base)]
    if Path(output).suffix != ".safetensors":
        raise MergeError(
            f"found the output {output}; needed a .safetensors file, which is what a merge of "
            "checkpoints writes"
        )
    target = check_output(output, MERGED, [*sources, *map(Path, statistics)])
    opened = [open_checkpoint(path) for path in sources]
    for other in opened[1:]:
        _check_same(opened[0], other)
    parents = opened[: len(files)]
    layers = None
    if chosen.needs_statistics:
        seen = [Path(path) for path in statistics]
        layers = CheckpointLayers(parents, seen, merge_weights, chosen, options)
    read = {option: getattr(options, option) for option in chosen.options}
    record = {"method": method, "weights": merge_weights, **read}
    entries = {name: _merged_type(name, parents) for name in opened[0].tensors}
    header, order = _header(entries)
    with replaced(target, MERGED) as file:
        file.write(with_metadata(header, "merged", record))
        for done, name in enumerate(order):
            tensors = [_finite(checkpoint, name) for checkpoint in opened]
            means = _means(parents, name)
            merged = layers.merged(name) if layers is not None else None
            if merged is None:
                merged = _merge_one(tensors, means, merge_weights, chosen, options)
            file.write(_as_stored(merged, entries[name], name, target))
            if progress:
                progress(done + 1, len(order))
    return target


def _base_of(method: str, base: str | os.PathLike[str] | None) -> list[Path]:
    """The source checkpoint as a list of one, or no path where the method does not read it."""
    if not METHODS[method].needs_base:
        return []
    if base is None:
        raise MergeError(f"found no source checkpoint; {method} needs one: give it as `base`")
    return [Path(base)]


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
            "smaller `scaling`, or parents in float32"
        )
    return np.ascontiguousarray(data).tobytes()


def _endless(bits: Array) -> bool:
    """Whether a bfloat16 was rounded up to infinity."""
    return bool(((bits & 0x7FFF) == 0x7F80).any())


def _merge_one(
    tensors: list[Array],
    means: list[Array] | None,
    merge_weights: list[float],
    method: MergeMethod,
    options: MethodOptions,
) -> Array:
    """The merged tensor of one name; the base's, where it is read, is the last of ``tensors``."""
    count = len(merge_weights)
    if tensors[0].dtype.kind != "f":
        return tensors[0]  # counters and tables: the first model's
    if means is not None:
        return matched_variance(tensors[:count], means, merge_weights, np.float64)
    wide = float64(tensors)
    if wide[0].ndim == 0 or wide[0].size == 0:
        method = MEAN
    base = wide[count] if method.needs_base else None
    return method.merge(wide[:count], merge_weights, base, options)


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
