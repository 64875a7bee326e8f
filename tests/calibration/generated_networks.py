"""Small networks drawn from a grammar of layers, joins, names, strides, groups and shapes.

A network is a list of instructions (operation, a, b, c) with small integers, which a test draws;
an instruction that does not fit the tensors at hand is left out. ``make()`` is the factory that
``--model generated_networks:make`` names; it builds what ``PROGRAM`` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Instruction = tuple[str, int, int, int]

# Names that calibration, the exporter or PyTorch might take themselves.
NAMES = ("weight", "bias", "act_scale", "folded_0", "weight_scale", "mean", "input", "output",
         "model", "module", "relu", "add", "conv2d", "codes", "weight_codes", "val_0")  # fmt: skip
JOINS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: torch.add(a, b, alpha=-1),
    lambda a, b: torch.add(a, b, alpha=2),
    lambda a, b: a * b,
    torch.maximum,
    lambda a, b: torch.cat([a, b], 1),
    lambda a, b: torch.cat([b, a * 3], 1),
)
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    F.relu6,
    F.hardswish,
    F.silu,
    F.gelu,
    torch.sigmoid,
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: torch.clamp(x, 0.05, 2),
    lambda x: torch.clamp(x, -0.2, 0.4),
    lambda x: F.hardtanh(x, 0.0, 1.0),
    torch.abs,
    torch.tanh,
    lambda x: F.elu(x),
    lambda x: F.relu(x - 0.2) * 2,
    lambda x: 1 - F.relu(x),
)
MOVES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.flip(-1),
    lambda x: x.roll(1, -1),
    lambda x: x.chunk(2, 1)[0] if x.shape[1] > 1 else x,
    lambda x: torch.cat([x[:, 1:], x[:, :1]], 1),
    lambda x: x.transpose(1, 2).reshape(x.shape) if x.ndim == 3 else x.transpose(2, 3),
    lambda x: F.pad(x, (1, 0)),
    lambda x: x[..., 1:] if x.shape[-1] > 4 else x,
)


@dataclass
class Program:
    """What the next ``make()`` builds.

    Attributes:
        shape: Of one input, (C, H, W), (C, L) or (C,).
        body: Instructions.
        head: How the output is made.
        seed: Seed of the weights.
    """

    shape: tuple[int, ...] = (3, 8, 8)
    body: list[Instruction] = field(default_factory=list)
    head: int = 0
    seed: int = 0


PROGRAM = Program()


class Generated(nn.Module):
    """A network of one program; layers are made while a first tensor passes."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.steps: list[Callable[[list[Tensor]], Tensor]] = []
        kept = [torch.rand(2, *program.shape)]
        for number, (operation, a, b, c) in enumerate(program.body):
            step = getattr(self, f"_{operation}")(kept, number, a, b, c)
            if step is not None:
                self.steps.append(step)
                kept.append(step(kept))
        self.steps.append(self._head(kept, program.head))

    def forward(self, x: Tensor) -> Tensor:
        kept = [x]
        for step in self.steps:
            kept.append(step(kept))
        return kept[-1]

    def _add(self, number: int, module: nn.Module, name: int = 0) -> nn.Module:
        names = [f"layer{number}", *NAMES[6:13]]
        free = [n for n in names[name % len(names) :] if n not in self._modules and
                not hasattr(self, n)] or [f"layer{number}"]  # fmt: skip
        self.add_module(free[0], module)
        return module

    def _parameter(self, number: int, value: Tensor, name: int) -> Callable[[], Tensor]:
        free = [n for n in NAMES[name % len(NAMES) :] if not hasattr(self, n)]
        chosen = (free or [f"parameter{number}"])[0]
        self.register_parameter(chosen, nn.Parameter(value))
        return lambda: getattr(self, chosen)

    def _conv(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        x = kept[-1]
        if x.ndim < 3:
            return None
        kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[x.ndim]
        kernel = min(1 + a % 3, *x.shape[2:])
        inside = x.shape[1]
        groups = (1, inside, 2 if inside % 2 == 0 else 1, 1)[b % 4]
        outside = groups * (1 + c % 4) if groups > 1 else 4 + c
        layer = self._add(number, kind(
            inside, outside, kernel, stride=1 + (b // 4) % 2, padding=(a // 3) % 2,
            groups=groups, bias=c % 3 != 0,
        ), a)  # fmt: skip
        return lambda kept: layer(kept[-1])

    def _twice(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        if kept[-1].ndim != 4:
            return None
        width = kept[-1].shape[1]
        layer = self._add(number, nn.Conv2d(width, width, 3, padding=1, bias=bool(a % 2)))
        return lambda kept: layer(F.relu(layer(kept[-1]))) + kept[-1] * (b % 2)

    def _norm(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        x = kept[-1]
        width = x.shape[1]
        kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        layer = kinds[x.ndim](width) if a % 4 or x.ndim == 2 else nn.GroupNorm(1, width)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                layer.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
                layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
                layer.weight.uniform_(0.5, 1.5)
                layer.weight[0] *= (1, -1, 1e-5, 0)[b % 4]
                layer.bias.normal_(0, 0.3)
        self._add(number, layer, c)
        return lambda kept: layer(kept[-1])

    def _activate(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        function = ACTIVATIONS[a % len(ACTIVATIONS)]
        return lambda kept: function(kept[-1])

    def _move(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        function = MOVES[a % len(MOVES)]
        if kept[-1].ndim < 3 or kept[-1].shape[-1] < 2:
            return None
        return lambda kept: function(kept[-1])

    def _join(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        fitting = [i for i, x in enumerate(kept[:-1]) if x.shape == kept[-1].shape]
        if not fitting:
            return None
        other, function = fitting[b % len(fitting)], JOINS[a % len(JOINS)]
        if kept[-1].shape[1] > 24:
            function = JOINS[a % 6]
        return lambda kept: function(kept[-1], kept[other])

    def _pool(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        x = kept[-1]
        if x.ndim != 4 or min(x.shape[2:]) < 4:
            return None
        pools: tuple[Callable[[Tensor], Tensor], ...] = (
            lambda x: F.max_pool2d(x, 2),
            lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=bool(b % 2)),
            lambda x: F.max_pool2d(x, 3, 1, 1),
            lambda x: F.adaptive_avg_pool2d(x, (2 + b % 3, 3)),
            lambda x: F.adaptive_max_pool2d(x, (3, 2 + b % 3)),
            lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest") if x.shape[2] < 9 else x,
            lambda x: F.interpolate(x, size=(5, 6), mode="bilinear"),
        )
        function = pools[a % len(pools)]
        return lambda kept: function(kept[-1])

    def _scale(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        shape = (kept[-1].shape[1], *[1] * (kept[-1].ndim - 2))
        value = self._parameter(number, torch.rand(shape) + 0.5, a)
        return lambda kept: kept[-1] * value() if b % 2 else kept[-1] + value()

    def _linear(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        layer = self._add(number, nn.Linear(kept[-1].shape[-1], 4 + a, bias=bool(b % 2)), c)
        return lambda kept: layer(kept[-1])

    def _left(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        if kept[-1].ndim < 3:
            return None
        rows = kept[-1].shape[-2]
        value = self._parameter(number, torch.rand(2 + a, rows) / rows, b)
        return lambda kept: value() @ kept[-1]

    def _gate(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        if kept[-1].ndim != 4:
            return None
        layer = self._add(number, nn.Conv2d(kept[-1].shape[1], kept[-1].shape[1], 1))
        return lambda kept: kept[-1] * torch.sigmoid(layer(kept[-1].mean((2, 3), keepdim=True)))

    def _attend(self, kept: list[Tensor], number: int, a: int, b: int, c: int) -> Any:
        x = kept[-1]
        if x.ndim != 4 or x.shape[1] % 2 or x.shape[2] * x.shape[3] > 100:
            return None
        first = bool(a % 2)
        layer = self._add(number, nn.MultiheadAttention(x.shape[1], 2, batch_first=first))

        def step(kept: list[Tensor]) -> Tensor:
            tokens = kept[-1].flatten(2).permute(*((0, 2, 1) if first else (2, 0, 1)))
            out = layer(tokens, tokens, tokens, need_weights=False)[0] + tokens
            return out.permute(*((0, 2, 1) if first else (1, 2, 0))).reshape(kept[-1].shape)

        return step

    def _head(self, kept: list[Tensor], head: int) -> Callable[[list[Tensor]], Tensor]:
        x = kept[-1]
        if x.ndim == 4 and head % 4 == 1:
            layer = self._add(999, nn.Conv2d(x.shape[1], 3, 1))
            return lambda kept: layer(kept[-1])
        width = x[0].numel() if head % 4 == 2 else x.shape[1]
        layer = self._add(999, nn.Linear(width, 1 if head % 4 == 3 else 5))

        def step(kept: list[Tensor]) -> Tensor:
            y = kept[-1].flatten(1) if head % 4 == 2 else kept[-1].flatten(2).mean(2) if (
                kept[-1].ndim > 2) else kept[-1]  # fmt: skip
            y = layer(y)
            return y.squeeze(1) if head % 8 == 7 else y

        return step


def make() -> nn.Module:
    """The factory: the network of ``PROGRAM``."""
    torch.manual_seed(PROGRAM.seed)
    return Generated(PROGRAM)
