"""Codes of a weighted mean of quantized weights.

``nearest``   to the nearest code;
``noise``     after a draw of the parents' rounding errors, but only where the sum is
              ambiguous, so that ties are not all broken one way (paper section 4.3);
``advanced``  many such draws: the first, replaced by any later one that points from every
              parent more nearly towards the real midpoint.

Ambiguous means: two parents at equal weights whose codes have an odd sum. Any other mix has
no exact ties; there a position is ambiguous when the scaled sum lies within
``TIE_DISTANCE`` of a half.

Why it is fast. With errors e_i ~ U(-s_i/2, s_i/2) the noisy sum rounds either down or up: a
position is one toss with a known probability, the distribution function of a sum of uniform
variables, and one 16-bit number decides it. And the cosines that ``advanced`` compares are
made of sums that are *linear* in these tosses, so that all candidates are scored by one
product of the matrix of tosses (candidates, positions) with a few columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..numerics import quantization
from ..numerics.spec import QuantSpec

__all__ = ["ROUNDINGS", "TIE_DISTANCE", "Merged", "ambiguous", "merge_codes", "round_up_share"]

ROUNDINGS = ("nearest", "noise", "advanced")
TIE_DISTANCE = 0.25
# Weights at a time: the tosses of one piece stay in a core's cache.
_PIECE = 1 << 14
# Errors of a parent with a smaller share of the step are not told apart from none.
_SMALLEST_SHARE = 1e-4

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Merged:
    """Codes of one tensor, and how they came about.

    Attributes:
        codes: int8, shape of the parents' codes.
        ambiguous: Share of the positions where rounding was a toss-up.
        changed: Share of the codes that are not those of ``nearest``.
        cosines: |cos(codes - parent, midpoint - parent)| for every parent.
        nearest_cosines: The same for ``nearest``.
    """

    codes: npt.NDArray[np.int8]
    ambiguous: float
    changed: float
    cosines: tuple[float, ...]
    nearest_cosines: tuple[float, ...]


def merge_codes(
    codes: Sequence[Array],
    scales: Sequence[Array],
    scale: Array,
    mix: Sequence[float],
    spec: QuantSpec,
    rounding: str = "advanced",
    candidates: int = 100,
    seed: Sequence[int] = (0,),
) -> Merged:
    """Codes of the weighted mean of ``scales[i] * codes[i]`` on the step ``scale``.

    Args:
        codes: Parents' codes, one shape.
        scales: Parents' steps, () or (codes.shape[spec.axis],).
        scale: Merged step, shape of ``scales[0]``.
        mix: Weights of the parents, sum 1.
        spec: Range and axis of the codes.
        rounding: One of ``ROUNDINGS``.
        candidates: Draws of ``advanced``.
        seed: Of the draws; any numbers >= 0.

    Source:
        Shin et al., ICML 2025, section 4.3.
    """
    draws = {"nearest": 0, "noise": 1, "advanced": candidates}[rounding]
    result = np.empty(codes[0].shape, np.int8)
    sums = _Sums(mix, draws)
    stream = np.random.Generator(np.random.SFC64(np.random.SeedSequence(list(seed))))
    opened = []
    for piece in _pieces(codes, scales, scale, spec, result, _PIECE if draws else 4 * _PIECE):
        part = _round(piece, mix, spec, draws > 0)
        piece.target[...] = part.nearest
        tosses = toss(stream, part.chances, draws)
        sums.add(part, tosses)
        if draws:
            opened.append((piece.target, part.open, part.low, np.packbits(tosses, axis=1)))
    chosen = sums.choose() if rounding == "advanced" else draws - 1
    changed = 0
    if chosen >= 0:
        for target, where, low, packed in opened:
            up = np.unpackbits(packed[chosen], count=len(low))
            decided = np.minimum(low + up.astype(np.int8), spec.hi).clip(spec.lo).astype(np.int8)
            changed += int((decided != target[where]).sum())
            target[where] = decided
    size = max(result.size, 1)
    cosines = sums.cosines()
    return Merged(
        codes=result,
        ambiguous=sums.open / size,
        changed=changed / size,
        cosines=tuple(map(float, cosines[chosen])),
        nearest_cosines=tuple(map(float, cosines[-1])),
    )


def ambiguous(codes: Sequence[Array], scaled: Array, mix: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Where rounding is a toss-up (see the module's text).

    Args:
        codes: Parents' integer codes.
        scaled: Weighted sum of the real weights over the merged step, same shape.
        mix: Weights of the parents.
    """
    odd: npt.NDArray[np.bool_]
    if len(codes) == 2 and mix[0] == mix[1]:
        odd = ((codes[0] ^ codes[1]) & 1).astype(bool)
        return odd
    odd = np.abs(scaled - np.floor(scaled) - 0.5) <= TIE_DISTANCE
    return odd


