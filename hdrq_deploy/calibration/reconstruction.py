"""Block-wise reconstruction: the float and the quantized activations pushed forward once.

For each block in order: the float block's outputs on float inputs are the targets; the
quantized block learns weights and steps to meet them; then both sets of activations move on
to the next block. No prefix is ever run again, so the cost is linear in depth. A finished
block is stored, so that a stopped run goes on behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from .activation_cache import Caches, Rows
from .blocks import MOST_HEAVY, Block, find_blocks, is_tensor, rows_per_image, scalar_value
from .capture import Capture, attribute, module_path, set_attribute
from .fake_quantizers import ActivationQuantizer, Mode, WeightQuantizer
from .noise import Draws
from .placement import Plan
from .recipe import Options
from .resume import Partial

__all__ = ["Quantized", "quantizers_of", "reconstruct"]

Report = Callable[[int, int, str], None]
# Images per forward pass when nothing is learned: so many, and values of the input, at most.
_RUN_BATCH, _RUN_VALUES = 32, 1 << 23


def run_batch(images: Tensor) -> int:
    """Images (N, ...) per forward pass when nothing is learned."""
    return max(1, min(_RUN_BATCH, _RUN_VALUES // max(images[0].numel(), 1)))


@dataclass
class Quantized:
    """What calibration learned, by the names used in the bundle."""

    weights: dict[str, WeightQuantizer]
    activations: dict[str, ActivationQuantizer]
    blocks: list[dict[str, Any]]


class BlockModule(nn.Module):
    """A block of the graph as a module, quantizers included."""

    def __init__(self, block: Block, body: fx.GraphModule, scalars: list[fx.Node]) -> None:
        super().__init__()
        self.block = block
        self.body = body
        self.scalars = scalars
        modules = list(body.modules())
        self.weights: list[WeightQuantizer] = [m for m in modules if isinstance(m, WeightQuantizer)]
        self.activations: list[ActivationQuantizer] = [
            m for m in modules if isinstance(m, ActivationQuantizer)
        ]

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Tensors of ``block.inputs`` to tensors of ``block.outputs``."""
        batch = len(inputs[0]) // rows_per_image(self.block.inputs[0])
        shapes = [scalar_value(node, batch) for node in self.scalars]
        outputs: list[Tensor] = self.body(*inputs, *shapes)
        return outputs

    def set_mode(self, weights: Mode, activations: Mode | None = None, drop: float = 0.0) -> None:
        """Set every quantizer of the block; activations as weights where nothing is said."""
        for weight in self.weights:
            weight.mode = weights
        for activation in self.activations:
            activation.mode = weights if activations is None else activations
            activation.drop = drop


def quantizers_of(
    found: Capture, plan: Plan, device: torch.device, fold: str = "weights"
) -> Quantized:
    """Untrained quantizers for every site of ``plan``; weight steps by search.

    Args:
        found: The folded model.
        plan: Where quantizers go.
        device: Where they compute.
        fold: ``weights``, or ``steps`` to quantize the weights before the fold.
    """
    weights: dict[str, WeightQuantizer] = {}
    for site in plan.layers:
        if site.weight is None or site.spec is None or site.weight in weights:
            continue
        folded = found.folds.get(site.weight) if fold == "steps" else None
        value = attribute(found.module, site.weight) if folded is None else folded.raw
        gain = None if folded is None else folded.gain.to(device)
        weights[site.weight] = WeightQuantizer(value.to(device), site.spec, gain)
    activations = {
        site.name: ActivationQuantizer(site.spec, site.name, device) for site in plan.activations
    }
    return Quantized(weights, activations, [])


