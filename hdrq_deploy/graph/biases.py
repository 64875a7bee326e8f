"""Biases that integer kernels can hold: whole multiples of s_x * s_w, in int32.

A kernel sums products of codes in int32, adds the bias as a whole number of s_x * s_w, and
rounds the sum to a code of its output. Two rules follow.

1. The bias must fit. Where s_x * s_w is tiny, as in a channel that BatchNorm switches off, it
   leaves int32 and wraps. The channel's scale is raised until the bias fits; its codes become
   small or 0. That costs nothing: a weight whose every product is that small beside its bias
   does not show in the output.
2. The bias must be a whole number before a kernel rounds it. With few bits the sums lie far
   apart, many of them at the same distance from the border between two codes, so that a bias
   half a multiple away turns many codes of a channel at once. Biases are whole from the start,
   in the bundle, and a multiple is chosen that keeps the sums away from those borders, where
   the last bit of a float would decide.

Codes of b bits are stored times 2^(8 - b), so the unit of a bias is s_x * s_w / 2^(8 - b).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..formats.bundle_manifest import FoldRecord, Tensor
from ..numerics import quantization
from ..numerics.batchnorm_fold import graph_tensors
from ..typing import Array
from .operators import QUANTIZABLE
from .qdq import quantizer_behind, quantizer_of, transposes_weight, weight_dequantizer

__all__ = [
    "LARGEST",
    "BiasSite",
    "added_bias",
    "bias_sites",
    "channel_axis",
    "fitted",
    "folded_tensors",
    "shifts",
    "smallest_scale",
    "whole_bias",
]

Floats = npt.NDArray[np.float64]
# A bias code's largest magnitude; the other half of int32 is left to the sums of products.
LARGEST = 1 << 30
# Scales this close to what is needed are left as they are.
_SLACK = 1 + 1e-3
# Beyond the smallest scale with which its bias fits a channel does not show its weights yet:
# rounding them adds 2^-30 of the bias for every product, at this factor 2^-24.
_HARMLESS = 64
# No product of two scales is smaller: float32 holds it and its inverse.
_SMALLEST_UNIT = 1e-30
# Relative error of a sum in float32, with room for sums that cancel.
_TIE = 4e-6
# By how many units a bias may be moved away from a border, the nearest first.
_OFFSETS = (0, 1, -1, 2, -2)


@dataclass(frozen=True)
class BiasSite:
    """A layer that adds a constant to a product of codes; tensors by their names.

    Attributes:
        node: ONNX node.
        codes: Codes of its weight.
        scale: Scale of its weight.
        bias: (C,).
        operand: Scale of the activation that it reads.
        axis: Axis of the C output channels in ``codes``.
        output: Scale of the codes that it writes, behind ReLU or Clip; None where its output
            stays real.
        lo, hi: Lowest and highest of these codes.
        whole: The kernel rounds this bias, and nothing else reads it. Convolutions with real
            output and products of tokens add theirs in float.
    """

    node: str
    codes: str
    scale: str
    bias: str
    operand: str
    axis: int
    output: str | None
    lo: int
    hi: int
    whole: bool


def bias_sites(model: ir.Model) -> list[BiasSite]:
    """List all layers of a bundle's graph that add a constant bias to a product of codes."""
    sites = (_site(model, node) for node in model.graph if node.op_type in QUANTIZABLE)
    return [site for site in sites if site is not None]


def shifts(entries: Mapping[str, Tensor]) -> dict[str, int]:
    """How many bits lie between codes and int8, by the name of the codes."""
    return {name: 8 - entry.bits for name, entry in entries.items() if entry.bits is not None}


def fitted(
    tensors: Mapping[str, Array],
    sites: Sequence[BiasSite],
    shift: Mapping[str, int],
    folds: Mapping[str, FoldRecord] | None = None,
    split: bool = False,
    whole: bool = True,
) -> dict[str, Array]:
    """The tensors that must change so that every bias fits int32 and is a whole number.

    Args:
        tensors: Scales and biases, float32; codes where they have been rounded already.
        sites: Biases as :func:`bias_sites` gives them.
        shift: See :func:`shifts`.
        folds: BatchNorms that scales carry: their codes stay, the gain is raised.
        split: Give every channel its own scale where channels of one scale need different ones.
            Otherwise that scale rises no further than harms no channel, and may stay too small.
        whole: Round biases, too.

    Returns:
        New scales, codes and biases by name; empty where all fits.
    """
    now = dict(tensors)
    changed: dict[str, Array] = {}
    for name, group in _by_codes(sites).items():
        raised = _raised(now, name, group, shift[name], (folds or {}).get(name), split)
        now |= raised
        changed |= raised
    for site in sites if whole else ():
        if not site.whole:
            continue
        unit = _unit(now[site.operand], now[site.scale], shift[site.codes])
        scale = None if site.output is None else float(now[site.output])
        bias = whole_bias(now[site.bias], unit, 1 << shift[site.codes], scale, site.lo, site.hi)
        if not np.array_equal(bias, now[site.bias]):
            changed[site.bias] = bias
    return changed


