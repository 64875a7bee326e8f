"""The BatchNorm behind a merged layer: its gain, and moments that fit the merged weight.

Matched moments are those of a mixture of the parents' outputs. The merged weight, rounded or not,
gives others. With the statistics of the inputs both are known up to what the statistics leave out,
which parents and merge share. A weight that was averaged in front of BatchNorm moves its mean by
the difference, its variance by the ratio. A weight that was merged for what leaves BatchNorm is
divided by the merged gain, which therefore stays; its mean is placed so that the merge's outputs
have the mean of the parents' outputs behind BatchNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..formats.bundle import Bundle
from ..formats.bundle_manifest import FoldRecord
from ..formats.statistics import LayerRecord, NormRecord
from ..graph.qdq import batch_norm_epsilon
from ..numerics.batchnorm_fold import BLIND_GAIN
from ..numerics.layer_matrix import rows_of
from ..numerics.layer_statistics import InputStatistics
from ..numerics.moments import covariance, mean_of
from ..typing import Array
from .methods.mean import matched_variance, weighted_mean

__all__ = [
    "Correction",
    "Norm",
    "NormAtMix",
    "correction",
    "fold_norm",
    "norm_behind",
    "norm_of",
    "norms_of",
    "parameters_of",
]

# A channel whose outputs do not vary keeps its variance.
_SMALLEST = 1e-20
# Gammas of two signs that leave a smaller share of their sizes cancel each other.
_CANCELLED = 1e-3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Norm:
    """The BatchNorm behind a layer.

    Attributes:
        gamma, beta, mean, variance: Names of its tensors.
        eps: Added to the variance.
        raw_bias: Name of the layer's own bias, in front of it; None where there is none.
        constants: Gamma and beta, by name, of a norm that trains none of its own.
    """

    gamma: str
    beta: str
    mean: str
    variance: str
    eps: float
    raw_bias: str | None = None
    constants: Mapping[str, Array] = field(default_factory=dict)

    def gain(self, tensors: Mapping[str, Array]) -> Floats:
        """What it multiplies each channel by; a node's gamma may be negative, a fold's is not."""
        spread = np.sqrt(tensors[self.variance].astype(np.float64) + self.eps)
        return np.asarray(tensors[self.gamma] / spread)

    def offset(self, tensors: Mapping[str, Array]) -> Floats:
        """What is taken off the layer's products in front of the gain: mean less own bias."""
        mean = tensors[self.mean].astype(np.float64)
        return mean if self.raw_bias is None else np.asarray(mean - tensors[self.raw_bias])

    def summand(self, tensors: Mapping[str, Array]) -> Floats:
        """What each channel is given behind the gain, the layer's own bias with it."""
        return np.asarray(tensors[self.beta] - self.gain(tensors) * self.offset(tensors))

    def read(self, tensor: Callable[[str], Array]) -> dict[str, Array]:
        """Its tensors, which ``tensor`` gives by their names."""
        return {**self.constants, **{name: tensor(name) for name in self.stored}}

    @classmethod
    def recorded(cls, record: NormRecord) -> Norm:
        """A norm as statistics of a checkpoint name it."""
        constants = {"1": np.ones(1, np.float32), "0": np.zeros(1, np.float32)}
        own = (record.gamma or "1", record.beta or "0", record.mean, record.variance)
        used = {name: value for name, value in constants.items() if name in own}
        return cls(*own, record.eps, record.raw_bias, used)

    @property
    def stored(self) -> list[str]:
        """Names of those of its tensors that are a bundle's."""
        names = (self.gamma, self.beta, self.mean, self.variance, self.raw_bias)
        return [name for name in names if name is not None and name not in self.constants]


