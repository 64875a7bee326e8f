"""Block-wise reconstruction: the float and the quantized activations pushed forward once.

For each block in order: the float block's outputs on float inputs are the targets; the
quantized block learns weights and steps to meet them; then both sets of activations move on
to the next block. No prefix is ever run again, so the cost is linear in depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError, SpecError
from .blocks import Block, find_blocks, is_tensor, scalar_value
from .capture import Capture, attribute, module_path, set_attribute
from .fakequant import ActivationQuantizer, Mode, WeightQuantizer
from .placement import Plan

__all__ = ["Options", "Quantized", "reconstruct"]


@dataclass(frozen=True)
class Options:
    """HDRQ's knobs (docs: names as in the paper).

    Attributes:
        iters: Iterations per block.
        batch: Images per iteration.
        lr: Adam's rate for weights and their steps; the paper's text says 1e-3.
        act_lr: Adam's rate for activation steps.
        distance: lambda, weight of the distance to the source weights.
        noise_fraction: Share of the iterations with noise; the rest rounds.
        warmup: Share of the iterations with a rising learning rate.
        input_prob: Probability that an input element comes from the quantized network.
        step_change: Most that one update may change a step, relative to its first value. The
            reference has no such bound (0); its rates are absolute, so that the fine steps
            of 8-bit tensors are lost in a few updates.
        drop_prob: Probability that an activation element inside a block stays real.
    """

    iters: int = 20000
    batch: int = 32
    lr: float = 1e-4
    act_lr: float = 4e-5
    distance: float = 0.05
    noise_fraction: float = 0.8
    warmup: float = 0.2
    input_prob: float = 0.5
    drop_prob: float = 0.5
    step_change: float = 2e-3

    def __post_init__(self) -> None:
        if self.iters < 1 or self.batch < 1:
            raise SpecError(f"found iters={self.iters}, batch={self.batch}; needed both 1 or more")
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0:
                raise SpecError(f"found {name}={value}; needed a number >= 0")
            if name.endswith(("prob", "fraction", "warmup")) and value > 1:
                raise SpecError(f"found {name}={value}; needed 0 to 1")


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
        batch = len(inputs[0])
        shapes = [scalar_value(node, batch) for node in self.scalars]
        outputs: list[Tensor] = self.body(*inputs, *shapes)
        return outputs

    @property
    def quantizers(self) -> list[WeightQuantizer | ActivationQuantizer]:
        """Those of the weights, then those of the activations."""
        return [*self.weights, *self.activations]

    def set_mode(self, mode: Mode, drop: float = 0.0) -> None:
        """Set every quantizer of the block."""
        for quantizer in self.quantizers:
            quantizer.mode = mode
        for activation in self.activations:
            activation.drop = drop

    def seed(self, seed: int) -> None:
        """Start the quantizers' draws."""
        for i, quantizer in enumerate(self.quantizers):
            quantizer.generator.manual_seed(seed * 1000 + i)


