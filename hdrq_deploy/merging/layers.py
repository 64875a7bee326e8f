"""Layers merged and rounded with what calibration saw of their inputs.

Every layer is merged by itself. What a parent gives to it does not depend on the merge weights, and
where :class:`LayerMerge` is asked to keep it the method prepares all mixes at once (see
:mod:`hdrq_deploy.numerics.moment_mixtures`). A layer whose inputs not all parents saw, or whose
system has no solution, gets the weighted mean, and the result says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import MergeError
from ..formats.bundle import Bundle
from ..formats.bundle_manifest import Tensor
from ..formats.statistics import LayerRecord, StatisticsFile
from ..numerics.error_compensation import compensated, damped
from ..numerics.layer_matrix import bias_of, rows_of, times_outputs, weight_of, with_bias
from ..numerics.layer_statistics import InputStatistics
from ..numerics.moments import SingularError, covariance, mean_of, mixed, second_moments
from ..numerics.quantization import along, dequantize
from ..typing import Array
from .batchnorm_correction import Norm, NormAtMix, correction, norms_of
from .merged_statistics import common_layers
from .methods.base import (
    Floats,
    LayerAtMix,
    LayerMethod,
    LayerPart,
    MergeMethod,
    MethodOptions,
    float64,
)
from .rounding import ROUNDINGS, MergedCodes, round_target
from .scales import searched_scale

__all__ = ["LayerMerge", "RealLayer", "RoundedLayer", "layer_part", "scale_of", "statistics_of"]


@dataclass(frozen=True)
class RealLayer:
    """A merged layer before it is rounded.

    Attributes:
        weight: float64, of the weight's shape.
        bias: float64; None where the layer has none of its own, or where BatchNorm's mean is moved
            in its place.
        fallback: Why the weighted mean was taken; empty where the method was used.
        behind: Whether it was merged for what leaves the BatchNorm behind it.
    """

    weight: Floats
    bias: Floats | None
    fallback: str
    behind: bool = False


@dataclass(frozen=True)
class RoundedLayer:
    """A merged layer in codes.

    Attributes:
        codes: And what rounding did.
        scale: float32, of its tensor's shape.
        bias: float32, corrected for what rounding changes in the mean output; None as above.
        fallback: Why the layer was not rounded as asked; empty where it was.
        behind: As of the real layer.
    """

    codes: MergedCodes
    scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    fallback: str
    behind: bool


class LayerMerge:
    """The layers of several bundles, merged by a method or rounded in a way with statistics.

    Args:
        parents: Bundles that fit each other.
        method: Merges the layers.
        rounding: Name of one of ``ROUNDINGS`` that draws nothing.
        options: Numbers of the method.
        entries: Tensors of the merge; their codes may have other ranges than the parents'.
        keep: Keep each layer's system as the method prepares it for merges at other weights; a
            result then differs in the last digits of single precision.

    Raises:
        MergeError: A parent without statistics.
    """

    def __init__(
        self,
        parents: Sequence[Bundle],
        method: MergeMethod,
        rounding: str,
        options: MethodOptions,
        entries: Mapping[str, Tensor],
        keep: bool = False,
    ) -> None:
        self.parents, self.method, self.options = parents, method, options
        self.rounding, self._entries = ROUNDINGS[rounding], entries
        needed = method.needs_statistics or self.rounding.needs_statistics
        self._files = [statistics_of(parent) for parent in parents] if needed else []
        self._records, self.missing = common_layers(self._files)
        self._bias_counts = Counter(r.bias for r in self._records.values())
        self._kept: dict[str, LayerAtMix] | None = {} if keep else None
        # A transposed convolution's outputs have no mean that one row of inputs gives.
        self.norms = {
            name: norm
            for name, norm in (norms_of(parents[0]) if self._files else {}).items()
            if name in self._records and self._records[name].layout != "transposed"
        }

    def of(self, parents: Sequence[Bundle]) -> LayerMerge:
        """The same, reading its parents' tensors through other objects of the same bundles."""
        merging = copy(self)
        merging.parents = parents
        return merging

    def apart(self) -> LayerMerge:
        """A copy that keeps its systems in a dictionary of its own."""
        merging = copy(self)
        merging._kept = None if self._kept is None else {}
        return merging

    def record(self, name: str) -> LayerRecord | None:
        """The layer of a weight that all parents saw; its bias is the layer's own alone."""
        record = self._records.get(name)
        if record is None or record.bias is None:
            return record
        shared = self._bias_counts[record.bias] > 1
        if shared or record.layout == "transposed":
            return record.model_copy(update={"bias": None})
        return record

    @property
    def weights(self) -> tuple[str, ...]:
        """Weights of the layers that all parents saw."""
        return tuple(self._records)

    def real(self, name: str, merge_weights: Sequence[float]) -> RealLayer:
        """The merged weight of a layer, and its bias.

        Args:
            name: The weight's tensor.
            merge_weights: One per parent, sum 1.
        """
        record, fallback = self.record(name), self.missing.get(name, "no statistics")
        entry = self._entries[name]
        layers = self.method.layers
        if layers is not None and record is not None:
            try:
                rows = self._rows(name, record, merge_weights)
            except SingularError as error:
                fallback = str(error)
            else:
                if (norm := self.norm_at(name, merge_weights)) is not None:
                    inner = norm.in_front(
                        rows[:, :-1], lambda: rows_of(self._averaged(name, merge_weights), record)
                    )
                    return RealLayer(weight_of(inner, record, entry.shape), None, "", behind=True)
                bias = None if record.bias is None else bias_of(rows)
                inner = rows if bias is None else rows[:, :-1]
                return RealLayer(weight_of(inner, record, entry.shape), bias, "")
        bias = None
        if record is not None and record.bias is not None:
            biases = [parent.tensor(record.bias) for parent in self.parents]
            bias = self.method.merge(float64(biases), merge_weights, None, self.options)
        averaged = self._averaged(name, merge_weights)
        return RealLayer(averaged, bias, fallback if layers is not None else "")

    def rounded(
        self, name: str, merge_weights: Sequence[float], scale: Array, per_channel: bool
    ) -> RoundedLayer:
        """The merged layer in codes, with a scale that is searched on its weights.

        Args:
            name: Tensor of the codes.
            merge_weights: One per parent, sum 1.
            scale: The mean of the parents' scales.
            per_channel: Search a scale for every channel; else one for all.
        """
        real, record = self.real(name, merge_weights), self.record(name)
        spec = self._entries[name].spec
        found = searched_scale(real.weight, spec, scale, per_channel)
        codes, bias, fallback = None, real.bias, real.fallback
        if self.rounding.needs_statistics and record is not None:
            codes, bias = self._compensated(name, real, record, found, merge_weights)
        elif self.rounding.needs_statistics:
            fallback = fallback or self.missing.get(name, "no statistics")
        merged = round_target(real.weight, self.weights_of(name), found, spec, codes)
        single = None if bias is None else bias.astype(np.float32)
        return RoundedLayer(merged, found, single, fallback, real.behind)

    def _compensated(
        self,
        name: str,
        real: RealLayer,
        record: LayerRecord,
        scale: Array,
        merge_weights: Sequence[float],
    ) -> tuple[npt.NDArray[np.int8], Floats | None]:
        """Codes, and the bias with the mean of what they lose."""
        inputs = self.inputs_of(name)
        spec, shape = self._entries[name].spec, real.weight.shape
        wide = along(scale.astype(np.float64), len(shape), spec.axis)
        rows = rows_of(real.weight, record)
        steps = rows_of(np.broadcast_to(wide, shape), record)
        if real.bias is None and name not in self.norms:
            # Nothing makes up for a change of the mean: it is an error as well.
            whole = [second_moments(part, 1.0, bias=False) for part in inputs]
            moments = mixed(whole, merge_weights)
        else:
            moments = covariance(inputs, merge_weights)
        codes = compensated(rows, damped(moments), steps, spec)
        bias = real.bias
        if bias is not None:
            lost = mean_of(inputs, merge_weights)[:, None] @ (rows - codes * steps)
            bias = bias + lost.reshape(-1)
        return weight_of(codes, record, shape), bias

    def moments(
        self, name: str, weight: Array, merge_weights: Sequence[float], behind: bool
    ) -> dict[str, Array]:
        """Moments of the BatchNorm behind a layer that fit its merged weight, by tensor name.

        Args:
            name: The weight's tensor.
            weight: The merged real weight that is computed with.
            merge_weights: One per parent, sum 1.
            behind: Whether it was merged for what leaves BatchNorm.
        """
        norm, record = self.norm_at(name, merge_weights), self.record(name)
        if norm is None or record is None:
            return {}
        inputs, own = self.inputs_of(name), self.weights_of(name)
        if behind:
            return norm.placed(weight, own, inputs, record)
        return correction(weight, own, inputs, merge_weights, record).applied(norm)

    def norm_at(self, name: str, merge_weights: Sequence[float]) -> NormAtMix | None:
        """The BatchNorm behind a layer, in the parents and merged; None where there is none."""
        norm = self.norms.get(name)
        if norm is None:
            return None
        return NormAtMix(norm, [norm.read(p.tensor) for p in self.parents], merge_weights)

    def inputs_of(self, name: str) -> list[InputStatistics]:
        """What each parent saw of a layer's inputs."""
        return [file.layer(name) for file in self._files]

    def weights_of(self, name: str) -> list[Array]:
        """The real weights of the parents, BatchNorm not applied."""
        entry = self._entries[name]
        if entry.role != "codes":
            return [parent.tensor(name) for parent in self.parents]
        scale = scale_of(name, self.parents[0])
        return [dequantize(p.tensor(name), p.tensor(scale), entry.axis) for p in self.parents]

    def _rows(self, name: str, record: LayerRecord, merge_weights: Sequence[float]) -> Floats:
        """The merged rows of a layer; raises SingularError."""
        layers = self.method.layers
        assert layers is not None
        if self._kept is None:
            return layers.merge(self._parts(name, record), merge_weights, self.options)
        if name not in self._kept:
            self._kept[name] = layers.kept(self._parts(name, record), self.options)
        return self._kept[name](merge_weights)

    def _averaged(self, name: str, merge_weights: Sequence[float]) -> Floats:
        """The weight as the method merges it without statistics."""
        return self.method.merge(float64(self.weights_of(name)), merge_weights, None, self.options)

    def _parts(self, name: str, record: LayerRecord) -> list[LayerPart]:
        """What each parent gives to a layer."""
        layers, norm = self.method.layers, self.norms.get(name)
        assert layers is not None
        seen = zip(self.parents, self.inputs_of(name), self.weights_of(name), strict=True)
        return [
            layer_part(layers, record, weight, parent.tensor, norm, inputs, self.options)
            for parent, inputs, weight in seen
        ]