def reconstruct(
    found: Capture,
    plan: Plan,
    images: Tensor,
    options: Options,
    base: Capture | None = None,
    fold: str = "weights",
    seed: int = 0,
    device: torch.device | None = None,
    caches: Caches | None = None,
    partial: Partial | None = None,
    progress: Report | None = None,
) -> Quantized:
    """Learn all quantizers of a captured model.

    Args:
        found: The folded, adapted model.
        plan: Where quantizers go.
        images: Calibration inputs (N, ...).
        options: What is learned, and how.
        base: The folded source model, for the distance term.
        fold: Where BatchNorm goes, ``weights`` or ``steps``.
        seed: Seed of every draw.
        device: Where to compute.
        caches: Keeps the activations between blocks; in memory by default.
        partial: Finished blocks of a stopped run; this run's are added.
        progress: Called with (steps done, steps in all, block name).

    Raises:
        ModelError: NaN or infinity appears in a block's activations.
        DataError: No room for the activations.

    Source:
        Shin et al., ICML 2025, sections 4.1 and 4.2; block order and caches as in BRECQ.
    """
    device = device or torch.device("cpu")
    caches = caches or Caches(1 << 62)
    blocks = find_blocks(found, 1 if options.granularity == "layer" else MOST_HEAVY)
    found.module.to(device)
    result = quantizers_of(found, plan, device, fold)
    draws = Draws(seed, device)
    start = next(n for n in found.graph.nodes if n.op == "placeholder" and is_tensor(n))
    batch = run_batch(images)
    first = caches.rows(len(images), images.shape[1:])
    first.write(0, images)
    kept: dict[fx.Node, tuple[Rows, Rows]] = {start: (first, first)}
    last_use = {n: i for i, block in enumerate(blocks) for n in block.inputs}
    per_block = options.iters if options.learner != "none" else 1
    for index, block in enumerate(blocks):
        module = _build(found, plan, block, result).to(device)
        name = module_path(block.heavy[0]) if block.heavy else f"block {index}"
        real = [kept[node][0] for node in block.inputs]
        mixed = [kept[node][1] for node in block.inputs]
        run = _Run(module, options, device, caches, batch)
        stored = partial.load(index) if partial else None
        if stored:
            targets = run.float_outputs(real)
            _restore(module, result, stored.tensors)
            record = stored.record
        else:
            targets = run.float_outputs(real, observe=True)
            _check_finite(targets, block, name, run.batch)
            record = {"name": name, "layers": len(block.heavy), "outputs": len(block.outputs)}

            def report(i: int, done: int = index, label: str = name) -> None:
                if progress:
                    progress(done * per_block + i, len(blocks) * per_block, label)

            draws.restart(index)
            sources = _source_weights(module, found, base, result.weights, fold)
            record |= _settle(run, real, mixed, targets, sources, draws, report)
        spent = [node for node in block.inputs if last_use[node] == index]
        for node in spent:
            if kept[node][0] is not kept[node][1]:
                kept[node][0].free()
        outputs = run.quantized_outputs(mixed)
        if not stored:
            record["loss_after"] = run.loss(outputs, targets)
            if partial:
                partial.save(index, _state(module, result), record)
        result.blocks.append(record)
        for node, target, output in zip(block.outputs, targets, outputs, strict=True):
            kept[node] = (target, output)
        for node in spent:
            kept.pop(node)[1].free()
        if progress:
            progress((index + 1) * per_block, len(blocks) * per_block, name)
    return result


def _settle(
    run: _Run,
    real: list[Rows],
    mixed: list[Rows],
    targets: list[Rows],
    sources: list[tuple[WeightQuantizer, Tensor]],
    draws: Draws,
    report: Callable[[int], None],
) -> dict[str, Any]:
    """Learn one block and freeze it; its error before, and whether learning was kept."""
    module, options = run.module, run.options
    open_weights = run.open_weights
    before = run.round_loss(mixed, targets)
    record: dict[str, Any] = {"loss_before": before, "learned": False}
    if options.learner != "none" and open_weights:
        first = [(q.scale, q.scale.detach().clone()) for q in run.open_quantizers]
        _learn(run, open_weights, real, mixed, targets, sources, draws, report)
        record["learned"] = True
        if options.keep_best and not run.round_loss(mixed, targets) <= before:
            record["learned"] = False
            for scale, value in first:
                scale.data.copy_(value)
            for weight in open_weights:
                weight.reset()
    for weight in open_weights:
        weight.freeze()
    for activation in module.activations:
        activation.settled = True
    return record


