"""Block-wise reconstruction: the float and the quantized activations pushed forward once.

For each block in order: the float block's outputs on float inputs are the targets; the
quantized block learns weights and scales to meet them; then both sets of activations move on
to the next block. No prefix is ever run again, so the cost is linear in depth. A finished
block is stored, so that a stopped run resumes after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..typing import Progress
from .activation_cache import Caches, Rows, run_batch
from .bias_correction import correct_biases, put_shifts
from .block_module import (
    BlockModule,
    Quantizers,
    block_module,
    block_state,
    quantizers_of,
    restore_block,
)
from .blocks import Block, is_tensor, rows_per_image
from .capture import Capture
from .compensation import compensate
from .fake_quantizers import ActivationQuantizer, Mode, WeightQuantizer
from .methods import Options
from .nodes import module_path
from .noise import Draws
from .placement import Plan
from .preparation import Preparation
from .resume import Partial
from .statistics import Watch
from .tensors import attribute

__all__ = ["observe_float", "reconstruct"]

# A quantizer of a weight and the source model's weight, which it stays close to.
Sources = list[tuple[WeightQuantizer, Tensor]]
# The same, with the weight of their distance in the loss.
Pulls = list[tuple[WeightQuantizer, Tensor, float]]
# What was added to a bias, in the state of a finished block.
_SHIFT = "shift "
# Images that say the first scales of activations one by one.
_IMAGES, _VALUES = 8, 1 << 13


class _Activation(NamedTuple):
    """An activation for every calibration image, in every network that is run.

    ``weighted`` is that of the network with quantized weights and real activations, where weights
    are learned in it; else it is that of the quantized network.
    """

    real: Rows
    coded: Rows
    weighted: Rows

    def free_real(self) -> None:
        """Give the float network's rows back, where no other network shares them."""
        if self.real is not self.coded:
            self.real.free()

    def free_others(self) -> None:
        """Give the other networks' rows back."""
        self.coded.free()
        if self.weighted is not self.coded:
            self.weighted.free()