def smallest_scale(bias: Array, operand: Array, shift: int) -> Floats:
    """The smallest weight scale of each channel with which its bias fits.

    Args:
        bias: (C,).
        operand: Scale of the activation, ().
        shift: Bits between the weight's codes and int8.

    Returns:
        (C,) float64.

    >>> smallest_scale(np.array([0.0, 2.0**20]), np.array(2.0**-10), 0)
    array([1.024e-27, 1.000e+00])
    """
    unit = np.maximum(np.abs(bias.astype(np.float64)) / LARGEST, _SMALLEST_UNIT)
    smallest: Floats = unit * 2.0**shift / float(operand)
    return smallest


def whole_bias(
    bias: Array,
    unit: Array,
    spacing: int,
    scale: float | None = None,
    lo: int = 0,
    hi: int = 0,
) -> npt.NDArray[np.float32]:
    """The nearest whole multiples of ``unit``, or one or two further where sums meet a border.

    Args:
        bias: (C,) real values.
        unit: What 1 of the kernel's int32 sum stands for, (C,) or ().
        spacing: Sums of products are multiples of it.
        scale: Scale of the output's codes; None where it has none.
        lo, hi: Lowest and highest code of the output.

    >>> whole_bias(np.array([0.26, -0.4]), np.array(0.25), 1)
    array([ 0.25, -0.5 ], dtype=float32)
    """
    wide = np.broadcast_to(np.asarray(unit, np.float64), bias.shape)
    codes = np.rint(bias.astype(np.float64) / wide)
    if scale is not None and spacing > 1:
        codes = codes + _away_from_borders(codes, wide / scale, spacing, lo, hi)
    fits = np.abs(codes) <= 2 * LARGEST  # a scale that serves other channels, too, may be too small
    return np.where(fits, codes * wide, bias).astype(np.float32)


def _away_from_borders(
    codes: Floats, factor: Floats, spacing: int, lo: int, hi: int
) -> npt.NDArray[np.int64]:
    """What to add to bias codes (C,) so that the fewest sums lie on a border of two codes.

    A sum is a bias code plus a multiple of ``spacing``; times ``factor`` it is the output in
    codes, whose borders lie at k + 1/2.
    """
    borders = np.arange(lo, hi) + 0.5
    # What a float computation of the sum can be off by, in codes.
    doubt = _TIE * (np.abs(borders) + np.abs(codes * factor)[:, None] + 1)
    moves = np.zeros(len(codes), np.int64)
    # Where the sums lie closer together than the doubt reaches, some always meet a border.
    open_ = np.flatnonzero((2 * doubt / (spacing * factor[:, None])).sum(1) < 1)
    best = np.full(len(codes), len(borders) + 1)
    for move in _OFFSETS:
        some = open_[best[open_] > 0]
        if not some.size:
            break
        place = (borders / factor[some, None] - codes[some, None] - move) / spacing
        away = np.abs(place - np.rint(place)) * spacing * factor[some, None]
        met = (away < doubt[some]).sum(1)
        better = met < best[some]
        moves[some[better]], best[some[better]] = move, met[better]
    return moves


def _by_codes(sites: Iterable[BiasSite]) -> dict[str, list[BiasSite]]:
    groups: dict[str, list[BiasSite]] = {}
    for site in sites:
        groups.setdefault(site.codes, []).append(site)
    return groups


def _raised(
    tensors: Mapping[str, Array],
    name: str,
    sites: Sequence[BiasSite],
    shift: int,
    fold: FoldRecord | None,
    split: bool,
) -> dict[str, Array]:
    """Scale, codes and bias of one weight whose scale is too small; empty where it is not."""
    first = sites[0]
    scale = tensors[first.scale]
    needed = np.max(
        [smallest_scale(tensors[site.bias], tensors[site.operand], shift) for site in sites], axis=0
    )
    if scale.ndim == 0 and not (split and (needed > scale * _SLACK).any()):
        needed = np.minimum(needed.max(), _HARMLESS * needed.min())
    if not (needed > scale * _SLACK).any():
        return {}
    if fold is not None:
        return _raised_fold(tensors, fold, needed)
    before = np.broadcast_to(scale.astype(np.float64), needed.shape)
    after = np.where(needed > before * _SLACK, needed, before).astype(np.float32)
    changed: dict[str, Array] = {first.scale: np.asarray(after)}
    if name in tensors:
        codes = tensors[name]
        axis = first.axis if after.ndim else None
        ratio = quantization.along(before / after.astype(np.float64), codes.ndim, axis)
        # A channel whose scale stays keeps its codes: the ratio is 1 but for float32's rounding.
        changed[name] = np.rint(codes * ratio).astype(codes.dtype)
    return changed