class _Run:
    """Passes of one block over all calibration images."""

    def __init__(
        self,
        module: BlockModule,
        options: Options,
        device: torch.device,
        caches: Caches,
        batch: int,
    ) -> None:
        self.module, self.options, self.device, self.caches = module, options, device, caches
        self.batch = batch
        self.open_weights = [q for q in module.weights if q.frozen is None]
        self.open_activations = [q for q in module.activations if not q.settled]

    @property
    def open_quantizers(self) -> list[WeightQuantizer | ActivationQuantizer]:
        """Those whose steps are still learned."""
        return [*self.open_weights, *self.open_activations]

    def float_outputs(self, real: list[Rows], observe: bool = False) -> list[Rows]:
        """Outputs of the float block; while ``observe``, steps of activations are found."""
        watched = self.open_activations if observe else []
        for quantizer in watched:
            quantizer.start_observing()
        self.module.set_mode(Mode.OFF)
        outputs = self._collect(real)
        for quantizer in watched:
            quantizer.finish_observing()
        return outputs

    def quantized_outputs(self, mixed: list[Rows]) -> list[Rows]:
        """Outputs of the rounded block on the quantized network's activations."""
        self.module.set_mode(Mode.ROUND)
        return self._collect(mixed)

    def round_loss(self, mixed: list[Rows], targets: list[Rows]) -> float:
        """Error of the rounded block on the quantized network's activations."""
        self.module.set_mode(Mode.ROUND)
        total = 0.0
        for (first, last), outputs in self._outputs(mixed):
            total += self._part_loss(first, last, outputs, targets)
        return total / len(mixed[0])

    def loss(self, outputs: list[Rows], targets: list[Rows]) -> float:
        """The same error of outputs that are there already."""
        total = 0.0
        for first, last in self._batches(len(targets[0])):
            parts = [rows.read(first, last) for rows in outputs]
            total += self._part_loss(first, last, parts, targets)
        return total / len(targets[0])

    def _part_loss(
        self, first: int, last: int, outputs: list[Tensor], targets: list[Rows]
    ) -> float:
        parts = (
            _error(o, t.read(first, last).to(o.device))
            for o, t in zip(outputs, targets, strict=True)
        )
        return float(sum(parts)) * (last - first)

    @torch.no_grad()
    def _outputs(self, inputs: list[Rows]) -> Iterator[tuple[tuple[int, int], list[Tensor]]]:
        for first, last in self._batches(len(inputs[0])):
            parts = [rows.read(first, last).to(self.device) for rows in inputs]
            yield (first, last), self.module(parts)

    def _collect(self, inputs: list[Rows]) -> list[Rows]:
        collected: list[Rows] = []
        for (first, _), outputs in self._outputs(inputs):
            if not collected:
                nodes = zip(self.module.block.outputs, outputs, strict=True)
                collected = [
                    self.caches.rows(len(inputs[0]), output.shape[1:], rows_per_image(node))
                    for node, output in nodes
                ]
            for rows, output in zip(collected, outputs, strict=True):
                rows.write(first, output.cpu())
        return collected

    def _batches(self, count: int) -> Iterator[tuple[int, int]]:
        return _parts(count, self.batch)


def _parts(count: int, most: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, most):
        yield first, min(first + most, count)


def _state(module: BlockModule, result: Quantized) -> dict[str, Tensor]:
    """What a finished block has learned, by the names of its weights and steps."""
    names = {id(q): n for n, q in (*result.weights.items(), *result.activations.items())}
    state = {}
    for weight in module.weights:
        state[f"codes {names[id(weight)]}"] = weight.codes().cpu()
        state[f"scale {names[id(weight)]}"] = weight.scale.detach().cpu()
    for activation in module.activations:
        state[f"act {names[id(activation)]}"] = activation.scale.detach().cpu()
    return state


@torch.no_grad()
def _restore(module: BlockModule, result: Quantized, state: dict[str, Tensor]) -> None:
    names = {id(q): n for n, q in (*result.weights.items(), *result.activations.items())}
    for weight in module.weights:
        name = names[id(weight)]
        weight.freeze(state[f"codes {name}"], state[f"scale {name}"])
    for activation in module.activations:
        activation.scale.copy_(state[f"act {names[id(activation)]}"])
        activation.settled = True


