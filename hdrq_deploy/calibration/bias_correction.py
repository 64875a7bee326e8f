"""Biases moved by what quantization does to the mean of a layer's outputs.

Rounding errors of a weight meet inputs whose mean is not 0, so that they shift every output by
about the same number, image after image. Layer after layer the mean output of the quantized network
is brought back to that of the float network. Where scales carry BatchNorm its running mean moves,
which a merge averages like any other.

Source:
    Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019,
    section 4.2, with means of calibration images in place of those that BatchNorm implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from ..numerics.batchnorm_fold import BLIND_GAIN
from .block_module import BlockModule
from .capture import LINEAR, PRODUCTS, Capture, Fold
from .compensation import Batches, values_of
from .fake_quantizers import Mode
from .fold_batch_norm import read_once
from .tensors import attribute

__all__ = ["correct_biases", "put_shifts"]


@torch.no_grad()
def correct_biases(
    module: BlockModule, capture: Capture, real: Batches, coded: Batches
) -> dict[str, Tensor]:
    """Bring the mean outputs of a block's layers to those of the float block. In place.

    A layer without a bias of its own stays as it is.

    Args:
        module: The block; its weights have codes, and its activations scales.
        capture: The folded model that it is part of.
        real: The block's inputs in the float network.
        coded: The block's inputs in the quantized network.

    Returns:
        What was added to each bias, (outputs,), by its name.
    """
    nodes = {node: bias for node in module.weight_names if (bias := _own_bias(node, capture))}
    module.set_mode(Mode.OFF)
    wanted = _means(module, list(nodes), real) if nodes else []
    module.set_mode(Mode.ROUND)
    shifts = {}
    for (node, bias), mean in zip(nodes.items(), wanted, strict=True):
        # The layers before it are corrected already.
        (found,) = _means(module, [node], coded)
        shifts[bias] = (mean - found).cpu()
        put_shifts(capture, {bias: shifts[bias]})
    return shifts


@torch.no_grad()
def put_shifts(capture: Capture, shifts: Mapping[str, Tensor]) -> None:
    """Add shifts, as :func:`correct_biases` returns them, to the biases of a model. In place."""
    weights = {fold.bias_name: weight for weight, fold in capture.folds.items()}
    for name, shift in shifts.items():
        bias = attribute(capture.module, name)
        bias.add_(shift.to(bias))
        if name in weights:
            capture.folds[weights[name]] = _shifted(capture.folds[weights[name]], shift)


def _shifted(fold: Fold, shift: Tensor) -> Fold:
    """A fold whose bias is moved: by its running mean, or by beta where that has no say."""
    gain = fold.gain
    sees = gain > BLIND_GAIN
    by_mean = torch.where(sees, shift / torch.where(sees, gain, 1.0), 0.0)
    by_beta = torch.where(sees, 0.0, shift)
    return replace(fold, mean=fold.mean - by_mean, beta=fold.beta + by_beta)


def _own_bias(node: fx.Node, capture: Capture) -> str:
    """The bias of a block's layer that no other node of the model reads; "" where it has none."""
    bias = node.args[2] if len(node.args) > 2 and node.target not in PRODUCTS else None
    if not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return ""
    nodes = (n for n in capture.graph.nodes if n.op == "get_attr" and n.target == bias.target)
    return str(bias.target) if read_once(next(nodes)) else ""


def _means(module: BlockModule, nodes: list[fx.Node], batches: Batches) -> list[Tensor]:
    """Mean output of every channel of some layers, float32 (outputs,)."""
    part = values_of(module, nodes)
    totals: list[Tensor] = []
    count = 0
    for size, inputs in batches():
        found = module(inputs, part)
        sums = [size * _mean(y, node).double() for y, node in zip(found, nodes, strict=True)]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        count += size
    return [(total / count).float() for total in totals]


def _mean(y: Tensor, node: fx.Node) -> Tensor:
    """The mean of a batch over all but the channels."""
    axis = y.ndim - 1 if node.target in LINEAR else 1
    return y.mean([i for i in range(y.ndim) if i != axis])
