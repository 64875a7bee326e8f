"""What a merge method is: a function of one parameter's tensors, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import MergeError
from ...numerics.layer_statistics import InputStatistics
from ...numerics.moments import Moments

__all__ = [
    "Floats",
    "LayerAtMix",
    "LayerMethod",
    "LayerPart",
    "MergeFunction",
    "MergeMethod",
    "MethodOptions",
    "float64",
]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MethodOptions:
    """Numbers that merge methods read; each is also a flag of ``hdrq-merge``.

    Attributes:
        scaling: Factor of the merged task vector; finite.
        density: Share of each task vector that ``ties`` keeps, above 0 and up to 1.
        alpha: What ``regression`` keeps of the products of different inputs, 0 to 1.
        ridge: What ``regression`` adds to its diagonal, as a share of the mean; 0 or more.

    Raises:
        MergeError: A number is out of its range.
    """

    scaling: float = field(default=1.0, metadata={"help": "factor of the task vector"})
    density: float = field(default=0.2, metadata={"help": "share that ties keeps"})
    # Calibration images of the digits, HDRQ at W4A8, pairs and triple, in %: at 0.8, 0.9, 0.95,
    # 0.98, 0.99 and 1 statistics of the default rank gave 87.2, 88.1, 88.2, 88.3, 88.5 and 88.4,
    # in full 87.8, 88.7, 89.0, 89.3, 90.1 and 89.8. 0.98 is safer where images are few.
    alpha: float = field(default=0.98, metadata={"help": "share kept of products of inputs"})
    ridge: float = field(default=1e-4, metadata={"help": "pull of regression towards the mean"})

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or not math.isfinite(self.scaling):
            raise MergeError(
                f"found density={self.density}, scaling={self.scaling}; needed a density above 0, "
                "up to 1, and a finite scaling"
            )
        if not 0 <= self.alpha <= 1 or not 0 <= self.ridge < math.inf:
            raise MergeError(
                f"found alpha={self.alpha}, ridge={self.ridge}; needed an alpha of 0 to 1, and a "
                "finite ridge of 0 or more"
            )


class MergeFunction(Protocol):
    """Merges the tensors that several models have for one parameter; NumPy only."""

    def __call__(
        self,
        tensors: Sequence[Floats],
        merge_weights: Sequence[float],
        base: Floats | None,
        options: MethodOptions,
    ) -> Floats:
        """The merged tensor, float64, of the parameter's shape.

        Args:
            tensors: One per model, float64, all of one shape. The function does not change them.
            merge_weights: One per model, >= 0, sum 1.
            base: The source model's tensor where the method asked for it, else None.
            options: See :class:`MethodOptions`.
        """
        ...


@dataclass(frozen=True)
class LayerPart:
    """What one parent gives to a layer that is merged with statistics, whatever its weight.

    Attributes:
        rows: The parent's weight, (groups, features, outputs of a group); see
            :mod:`hdrq_deploy.numerics.layer_matrix`.
        moments: Of its inputs.
        product: ``moments`` times ``rows``.
        bias: Whether the last feature is the bias.
    """

    rows: Floats
    moments: Moments
    product: Floats
    bias: bool


# The merged rows of one layer at merge weights.
LayerAtMix = Callable[[Sequence[float]], Floats]


@dataclass(frozen=True)
class LayerMethod:
    """How a method merges a layer of whose inputs there are statistics.

    Attributes:
        prepare: What one parent gives, from (its rows, the statistics of its inputs, whether the
            last row is the bias, the options); merge weights do not matter to it.
        merge: The merged rows, from (the parts, the merge weights, the options).
            :class:`~hdrq_deploy.numerics.moments.SingularError` says that there are none.
        kept: What gives the same rows at any merge weights with little work, from (the parts,
            the options); it may take its time, and raises as ``merge`` does.
    """

    prepare: Callable[[Floats, InputStatistics, bool, MethodOptions], LayerPart]
    merge: Callable[[Sequence[LayerPart], Sequence[float], MethodOptions], Floats]
    kept: Callable[[Sequence[LayerPart], MethodOptions], LayerAtMix]


@dataclass(frozen=True)
class MergeMethod:
    """A merge method, as the table :data:`hdrq_deploy.merging.methods.METHODS` holds it.

    A method that needs no source checkpoint also merges bundles: it is given the weights that
    the codes stand for, and its result is rounded to codes again.

    Attributes:
        merge: Called once for every floating-point parameter, except for BatchNorm's running
            variances (their moments are matched) and for tensors of one element or none (their
            weighted mean is taken).
        summary: One line for the command's help.
        needs_base: Whether the method reads the source checkpoint.
        options: Names of the :class:`MethodOptions` that the method reads.
        is_mean: Whether the result is the weighted mean. Codes are rounded with noise only then:
            the probabilities are those of a weighted mean.
        layers: How layers are merged of whose inputs all parents have statistics; ``merge``
            serves all others. None where the method reads no statistics.
    """

    merge: MergeFunction
    summary: str
    needs_base: bool = False
    options: tuple[str, ...] = ()
    is_mean: bool = False
    layers: LayerMethod | None = None

    @property
    def needs_statistics(self) -> bool:
        """Whether the parents must hold statistics of their layers' inputs."""
        return self.layers is not None

    @property
    def merges_bundles(self) -> bool:
        """Whether bundles can be merged: they do not hold the source weights."""
        return not self.needs_base


def float64(tensors: Sequence[npt.NDArray[Any]]) -> list[Floats]:
    """The tensors as a merge method takes them."""
    return [np.asarray(tensor, np.float64) for tensor in tensors]