def _build(found: Capture, plan: Plan, block: Block, result: Quantized) -> BlockModule:
    """Copy the block's nodes into a graph of their own, with quantizers in place."""
    sites = {site.source: site for site in plan.activations}
    members = set(block.nodes)
    graph, modules = fx.Graph(), nn.ModuleDict()
    copies: dict[fx.Node, fx.Node] = {}

    def add(quantizer: nn.Module, *args: fx.Node) -> fx.Node:
        key = next((k for k, m in modules.items() if m is quantizer), f"q{len(modules)}")
        modules[key] = quantizer
        return graph.call_module(key, args)

    for node in block.inputs:
        copies[node] = graph.placeholder(node.name)
    outside = [a for n in block.nodes for a in n.all_input_nodes if a not in members]
    scalars = [
        node for node in dict.fromkeys(outside) if node.op != "get_attr" and not is_tensor(node)
    ]
    for node in scalars:
        copies[node] = graph.placeholder(node.name)
    for node in block.inputs:
        if node.op == "placeholder" and node in sites:
            copies[node] = add(result.activations[sites[node].name], copies[node])
    for node in dict.fromkeys(outside):
        if node.op != "get_attr":
            continue
        target = str(node.target)
        if target in result.weights:
            copies[node] = add(result.weights[target])
        else:
            copies[node] = graph.get_attr(target)
    for node in block.nodes:
        copies[node] = graph.node_copy(node, lambda arg: copies[arg])
        if node in sites:
            copies[node] = add(result.activations[sites[node].name], copies[node])
    graph.output([copies[node] for node in block.outputs])
    parameters = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            set_attribute(parameters, target, attribute(found.module, target))
    for key, quantizer in modules.items():
        parameters.add_module(key, quantizer)
    return BlockModule(block, fx.GraphModule(parameters, graph), scalars)


def _learn(
    run: _Run,
    weights: list[WeightQuantizer],
    real: list[Rows],
    mixed: list[Rows],
    targets: list[Rows],
    sources: list[tuple[WeightQuantizer, Tensor]],
    draws: Draws,
    report: Callable[[int], None],
) -> None:
    """Optimise one block, as HDRQ does or with AdaRound's rounding variables."""
    module, options, device = run.module, run.options, run.device
    adaround = options.learner == "adaround"
    for weight in weights:
        weight.draws = draws
    for activation in module.activations:
        activation.draws = draws
    if adaround:
        for weight in weights:
            weight.start_adaround()
    optimizers = _optimizers(run, weights)
    noisy = 0 if options.noise == "off" else round(options.iters * options.noise_fraction)
    floors = [(q.scale, q.scale.detach() * 1e-3) for q in run.open_quantizers]
    for i in range(options.iters):
        for optimizer, warmup in optimizers:
            _set_rate(optimizer, i, options.iters, warmup)
            optimizer.zero_grad()
        if i in {0, noisy}:
            later = Mode.SOFT if adaround else Mode.ROUND
            module.set_mode(Mode(options.noise) if i < noisy else later, None, options.drop_prob)
        rows = draws.rows(len(real[0]), options.batch)
        inputs = [
            _mix(clean, coded, rows, options.input_prob, draws, device)
            for clean, coded in zip(real, mixed, strict=True)
        ]
        loss = torch.zeros((), device=device)
        for output, target in zip(module(inputs), targets, strict=True):
            loss = loss + _error(output, target.take(rows).to(device))
        for quantizer, source in sources:
            loss = loss + options.distance * torch.linalg.vector_norm(quantizer.latent - source)
        if adaround and i >= options.iters * options.warmup:
            loss = loss + options.round_weight * _undecided(weights, i, options)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, _ in optimizers:
            optimizer.step()
        with torch.no_grad():  # a step must stay positive
            for scale, floor in floors:
                torch.maximum(scale, floor, out=scale.data)
        report(i + 1)


