"""A float merge quantized with the outputs of its experts as targets, held near its own weights.

Layer after layer of the merged network gets new weights and is rounded with compensated errors. The
weights are those of least squares: on every domain's images, inputs as the quantized merged network
has them, the layer is to put out what the domain's expert does; a second term holds it near the
merged weights, without which the few inputs that differ between the domains would move it far away.

    minimise  mean over domains d of E_d ||y_d - W x - b||^2  +  anchor m ||W - W_merged||^2

x are the inputs of the layer in the quantized merged network, m is the mean of their variances, so
that ``anchor`` has no unit, and b is free. The rounding measures errors by the covariance of x, and
b makes up for what it changes in the mean.

The idea is that of E-PMQ (arXiv 2605.16882). Of that paper the abstract alone was at hand: that
experts' weights give the targets of a layer-wise calibration, and that it is anchored to the merged
weights. Assumed here are the form of the anchor and its strength, that domains count alike, that
biases are solved for, that scales are searched on the new weights, and what the targets are: either
the outputs of the expert's own layer on its own activations (``network``), or those of the expert's
layer on the inputs that the merged network has (``layer``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import ModelError, SpecError
from ..formats.bundle import Bundle
from ..numerics.guided_layer import GuidedLayer, RowSums
from ..numerics.layer_matrix import rows_of, weight_of
from ..numerics.quantization import along
from ..typing import Progress
from .activation_cache import Caches, Rows, run_batch
from .block_module import BlockModule, Quantizers, block_module, quantizers_of
from .blocks import Block, is_tensor, rows_per_image
from .capture import CONVOLUTIONS, PRODUCTS, Capture
from .compensation import layers_of, operand_of, rounded_weight, values_of
from .fake_quantizers import Mode, WeightQuantizer, search_scale
from .graph_cache import GraphCache
from .inputs import CalibrationInputs, load
from .layer_rows import LayerShape, layer_rows, layer_shape, some_rows
from .learning import RunRecord
from .loading import current_folder_importable, state_sha256
from .nodes import module_path
from .placement import HEAVY, Plan
from .preparation import Preparation, prepare
from .request import CalibrationRequest
from .tensors import attribute
from .writing import write

__all__ = ["TARGETS", "ExpertTargets", "calibrate_with_experts"]

TARGETS = ("network", "layer")
# Rows of a layer and a domain at most.
_ROWS = 1 << 16


@dataclass(frozen=True)
class ExpertTargets:
    """What a merged model's layers are to put out.

    Attributes:
        experts: The checkpoint of every domain's expert.
        anchor: Strength of the term that holds a layer near its merged weights, >= 0, relative to
            the mean variance of its inputs.
        targets: ``network``: outputs of the expert network; ``layer``: outputs of the expert's
            layer on the inputs in the merged network.

    Raises:
        SpecError: A value is out of range.
    """

    experts: Mapping[str, str | Path]
    anchor: float = 0.01
    targets: str = "network"

    def __post_init__(self) -> None:
        if not 0 <= self.anchor < float("inf"):
            raise SpecError(f"found anchor {self.anchor}; needed a number >= 0")
        if self.targets not in TARGETS:
            raise SpecError(f"found targets {self.targets!r}; choose one of {', '.join(TARGETS)}")


def calibrate_with_experts(
    request: CalibrationRequest,
    guide: ExpertTargets,
    graphs: GraphCache | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Quantize a merged checkpoint, its experts' outputs the targets, and write its bundle.

    Args:
        request: The merged checkpoint as ``weights``, the domains and their images; ``method`` is
            ``gptq``, whose scales and rounding are used. Nothing is resumed.
        guide: The experts, one for each domain, and how they guide.
        graphs: Shared by calibrations of one model; by default nothing is shared.
        progress: Called with (blocks done, blocks in all, block name).

    Raises:
        HdrqError: As :func:`.pipeline.calibrate`.
        SpecError: Experts of other domains, another method, or BatchNorm that is not folded into
            the weights.
        ModelError: An expert has another graph than the merged model.
    """
    if set(guide.experts) != set(request.domains):
        raise SpecError(
            f"found experts of {', '.join(guide.experts)} for a model of "
            f"{', '.join(request.domains)}; needed one for each domain"
        )
    if request.method != "gptq" or request.fold != "weights":
        raise SpecError(
            f"found method {request.method} and fold {request.fold}; targets of experts need "
            "method gptq and fold weights"
        )
    graphs = graphs or GraphCache()
    with current_folder_importable():
        inputs = load(request)
        preparation = prepare(request, inputs, graphs)
        experts, hashes = [], {}
        for domain in request.domains:
            expert, hashes[domain] = _expert(request, guide.experts[domain], inputs, domain, graphs)
            experts.append(expert)
        counts = [len(dataset) for dataset in inputs.datasets.values()]
        work = _Guided(preparation, experts, inputs, counts, guide)
        for index, block in enumerate(preparation.blocks):
            name = module_path(block.heavy[0]) if block.heavy else f"block {index}"
            work.settle(index, name)
            if progress:
                progress(index + 1, len(preparation.blocks), name)
        preparation.capture.module.cpu()
        record = RunRecord.of(request, inputs)
        said = {"targets": guide.targets, "anchor": guide.anchor, "adapted_sha256": hashes}
        record = replace(record, options={**record.options, "experts": said})
        return write(request, inputs, preparation, work.quantizers, record, graphs)