class NormAtMix:
    """A BatchNorm in every parent, and in their merge.

    Args:
        norm: Its tensors' names.
        parents: Its tensors in each parent, as :meth:`Norm.read` gives them.
        merge_weights: One per parent, sum 1.

    Attributes:
        norm: The same.
        merge_weights: The same.
        tensors: Of the merge: means, and the matched variance.
        gains: What it multiplies each channel by in each parent, (outputs,).
        gain: In the merge.
        shows: Where the merged gain can be divided by: gammas of two signs may cancel each other,
            and what is multiplied by next to nothing shows nothing.
    """

    def __init__(
        self,
        norm: Norm,
        parents: Sequence[Mapping[str, Array]],
        merge_weights: Sequence[float],
    ) -> None:
        self.norm, self.merge_weights = norm, merge_weights
        self.tensors = {
            name: weighted_mean([tensors[name] for tensors in parents], merge_weights)
            for name in parents[0]
        }
        variances, means = ([t[name] for t in parents] for name in (norm.variance, norm.mean))
        self.tensors[norm.variance] = matched_variance(variances, means, merge_weights)
        self.gains = [norm.gain(tensors) for tensors in parents]
        self.gain = norm.gain(self.tensors)
        sizes = [np.abs(tensors[norm.gamma].astype(np.float64)) for tensors in parents]
        size = sum(w * own for w, own in zip(merge_weights, sizes, strict=True))
        left = np.abs(self.tensors[norm.gamma]) > _CANCELLED * np.asarray(size)
        self.shows = left & (np.abs(self.gain) > BLIND_GAIN)
        # What BatchNorm takes off its input, the layer's own bias with it.
        self._offsets = [norm.offset(tensors) for tensors in parents]

    def in_front(self, behind: Floats, averaged: Callable[[], Floats]) -> Floats:
        """The merged rows in front of the norm, (groups, features, outputs of a group).

        Args:
            behind: They times the merged gain.
            averaged: Gives the rows that a channel of which nothing shows is given.
        """
        shape = (behind.shape[0], 1, -1)
        shows, gain = self.shows.reshape(shape), self.gain.reshape(shape)
        if shows.all():
            return np.asarray(behind / gain)
        return np.where(shows, behind / np.where(shows, gain, 1.0), averaged())

    def placed(
        self,
        merged: Array,
        parents: Sequence[Array],
        inputs: Sequence[InputStatistics],
        layer: LayerRecord,
    ) -> dict[str, Array]:
        """The norm's moments, with which outputs behind it have the mean of the parents' outputs.

        The variance is the one whose gain the weight was divided by.

        Args:
            merged: The merged weight, as it will be computed with.
            parents: Weights of the parents, of the same shape.
            inputs: Statistics of each parent's inputs.
            layer: Says how rows are made of the weights.
        """

        def output_mean(
            weight: Array, seen: Sequence[InputStatistics], shares: Sequence[float]
        ) -> Floats:
            rows = rows_of(weight.astype(np.float64), layer)
            return np.asarray((mean_of(seen, shares)[:, None] @ rows).reshape(-1))

        norm, tensors = self.norm, self.tensors
        own = [output_mean(w, [seen], [1.0]) for w, seen in zip(parents, inputs, strict=True)]
        terms = zip(self.merge_weights, self.gains, own, self._offsets, strict=True)
        wanted = np.asarray(sum(w * gain * (mean - offset) for w, gain, mean, offset in terms))
        bias = 0.0 if norm.raw_bias is None else tensors[norm.raw_bias]
        mean = output_mean(merged, inputs, self.merge_weights) + bias
        placed = mean - wanted / np.where(self.shows, self.gain, 1.0)
        found = np.where(self.shows, placed, tensors[norm.mean])
        return {norm.mean: found.astype(np.float32), norm.variance: tensors[norm.variance]}


@dataclass(frozen=True)
class Correction:
    """What a BatchNorm's matched moments lack, of every channel.

    Attributes:
        shift: To be added to the mean, (outputs,).
        ratio: To be multiplied with the variance, (outputs,).
    """

    shift: Floats
    ratio: Floats

    def applied(self, norm: NormAtMix) -> dict[str, Array]:
        """The corrected moments, float32, by the names of their tensors."""
        names, tensors = norm.norm, norm.tensors
        return {
            names.mean: (tensors[names.mean] + self.shift).astype(np.float32),
            names.variance: (tensors[names.variance] * self.ratio).astype(np.float32),
        }