def _mix(
    clean: Rows, coded: Rows, rows: Tensor, share: float, draws: Draws, device: torch.device
) -> Tensor:
    """Elements of the quantized network with probability ``share``, else of the float one."""
    if share >= 1 or clean is coded:
        return coded.take(rows).to(device)
    real = clean.take(rows).to(device)
    if share <= 0:
        return real
    return torch.lerp(coded.take(rows).to(device), real, draws.keep(real, 1 - share))


def _undecided(weights: list[WeightQuantizer], i: int, options: Options) -> Tensor:
    """AdaRound's regularizer: how many weights are neither up nor down (its eq. 24)."""
    warm = options.iters * options.warmup
    left = max(0.0, 1 - (i - warm) / max(options.iters - warm, 1))
    beta = options.beta_last + (options.beta_first - options.beta_last) * left
    parts = [(1 - (2 * weight.soft() - 1).abs().pow(beta)).sum() for weight in weights]
    return torch.stack(parts).sum()


def _optimizers(
    run: _Run, weights: list[WeightQuantizer]
) -> list[tuple[torch.optim.Optimizer, float]]:
    """One Adam for the weights with warm-up, one for the steps of activations without."""
    options = run.options
    if options.learner == "adaround":
        groups = [{"params": [q.rounding], "rate": options.lr} for q in weights]
        warmup = 0.0
    else:
        groups = [{"params": [q.latent], "rate": options.lr} for q in weights]
        groups += [_step_group(q.scale, options.lr, options.step_change) for q in weights]
        warmup = options.warmup
    made: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Adam(groups, lr=options.lr, fused=True), warmup)
    ]
    steps = [
        _step_group(q.scale, options.act_lr, options.step_change) for q in run.open_activations
    ]
    if steps:
        made.append((torch.optim.Adam(steps, lr=options.act_lr, fused=True), 0.0))
    return made


def _source_weights(
    module: BlockModule,
    found: Capture,
    base: Capture | None,
    weights: dict[str, WeightQuantizer],
    fold: str,
) -> list[tuple[WeightQuantizer, Tensor]]:
    """The source model's weight for every latent weight of the block."""
    names = {id(quantizer): name for name, quantizer in weights.items()}
    sources: list[tuple[WeightQuantizer, Tensor]] = []
    for quantizer in module.weights if base is not None else []:
        assert base is not None
        name = names[id(quantizer)]
        own, origin = found.folds.get(name), base.folds.get(name)
        if fold == "steps" and own is not None and origin is not None:
            turned = origin.sign * own.sign
            value = origin.raw * turned.reshape(-1, *[1] * (origin.raw.ndim - 1))
        else:
            value = attribute(base.module, name)
        if quantizer.frozen is None:
            sources.append((quantizer, value.to(quantizer.scale.device)))
    return sources


def _step_group(scale: nn.Parameter, rate: float, change: float) -> dict[str, Any]:
    """Adam moves a parameter by about its rate, so the rate bounds the change."""
    bound = change * float(scale.detach().min()) if change > 0 else rate
    return {"params": [scale], "rate": min(rate, bound)}


def _set_rate(optimizer: torch.optim.Optimizer, i: int, iters: int, warmup: float) -> None:
    """Linear warm-up from 0.001 of each group's rate, then cosine to 0."""
    rising = iters * warmup
    if i < rising:
        factor = 0.001 + 0.999 * i / rising
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (i - rising) / max(iters - rising, 1)))
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor


def _error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over channels, mean over the rest.

    Channels are axis 1 of (N, C) and (N, C, H, W), the last axis of tokens (N, L, C); values
    (N,) have none.
    """
    axis = -1 if output.ndim == 3 else min(1, output.ndim - 1)
    positions = output.numel() // (output.shape[axis] if output.ndim > 1 else 1)
    return torch.nn.functional.mse_loss(output, target, reduction="sum") / positions


def _check_finite(tensors: list[Rows], block: Block, name: str, batch: int) -> None:
    for node, rows in zip(block.outputs, tensors, strict=True):
        for first, last in _parts(len(rows), batch):
            if not torch.isfinite(rows.read(first, last)).all():
                raise ModelError(
                    "found NaN or infinity in the float activations of "
                    f"{module_path(node)} (block {name}); needed finite values: check the "
                    "checkpoint and the images"
                )