def _expert(
    request: CalibrationRequest,
    weights: str | Path,
    inputs: CalibrationInputs,
    domain: str,
    graphs: GraphCache,
) -> tuple[Capture, str]:
    """The folded graph of a domain's expert, and the hash of its weights."""
    own = replace(request, weights=weights, domain=domain, data=inputs.datasets[domain])
    loaded = load(own)
    return prepare(own, loaded, graphs).capture, state_sha256(loaded.state)


class _Guided:
    """The merged model's quantizers, and the activations in front of its next block.

    ``coded`` are those of the quantized merged network, ``real`` those of every domain's expert on
    the domain's own images.
    """

    def __init__(
        self,
        model: Preparation,
        experts: Sequence[Capture],
        inputs: CalibrationInputs,
        counts: Sequence[int],
        guide: ExpertTargets,
    ) -> None:
        assert model.plan is not None
        self._device, self._guide = inputs.device, guide
        for capture in (model.capture, *experts):
            capture.module.to(self._device)
        self._model, self._plan, self._experts = model, model.plan, experts
        self._twins = [_twins(model.capture, expert) for expert in experts]
        self.quantizers = quantizers_of(model.capture, model.plan, self._device)
        self._caches, self._size = Caches(1 << 62), run_batch(inputs.images)
        ends = np.cumsum([0, *counts])
        self._spans = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
        self._last_use = {n: i for i, block in enumerate(model.blocks) for n in block.inputs}
        start = next(n for n in model.capture.graph.nodes if n.op == "placeholder" and is_tensor(n))
        first = self._caches.rows(len(inputs.images), inputs.images.shape[1:])
        first.write(0, inputs.images)
        self._coded: dict[fx.Node, Rows] = {start: first}
        self._real: dict[fx.Node, Rows] = {start: first}

    @torch.no_grad()
    def settle(self, index: int, name: str) -> None:
        """New weights, codes and scales for one block; the activations move past it."""
        block = self._model.blocks[index]
        module = block_module(self._model.capture, self._plan, block, self.quantizers)
        module = module.to(self._device)
        experts = [self._expert_module(block, d) for d in range(len(self._experts))]
        self._observe(module, Mode.OFF)
        solved = 0
        for weight, nodes in layers_of(module).items():
            if weight.frozen is None:
                module.set_mode(Mode.ROUND)
                solved += self._solve(module, experts, weight, nodes)
        self._observe(module, Mode.ROUND)
        for activation in module.activations:
            activation.settled = True
        module.set_mode(Mode.ROUND)
        every = range(len(self._experts))
        moved = self._moved(block, [(module, d) for d in every], self._coded)
        ideal = self._moved(block, [(experts[d], d) for d in every], self._real)
        for node in block.inputs:
            if self._last_use[node] == index:
                coded, real = self._coded.pop(node), self._real.pop(node)
                coded.free()
                if real is not coded:
                    real.free()
        self._coded.update(moved)
        self._real.update(ideal)
        record = {"name": name, "layers": len(block.heavy), "outputs": len(block.outputs)}
        self.quantizers.blocks.append({**record, "learned": solved > 0})

    def _expert_module(self, block: Block, domain: int) -> BlockModule:
        twins = self._twins[domain]
        own = Block(*(tuple(twins[n] for n in part) for part in _parts(block)))
        return block_module(self._experts[domain], Plan(), own, Quantizers({}, {}, []))

    def _batches(
        self, block: Block, rows: Mapping[fx.Node, Rows], domain: int
    ) -> Iterator[tuple[int, int, list[Tensor]]]:
        start, end = self._spans[domain]
        for first in range(start, end, self._size):
            last = min(first + self._size, end)
            parts = [rows[node].read(first, last).to(self._device) for node in block.inputs]
            yield first, last, parts

    def _observe(self, module: BlockModule, weights: Mode) -> None:
        """Scales of activations, from what the block's tensors are at this moment."""
        module.set_mode(weights, Mode.OFF)
        watched = [q for q in module.activations if not q.settled]
        for quantizer in watched:
            quantizer.start_observing()
        for domain in range(len(self._experts)) if watched else ():
            for _, _, inputs in self._batches(module.block, self._coded, domain):
                module(inputs)
        for quantizer in watched:
            quantizer.finish_observing()

    def _moved(
        self, block: Block, runs: Sequence[tuple[BlockModule, int]], rows: Mapping[fx.Node, Rows]
    ) -> dict[fx.Node, Rows]:
        """Outputs of a block for all images, every domain's from the module that is its own."""
        found: dict[fx.Node, Rows] = {}
        count = self._spans[-1][1]
        for module, domain in runs:
            for first, _, inputs in self._batches(block, rows, domain):
                for node, output in zip(block.outputs, module(inputs), strict=True):
                    if node not in found:
                        shape = output.shape[1:]
                        found[node] = self._caches.rows(count, shape, rows_per_image(node))
                    found[node].write(first, output.cpu())
        return found

    def _solve(
        self,
        module: BlockModule,
        experts: Sequence[BlockModule],
        weight: WeightQuantizer,
        nodes: Sequence[fx.Node],
    ) -> bool:
        """New weights of one layer, rounded, and its bias; False where they cannot be had.

        A weight that several layers share, or whose bias they share, is rounded to nearest.
        """
        node, spec = nodes[0], weight.spec
        shape = layer_shape(node, weight.original)
        own, bias = _own_bias(node, self._model.capture)
        if shape is None or len(nodes) > 1 or not own:
            weight.freeze()
            return False
        parts = [
            self._seen(module, expert, node, shape, domain) for domain, expert in enumerate(experts)
        ]
        seen = GuidedLayer.mixed(parts, [1 / len(parts)] * len(parts))
        merged = weight.original.double().cpu().numpy()
        rows = seen.solved(rows_of(merged, shape), self._guide.anchor, bias is not None)
        real = torch.from_numpy(weight_of(rows, shape, merged.shape)).to(weight.original)
        weight.original.copy_(real)
        weight.scale.copy_(search_scale(real, spec))
        matrix = torch.from_numpy(seen.covariance if bias else seen.inputs)
        codes = rounded_weight(weight, real, shape, matrix)
        weight.freeze(codes)
        if bias is not None:
            scale = weight.scale.double().cpu().numpy()
            coded = codes.numpy() * along(scale, codes.ndim, spec.axis)
            free = torch.from_numpy(seen.bias(rows_of(coded, shape)).reshape(-1))
            attribute(self._model.capture.module, bias).copy_(free)
        return True

    def _seen(
        self,
        module: BlockModule,
        expert: BlockModule,
        node: fx.Node,
        shape: LayerShape,
        domain: int,
    ) -> GuidedLayer:
        """A layer's moments on one domain's images."""
        twin = _heavy(expert)[_heavy(module).index(node)]
        weight, bias = (_constant(expert, twin, place) for place in (1, 2))
        assert weight is not None
        inputs, outputs = values_of(module, [operand_of(node)]), values_of(expert, [twin])
        start, end = self._spans[domain]
        sums = RowSums(shape.groups, shape.features, shape.outputs // shape.groups)
        coded = self._batches(module.block, self._coded, domain)
        real = self._batches(module.block, self._real, domain)
        for (first, last, own), (_, _, ideal) in zip(coded, real, strict=True):
            most = max(1, _ROWS * (last - first) // (end - start))
            (x,) = module(own, inputs)
            if self._guide.targets == "network":
                (y,) = expert(ideal, outputs)
            else:
                assert callable(twin.target)
                y = twin.target(x, weight, bias, *twin.args[3:], **twin.kwargs)
            view, leading = layer_rows(node, x, weight)
            wanted = y.movedim(1, -1) if node.target in CONVOLUTIONS else y
            wide = replace(shape, features=shape.outputs // shape.groups)
            # The same rows of both.
            draws = [torch.Generator().manual_seed(first) for _ in range(2)]
            few = some_rows(view, leading, shape, most, draws[0])
            ideal_rows = some_rows(wanted, leading, wide, most, draws[1])
            sums.add(few.cpu().numpy(), ideal_rows.cpu().numpy())
        return sums.layer()


def _parts(block: Block) -> tuple[tuple[fx.Node, ...], ...]:
    return block.nodes, block.inputs, block.outputs


def _twins(merged: Capture, expert: Capture) -> dict[fx.Node, fx.Node]:
    """The expert's node for every node of the merged model's graph."""
    pairs = list(zip(merged.graph.nodes, expert.graph.nodes, strict=False))
    same = len(merged.graph.nodes) == len(expert.graph.nodes)
    if not same or any(a.op != b.op or str(a.target) != str(b.target) for a, b in pairs):
        raise ModelError(
            "found an expert whose graph is not that of the merged model; needed checkpoints of "
            "one architecture"
        )
    return dict(pairs)


def _heavy(module: BlockModule) -> list[fx.Node]:
    return [node for node in module.body.graph.nodes if node.target in HEAVY]


def _constant(module: BlockModule, node: fx.Node, place: int) -> Tensor | None:
    """A parameter that a heavy node reads."""
    source = node.args[place] if len(node.args) > place else None
    return attribute(module.body, str(source.target)) if isinstance(source, fx.Node) else None


def _own_bias(node: fx.Node, capture: Capture) -> tuple[bool, str | None]:
    """Whether a layer's bias, if it has one, is its own alone; and its name."""
    source = node.args[2] if len(node.args) > 2 and node.target not in PRODUCTS else None
    if source is None:
        return True, None
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return False, None
    name = str(source.target)
    readers = [n for n in capture.graph.nodes if n.op == "get_attr" and n.target == name]
    return sum(len(n.users) for n in readers) == 1, name