def norms_of(bundle: Bundle) -> dict[str, Norm]:
    """BatchNorms that a bundle keeps apart, by the weight of the layer before each.

    They are carried by scales, or, of a float bundle, nodes behind a layer that nothing else reads.
    """
    folds = bundle.manifest.folds
    if folds:
        return {name: fold_norm(fold) for name, fold in folds.items()}
    known, found = set(bundle.manifest.tensors), {}
    for node in bundle.graph_ir().graph:
        behind = norm_behind(node) if node.op_type in {"Conv", "Gemm"} else None
        if behind is None:
            continue
        held, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        # What two layers or two norms read is not moved for one of them.
        if held is None or any(v and len(v.uses()) > 1 for v in (held, *behind.inputs[1:5])):
            continue
        weight = str(held.name)
        norm = norm_of(behind, known, None if bias is None else str(bias.name))
        if {weight, *norm.stored} <= known:
            found[weight] = norm
    return found


def fold_norm(fold: FoldRecord) -> Norm:
    """The BatchNorm that scales carry."""
    names = (fold.gamma, fold.beta, fold.mean, fold.variance)
    return Norm(*names, fold.eps, fold.raw_bias)


def norm_of(node: ir.Node, known: Container[str], raw_bias: str | None = None) -> Norm:
    """The BatchNorm that a node is.

    Args:
        node: A BatchNormalization.
        known: Names of the bundle's tensors; what is none of them may be a constant.
        raw_bias: Bias of the layer before it.
    """
    names = parameters_of(node)
    constants = {
        name: value.numpy()
        for name, place in zip(names[:2], node.inputs[1:3], strict=True)
        if name not in known
        and place is not None
        and (value := ir.convenience.get_const_tensor(place)) is not None
    }
    return Norm(*names, batch_norm_epsilon(node), raw_bias, constants)


def norm_behind(layer: ir.Node) -> ir.Node | None:
    """The BatchNormalization that alone reads a layer's output; None where there is none."""
    uses = list(layer.outputs[0].uses())
    norm = uses[0].node if len(uses) == 1 else None
    return norm if norm is not None and norm.op_type == "BatchNormalization" else None


def parameters_of(norm: ir.Node) -> tuple[str, str, str, str]:
    """Names of gamma, beta, mean and variance as a BatchNormalization reads them.

    Not all of them are a bundle's tensors: a norm may have no gamma and beta of its own.
    """
    gamma, beta, mean, variance = (str(value and value.name) for value in norm.inputs[1:5])
    return gamma, beta, mean, variance


def correction(
    merged: Array,
    parents: Sequence[Array],
    inputs: Sequence[InputStatistics],
    merge_weights: Sequence[float],
    layer: LayerRecord,
) -> Correction:
    """How far the moments of a merged weight's outputs are from the parents' mixture.

    Args:
        merged: The merged weight, as it will be computed with.
        parents: Weights of the parents, of the same shape.
        inputs: Statistics of each parent's inputs.
        merge_weights: One per parent, sum 1.
        layer: Says how rows are made of the weights.
    """
    own = [
        _outputs(rows_of(weight.astype(np.float64), layer), [part], [1.0])
        for weight, part in zip(parents, inputs, strict=True)
    ]
    shares = list(zip(merge_weights, own, strict=True))
    centre = np.asarray(sum(share * mean for share, (mean, _) in shares))
    spread = np.asarray(sum(share * (v + (mean - centre) ** 2) for share, (mean, v) in shares))
    rows = rows_of(merged.astype(np.float64), layer)
    mean, variance = _outputs(rows, inputs, merge_weights)
    varies = (spread > _SMALLEST) & (variance > _SMALLEST)
    ratio = np.where(varies, variance / np.where(varies, spread, 1.0), 1.0)
    return Correction((mean - centre).reshape(-1), ratio.reshape(-1))


def _outputs(
    rows: Floats, inputs: Sequence[InputStatistics], shares: Sequence[float]
) -> tuple[Floats, Floats]:
    """Mean and variance of a layer's outputs, (groups, outputs of a group)."""
    moments = covariance(inputs, shares)
    mean = (mean_of(inputs, shares)[:, None] @ rows)[:, 0]
    low = moments.factor @ rows
    variance = np.einsum("gro,gro->go", low, low)
    variance += np.einsum("gf,gfo,gfo->go", moments.diagonal, rows, rows, optimize=True)
    return mean, variance
