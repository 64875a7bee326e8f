"""Random numbers for calibration, drawn once and read through random windows.

One iteration needs a number for every element of every activation. Drawing them anew costs
5 to 10 ns each on a CPU, more than the convolution they disturb. Here they are drawn once,
``SIZE`` of each kind, and every use reads from a fresh random offset: inside one tensor the
numbers stay independent, and only an array copy is left to pay for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..numerics.e4m3 import LARGEST
from ..numerics.spec import QuantSpec

__all__ = ["Draws", "unit_of"]

SIZE = 1 << 22
_PIECE = SIZE // 2
# How many rounding errors of a tensor stand for their distribution.
_POOL_BITS = 14
POOL = 1 << _POOL_BITS


def unit_of(u: Tensor) -> Tensor:
    """The distance of the numbers of E4M3 around values ``u``, as :func:`..e4m3.spacing` has it."""
    _, exponent = torch.frexp(u.clamp(-LARGEST, LARGEST))
    return torch.ldexp(torch.ones_like(u), (exponent - 1).clamp_(min=-6) - 3)


def _errors(u: Tensor, spec: QuantSpec) -> Tensor:
    """Rounding errors of values in units of the scale, over the distance of their codes."""
    if not spec.floating:
        return torch.round(u) - u
    inside = u.clamp(spec.lo, spec.hi)
    return (inside.to(torch.float8_e4m3fn).to(u.dtype) - inside) / unit_of(u)


class Draws:
    """Masks and noise; the same seed and order of calls give the same numbers.

    Args:
        seed: Seed of the numbers themselves.
        device: Device of the values.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._numbers: dict[str, Tensor] = {}
        self._offsets = random.Random(seed)

    def restart(self, block: int) -> None:
        """Begin the offsets of one block, whatever was drawn before it."""
        self._offsets = random.Random(f"{self._seed}/{block}")

    def keep(self, like: Tensor, probability: float) -> Tensor:
        """1.0 with ``probability``, else 0.0; shape of ``like``."""

        def make(generator: torch.Generator) -> Tensor:
            return (torch.rand(SIZE, generator=generator) < probability).float()

        return self._window(f"keep {probability}", make, like)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [-0.5, 0.5), shape of ``like``."""
        return self._window(
            "uniform", lambda generator: torch.rand(SIZE, generator=generator) - 0.5, like
        )

    def resample(self, x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
        """Noise with the distribution of the rounding errors of ``x`` itself.

        The reference draws from a 256-bin histogram of these errors; drawing ``POOL`` of them
        and then every element's from these is the same distribution without the binning.
        Saturated values, at a limit of the codes or beyond it, do not take part.

        Args:
            x: Real values.
            scale: Scales that broadcast against ``x``.
            spec: Range of the codes.

        Returns:
            Noise in units of the scale, shape of ``x``.

        The numbers of E4M3 do not lie equally far apart: errors are taken in units of their
        distance, and each element's noise is multiplied by the distance around it.

        Source:
            Shin et al., ICML 2025, section 4.1.
        """
        flat = (x if scale.ndim == 0 else x / scale).reshape(-1)
        some = flat
        if flat.numel() > POOL:  # at random places: a stride may coincide with rows
            (places,) = self._pieces("place", self._places, POOL)
            some = flat[(places * flat.numel()).long()]
        if scale.ndim == 0:
            some = some / scale
        errors = _errors(some, spec)
        inside = errors[(some > spec.lo) & (some < spec.hi)]
        if inside.numel() == 0:
            return torch.zeros_like(x)
        pieces = list(self._pieces("index", self._indices, flat.numel()))
        if inside.numel() != POOL:
            (fill,) = self._pieces("index", self._indices, POOL)
            inside = inside[fill * inside.numel() >> _POOL_BITS]
        noise, first = torch.empty_like(flat), 0
        for index in pieces:
            torch.index_select(inside, 0, index, out=noise[first : first + len(index)])
            first += len(index)
        if spec.floating:
            noise *= unit_of(flat / scale if scale.ndim == 0 else flat)
        return noise.reshape(x.shape)

    def rows(self, count: int, batch: int) -> Tensor:
        """Indices of one batch among ``count`` images, on the CPU."""
        return torch.tensor([self._offsets.randrange(count) for _ in range(batch)])

    @staticmethod
    def _places(generator: torch.Generator) -> Tensor:
        return torch.rand(SIZE, generator=generator, dtype=torch.float64)

    @staticmethod
    def _indices(generator: torch.Generator) -> Tensor:
        return torch.randint(POOL, (SIZE,), generator=generator)

    def _window(self, kind: str, make: Callable[[torch.Generator], Tensor], like: Tensor) -> Tensor:
        pieces = list(self._pieces(kind, make, like.numel()))
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(like.shape)

    def _pieces(
        self, kind: str, make: Callable[[torch.Generator], Tensor], count: int
    ) -> Iterator[Tensor]:
        """``count`` numbers of a kind, in windows from fresh offsets."""
        if kind not in self._numbers:
            generator = torch.Generator().manual_seed(self._seed)
            self._numbers[kind] = make(generator).to(self._device)
        numbers = self._numbers[kind]
        for begin in range(0, count, _PIECE):
            length = min(_PIECE, count - begin)
            first = self._offsets.randrange(SIZE - length + 1)
            yield numbers[first : first + length]
