"""Layers of float checkpoints, merged with statistics that lie beside them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import MergeError
from ..formats.checkpoints import Checkpoint, checkpoint_sha256
from ..formats.statistics import (
    CheckpointStatistics,
    LayerRecord,
    NormRecord,
    StatisticsFile,
    read_statistics,
)
from ..numerics.layer_matrix import bias_of, rows_of, weight_of
from ..numerics.moments import SingularError
from ..typing import Array
from .batchnorm_correction import Norm, NormAtMix
from .layers import layer_part
from .merged_statistics import common_layers
from .methods.base import MergeMethod, MethodOptions
from .methods.mean import weighted_mean

__all__ = ["CheckpointLayers"]

_log = logging.getLogger("hdrq_deploy")


class CheckpointLayers:
    """Layers that all parents' statistics describe: weights, biases, moments of BatchNorm behind.

    Args:
        parents: The checkpoints.
        statistics: A file of ``hdrq statistics`` for each, in the same order.
        merge_weights: One per parent, sum 1.
        method: Merges layers with statistics.
        options: Its numbers.

    Raises:
        MergeError: Not one file for each checkpoint, or statistics of another checkpoint.
        BundleError: A file holds no statistics.
    """

    def __init__(
        self,
        parents: Sequence[Checkpoint],
        statistics: Sequence[Path],
        merge_weights: Sequence[float],
        method: MergeMethod,
        options: MethodOptions,
    ) -> None:
        if len(statistics) != len(parents):
            raise MergeError(
                f"found {len(statistics)} files of statistics for {len(parents)} checkpoints; give "
                "one for each as `statistics`, in their order: hdrq statistics makes them"
            )
        self._parents, self._merge_weights = parents, merge_weights
        assert method.layers is not None
        self._method, self._options = method.layers, options
        self._files = [
            _of_checkpoint(read_statistics(path), parent)
            for path, parent in zip(statistics, parents, strict=True)
        ]
        records, _ = common_layers(self._files)
        counts = Counter(record.bias for record in records.values())
        self._records: dict[str, LayerRecord] = {}
        for name, record in records.items():
            own = counts[record.bias] == 1 and record.layout != "transposed"
            layer = record if own else record.model_copy(update={"bias": None})
            if all({name, layer.bias or name} <= set(parent.tensors) for parent in parents):
                self._records[name] = layer
        self._norms = {
            name: Norm.recorded(record)
            for name, record in _common_norms(self._files).items()
            if name in self._records
            and all(_fits(record, self._records[name], parent) for parent in parents)
        }
        self._owners = {r.bias: name for name, r in self._records.items() if r.bias is not None}
        for name, norm in self._norms.items():
            self._owners |= {norm.mean: name, norm.variance: name}
        self._waiting: dict[str, Array] = {}

    def merged(self, name: str) -> Array | None:
        """A merged weight, bias or moment of BatchNorm; None where another way is to be taken."""
        weight = self._owners.get(name, name)
        if name not in self._waiting and weight in self._records:
            self._waiting |= self._layer(self._records.pop(weight))
        return self._waiting.pop(name, None)

    def _layer(self, record: LayerRecord) -> dict[str, Array]:
        name, norm = record.weight, self._norms.get(record.weight)
        weights = [parent.read(name) for parent in self._parents]
        inputs = [file.layer(name) for file in self._files]
        parts = [
            layer_part(self._method, record, weight, parent.read, norm, seen, self._options)
            for parent, weight, seen in zip(self._parents, weights, inputs, strict=True)
        ]
        try:
            rows = self._method.merge(parts, self._merge_weights, self._options)
        except SingularError as error:
            _log.warning("%s gets the weighted mean: its system is %s", name, error)
            return {}
        shape = self._parents[0].tensors[name].shape
        if norm is not None:
            own = [norm.read(parent.read) for parent in self._parents]
            mix = NormAtMix(norm, own, self._merge_weights)
            inner = mix.in_front(
                rows[:, :-1],
                lambda: rows_of(weighted_mean(weights, self._merge_weights, np.float64), record),
            )
            weight = weight_of(inner, record, shape)
            return {name: weight, **mix.placed(weight, weights, inputs, record)}
        if record.bias is None:
            return {name: weight_of(rows, record, shape)}
        return {name: weight_of(rows[:, :-1], record, shape), record.bias: bias_of(rows)}


def _common_norms(files: Sequence[StatisticsFile]) -> dict[str, NormRecord]:
    """BatchNorms that all files tell alike, by the weight before each."""
    told = []
    for file in files:
        assert isinstance(file.record, CheckpointStatistics)
        told.append(file.record.norms)
    common = {
        name: norm
        for name, norm in told[0].items()
        if all(other.get(name) == norm for other in told)
    }
    every = {name for own in told for name in own}
    if len(every) > len(common):
        short = [f.path for f, own in zip(files, told, strict=True) if own.keys() != every]
        _log.warning(
            "found statistics that do not name the BatchNorm behind %d layer(s) alike; these are "
            "solved in front of it: run hdrq statistics again for %s",
            len(every) - len(common),
            ", ".join(map(str, short or [file.path for file in files])),
        )
    return common


def _fits(norm: NormRecord, layer: LayerRecord, parent: Checkpoint) -> bool:
    """Whether a checkpoint holds a value of every tensor of the norm for each of the outputs."""
    outputs = math.prod(parent.tensors[layer.weight].shape) // layer.features
    return all(
        name in parent.tensors and parent.tensors[name].shape == (outputs,) for name in norm.tensors
    )


def _of_checkpoint(file: StatisticsFile, parent: Checkpoint) -> StatisticsFile:
    """The file, which must be of this checkpoint."""
    record = file.record
    assert isinstance(record, CheckpointStatistics)
    digest = checkpoint_sha256(parent)
    if record.checkpoint_sha256 != digest:
        raise MergeError(
            f"{file.path}: found statistics of a checkpoint with sha256 "
            f"{record.checkpoint_sha256[:12]}; {parent.path} has {digest[:12]}: name the files of "
            "statistics in the order of the checkpoints, or run hdrq statistics again"
        )
    return file
