"""BatchNorm's moments of a merged layer, corrected for what its merged weight makes of its inputs.

Matched moments are those of a mixture of the parents' outputs. The merged weight, rounded or not,
gives others. With the statistics of the inputs both are known up to what the statistics leave out,
which parents and merge share: the mean moves by the difference, the variance by the ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..formats.bundle import Bundle
from ..formats.statistics import LayerRecord
from ..numerics.layer_matrix import rows_of
from ..numerics.layer_statistics import InputStatistics
from ..numerics.moments import covariance, mean_of
from ..typing import Array

__all__ = ["Correction", "NormMoments", "correction", "norm_behind", "norms_of", "parameters_of"]

# A channel whose outputs do not vary keeps its variance.
_SMALLEST = 1e-20

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NormMoments:
    """Tensors with the running mean and variance of the BatchNorm behind a layer."""

    mean: str
    variance: str


@dataclass(frozen=True)
class Correction:
    """What a BatchNorm's matched moments lack, of every channel.

    Attributes:
        shift: To be added to the mean, (outputs,).
        ratio: To be multiplied with the variance, (outputs,).
    """

    shift: Floats
    ratio: Floats

    def applied(self, norm: NormMoments, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The corrected moments, float32, by the names of their tensors."""
        return {
            norm.mean: (tensors[norm.mean] + self.shift).astype(np.float32),
            norm.variance: (tensors[norm.variance] * self.ratio).astype(np.float32),
        }


def norms_of(bundle: Bundle) -> dict[str, NormMoments]:
    """BatchNorms that a bundle keeps apart, by the weight of the layer before each.

    They are carried by scales, or, of a float bundle, nodes behind a layer that nothing else reads.
    """
    folds = bundle.manifest.folds
    found = {name: NormMoments(fold.mean, fold.variance) for name, fold in folds.items()}
    if folds:
        return found
    for node in bundle.graph_ir().graph:
        norm = norm_behind(node) if node.op_type in {"Conv", "Gemm"} else None
        if norm is None or node.inputs[1] is None:
            continue
        weight = str(node.inputs[1].name)
        _, _, mean, variance = parameters_of(norm)
        if {weight, mean, variance} <= set(bundle.manifest.tensors):
            found[weight] = NormMoments(mean, variance)
    return found


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
