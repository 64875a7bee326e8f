"""The rows that heavy layers multiply, and their mean and covariance, batch by batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..formats.statistics import Layout
from ..numerics.layer_statistics import InputStatistics
from .capture import CONVOLUTIONS, LINEAR, PRODUCTS, TRANSPOSED

__all__ = [
    "LayerShape",
    "RowStatistics",
    "layer_rows",
    "layer_shape",
    "row_statistics",
    "some_rows",
]

aten = torch.ops.aten

# A share of the features above which all eigenvectors are computed, not some; of few features
# they always are.
_MANY, _FEW = 1 / 3, 256
_OVERSAMPLED, _PASSES = 16, 3
_AT_ONCE = 1 << 11


@dataclass(frozen=True)
class LayerShape:
    """How the weight of a heavy layer is made of outputs and features.

    Attributes:
        layout: See :class:`..formats.statistics.LayerRecord`.
        groups: Groups of a convolution, else 1.
        features: Length of the rows that one group multiplies.
        outputs: Rows of the weight's matrix, of all groups together.
    """

    layout: Layout
    groups: int
    features: int
    outputs: int


def layer_shape(node: fx.Node, weight: Tensor) -> LayerShape | None:
    """The shape of a heavy node with a constant weight.

    None for a product whose weight is no matrix: it is one matrix per image or head.
    """
    groups = int(_argument(node, "groups", 1))
    if node.target in CONVOLUTIONS:
        return LayerShape("conv", groups, weight[0].numel(), len(weight))
    if node.target in TRANSPOSED:
        features = len(weight) // groups
        return LayerShape("transposed", groups, features, weight[0].numel() * groups)
    if weight.ndim != 2:
        return None
    if node.target in LINEAR:
        return LayerShape("linear", 1, weight.shape[1], weight.shape[0])
    return LayerShape("matmul", 1, weight.shape[0], weight.shape[1])


def layer_rows(node: fx.Node, x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """A view of the layer's input whose leading axes count rows.

    Args:
        node: The heavy node.
        x: Its first operand.
        weight: Its weight.

    Returns:
        (rows..., channels or features, kernel...), and the number of leading axes. What a
        convolution pads with zeros are zeros here.
    """
    if node.target in LINEAR | PRODUCTS:
        x = x[None] if x.ndim == 1 else x
        return x, x.ndim - 1
    x = x[None] if x.ndim == weight.ndim - 1 else x
    if node.target in TRANSPOSED:
        return x.movedim(1, -1), x.ndim - 1
    kernel = weight.shape[2:]
    stride, dilation = (_each(_argument(node, n, 1), len(kernel)) for n in ("stride", "dilation"))
    x = _padded(x, _argument(node, "padding", 0), kernel, dilation).contiguous()
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    steps = x.stride()
    apart = [step * s for step, s in zip(steps[2:], stride, strict=True)]
    within = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
    view = x.as_strided(
        (len(x), *sizes, x.shape[1], *kernel), (steps[0], *apart, steps[1], *within)
    )
    return view, 1 + len(kernel)


def some_rows(
    view: Tensor, leading: int, shape: LayerShape, most: int, draws: torch.Generator
) -> Tensor:
    """About ``most`` rows of a view at most, (groups, rows, features).

    One row comes of every stretch of equal length, so that they are even over images and over
    positions.

    Args:
        view: As :func:`layer_rows` gives it.
        leading: The number of its axes that count rows.
        shape: Of the layer.
        most: Rows wanted.
        draws: Where in its stretch a row lies.
    """
    sizes = view.shape[:leading]
    count = math.prod(sizes)
    if count > most:
        inside = torch.rand(most, generator=draws, dtype=torch.float64)
        index = ((torch.arange(most) + inside) * (count / most)).long().to(view.device)
        view, count = view[torch.unravel_index(index, sizes)], most
    return view.reshape(count, shape.groups, shape.features).transpose(0, 1)


def _padded(x: Tensor, padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    if padding == "valid":
        return x
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in whole]
    else:
        sides = [(side, side) for side in _each(padding, len(kernel))]
    return torch.nn.functional.pad(x, [side for pair in reversed(sides) for side in pair])


def _each(value: Any, count: int) -> list[int]:
    """One number for every axis of the kernel."""
    given = [int(value)] if isinstance(value, int) else [int(v) for v in value]
    return given * count if len(given) == 1 else given


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An argument of an ATen call by its name in the schema."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else default


class RowStatistics(ABC):
    """Mean and covariance of rows that come in batches."""

    rows = 0

    def add(self, rows: Tensor) -> None:
        """Take a batch (groups, rows, features) in."""
        self.rows += rows.shape[1]
        self._add(rows.float())

    @abstractmethod
    def _add(self, rows: Tensor) -> None: ...

    @abstractmethod
    def settle(self, rank: int) -> InputStatistics:
        """Statistics of rank ``rank`` at most."""


def row_statistics(rows: int, features: int) -> RowStatistics:
    """What keeps the statistics of about ``rows`` rows in the least memory."""
    return _Kept() if rows < 2 * features else _Moments()


class _Moments(RowStatistics):
    """Mean and sums of products around it, in float64, brought together part by part.

    Products of one part are summed in float32: around the part's own mean, and of a few thousand
    rows, since a long sum of equal terms loses digits.

    Source:
        Chan, Golub and LeVeque, The American Statistician 37(3), 1983, formula 2.1 for products.
    """

    def __init__(self) -> None:
        self._counted = 0

    def _add(self, rows: Tensor) -> None:
        for part in torch.split(rows, _AT_ONCE, 1):
            self._join(part)

    def _join(self, part: Tensor) -> None:
        groups, count, features = part.shape
        mean = part.mean(1, dtype=torch.float64)
        near = part - mean[:, None].float()
        if not self._counted:
            self._mean = torch.zeros_like(mean)
            self._products = mean.new_zeros(groups, features, features)
        self._products += torch.bmm(near.transpose(1, 2), near)
        away, both = mean - self._mean, self._counted + count
        scaled = away * (self._counted * count / both)
        self._products.baddbmm_(scaled[:, :, None], away[:, None, :])
        self._mean += away * (count / both)
        self._counted = both

    def settle(self, rank: int) -> InputStatistics:
        covariance = self._products.div_(self.rows)
        variances = covariance.diagonal(dim1=1, dim2=2).clamp(min=0)
        factor = _of_covariance(covariance, min(rank, covariance.shape[1]))
        return _statistics(self.rows, self._mean, variances, factor)


class _Kept(RowStatistics):
    """The rows themselves, where they are fewer than their products would be."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def _add(self, rows: Tensor) -> None:
        self._parts.append(rows)

    def settle(self, rank: int) -> InputStatistics:
        rows = torch.cat(self._parts, 1)
        self._parts.clear()
        mean = rows.mean(1, dtype=torch.float64)
        near = (rows - mean[:, None].float()).div_(math.sqrt(self.rows))
        variances = (near.double() if near.numel() < 1 << 24 else near).square().sum(1).double()
        factor = torch.stack([_of_rows(part, min(rank, part.shape[1])) for part in near])
        return _statistics(self.rows, mean, variances, factor)