def layer_part(
    method: LayerMethod,
    record: LayerRecord,
    weight: Array,
    tensor: Callable[[str], Array],
    norm: Norm | None,
    inputs: InputStatistics,
    options: MethodOptions,
) -> LayerPart:
    """What a parent gives to a layer: with BatchNorm behind it, what makes the norm's outputs.

    Args:
        method: Merges the layer.
        record: The layer.
        weight: The parent's weight.
        tensor: Gives the parent's tensors by name.
        norm: The BatchNorm behind the layer.
        inputs: Statistics of the parent's inputs.
        options: Numbers of the method.
    """
    rows = rows_of(weight.astype(np.float64), record)
    bias = None if record.bias is None else tensor(record.bias)
    if norm is not None:
        own = norm.read(tensor)
        rows = times_outputs(rows, norm.gain(own))
        bias = norm.summand(own)
    return method.prepare(with_bias(rows, bias), inputs, bias is not None, options)


def scale_of(codes: str, bundle: Bundle) -> str:
    """The tensor with the scales that ``codes`` were rounded with, BatchNorm not applied."""
    fold = bundle.manifest.folds.get(codes)
    scale = fold.raw_scale if fold else bundle.manifest.tensors[codes].scale
    assert scale is not None
    return scale


def statistics_of(bundle: Bundle) -> StatisticsFile:
    """The statistics of a bundle that must have some; else raises MergeError."""
    statistics = bundle.statistics()
    if statistics is None:
        raise MergeError(
            f"{bundle.path}: found no statistics of its layers' inputs; needed those of every "
            "bundle: calibrate it again, or choose `method` mean and a `rounding` without them"
        )
    return statistics