def reconstruct(
    found: Capture,
    plan: Plan,
    images: Tensor,
    method: str,
    options: Options,
    base: Capture | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Quantized:
    """Learn all quantizers of a captured model.

    Args:
        found: The folded, adapted model.
        plan: Where quantizers go.
        images: Calibration inputs (N, ...).
        method: ``rtn`` (steps only) or ``hdrq``.
        options: HDRQ's knobs.
        base: The folded source model, for the distance term.
        seed: Seed of every draw.
        device: Where to compute.
        progress: Called with (steps done, steps in all, block name).

    Raises:
        ModelError: NaN or infinity appears in a block's activations.

    Source:
        Shin et al., ICML 2025, sections 4.1 and 4.2; block order and caches as in BRECQ.
    """
    device = device or torch.device("cpu")
    found.module.to(device)
    weights = {
        site.weight: WeightQuantizer(attribute(found.module, site.weight), site.spec)
        for site in plan.layers
        if site.weight is not None and site.spec is not None
    }
    activations = {
        site.name: ActivationQuantizer(site.spec, site.name, device) for site in plan.activations
    }
    result = Quantized(weights, activations, [])
    blocks = find_blocks(found.graph)
    start = next(n for n in found.graph.nodes if n.op == "placeholder" and is_tensor(n))
    caches: dict[fx.Node, tuple[Tensor, Tensor]] = {start: (images, images)}
    last_use = {n: i for i, block in enumerate(blocks) for n in block.inputs}
    learns = method == "hdrq"
    per_block = options.iters if learns else 1
    for index, block in enumerate(blocks):
        module = _build(found, plan, block, result).to(device)
        name = module_path(block.heavy[0]) if block.heavy else f"block {index}"
        real = [caches[node][0] for node in block.inputs]
        mixed = [caches[node][1] for node in block.inputs]
        _observe(module, real, options.batch, device)
        targets = _run(module, real, Mode.OFF, device)
        _check_finite(targets, block, name)
        record = {"name": name, "layers": len(block.heavy), "outputs": len(block.outputs)}
        record["loss_before"] = _loss(_run(module, mixed, Mode.ROUND, device), targets)
        if learns and module.weights:

            def report(i: int, done: int = index, label: str = name) -> None:
                if progress:
                    progress(done * per_block + i, len(blocks) * per_block, label)

            _learn(
                module, real, mixed, targets, options, base, weights, seed + index, device, report
            )
        outputs = _run(module, mixed, Mode.ROUND, device)
        record["loss_after"] = _loss(outputs, targets)
        result.blocks.append(record)
        for node, target, output in zip(block.outputs, targets, outputs, strict=True):
            caches[node] = (target, output)
        caches = {n: c for n, c in caches.items() if last_use.get(n, -1) > index}
        if progress:
            progress((index + 1) * per_block, len(blocks) * per_block, name)
    return result


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


@torch.no_grad()
def _observe(module: BlockModule, real: list[Tensor], batch: int, device: torch.device) -> None:
    """Set the steps of the block's activations from the float network's values."""
    if not module.activations:
        return
    module.set_mode(Mode.OFF)
    for quantizer in module.activations:
        quantizer.start_observing()
    for rows in _batches(len(real[0]), batch):
        module([tensor[rows].to(device) for tensor in real])
    for quantizer in module.activations:
        quantizer.finish_observing()


@torch.no_grad()
def _run(
    module: BlockModule, inputs: list[Tensor], mode: Mode, device: torch.device, batch: int = 64
) -> list[Tensor]:
    module.set_mode(mode)
    parts: list[list[Tensor]] = []
    for rows in _batches(len(inputs[0]), batch):
        parts.append([t.cpu() for t in module([i[rows].to(device) for i in inputs])])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _batches(count: int, batch: int) -> Iterator[slice]:
    for first in range(0, count, batch):
        yield slice(first, first + batch)


def _learn(
    module: BlockModule,
    real: list[Tensor],
    mixed: list[Tensor],
    targets: list[Tensor],
    options: Options,
    base: Capture | None,
    names: dict[str, WeightQuantizer],
    seed: int,
    device: torch.device,
    report: Callable[[int], None],
) -> None:
    """HDRQ's optimisation of one block."""
    generator = torch.Generator().manual_seed(seed)
    module.seed(seed)
    sources = _source_weights(module, base, names, device)
    latents = [{"params": [q.latent], "rate": options.lr} for q in module.weights]
    steps = [_step_group(q.scale, options.lr, options.step_change) for q in module.weights]
    weight_optimizer = torch.optim.Adam([*latents, *steps])
    activation_steps = [
        _step_group(q.scale, options.act_lr, options.step_change) for q in module.activations
    ]
    step_optimizer = torch.optim.Adam(activation_steps) if activation_steps else None
    noisy = round(options.iters * options.noise_fraction)
    floors = [q.scale.detach() * 1e-3 for q in module.quantizers]
    for i in range(options.iters):
        _set_rate(weight_optimizer, i, options.iters, options.warmup)
        if step_optimizer:
            _set_rate(step_optimizer, i, options.iters, 0.0)
        if i in {0, noisy}:
            module.set_mode(Mode.NOISE if i < noisy else Mode.ROUND, options.drop_prob)
        rows = torch.randint(len(real[0]), (options.batch,), generator=generator)
        inputs = []
        for clean, coded in zip(real, mixed, strict=True):
            pick = torch.rand((len(rows), *clean.shape[1:]), generator=generator)
            inputs.append(
                torch.where(pick < options.input_prob, coded[rows], clean[rows]).to(device)
            )
        outputs = module(inputs)
        loss = torch.zeros((), device=device)
        for output, target in zip(outputs, targets, strict=True):
            loss = loss + _error(output, target[rows].to(device))
        if options.distance > 0:
            for quantizer, source in sources:
                loss = loss + options.distance * torch.linalg.vector_norm(quantizer.latent - source)
        weight_optimizer.zero_grad()
        if step_optimizer:
            step_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        weight_optimizer.step()
        if step_optimizer:
            step_optimizer.step()
        with torch.no_grad():  # a step must stay positive
            for learned, floor in zip(module.quantizers, floors, strict=True):
                learned.scale.copy_(torch.maximum(learned.scale, floor))
        report(i + 1)


def _source_weights(
    module: BlockModule,
    base: Capture | None,
    names: dict[str, WeightQuantizer],
    device: torch.device,
) -> list[tuple[WeightQuantizer, Tensor]]:
    if base is None:
        return []
    by_quantizer = {id(quantizer): name for name, quantizer in names.items()}
    return [(q, attribute(base.module, by_quantizer[id(q)]).to(device)) for q in module.weights]


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

    Channels are axis 1 of (N, C) and (N, C, H, W), the last axis of tokens (N, L, C).
    """
    axis = -1 if output.ndim == 3 else min(1, output.ndim - 1)
    return (output - target).square().sum(axis).mean()


def _loss(outputs: list[Tensor], targets: list[Tensor]) -> float:
    return float(sum(_error(o, t) for o, t in zip(outputs, targets, strict=True)))


def _check_finite(tensors: list[Tensor], block: Block, name: str) -> None:
    for node, tensor in zip(block.outputs, tensors, strict=True):
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"found NaN or infinity in the float activations of {module_path(node)} (block "
                f"{name}); needed finite values: check the checkpoint and the images"
            )