def _statistics(rows: int, mean: Tensor, variances: Tensor, factor: Tensor) -> InputStatistics:
    """The statistics as arrays; every eigenvector gets a sign of its own choice.

    An eigenvector's sign is arbitrary: its largest entry becomes positive.
    """
    if factor.shape[1]:
        largest = factor.gather(2, factor.abs().argmax(2, keepdim=True))
        factor = torch.where(largest < 0, -factor, factor)
    arrays = (mean.cpu().numpy(), variances.cpu().numpy(), factor.double().cpu().numpy())
    return InputStatistics.of_factor(rows, *arrays)


def _of_covariance(covariance: Tensor, rank: int) -> Tensor:
    """(groups, rank, features): the largest eigenvectors, each times the root of its eigenvalue."""
    size = covariance.shape[1]
    if size <= _FEW or rank > size * _MANY:
        values, vectors = torch.linalg.eigh(covariance)
        return _scaled(values, vectors, rank)
    parts = []
    for one in covariance:
        basis = _basis(one, lambda b, one=one: one @ b, rank)
        values, turns = torch.linalg.eigh(basis.T @ one @ basis)
        parts.append(_scaled(values, basis @ turns, rank))
    return torch.stack(parts)


def _of_rows(rows: Tensor, rank: int) -> Tensor:
    """(rank, features) of ``rows`` (n, features), whose products sum to the covariance."""
    count, size = rows.shape
    if rank > min(count, size) * _MANY:
        if count >= size:
            return _of_covariance((rows.T @ rows).double()[None], rank)[0]
        _, turns = torch.linalg.eigh((rows @ rows.T).double())
        kept = turns.flip(1)[:, :rank].T.to(rows.dtype) @ rows
        return torch.nn.functional.pad(kept, (0, 0, 0, max(0, rank - count)))
    basis = _basis(rows, lambda b: rows.T @ (rows @ b), rank)
    seen = (rows @ basis).double()
    values, turns = torch.linalg.eigh(seen.T @ seen)
    return _scaled(values, basis.double() @ turns, rank)


def _basis(like: Tensor, multiply: Any, rank: int) -> Tensor:
    """(features, about rank) that spans the largest eigenvectors, by subspace iteration.

    Source:
        Halko, Martinsson and Tropp, SIAM Review 53(2), 2011, algorithm 4.4.
    """
    size = like.shape[-1]
    width = min(size, rank + _OVERSAMPLED)
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(size, width, generator=draw, dtype=torch.float64)
    basis = start.to(like.device, like.dtype)
    for _ in range(1 + _PASSES):
        basis = torch.linalg.qr(multiply(basis))[0]
    return basis


def _scaled(values: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """Eigenvalues ascend, as ``eigh`` gives them."""
    roots = values.clamp(min=0).sqrt().flip(-1)[..., :rank]
    return vectors.flip(-1)[..., :rank].transpose(-1, -2) * roots[..., None]