def folded_tensors(
    tensors: Mapping[str, Array], fold: FoldRecord, smallest: Array | None = None
) -> tuple[Array, Array]:
    """The scale and bias that the graph reads: :func:`graph_tensors` of a fold's own tensors.

    Args:
        tensors: Tensors of a bundle by name.
        fold: Names those of one BatchNorm.
        smallest: Smallest scale of each channel, (C,).
    """
    return graph_tensors(
        tensors[fold.raw_scale],
        tensors[fold.gamma],
        tensors[fold.beta],
        tensors[fold.mean],
        tensors[fold.variance],
        fold.eps,
        None if fold.raw_bias is None else tensors[fold.raw_bias],
        smallest,
    )


def _raised_fold(
    tensors: Mapping[str, Array], fold: FoldRecord, needed: Floats
) -> dict[str, Array]:
    """BatchNorm's gain raised; the raw weight stays what a merge averages."""
    scale, bias = folded_tensors(tensors, fold, needed)
    return {fold.scale: scale, fold.bias: bias}


def _unit(operand: Array, scale: Array, shift: int) -> Floats:
    product: Floats = np.asarray(operand.astype(np.float64) * scale / 2.0**shift)
    return product


def _site(model: ir.Model, node: ir.Node) -> BiasSite | None:
    operand = quantizer_of(node.inputs[0])
    weight, transposed = weight_dequantizer(node.inputs[1])
    bias, last = added_bias(model, node)
    if operand is None or weight is None or bias is None:
        return None
    codes, scale = weight.inputs[:2]
    operand_scale = operand[1].inputs[1]
    if not all(_is_initializer(model, value) for value in (codes, scale, operand_scale)):
        return None
    assert codes is not None and scale is not None and operand_scale is not None
    if codes.shape is None or codes.dtype == ir.DataType.FLOAT8E4M3FN:  # no whole sums
        return None
    axis = channel_axis(node, len(codes.shape), transposed)
    if bias.shape is None or tuple(bias.shape) != (codes.shape[axis],):
        return None
    quantize = quantizer_behind(last)
    output = None if quantize is None else quantize.inputs[1]
    lo, hi = (0, 0) if quantize is None else _range(quantize)
    linear = node.op_type == "Gemm" or len(last.outputs[0].shape or ()) == 2
    rounded = linear or (node.op_type == "Conv" and quantize is not None)
    return BiasSite(
        node=str(node.name),
        codes=str(codes.name),
        scale=str(scale.name),
        bias=str(bias.name),
        operand=str(operand_scale.name),
        axis=axis,
        output=None if output is None else str(output.name),
        lo=lo,
        hi=hi,
        # A bias of the network's output decides no code; it stays as it was learned.
        whole=rounded and not last.outputs[0].is_graph_output() and len(list(bias.uses())) == 1,
    )


def added_bias(model: ir.Model, node: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """The constant that a layer adds, None where it adds none, and the node that adds it."""
    if node.op_type != "MatMul":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return (bias if _is_initializer(model, bias) else None), node
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None, node
    add = uses[0].node
    bias = next((v for v in add.inputs if _is_initializer(model, v)), None)
    return bias, add


def _is_initializer(model: ir.Model, value: ir.Value | None) -> bool:
    return value is not None and value.name in model.graph.initializers


def channel_axis(node: ir.Node, rank: int, transposed: bool = False) -> int:
    """The axis of the output channels in the codes of a layer's weight.

    Args:
        node: Conv, Gemm or MatMul.
        rank: Number of dimensions of the codes.
        transposed: A Transpose lies between the codes and the layer.
    """
    if node.op_type == "Conv":
        return 0
    turned = transposed != transposes_weight(node)
    return rank - 2 if turned else rank - 1


def _range(quantize: ir.Node) -> tuple[int, int]:
    """Lowest and highest code behind QuantizeLinear and an integer Clip."""
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    unsigned = zero is not None and zero.dtype == ir.DataType.UINT8
    lo, hi = (0, 255) if unsigned else (-128, 127)
    uses = list(quantize.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Clip":
        bounds = [ir.convenience.get_const_tensor(v) for v in uses[0].node.inputs[1:3] if v]
        if len(bounds) == 2 and all(bound is not None for bound in bounds):
            lo, hi = (int(bound.numpy()) for bound in bounds if bound is not None)
    return lo, hi