def round_up_share(fraction: Floats, shares: Sequence[Floats | float]) -> Floats:
    """Probability that floor(x) + 1 is the rounded noisy sum, for x with this fraction.

    Args:
        fraction: x - floor(x), in [0, 1).
        shares: Width of each parent's error in merged steps, mix_i * s_i / s; they add to 1.

    Returns:
        P(sum of shares_i * v_i <= fraction - 1/2) with v_i uniform on [-1/2, 1/2], shape of
        ``fraction``.

    Source:
        Sum of uniform variables of unequal widths: Bradley and Gupta, Annals of the Institute
        of Statistical Mathematics 54 (2002), theorem 1.

    >>> round_up_share(np.array([0.25, 0.5, 0.75]), [0.5, 0.5])
    array([0.125, 0.5  , 0.875])
    """
    if fraction.size == 0:
        return fraction
    wide = [h for h in shares if float(np.max(h)) > _SMALLEST_SHARE]
    # A parent without width leaves its share to the others.
    whole = sum(wide)
    count, volume = len(wide), math.factorial(len(wide)) * math.prod(h / whole for h in wide)
    total = np.zeros_like(fraction)
    for chosen in itertools.product((0, 1), repeat=count):
        shift = sum(h / whole for h, taken in zip(wide, chosen, strict=True) if taken)
        term = np.maximum(fraction - shift, 0.0) ** count
        total += term if sum(chosen) % 2 == 0 else -term
    result: Floats = np.clip(total / volume, 0.0, 1.0)
    return result


