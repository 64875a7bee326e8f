"""What a calibration sees of every layer's inputs and of every activation, for a merge.

A watch looks on while calibration moves the float network's activations through a block
(:mod:`.reconstruction`): inputs are those of the layer in the float network, which the merged model
is to follow. Those of the quantized network carry its own error with them. It holds sums for
the layers of the block at work only, and of a large map it reads some rows, evenly spread over
images and positions. It draws from random numbers of its own, so that a calibration's codes do not
depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..formats.statistics import Histogram, Layout, Rank, Statistics, file_bytes
from ..numerics.layer_statistics import InputStatistics
from .block_module import BlockModule
from .bundle_model import BundleModel
from .capture import PRODUCTS, Capture
from .fake_quantizers import ActivationQuantizer
from .layer_rows import (
    LayerShape,
    RowStatistics,
    layer_rows,
    layer_shape,
    row_statistics,
    some_rows,
)
from .nodes import weight_node
from .placement import HEAVY
from .tensors import attribute

__all__ = ["Watch", "rank_within"]

# Rows per layer at most, and values of all of them together.
_ROWS, _VALUES = 1 << 14, 1 << 26
# Bins of a histogram, and values per batch that are counted.
_BINS, _COUNTED = 512, 1 << 16
# Fewer eigenvectors than these do little for a merge, whatever room there is.
_LEAST = 8


@dataclass
class _Layer:
    """A weight, the nodes that read it, and what was seen of their rows."""

    shape: LayerShape
    rank: int
    draws: torch.Generator
    nodes: list[fx.Node]
    waiting: int
    seen: RowStatistics | None = None
    settled: InputStatistics | None = None


class Watch:
    """Statistics of the inputs of a captured model's layers, and of its activations.

    Args:
        capture: The prepared model.
        rank: Eigenvectors kept of every covariance: a number, ``full``, or ``auto`` for as many
            as make the file no larger than the layers' codes at 8 bits, but 8 or more.
        images: Calibration images in all.
        seed: Seed of the rows that are drawn.
        activations: Number of activations that are quantized.
    """

    def __init__(
        self, capture: Capture, rank: Rank, images: int, seed: int = 0, activations: int = 0
    ) -> None:
        self._capture, self._rank, self._images = capture, rank, images
        shapes, readers = _shapes(capture)
        most = rank_within(shapes, activations) if rank == "auto" else rank
        self._layers: dict[str, _Layer] = {}
        for i, (name, shape) in enumerate(shapes.items()):
            draws = torch.Generator().manual_seed((seed << 20) + i)
            nodes, features = readers[name], shape.features
            own = features if most == "full" else min(most, features)
            self._layers[name] = _Layer(shape, own, draws, nodes, len(nodes))
        self._histograms: dict[str, _Counts] = {}

    @torch.no_grad()
    def run(self, module: BlockModule, inputs: list[Tensor], images: int) -> list[Tensor]:
        """The block's outputs for one batch of ``images`` images; what passes is counted."""
        outputs: list[Tensor] = module(inputs, _Observed(module, self, images).run)
        return outputs

    def finish(self, module: BlockModule) -> None:
        """Reduce the statistics of a block's layers to their rank; all images have passed."""
        for name in module.weight_names.values():
            layer = self._layers.get(name)
            if layer is None:
                continue
            layer.waiting -= 1
            if layer.waiting == 0 and layer.seen is not None:
                layer.settled, layer.seen = layer.seen.settle(layer.rank), None

    def see_layer(self, name: str, node: fx.Node, x: Tensor, weight: Tensor, images: int) -> None:
        """Count the rows that a layer multiplies for one batch of images."""
        layer = self._layers.get(name)
        if layer is None:
            return
        view, leading = layer_rows(node, x, weight)
        count = math.prod(view.shape[:leading])
        groups, features = layer.shape.groups, layer.shape.features
        uses = len(layer.nodes)
        most = min(_ROWS, _VALUES // (groups * features)) // uses
        share = max(1, most // self._images) * images
        if layer.seen is None:
            expected = min(count, share) / images * self._images * uses
            layer.seen = row_statistics(int(expected), features)
        layer.seen.add(some_rows(view, leading, layer.shape, share, layer.draws))

    def see_activation(self, name: str, x: Tensor) -> None:
        """Count values of an activation before it is quantized."""
        self._histograms.setdefault(name, _Counts()).add(x)

    def statistics(self, model: BundleModel) -> Statistics | None:
        """The statistics by the names of the bundle's tensors; None where there are no layers."""
        names = _bundle_names(self._capture, model)
        layouts: dict[str, tuple[str | None, Layout]] = {}
        layers: dict[str, InputStatistics] = {}
        for layer in self._layers.values():
            if layer.settled is None:
                continue
            weight, bias = _names_of(layer.nodes, names, model)
            layouts[weight], layers[weight] = (bias, layer.shape.layout), layer.settled
        if not layers:
            return None
        histograms = {name: counts.histogram() for name, counts in self._histograms.items()}
        return Statistics(self._rank, layouts, layers, histograms)


class _Observed(fx.Interpreter):
    """Runs a block node by node, and shows a watch what layers and quantizers read."""

    def __init__(self, module: BlockModule, watch: Watch, images: int) -> None:
        super().__init__(module.body)
        self._watch, self._images = watch, images
        self._weights = module.weight_names

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        if n in self._weights:
            x, weight = self.fetch_args_kwargs_from_env(n)[0][:2]
            self._watch.see_layer(self._weights[n], n, x, weight, self._images)
        elif n.op == "call_module":
            quantizer = self.module.get_submodule(str(n.target))
            if isinstance(quantizer, ActivationQuantizer):
                (x,) = self.fetch_args_kwargs_from_env(n)[0]
                self._watch.see_activation(quantizer.name, x)
        return super().run_node(n)


@dataclass
class _Counts:
    """A histogram whose range doubles where values leave it."""

    low: float = 0.0
    high: float = 0.0
    counts: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(_BINS))

    def add(self, x: Tensor) -> None:
        """Count about ``_COUNTED`` values, evenly spread; the range holds all of them."""
        flat = x.detach().reshape(-1)
        if not flat.numel():
            return
        self._cover(float(flat.min()), float(flat.max()))
        # An odd stride does not coincide with channel or row lengths.
        some = flat[:: max(1, flat.numel() // _COUNTED) | 1].float()
        counted = torch.histc(some, _BINS, self.low, self.high)
        self.counts += counted.double().cpu().numpy()

    def _cover(self, low: float, high: float) -> None:
        if self.low == self.high:
            self.low = min(low, 0.0)
            self.high = high if high > self.low else self.low + 1e-6
        while low < self.low or high > self.high:
            width, halves = self.high - self.low, self.counts.reshape(-1, 2).sum(1)
            empty = np.zeros(_BINS // 2)
            if high > self.high:
                self.high, parts = self.low + 2 * width, (halves, empty)
            else:
                self.low, parts = self.high - 2 * width, (empty, halves)
            self.counts = np.concatenate(parts)

    def histogram(self) -> Histogram:
        """What was counted."""
        return Histogram(self.low, self.high, self.counts.astype(np.float32))


def _shapes(capture: Capture) -> tuple[dict[str, LayerShape], dict[str, list[fx.Node]]]:
    """The layers whose weight is a parameter, by its name, and the nodes that read it.

    A weight that is read in two ways, as a convolution and as a product, belongs to neither.
    """
    shapes: dict[str, LayerShape] = {}
    readers: dict[str, list[fx.Node]] = {}
    mixed: set[str] = set()
    for node in capture.graph.nodes:
        weight = weight_node(node) if node.target in HEAVY else None
        if weight is None:
            continue
        name = str(weight.target)
        shape = layer_shape(node, attribute(capture.module, name))
        if shape is None or shapes.setdefault(name, shape) != shape:
            mixed.add(name)
        readers.setdefault(name, []).append(node)
    return {name: shape for name, shape in shapes.items() if name not in mixed}, readers


def rank_within(shapes: Mapping[str, LayerShape], activations: int) -> int:
    """The largest rank at which the file takes no more room than codes of one byte.

    One rank for all layers: ranks in proportion to the layers' outputs, or by the share of the
    variance that an eigenvector holds, were no better at equal bytes (digits benchmark).

    Args:
        shapes: All layers; one with fewer features than the rank keeps all of them.
        activations: Number of the histograms that lie in the same file.
    """
    room = sum(s.features * s.outputs for s in shapes.values())
    fits, beyond = _LEAST, max((s.features for s in shapes.values()), default=0) + 1
    while fits + 1 < beyond:
        middle = (fits + beyond) // 2
        sizes = {n: (s.groups, s.features, min(middle, s.features)) for n, s in shapes.items()}
        if file_bytes(sizes, activations, _BINS) <= room:
            fits = middle
        else:
            beyond = middle
    return fits


def _bundle_names(capture: Capture, model: BundleModel) -> dict[fx.Node, fx.Node]:
    """The node of the bundle's graph for every heavy node of the captured one."""
    nodes = [node for node in model.module.graph.nodes if node.target in HEAVY]
    own = [node for node in capture.graph.nodes if node.target in HEAVY]
    return dict(zip(own, nodes, strict=True))


def _names_of(
    nodes: Sequence[fx.Node], written: Mapping[fx.Node, fx.Node], model: BundleModel
) -> tuple[str, str | None]:
    """Names of a layer's weight and of the bias that is this layer's alone, in the bundle."""
    first = written[nodes[0]].args[1]
    assert isinstance(first, fx.Node)
    held = first.args[0] if first.target is torch.ops.hdrq.dequantize.default else first
    assert isinstance(held, fx.Node)
    weight = str(held.target)
    if weight in model.folds or nodes[0].target in PRODUCTS:
        return weight, None
    biases = {
        _target(written[node].args[2]) if len(written[node].args) > 2 else None for node in nodes
    }
    (bias, *others) = biases
    readers = [
        user
        for node in model.module.graph.nodes
        if node.op == "get_attr" and node.target == bias
        for user in node.users
    ]
    return weight, None if others or len(readers) != len(nodes) else bias


def _target(node: Any) -> str | None:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None
