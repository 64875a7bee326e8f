"""Weights of a block rounded one after another, each column's error made up for by the next ones.

The layers of a block are rounded in the order in which the network runs them. Each sees the inputs
that it has in the quantized network, in which all layers before it are rounded already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from ..numerics.error_compensation import compensated, with_damping
from ..numerics.layer_matrix import rows_of, weight_of
from ..numerics.quantization import along
from .block_module import BlockModule
from .fake_quantizers import Mode, WeightQuantizer
from .layer_rows import LayerShape, layer_rows, layer_shape, some_rows
from .placement import HEAVY

__all__ = ["Batches", "compensate", "layers_of", "operand_of", "rounded_weight", "values_of"]

# Rows per layer at most, evenly spread over images and positions, and rows of one product.
_ROWS, _AT_ONCE = 1 << 17, 1 << 12
# (images, inputs of the block) of every batch.
Batches = Callable[[], Iterator[tuple[int, list[Tensor]]]]


@torch.no_grad()
def compensate(module: BlockModule, batches: Batches, images: int) -> None:
    """Give all open weights of a block their codes; scales stay as they are.

    A weight of which no matrix of inputs exists (a product with one matrix per head) is rounded to
    nearest.

    Args:
        module: The block, its activation quantizers observed.
        batches: The block's inputs in the quantized network.
        images: Images of all batches together.

    Source:
        Frantar et al., GPTQ, ICLR 2023, with features in order of falling size (``act-order``)
        and a damping of 1%.
    """
    for weight, nodes in layers_of(module).items():
        if weight.frozen is not None:
            continue
        shapes = {layer_shape(node, weight.original) for node in nodes}
        shape = shapes.pop()
        module.set_mode(Mode.ROUND)
        if shape is None or shapes:
            weight.freeze()
            continue
        hessian = _hessian(module, nodes, shape, weight.original, batches, images)
        weight.freeze(rounded_weight(weight, weight.original, shape, hessian))


def layers_of(module: BlockModule) -> dict[WeightQuantizer, list[fx.Node]]:
    """The heavy nodes that read each quantized weight of a block, in the order of the graph."""
    readers: dict[WeightQuantizer, list[fx.Node]] = {}
    for node in module.body.graph.nodes:
        source = node.args[1] if node.target in HEAVY else None
        if isinstance(source, fx.Node) and source.op == "call_module":
            quantizer = module.body.get_submodule(str(source.target))
            if isinstance(quantizer, WeightQuantizer):
                readers.setdefault(quantizer, []).append(node)
    return readers


def values_of(module: BlockModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of a block's body that computes ``nodes``, one output each."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.body.graph.nodes:
        if node.op == "output":
            break
        copies[node] = graph.node_copy(node, lambda arg: copies[arg])
    graph.output([copies[node] for node in nodes])
    part = fx.GraphModule(module.body, graph)
    part.graph.eliminate_dead_code()
    part.recompile()
    return part


def operand_of(node: fx.Node) -> fx.Node:
    """What a heavy node multiplies by its weight."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def rounded_weight(
    quantizer: WeightQuantizer, weight: Tensor, shape: LayerShape, hessian: Tensor
) -> Tensor:
    """int8 codes of ``weight`` on the quantizer's scale.

    Args:
        quantizer: Its scale and range.
        weight: Real values, of the quantizer's shape.
        shape: How they are made of outputs and features.
        hessian: (groups, features, features): sums of x x^T of the layer's inputs.
    """
    spec, sizes = quantizer.spec, tuple(weight.shape)
    scale = quantizer.scale.detach().double().cpu().numpy()
    steps = np.broadcast_to(along(scale, weight.ndim, spec.axis), sizes)
    codes = compensated(
        rows_of(weight.detach().double().cpu().numpy(), shape),
        with_damping(hessian.cpu().numpy()),
        rows_of(steps, shape),
        spec,
    )
    return torch.from_numpy(weight_of(codes, shape, sizes))


def _hessian(
    module: BlockModule,
    nodes: list[fx.Node],
    shape: LayerShape,
    weight: Tensor,
    batches: Batches,
    images: int,
) -> Tensor:
    """(groups, features, features) float64: mean of x x^T of the rows that the nodes multiply."""
    part = values_of(module, [operand_of(node) for node in nodes])
    draws = torch.Generator().manual_seed(0)
    most = max(1, _ROWS // len(nodes))
    total = weight.new_zeros(shape.groups, shape.features, shape.features, dtype=torch.float64)
    count = 0
    for size, inputs in batches():
        for node, x in zip(nodes, module(inputs, part), strict=True):
            share = max(1, most * size // images)
            rows = some_rows(*layer_rows(node, x, weight), shape, share, draws).float()
            count += rows.shape[1]
            for first in range(0, rows.shape[1], _AT_ONCE):
                few = rows[:, first : first + _AT_ONCE]
                total += torch.bmm(few.transpose(1, 2), few)
    return total / count