def toss(
    stream: np.random.Generator, chances: npt.NDArray[np.uint16], times: int
) -> npt.NDArray[np.bool_]:
    """(times, positions) tosses; position j is True with probability chances[j] / 65536."""
    count = len(chances)
    width = -(-count // 4)  # four numbers in one of 64 bits
    raw = stream.integers(0, 1 << 64, times * width, np.uint64)  # without Python's lock
    numbers = raw.view(np.uint16).reshape(times, 4 * width)[:, :count]
    tosses: npt.NDArray[np.bool_] = numbers < chances
    return tosses


@dataclass
class _Piece:
    """Some channels or some weights of one; steps broadcast against the codes."""

    codes: list[Array]
    steps: list[Floats]
    step: Floats
    target: npt.NDArray[np.int8]


def _pieces(
    codes: Sequence[Array],
    scales: Sequence[Array],
    scale: Array,
    spec: QuantSpec,
    result: npt.NDArray[np.int8],
    most: int,
) -> Iterator[_Piece]:
    """Views of about ``most`` weights at a time, in one order for all parents."""
    ndim, axis = result.ndim, spec.axis
    grids: list[Floats] = [
        quantization.along(s.astype(np.float64), ndim, axis).astype(np.float64)
        for s in (*scales, scale)
    ]
    if result.size == 0:
        return
    if axis is None:
        flats = [c.reshape(-1) for c in codes]
        out = result.reshape(-1)
        for first in range(0, len(out), most):
            cut = slice(first, first + most)
            yield _Piece([f[cut] for f in flats], grids[:-1], grids[-1], out[cut])
        return
    rows = [np.moveaxis(c, axis, 0) for c in codes]
    columns = [np.moveaxis(g, axis, 0) for g in grids]
    out = np.moveaxis(result, axis, 0)
    height = max(1, most * len(out) // result.size)
    for first in range(0, len(out), height):
        cut = slice(first, first + height)
        steps = [c[cut] for c in columns]
        yield _Piece([r[cut] for r in rows], steps[:-1], steps[-1], out[cut])


@dataclass
class _Rounded:
    """A piece rounded to nearest, and what is open in it.

    Attributes:
        nearest: Codes, float64.
        real: Real weights of the parents, float64.
        middle: Their weighted mean.
        step: Merged step.
        open: Mask of the ambiguous positions.
        low: floor(middle / step) there, int8, not yet saturated to the codes' range.
        chances: Probability of the next code there, in units of 1 / 65536.
        rise: What that code adds to the real weight there; 0 where both saturate.
        low_real: The real weight of the saturated ``low``.
    """

    nearest: Floats
    real: list[Floats]
    middle: Floats
    step: Floats
    open: npt.NDArray[np.bool_]
    low: npt.NDArray[np.int8]
    chances: npt.NDArray[np.uint16]
    rise: Floats
    low_real: Floats


def _round(piece: _Piece, mix: Sequence[float], spec: QuantSpec, tosses: bool) -> _Rounded:
    real = [s * q for s, q in zip(piece.steps, piece.codes, strict=True)]
    middle = mix[0] * real[0]
    for share, values in zip(mix[1:], real[1:], strict=True):
        middle += share * values
    scaled = middle / piece.step
    nearest = np.rint(scaled).clip(spec.lo, spec.hi)
    mask = ambiguous(piece.codes, scaled, mix)
    if not tosses:
        empty = np.zeros(0)
        return _Rounded(
            nearest=nearest,
            real=real,
            middle=middle,
            step=piece.step,
            open=mask,
            low=empty.astype(np.int8),
            chances=empty.astype(np.uint16),
            rise=empty,
            low_real=empty,
        )
    shape = nearest.shape
    floor = np.floor(scaled[mask])
    widths = [m * s / piece.step for m, s in zip(mix, piece.steps, strict=True)]
    shares = [w if w.ndim == 0 else np.broadcast_to(w, shape)[mask] for w in widths]
    chance = round_up_share(scaled[mask] - floor, shares)
    step = np.broadcast_to(piece.step, shape)[mask]
    low = floor.clip(spec.lo, spec.hi)
    return _Rounded(
        nearest=nearest,
        real=real,
        middle=middle,
        step=piece.step,
        open=mask,
        # One below the range at most, and one more never leaves int8.
        low=floor.clip(-128, 126).astype(np.int8),
        chances=np.rint(chance * 65536).clip(0, 65535).astype(np.uint16),
        rise=((floor + 1).clip(spec.lo, spec.hi) - low) * step,
        low_real=low * step,
    )


class _Sums:
    """Dot products and norms of every candidate, gathered piece by piece.

    For candidate c and parent r the cosine of (c - r, m - r) needs sum (c - r)(m - r) and
    sum (c - r)^2. With c = low + toss * rise both are a constant plus sums over tosses of
    rise * r_i and rise^2 + 2 rise * low: one column per parent and one more.
    """

    def __init__(self, mix: Sequence[float], draws: int) -> None:
        parents = len(mix)
        self.mix = np.array(mix)
        self.open = 0
        # The last row is ``nearest``.
        self._linear = np.zeros((draws + 1, parents + 1))
        self._aim = np.zeros(parents)
        self._nearest = np.zeros((2, parents))
        self._draws = draws

    def add(self, part: _Rounded, tosses: npt.NDArray[np.bool_]) -> None:
        """Add a piece: what is settled, and what the tosses decide."""
        self.open += int(part.open.sum())
        chosen = part.nearest * part.step
        for i, real in enumerate(part.real):
            away, aim = (chosen - real).ravel(), (part.middle - real).ravel()
            self._nearest[:, i] += away @ aim, away @ away
            self._aim[i] += aim @ aim
        if not self._draws or not len(part.low):
            return
        # Single precision inside a piece: its error is 1e-7 of the candidates' spread.
        columns = np.empty((len(part.low), len(part.real) + 1), np.float32)
        for i, real in enumerate(part.real):
            columns[:, i] = part.rise * real[part.open]
        columns[:, -1] = part.rise * (part.rise + 2 * part.low_real)
        self._linear[:-1] += tosses.astype(np.float32) @ columns
        # Where nearest rounded up, the candidates' constant part is one rise lower.
        up = (chosen[part.open] - part.low_real > 0.5 * part.rise) & (part.rise > 0)
        self._linear[-1] += up.astype(np.float32) @ columns

    def cosines(self) -> Floats:
        """(candidates + 1, parents); the last row is that of ``nearest``."""
        dots, squares = self._nearest
        linear = self._linear - self._linear[-1]
        dots = dots + linear[:, :-1] @ self.mix[:, None] - linear[:, :-1]
        squares = squares + linear[:, -1:] - 2 * linear[:, :-1]
        norms = np.sqrt(np.maximum(squares, 0) * self._aim)
        safe = np.where(norms > 0, norms, 1.0)
        result: Floats = np.where(norms > 0, np.abs(dots) / safe, 1.0)
        return result

    def choose(self) -> int:
        """The candidate that the filter ends with; the first one starts it."""
        cosines = self.cosines()[:-1]
        best = 0
        for i, found in enumerate(cosines):
            if (found > cosines[best]).all():
                best = i
        return best