def reconstruct(
    model: Preparation,
    images: Tensor,
    options: Options,
    seed: int = 0,
    device: torch.device | None = None,
    caches: Caches | None = None,
    partial: Partial | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Quantizers:
    """Learn all quantizers of a prepared model.

    Args:
        model: The folded model with its quantizers placed; it is moved to ``device``.
        images: Calibration inputs (N, ...).
        options: What is learned, and how.
        seed: Seed of every random number.
        device: Device that computes; the CPU by default.
        caches: Holds the activations between blocks; in memory by default.
        partial: Finished blocks of a stopped run; this run's blocks are added.
        progress: Called with (steps done, steps in all, block name).
        watch: Looks on while the float network's activations move through every block.

    Raises:
        ModelError: NaN or infinity appears in a block's activations.
        DataError: No room for the activations.

    Source:
        Shin et al., ICML 2025, sections 4.1 and 4.2; block order and caches as in BRECQ.
    """
    device, caches = device or torch.device("cpu"), caches or Caches(1 << 62)
    draws = Draws(seed, device)
    work = _Reconstruction(model, images, options, draws, device, caches, watch)
    per_block = options.iters * options.stages if options.iterates else 1
    count = len(model.blocks)
    for index, block in enumerate(model.blocks):
        name = module_path(block.heavy[0]) if block.heavy else f"block {index}"

        def report(i: int, done: int = index, label: str = name) -> None:
            if progress:
                progress(done * per_block + i, count * per_block, label)

        work.settle(index, name, partial, report)
        report(per_block)
    return work.quantizers


def observe_float(
    model: Preparation,
    images: Tensor,
    watch: Watch,
    device: torch.device,
    caches: Caches | None = None,
) -> None:
    """Move the images through a model without quantizers, block by block, before a watch.

    Args:
        model: Its ``blocks`` cover the whole graph.
        images: (N, ...).
        watch: Looks on.
        device: Device that computes.
        caches: Holds the activations between blocks; in memory by default.

    Raises:
        ModelError: NaN or infinity appears in a block's activations.
        DataError: No room for the activations.
    """
    caches, capture = caches or Caches(1 << 62), model.capture
    capture.module.to(device)
    last_use = _last_use(model.blocks)
    rows = dict([_first_rows(capture, images, caches)])
    for index, block in enumerate(model.blocks):
        module = block_module(capture, Plan(), block, Quantizers({}, {}, [])).to(device)
        inputs = [rows[node] for node in block.inputs]
        options, batch = Options.of("float"), run_batch(images)
        run = _BlockRun(module, inputs, inputs, options, device, caches, batch)
        outputs = run.float_outputs(watch=watch)
        _check_finite(outputs, block, f"block {index}", batch)
        rows.update(zip(block.outputs, outputs, strict=True))
        for node in block.inputs:
            if last_use[node] == index:
                rows.pop(node).free()
    capture.module.cpu()


def _last_use(blocks: Sequence[Block]) -> dict[fx.Node, int]:
    """The last block that reads a tensor."""
    return {node: i for i, block in enumerate(blocks) for node in block.inputs}


def _first_rows(capture: Capture, images: Tensor, caches: Caches) -> tuple[fx.Node, Rows]:
    """The graph's input, and the images as its rows."""
    start = next(n for n in capture.graph.nodes if n.op == "placeholder" and is_tensor(n))
    rows = caches.rows(len(images), images.shape[1:])
    rows.write(0, images)
    return start, rows


class _Reconstruction:
    """The quantizers of a model, and the activations in front of its next block."""

    def __init__(
        self,
        model: Preparation,
        images: Tensor,
        options: Options,
        draws: Draws,
        device: torch.device,
        caches: Caches,
        watch: Watch | None,
    ) -> None:
        assert model.plan is not None
        capture = model.capture
        capture.module.to(device)
        self.quantizers = quantizers_of(capture, model.plan, device)
        self._model, self._plan, self._options = model, model.plan, options
        self._draws, self._device, self._caches, self._watch = draws, device, caches, watch
        self._batch = run_batch(images)
        self._last_use = _last_use(model.blocks)
        start, first = _first_rows(capture, images, caches)
        # Of every tensor that is still read.
        self._rows: dict[fx.Node, _Activation] = {start: _Activation(first, first, first)}

    def settle(
        self, index: int, name: str, partial: Partial | None, report: Callable[[int], None]
    ) -> None:
        """Learn one block, or read it from ``partial``, and move the activations past it."""
        block = self._model.blocks[index]
        module = block_module(self._model.capture, self._plan, block, self.quantizers)
        module = module.to(self._device)
        options = self._options
        inputs = [self._rows[node] for node in block.inputs]
        common = (options, self._device, self._caches, self._batch)
        real, coded, weighted = (list(rows) for rows in zip(*inputs, strict=True))
        run = first = _BlockRun(module, real, coded, *common)
        apart = options.stages == 2 and options.iterates
        if apart:
            first = _BlockRun(module, real, weighted, *common, Mode.OFF)
        stored = partial.load(index) if partial else None
        if stored:
            targets = run.float_outputs(watch=self._watch)
            restore_block(module, self.quantizers, stored.tensors)
            shifts = {
                name.removeprefix(_SHIFT): tensor
                for name, tensor in stored.tensors.items()
                if name.startswith(_SHIFT)
            }
            put_shifts(self._model.capture, shifts)
            record = stored.record
        else:
            targets = run.float_outputs(observe=True, watch=self._watch)
            _check_finite(targets, block, name, run.batch)
            self._draws.restart(index)
            record = {"name": name, "layers": len(block.heavy), "outputs": len(block.outputs)}
            record |= _settle(first, run, targets, self._sources(module), self._draws, report)
            shifts = {}
            if options.bias_correction:
                capture = self._model.capture
                shifts = correct_biases(module, capture, run.float_inputs, run.quantized_inputs)
        spent = [self._rows.pop(n) for n in block.inputs if self._last_use[n] == index]
        for activation in spent:
            activation.free_real()
        outputs = run.quantized_outputs()
        between = first.quantized_outputs() if apart else outputs
        if not stored:
            record["loss_after"] = run.loss(outputs, targets)
            if partial:
                state = block_state(module, self.quantizers)
                state |= {f"{_SHIFT}{name}": shift for name, shift in shifts.items()}
                partial.save(index, state, record)
        self.quantizers.blocks.append(record)
        for node, *rows in zip(block.outputs, targets, outputs, between, strict=True):
            self._rows[node] = _Activation(*rows)
        for activation in spent:
            activation.free_others()

    def _sources(self, module: BlockModule) -> Sources:
        """The source model's weight for every latent weight of the block."""
        if self._model.source is None:
            return []
        names = {id(quantizer): name for name, quantizer in self.quantizers.weights.items()}
        pairs = [
            (q, _source_weight(names[id(q)], self._model.capture, self._model.source))
            for q in module.weights
        ]
        return [(q, value.to(q.scale.device)) for q, value in pairs if q.frozen is None]


def _source_weight(name: str, capture: Capture, source: Capture) -> Tensor:
    """The source model's weight as the model in ``capture`` quantizes it."""
    own, origin = capture.folds.get(name), source.folds.get(name)
    if own is None or origin is None:
        return attribute(source.module, name)
    turned = origin.sign * own.sign
    return origin.raw * turned.reshape(-1, *[1] * (origin.raw.ndim - 1))


def _settle(
    first: _BlockRun,
    run: _BlockRun,
    targets: list[Rows],
    sources: Sources,
    draws: Draws,
    report: Callable[[int], None],
) -> dict[str, Any]:
    """Learn or round one block and freeze it; its error before, and whether that was kept.

    Args:
        first: What the weights are learned in; where it is not ``run``, activation scales are
            learned in ``run`` when the weights are frozen.
        run: The block in the quantized network.
        targets: Outputs of the float block.
        sources: Weights of the source model.
        draws: Random numbers.
        report: Called with the iterations done.
    """
    module, options = run.module, run.options
    open_weights = run.open_weights
    before = run.round_loss(targets)
    record: dict[str, Any] = {"loss_before": before, "learned": False}
    if options.learner != "none" and open_weights:
        scales = [(q.scale, q.scale.detach().clone()) for q in run.open_quantizers]
        if options.iterates:
            pulls = _pulls(sources, options, before)
            _iterate(first, run, targets, pulls, draws, report)
        else:
            compensate(module, run.quantized_inputs, len(run.mixed[0]))
        record["learned"] = True
        if options.keep_best and not run.round_loss(targets) <= before:
            record["learned"] = False
            for scale, value in scales:
                scale.data.copy_(value)
            for weight in open_weights:
                weight.reset()
    for weight in open_weights:
        weight.freeze()
    for activation in module.activations:
        activation.settled = True
    return record


def _iterate(
    first: _BlockRun,
    run: _BlockRun,
    targets: list[Rows],
    pulls: Pulls,
    draws: Draws,
    report: Callable[[int], None],
) -> None:
    """Learn weights and activation scales, in one stage or in two; as :func:`_settle`."""
    weights = run.open_weights
    _learn(first, weights, first.learned_activations, targets, pulls, draws, report)
    if first is run:
        return
    for weight in weights:
        weight.freeze()
    if run.open_activations:
        later: Callable[[int], None] = lambda i: report(run.options.iters + i)  # noqa: E731
        _learn(run, [], run.open_activations, targets, [], draws, later)


class _BlockRun:
    """Passes of one block over all calibration images.

    Args:
        module: The block.
        real: The block's inputs in the float network.
        mixed: The block's inputs in the quantized network.
        options: What is learned, and how.
        device: Device that computes.
        caches: Makes room for the outputs.
        batch: Images per pass where nothing is learned.
        activations: What activation quantizers do: as the weights' by default, or ``OFF``.
    """

    def __init__(
        self,
        module: BlockModule,
        real: list[Rows],
        mixed: list[Rows],
        options: Options,
        device: torch.device,
        caches: Caches,
        batch: int,
        activations: Mode | None = None,
    ) -> None:
        self.module, self.real, self.mixed = module, real, mixed
        self.activations = activations
        self.options, self.device, self.batch = options, device, batch
        self._caches = caches
        self.open_weights = [q for q in module.weights if q.frozen is None]
        self.open_activations = [q for q in module.activations if not q.settled]

    @property
    def open_quantizers(self) -> list[WeightQuantizer | ActivationQuantizer]:
        """Those whose scales are still learned."""
        return [*self.open_weights, *self.open_activations]

    @property
    def learned_activations(self) -> list[ActivationQuantizer]:
        """Open quantizers of activations, where they quantize."""
        return [] if self.activations is Mode.OFF else self.open_activations

    def float_outputs(self, observe: bool = False, watch: Watch | None = None) -> list[Rows]:
        """Outputs of the float block, before ``watch``; ``observe`` finds activation scales."""
        watched = self.open_activations if observe else []
        pooled = self.options.act_init == "pooled"
        self.module.set_mode(Mode.OFF)
        if pooled:
            for quantizer in watched:
                quantizer.start_observing()
        outputs = self._collect(self.real, watch)
        if watch:
            watch.finish(self.module)
        if watched and not pooled:
            for quantizer in watched:
                quantizer.start_observing(_VALUES)
            count = len(self.real[0])
            images = sorted({i * count // _IMAGES for i in range(_IMAGES)})
            for _ in self._outputs(self.real, [(i, i + 1) for i in images]):
                pass
        for quantizer in watched:
            quantizer.finish_observing(pooled)
        return outputs

    def float_inputs(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Images and inputs of every batch, in the float network."""
        return self._inputs(self.real)

    def quantized_inputs(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Images and inputs of every batch, in the quantized network."""
        return self._inputs(self.mixed)

    def _inputs(self, inputs: list[Rows]) -> Iterator[tuple[int, list[Tensor]]]:
        for first, last in self._batches(len(inputs[0])):
            yield last - first, [rows.read(first, last).to(self.device) for rows in inputs]

    def quantized_outputs(self) -> list[Rows]:
        """Outputs of the rounded block on the quantized network's activations."""
        self.module.set_mode(Mode.ROUND, self.activations)
        return self._collect(self.mixed)

    def round_loss(self, targets: list[Rows]) -> float:
        """Error of the rounded block on the quantized network's activations."""
        self.module.set_mode(Mode.ROUND, self.activations)
        total = 0.0
        for (first, last), outputs in self._outputs(self.mixed, self._batches(len(self.mixed[0]))):
            total += self._part_loss(first, last, outputs, targets)
        return total / len(self.mixed[0])

    def loss(self, outputs: list[Rows], targets: list[Rows]) -> float:
        """The same error of outputs that were computed before."""
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
    def _outputs(
        self,
        inputs: list[Rows],
        batches: Iterable[tuple[int, int]],
        watch: Watch | None = None,
    ) -> Iterator[tuple[tuple[int, int], list[Tensor]]]:
        for first, last in batches:
            parts = [rows.read(first, last).to(self.device) for rows in inputs]
            seen = watch.run(self.module, parts, last - first) if watch else self.module(parts)
            yield (first, last), seen

    def _collect(self, inputs: list[Rows], watch: Watch | None = None) -> list[Rows]:
        collected: list[Rows] = []
        for (first, _), outputs in self._outputs(inputs, self._batches(len(inputs[0])), watch):
            if not collected:
                nodes = zip(self.module.block.outputs, outputs, strict=True)
                collected = [
                    self._caches.rows(len(inputs[0]), output.shape[1:], rows_per_image(node))
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


def _pulls(sources: Sources, options: Options, before: float) -> Pulls:
    """Weight of every layer's distance ||W - W_base|| in the loss.

    Args:
        sources: The layers.
        options: lambda, and the form of the distance.
        before: Error of the block before learning, which a relative distance is a share of.
    """
    pulls = []
    for quantizer, source in sources if options.distance > 0 else []:
        share = options.distance
        if options.distance_form == "relative":
            size = float(torch.linalg.vector_norm(source))
            share = share * before / size if size > 0 else 0.0
        pulls.append((quantizer, source, share))
    return pulls


def _learn(
    run: _BlockRun,
    weights: list[WeightQuantizer],
    activations: list[ActivationQuantizer],
    targets: list[Rows],
    pulls: Pulls,
    draws: Draws,
    report: Callable[[int], None],
) -> None:
    """Optimise weights and activation scales of a block, as HDRQ does or with AdaRound's rounding.

    Args:
        run: The block, and the network that it stands in.
        weights: Those that learn; others keep their codes.
        activations: Those whose scales learn.
        targets: Outputs of the float block.
        pulls: Distances to the source model in the loss.
        draws: Random numbers.
        report: Called with the iterations done.
    """
    module, options = run.module, run.options
    adaround = options.learner == "adaround"
    for weight in weights:
        weight.draws = draws
    for activation in module.activations:
        activation.draws = draws
    if adaround:
        for weight in weights:
            weight.start_adaround()
    optimizers = _optimizers(options, weights, activations)
    noisy = 0 if options.noise == "off" else round(options.iters * options.noise_fraction)
    learned: list[WeightQuantizer | ActivationQuantizer] = [*weights, *activations]
    floors = [(q.scale, q.scale.detach() * 1e-3) for q in learned]
    for i in range(options.iters):
        for optimizer, warmup, schedule in optimizers:
            _set_rate(optimizer, i, options.iters, warmup, schedule)
            optimizer.zero_grad()
        if i in {0, noisy}:
            later = Mode.SOFT if adaround else Mode.ROUND
            mode = Mode(options.noise) if i < noisy else later
            module.set_mode(mode, run.activations, options.drop_prob)
        loss = _batch_loss(run, targets, pulls, draws)
        if adaround and weights and i >= options.iters * options.warmup:
            loss = loss + options.round_weight * _undecided(weights, i, options)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, *_ in optimizers:
            optimizer.step()
        with torch.no_grad():  # a scale must stay positive
            for scale, floor in floors:
                torch.maximum(scale, floor, out=scale.data)
        report(i + 1)


def _batch_loss(run: _BlockRun, targets: list[Rows], pulls: Pulls, draws: Draws) -> Tensor:
    """Error of the block on one random batch, and the distance of its weights to the source."""
    options, device = run.options, run.device
    rows = draws.rows(len(run.real[0]), options.batch)
    inputs = [
        _mix(clean, coded, rows, options.input_prob, draws, device)
        for clean, coded in zip(run.real, run.mixed, strict=True)
    ]
    loss = torch.zeros((), device=device)
    for output, target in zip(run.module(inputs), targets, strict=True):
        loss = loss + _error(output, target.take(rows).to(device))
    for quantizer, source, share in pulls:
        loss = loss + share * torch.linalg.vector_norm(quantizer.latent - source)
    return loss


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
    options: Options, weights: list[WeightQuantizer], activations: list[ActivationQuantizer]
) -> list[tuple[torch.optim.Optimizer, float, str]]:
    """Adam for the weights, and for the scales of activations; warm-up and schedule of each."""
    lr, act_lr = (rate * options.rate_factor for rate in (options.lr, options.act_lr))
    if options.learner == "adaround":
        groups = [{"params": [q.rounding], "rate": lr} for q in weights]
        warmup = 0.0
    else:
        groups = [{"params": [q.latent], "rate": lr} for q in weights]
        groups += [_scale_group(q.scale, lr, options.step_change) for q in weights]
        warmup = options.warmup
    scales = [_scale_group(q.scale, act_lr, options.step_change) for q in activations]
    optimizers: list[tuple[torch.optim.Optimizer, float, str]] = []
    if groups:
        adam = torch.optim.Adam(groups, lr=lr, fused=True)
        optimizers.append((adam, warmup, options.schedule))
    if scales:
        optimizers.append((torch.optim.Adam(scales, lr=act_lr, fused=True), 0.0, "cosine"))
    return optimizers


def _scale_group(scale: nn.Parameter, rate: float, change: float) -> dict[str, Any]:
    """Adam moves a parameter by about its rate, so the rate bounds the change."""
    bound = change * float(scale.detach().min()) if change > 0 else rate
    return {"params": [scale], "rate": min(rate, bound)}


def _set_rate(
    optimizer: torch.optim.Optimizer, i: int, iters: int, warmup: float, schedule: str
) -> None:
    """Linear warm-up from 0.001 of each group's rate, then ``constant``, or ``cosine`` to 0."""
    rising = iters * warmup
    if i < rising:
        factor = 0.001 + 0.999 * i / rising
    elif schedule == "constant":
        factor = 1.0
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
