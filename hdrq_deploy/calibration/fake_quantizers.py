"""Fake quantization with learned scales, rounding noise and element-wise dropping."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.e4m3 import LARGEST
from ..numerics.spec import QuantSpec
from .noise import Draws, unit_of

__all__ = [
    "ActivationQuantizer",
    "Mode",
    "WeightQuantizer",
    "fake_quantize",
    "round_codes",
    "search_scale",
]


class Mode(Enum):
    """What a quantizer does to its tensor.

    ``SOFT`` is AdaRound's relaxed rounding of a weight; an activation rounds meanwhile.
    """

    OFF = "off"
    ROUND = "round"
    EMPIRICAL = "empirical"
    UNIFORM = "uniform"
    SOFT = "soft"


_NOISY = (Mode.EMPIRICAL, Mode.UNIFORM)
# AdaRound's stretched sigmoid reaches 0 and 1 at finite values (Nagel et al., ICML 2020, eq. 23).
_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1
_CHUNK = 1 << 16
_SKETCH, _NEAR = 1 << 15, 8
# Values of a tensor that stand for all of it in a search.
_SAMPLE = 1 << 13


def search_scale(x: Tensor, spec: QuantSpec, candidates: int = 100, power: float = 2.4) -> Tensor:
    """The scale that minimises mean |x_hat - x|^power over ``candidates`` ranges.

    Args:
        x: Values; with ``spec.axis`` set, one search per index of that axis.
        spec: Codes.
        candidates: Fractions 1/candidates, ... 1 of the largest magnitude are tried.
        power: Exponent of the error.

    Returns:
        Scales > 0, shape () or (x.shape[axis],).

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
    tried = torch.arange(candidates)
    if len(rows) == 1 and rows.shape[1] > 4 * _SKETCH:
        # A sketch finds the neighbourhood of the best range, all values decide within it.
        some = rows[:, :: rows.shape[1] // _SKETCH | 1]
        near = int(_range_errors(some, widest, spec, tried, candidates, power)[:, 0].argmin())
        tried = tried[max(0, near - _NEAR) : near + _NEAR + 1]
    scores = _range_errors(rows, widest, spec, tried, candidates, power)
    best = widest * (tried.to(rows.device)[scores.argmin(0)] + 1) / candidates
    # A tensor of zeros has no range; any normal scale represents it.
    best = torch.where(best > 1e-20, best, torch.full_like(best, 1e-6))
    return best.squeeze(0) if spec.axis is None else best


def _range_errors(
    rows: Tensor, widest: Tensor, spec: QuantSpec, tried: Tensor, candidates: int, power: float
) -> Tensor:
    """Summed errors (tried, rows) on ranges (tried + 1) / candidates of the widest."""
    scores = torch.zeros(len(tried), len(rows), device=rows.device)
    # Pieces that stay in a core's cache: the search is then bound by arithmetic, not memory.
    for first_row in range(0, len(rows), _CHUNK):
        width = max(1, _CHUNK // min(len(rows), _CHUNK))
        for first in range(0, rows.shape[1], width):
            part = rows[first_row : first_row + _CHUNK, first : first + width]
            scales = widest[first_row : first_row + _CHUNK, None]
            for k, i in enumerate(tried.tolist()):
                scale = scales * ((i + 1) / candidates)
                codes = round_codes(part / scale, spec.lo, spec.hi)
                error = codes.mul_(scale).sub_(part)
                scores[k, first_row : first_row + _CHUNK] += error.abs_().pow_(power).sum(1)
    return scores


def round_codes(u: Tensor, lo: int, hi: int) -> Tensor:
    """Values in units of the scale on the nearest codes (ties to even), in place where it can be.

    Codes of ``lo`` to ``hi``, which are integers, or numbers of E4M3 where ``hi`` is 448.
    """
    if hi == LARGEST:
        return u.clamp_(lo, hi).to(torch.float8_e4m3fn).to(u.dtype)
    return u.round_().clamp_(lo, hi)


class _FakeQuantize(torch.autograd.Function):
    """scale * round(clamp(x / scale)), or x + scale * noise in the range, in few passes.

    With u = x / scale, an element is saturated where u >= hi or u <= lo; its code q is the
    limit, with or without noise. Elements with ``keep`` 1 stay real. The gradient of x is that of
    the output where u is not saturated. The gradient of the scale is the sum of grad * q of
    saturated elements and of grad * (q - u) of the others, where q - u is the noise or the
    rounding error (LSQ, Esser et al., ICLR 2020, eq. 3 and 5).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        spec: QuantSpec,
        noise: Tensor | None,
        keep: Tensor | None,
        factor: float,
    ) -> Tensor:
        u = x / scale
        codes = u.clamp(spec.lo, spec.hi)
        if noise is None:
            codes = round_codes(codes, spec.lo, spec.hi)
        else:
            codes.add_(_inside(noise, u, spec))
        ctx.save_for_backward(u, codes, scale, keep)
        ctx.spec, ctx.factor = spec, factor
        real = codes * scale
        return real if keep is None else torch.lerp(real, x, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].contiguous()
        u, codes, scale, keep = ctx.saved_tensors
        coded = grad if keep is None else grad - grad * keep
        inside = _inside(coded, u, ctx.spec)
        grad_scale = _sum(coded, codes, scale) - _sum(inside, u, scale)
        grad_x = inside if keep is None else inside.addcmul_(grad, keep)
        return grad_x, grad_scale * ctx.factor, None, None, None, None


def _sum(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of products, over the axes along which a scale ``like`` is one value."""
    if like.ndim == 0:
        return a.flatten().dot(b.flatten())
    axes = [i for i, size in enumerate(like.shape) if size == 1]
    return (a * b).sum(axes, keepdim=True)


def _inside(values: Tensor, u: Tensor, spec: QuantSpec) -> Tensor:
    """``values`` where lo < u < hi, else 0, in one pass."""
    result: Tensor = torch.ops.aten.hardtanh_backward(values, u, spec.lo, spec.hi)
    return result


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    noise: Tensor | None = None,
    keep: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """scale * clamp(x / scale), rounded, or with ``noise`` added instead.

    Saturated elements, x >= scale * hi or x <= scale * lo (with lo = 0 every zero behind a
    ReLU), take the limit exactly and get no noise. The others become x + scale * noise, which
    is not clamped.

    Args:
        x: Real values, any shape.
        scale: Scales that broadcast against ``x``.
        spec: Range of the codes.
        noise: Noise in units of the scale, shape of ``x``.
        keep: 1.0 where an element stays real, else 0.0; shape of ``x``.
        factor: Factor of the gradient of ``scale``.

    Source:
        LSQ (Esser et al., ICLR 2020); noise: Shin et al., ICML 2025, section 4.1; keep:
        QDrop (Wei et al., ICLR 2022).
    """
    result = _FakeQuantize.apply(x, scale, spec, noise, keep, factor)
    assert isinstance(result, Tensor)
    return result


class WeightQuantizer(nn.Module):
    """A latent weight and its scale, and what AdaRound adds to them.

    ``gain``, one per output channel, multiplies the quantized weight; it is how scales carry
    a folded BatchNorm. ``freeze`` turns what was learned into codes.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, gain: Tensor | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.mode = Mode.OFF
        self.draws: Draws | None = None
        self.original: Tensor
        self.gain: Tensor | None
        self.frozen: Tensor | None
        self.register_buffer("original", weight.detach().clone())
        self.register_buffer("gain", None if gain is None else _along(gain, weight.ndim, 0))
        self.register_buffer("frozen", None)
        self.latent = nn.Parameter(weight.detach().clone())
        self.scale = nn.Parameter(search_scale(weight, spec))
        self.rounding: nn.Parameter | None = None

    def start_adaround(self) -> None:
        """Add the variable that learns up or down, at the weight's own fraction."""
        u = self.original / self._scale().detach()
        share = ((u - u.floor()) - _STRETCH_LOW) / (_STRETCH_HIGH - _STRETCH_LOW)
        self.rounding = nn.Parameter(torch.logit(share))

    def soft(self) -> Tensor:
        """h(V) in [0, 1]: how far each weight is rounded up."""
        assert self.rounding is not None
        stretched = torch.sigmoid(self.rounding) * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW
        return stretched.clamp(0, 1)

    def forward(self) -> Tensor:
        """The weight as ``mode`` says, its gain applied."""
        real = self._real()
        return real if self.gain is None else real * self.gain

    def _real(self) -> Tensor:
        original = self.original
        if self.mode is Mode.OFF:
            return original
        if self.frozen is not None:
            return self.frozen.to(original.dtype) * self._scale()
        if self.mode is Mode.SOFT:
            scale = self._scale().detach()
            codes = (original / scale).floor() + self.soft()
            return codes.clamp(self.spec.lo, self.spec.hi) * scale
        if self.rounding is not None:
            return self.codes().to(original.dtype) * self._scale()
        noise = _noise(self.mode, self.latent, self._scale(), self.spec, self.draws)
        return fake_quantize(self.latent, self._scale(), self.spec, noise)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Codes of what was learned, int8 or E4M3."""
        if self.frozen is not None:
            return self.frozen
        if self.rounding is not None:
            real = (self.original / self._scale()).floor() + (self.soft() >= 0.5)
        else:
            real = self.latent / self._scale()
        codes = round_codes(real, self.spec.lo, self.spec.hi)
        return codes.to(torch.float8_e4m3fn if self.spec.floating else torch.int8)

    @torch.no_grad()
    def freeze(self, codes: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Settle on codes and scale: those learned, or those given."""
        self.frozen = self.codes() if codes is None else codes.to(self.latent.device)
        if scale is not None:
            self.scale.copy_(scale)
        self.rounding = None
        self.latent.data = self.latent.data.new_empty(0)

    def reset(self) -> None:
        """Forget what was learned of the weight; the scale is the caller's."""
        self.rounding = self.frozen = None
        self.latent.data = self.original.clone()

    def _scale(self) -> Tensor:
        return _along(self.scale, self.original.ndim, self.spec.axis)


class ActivationQuantizer(nn.Module):
    """One learned scale; ``drop`` is the share of elements that stay real (QDrop)."""

    def __init__(self, spec: QuantSpec, name: str, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        self.mode = Mode.OFF
        self.drop = 0.0
        self.settled = False
        self.draws: Draws | None = None
        self.samples: list[Tensor] | None = None
        self._most = _SAMPLE
        self.scale = nn.Parameter(torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` fake-quantized as ``mode`` says; collects samples while observing."""
        if self.samples is not None:
            self.samples.append(_thin(x.detach(), self._most))
        if self.mode is Mode.OFF:
            return x
        x = x.contiguous()
        noise = _noise(self.mode, x, self.scale, self.spec, self.draws)
        keep = self.draws.keep(x, self.drop) if self.drop > 0 and self.draws else None
        factor = 1 / math.sqrt(x.numel() * self.spec.hi)
        return fake_quantize(x, self.scale, self.spec, noise, keep, factor)

    def start_observing(self, most: int = _SAMPLE) -> None:
        """Keep about ``most`` values of every tensor that passes."""
        self.samples, self._most = [], most

    @torch.no_grad()
    def finish_observing(self, pooled: bool = True) -> None:
        """Set the scale from all samples ``pooled``, or to the largest that a sample wants."""
        assert self.samples
        samples = [torch.cat(self.samples)] if pooled else self.samples
        self.scale.copy_(torch.stack([search_scale(x, self.spec) for x in samples]).amax())
        self.samples = None


@torch.no_grad()
def _noise(
    mode: Mode, x: Tensor, scale: Tensor, spec: QuantSpec, draws: Draws | None
) -> Tensor | None:
    if mode not in _NOISY:
        return None
    assert draws is not None
    if mode is Mode.EMPIRICAL:
        return draws.resample(x, scale, spec)
    noise = draws.uniform(x)
    return noise * unit_of(x / scale) if spec.floating else noise


def _along(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _thin(x: Tensor, most: int) -> Tensor:
    """At most about ``most`` values, evenly spread, with the extremes."""
    flat = x.reshape(-1)
    every = max(1, flat.numel() // most)
    # An odd stride does not coincide with channel or row lengths.
    return torch.cat([flat[:: every | 1], flat.amax()[None], flat.amin()[None]])
