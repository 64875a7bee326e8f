"""Fake quantization with learned steps, rounding noise and element-wise dropping."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor, nn

from ..spec import QuantSpec

__all__ = ["ActivationQuantizer", "Mode", "WeightQuantizer", "search_scale"]


class Mode(Enum):
    """What a quantizer does to its tensor."""

    OFF = "off"
    ROUND = "round"
    NOISE = "noise"


def search_scale(x: Tensor, spec: QuantSpec, candidates: int = 100, power: float = 2.4) -> Tensor:
    """The step that minimises mean |x_hat - x|^power over ``candidates`` ranges.

    Args:
        x: Values; with ``spec.axis`` set, one search per index of that axis.
        spec: Codes.
        candidates: Fractions 1/candidates, ... 1 of the largest magnitude are tried.
        power: Exponent of the error.

    Returns:
        Steps > 0, shape () or (x.shape[axis],).

    Source:
        Initialisation of BRECQ and QDrop (Li et al., ICLR 2021; Wei et al., ICLR 2022).
    """
    rows = x.detach().reshape(1, -1) if spec.axis is None else x.detach().movedim(spec.axis, 0)
    rows = rows.reshape(len(rows), -1).float()
    # The range that no value leaves: the negative side has one code more.
    widest = torch.maximum(
        rows.amax(1).clamp(min=0) / spec.hi, -rows.amin(1).clamp(max=0) / max(-spec.lo, 1)
    ).clamp(min=torch.finfo(torch.float32).tiny * 1e6)
    if spec.lo == 0:
        widest = rows.amax(1).clamp(min=1e-30) / spec.hi
    best, least = widest.clone(), torch.full_like(widest, math.inf)
    for i in range(1, candidates + 1):
        step = (widest * i / candidates).unsqueeze(1)
        error = (rows / step).round_().clamp_(spec.lo, spec.hi).mul_(step).sub_(rows)
        score = error.abs_().pow_(power).mean(1)
        better = score < least
        least = torch.where(better, score, least)
        best = torch.where(better, step.squeeze(1), best)
    # A tensor of zeros has no range; any normal step represents it.
    best = torch.where(best > 1e-20, best, torch.full_like(best, 1e-6))
    return best.squeeze(0) if spec.axis is None else best


def resample_errors(u: Tensor, spec: QuantSpec, generator: torch.Generator) -> Tensor:
    """Noise with the distribution of the rounding errors of ``u`` itself.

    The reference draws from a 256-bin histogram of these errors; drawing them directly is
    the same distribution without the binning. Saturated values do not take part.
    """
    errors = torch.round(u) - u
    inside = errors[(u >= spec.lo) & (u <= spec.hi)]
    if inside.numel() == 0:
        return torch.zeros_like(u)
    index = torch.randint(inside.numel(), u.shape, generator=generator, device=u.device)
    return inside[index]


def fake_quantize(
    x: Tensor, scale: Tensor, spec: QuantSpec, noise: torch.Generator | None
) -> Tensor:
    """scale * clamp(x / scale, rounded or with noise added).

    The gradient reaches ``x`` unchanged inside the range, and ``scale`` through the rounding
    error (or the noise) and the saturation limits. ``scale`` broadcasts against ``x``.

    Source:
        LSQ (Esser et al., ICLR 2020); noise: Shin et al., ICML 2025, section 4.1.
    """
    u = x / scale
    if noise is not None:
        u = u + resample_errors(u.detach(), spec, noise)
        return u.clamp(spec.lo, spec.hi) * scale
    u = u.clamp(spec.lo, spec.hi)
    return (u + (torch.round(u) - u).detach()) * scale


class WeightQuantizer(nn.Module):
    """A latent weight and its step; ``mode`` OFF gives the weight as it was adapted."""

    def __init__(self, weight: Tensor, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mode = Mode.OFF
        self.generator = torch.Generator(weight.device)
        self.register_buffer("original", weight.detach().clone())
        self.latent = nn.Parameter(weight.detach().clone())
        self.scale = nn.Parameter(search_scale(weight, spec))

    def forward(self) -> Tensor:
        """The weight, fake-quantized as ``mode`` says."""
        if self.mode is Mode.OFF:
            original = self.original
            assert isinstance(original, Tensor)
            return original
        noise = self.generator if self.mode is Mode.NOISE else None
        return fake_quantize(self.latent, self._along(), self.spec, noise)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """int8 codes of the latent weight."""
        codes = torch.round(self.latent / self._along())
        return codes.clamp(self.spec.lo, self.spec.hi).to(torch.int8)

    def _along(self) -> Tensor:
        if self.spec.axis is None:
            return self.scale
        shape = [1] * self.latent.ndim
        shape[self.spec.axis] = -1
        return self.scale.reshape(shape)


class ActivationQuantizer(nn.Module):
    """One learned step; ``drop`` is the share of elements that stay real (QDrop)."""

    def __init__(self, spec: QuantSpec, name: str, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        self.mode = Mode.OFF
        self.drop = 0.0
        self.generator = torch.Generator(device)
        self.samples: list[Tensor] | None = None
        self.scale = nn.Parameter(torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` fake-quantized as ``mode`` says; collects samples while observing."""
        if self.samples is not None:
            self.samples.append(_thin(x.detach()))
        if self.mode is Mode.OFF:
            return x
        noise = self.generator if self.mode is Mode.NOISE else None
        real = fake_quantize(x, self._lsq_scale(x), self.spec, noise)
        if self.drop > 0:
            kept = torch.rand(x.shape, generator=self.generator, device=x.device) < self.drop
            real = torch.where(kept, x, real)
        return real

    def start_observing(self) -> None:
        """Keep samples of what passes."""
        self.samples = []

    @torch.no_grad()
    def finish_observing(self) -> None:
        """Set the step from the samples."""
        assert self.samples
        self.scale.copy_(search_scale(torch.cat(self.samples), self.spec))
        self.samples = None

    def _lsq_scale(self, x: Tensor) -> Tensor:
        factor = 1 / math.sqrt(x.numel() * self.spec.hi)
        return (self.scale - self.scale * factor).detach() + self.scale * factor


def _thin(x: Tensor, most: int = 1 << 13) -> Tensor:
    """At most about ``most`` values, evenly spread, with the extremes."""
    flat = x.reshape(-1)
    every = max(1, flat.numel() // most)
    # An odd stride does not fall in step with channel or row lengths.
    return torch.cat([flat[:: every | 1], flat.amax()[None], flat.amin()[None]])
