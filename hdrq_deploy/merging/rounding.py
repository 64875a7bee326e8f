"""Codes of a weighted mean of quantized weights.

``nearest``   rounds to the nearest code;
``noise``     rounds after a draw of the parents' rounding errors, but only where the sum is
              ambiguous, so that ties are not all broken one way (paper section 4.3);
``advanced``  takes many such draws and keeps the first, replaced by any later one that points
              from every parent more nearly towards the real midpoint;
``compensated`` needs statistics of the layers' inputs and is done by
:mod:`hdrq_deploy.numerics.error_compensation`.

Ambiguous means: the weighted sum of the codes is a half exactly, in integer arithmetic. For two
parents at equal weights these are the odd sums; with weights k_i / n a position is ambiguous
where sum_i k_i q_i leaves the remainder n / 2 on division by n. Three parents at equal weights
have no ties, nor has any odd n: a third and two thirds are clear cases, and noise would move codes
away from the nearer side. There all three ways round to nearest.

Why it is fast. With errors e_i ~ U(-s_i/2, s_i/2) the noisy sum rounds either down or up: a
position is one toss with a known probability, the distribution function of a sum of uniform
variables, and one 16-bit number decides it. And the cosines that ``advanced`` compares are
made of sums that are *linear* in these tosses, so that all candidates are scored by one
product of the matrix of tosses (candidates, positions) with a few columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from ..numerics import e4m3, quantization
from ..numerics.spec import QuantSpec
from ..typing import Array

__all__ = [
    "ROUNDINGS",
    "MergedCodes",
    "Rounding",
    "ambiguous",
    "merge_codes",
    "round_target",
    "round_up_share",
]

# Merge weights that are no multiples of 1 / n for an n up to this have no ties.
_LARGEST_DENOMINATOR = 1000
# Weights at a time: the tosses of one piece stay in a core's cache.
_PIECE = 1 << 14
# Errors of a parent with a smaller share of the scale are treated as exact.
_SMALLEST_SHARE = 1e-4

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rounding:
    """A way to round the merged weights, as the table ``ROUNDINGS`` holds it.

    Attributes:
        summary: One line for the command's help.
        draws: The number of draws that are made, from the number of candidates asked for.
        choose: The index of the draw that is taken, from the draws' cosines (draws, parents);
            -1 for the codes of rounding to nearest.
        needs_statistics: Whether layers are rounded by :mod:`..numerics.error_compensation`,
            with the statistics of their inputs; the draws are not asked for then.
    """

    summary: str
    draws: Callable[[int], int]
    choose: Callable[[Floats], int]
    needs_statistics: bool = False

    @property
    def tosses(self) -> bool:
        """Whether ambiguous positions are decided by draws."""
        return self.draws(1) > 0


def _best(cosines: Floats) -> int:
    """The first draw, replaced by any later one whose cosines are all larger."""
    best = 0
    for i, row in enumerate(cosines):
        if (row > cosines[best]).all():
            best = i
    return best


ROUNDINGS: dict[str, Rounding] = {
    "nearest": Rounding("round to the nearest code", lambda candidates: 0, lambda cosines: -1),
    "noise": Rounding("one draw decides ties", lambda candidates: 1, lambda cosines: 0),
    "advanced": Rounding("the best of several draws", lambda candidates: candidates, _best),
    "compensated": Rounding(
        "later weights make up for the errors of earlier ones",
        lambda candidates: 0,
        lambda cosines: -1,
        needs_statistics=True,
    ),
}


@dataclass(frozen=True)
class MergedCodes:
    """Codes of one tensor, and statistics of their rounding.

    Attributes:
        codes: int8 or E4M3, shape of the parents' codes.
        ambiguous: Share of the positions where rounding was a toss-up.
        changed: Share of the codes that are not those of ``nearest``.
        cosines: |cos(codes - parent, midpoint - parent)| for every parent.
        nearest_cosines: The same for ``nearest``.
    """

    codes: Array
    ambiguous: float
    changed: float
    cosines: tuple[float, ...]
    nearest_cosines: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {
            "codes": self.codes.size,
            "ambiguous": self.ambiguous,
            "changed": self.changed,
            "cosines": self.cosines,
            "nearest_cosines": self.nearest_cosines,
        }


def merge_codes(
    codes: Sequence[Array],
    scales: Sequence[Array],
    scale: Array,
    merge_weights: Sequence[float],
    spec: QuantSpec,
    rounding: str = "advanced",
    candidates: int = 100,
    seed: Sequence[int] = (0,),
) -> MergedCodes:
    """Codes of the weighted mean of ``scales[i] * codes[i]``, rounded with ``scale``.

    Args:
        codes: Parents' codes, one shape.
        scales: Parents' scales, () or (codes.shape[spec.axis],).
        scale: Merged scale, shape of ``scales[0]``.
        merge_weights: One per parent, sum 1.
        spec: Range and axis of the codes.
        rounding: Name of one of ``ROUNDINGS``.
        candidates: Draws of ``advanced``.
        seed: Seed of the draws: any numbers >= 0.

    Source:
        Shin et al., ICML 2025, section 4.3.
    """
    draws = ROUNDINGS[rounding].draws(candidates)
    result = np.empty(codes[0].shape, np.int8)
    sums = _Sums(merge_weights, draws)
    stream = np.random.Generator(np.random.SFC64(np.random.SeedSequence(list(seed))))
    opened = []
    for piece in _pieces(codes, scales, scale, spec, result, _PIECE if draws else 4 * _PIECE):
        part = _round(piece, merge_weights, spec, draws > 0)
        piece.target[...] = part.nearest
        tosses = toss(stream, part.chances, draws)
        sums.add(part, tosses)
        if draws:
            opened.append((piece.target, part.open, part.low, np.packbits(tosses, axis=1)))
    cosines = sums.cosines()
    chosen = ROUNDINGS[rounding].choose(cosines[:-1])
    changed = 0
    if chosen >= 0:
        for target, mask, low, packed in opened:
            up = np.unpackbits(packed[chosen], count=len(low))
            decided = np.minimum(low + up.astype(np.int8), spec.hi).clip(spec.lo).astype(np.int8)
            changed += int((decided != target[mask]).sum())
            target[mask] = decided
    size = max(result.size, 1)
    return MergedCodes(
        codes=result,
        ambiguous=sums.open / size,
        changed=changed / size,
        cosines=tuple(map(float, cosines[chosen])),
        nearest_cosines=tuple(map(float, cosines[-1])),
    )


def round_target(
    target: Array,
    parents: Sequence[Array],
    scale: Array,
    spec: QuantSpec,
    codes: Array | None = None,
) -> MergedCodes:
    """Codes of merged weights that a method other than the weighted mean gave.

    Args:
        target: Merged real weights, shape of the codes.
        parents: Real weights of the parents, of the same shape.
        scale: Merged scale, () or (target.shape[spec.axis],).
        spec: Range and axis of the codes.
        codes: The codes where they are found already; else the nearest ones are taken.
    """
    wide = quantization.along(scale.astype(np.float64), target.ndim, spec.axis)
    nearest = quantization.rounded(target / wide, spec)
    nearest = nearest.astype(e4m3.DTYPE if spec.floating else np.int8)
    taken = nearest if codes is None else codes
    near = tuple(_cosine(_wide(nearest) * wide - real, target - real) for real in parents)
    cosines = near
    if codes is not None:
        cosines = tuple(_cosine(_wide(codes) * wide - real, target - real) for real in parents)
    return MergedCodes(
        codes=taken,
        ambiguous=0.0,
        changed=float((taken != nearest).mean()) if taken.size else 0.0,
        cosines=cosines,
        nearest_cosines=near,
    )


def _wide(codes: Array) -> Floats:
    return codes.astype(np.float64)


def _cosine(a: Floats, b: Floats) -> float:
    """|cos| of the angle between two tensors; 1 where one of them is zero."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(abs(np.vdot(a, b))) / norm if norm > 0 else 1.0


def ambiguous(codes: Sequence[Array], merge_weights: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Where the weighted sum of the codes is a half exactly (see the module's text).

    Args:
        codes: Parents' integer codes, one shape.
        merge_weights: One per parent, sum 1.

    >>> ambiguous([np.array([1, 2]), np.array([2, 4])], [0.5, 0.5])
    array([ True, False])
    """
    parts, whole = _whole_parts(merge_weights)
    if whole % 2:
        return np.zeros(codes[0].shape, bool)
    if whole == 2 and len(codes) == 2:
        odd: npt.NDArray[np.bool_] = ((codes[0] ^ codes[1]) & 1).astype(bool)
        return odd
    total = np.zeros(codes[0].shape, np.int32)
    for part, values in zip(parts, codes, strict=True):
        total += part * values.astype(np.int32)  # NumPy 1 multiplies in the type of the codes
    ties: npt.NDArray[np.bool_] = total % whole == whole // 2
    return ties


def _whole_parts(merge_weights: Sequence[float]) -> tuple[list[int], int]:
    """Whole numbers k_i and n with weights k_i / n; n = 1 where no small n fits.

    >>> _whole_parts([0.5, 0.25, 0.25]), _whole_parts([1 / 3] * 3)
    (([2, 1, 1], 4), ([1, 1, 1], 3))
    """
    near = [Fraction(w).limit_denominator(_LARGEST_DENOMINATOR) for w in merge_weights]
    whole = math.lcm(*(share.denominator for share in near))
    exact = all(abs(float(share) - w) < 1e-12 for share, w in zip(near, merge_weights, strict=True))
    if not exact or whole > _LARGEST_DENOMINATOR or sum(near) != 1:
        return [0] * len(near), 1
    return [int(share * whole) for share in near], whole


def round_up_share(fraction: Floats, shares: Sequence[Floats | float]) -> Floats:
    """Probability that floor(x) + 1 is the rounded noisy sum, for x with this fraction.

    Args:
        fraction: x - floor(x), in [0, 1).
        shares: Width of each parent's error in merged scales, mix_i * s_i / s; they add to 1.

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
    """Some channels or some weights of one; scales broadcast against the codes."""

    codes: list[Array]
    scales: list[Floats]
    scale: Floats
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
        scales = [c[cut] for c in columns]
        yield _Piece([r[cut] for r in rows], scales[:-1], scales[-1], out[cut])


@dataclass
class _RoundedPiece:
    """A piece rounded to nearest, and what is open in it.

    Attributes:
        nearest: Codes, float64.
        real: Real weights of the parents, float64.
        middle: Their weighted mean.
        scale: Merged scale.
        open: Mask of the ambiguous positions.
        low: floor(middle / scale) there, int8, not yet saturated to the codes' range.
        chances: Probability of the next code there, in units of 1 / 65536.
        rise: What that code adds to the real weight there; 0 where both saturate.
        low_real: The real weight of the saturated ``low``.
    """

    nearest: Floats
    real: list[Floats]
    middle: Floats
    scale: Floats
    open: npt.NDArray[np.bool_]
    low: npt.NDArray[np.int8]
    chances: npt.NDArray[np.uint16]
    rise: Floats
    low_real: Floats


def _round(
    piece: _Piece, merge_weights: Sequence[float], spec: QuantSpec, tosses: bool
) -> _RoundedPiece:
    real = [s * q for s, q in zip(piece.scales, piece.codes, strict=True)]
    middle = merge_weights[0] * real[0]
    for share, values in zip(merge_weights[1:], real[1:], strict=True):
        middle += share * values
    scaled = middle / piece.scale
    nearest = np.rint(scaled).clip(spec.lo, spec.hi)
    mask = ambiguous(piece.codes, merge_weights)
    if not tosses:
        empty = np.zeros(0)
        return _RoundedPiece(
            nearest=nearest,
            real=real,
            middle=middle,
            scale=piece.scale,
            open=mask,
            low=empty.astype(np.int8),
            chances=empty.astype(np.uint16),
            rise=empty,
            low_real=empty,
        )
    shape = nearest.shape
    floor = np.floor(scaled[mask])
    widths = [m * s / piece.scale for m, s in zip(merge_weights, piece.scales, strict=True)]
    shares = [w if w.ndim == 0 else np.broadcast_to(w, shape)[mask] for w in widths]
    chance = round_up_share(scaled[mask] - floor, shares)
    scale = np.broadcast_to(piece.scale, shape)[mask]
    low = floor.clip(spec.lo, spec.hi)
    return _RoundedPiece(
        nearest=nearest,
        real=real,
        middle=middle,
        scale=piece.scale,
        open=mask,
        # One below the range at most, and one more never leaves int8.
        low=floor.clip(-128, 126).astype(np.int8),
        chances=np.rint(chance * 65536).clip(0, 65535).astype(np.uint16),
        rise=((floor + 1).clip(spec.lo, spec.hi) - low) * scale,
        low_real=low * scale,
    )


class _Sums:
    """Dot products and norms of every candidate, gathered piece by piece.

    For candidate c and parent r the cosine of (c - r, m - r) needs sum (c - r)(m - r) and
    sum (c - r)^2. With c = low + toss * rise both are a constant plus sums over tosses of
    rise * r_i and rise^2 + 2 rise * low: one column per parent and one more.
    """

    def __init__(self, merge_weights: Sequence[float], draws: int) -> None:
        parents = len(merge_weights)
        self._merge_weights = np.array(merge_weights)
        self.open = 0
        # The last row is ``nearest``.
        self._linear = np.zeros((draws + 1, parents + 1))
        self._aim = np.zeros(parents)
        self._nearest = np.zeros((2, parents))
        self._draws = draws

    def add(self, part: _RoundedPiece, tosses: npt.NDArray[np.bool_]) -> None:
        """Add a piece: what is settled, and what the tosses decide."""
        self.open += int(part.open.sum())
        chosen = part.nearest * part.scale
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
        dots = dots + linear[:, :-1] @ self._merge_weights[:, None] - linear[:, :-1]
        squares = squares + linear[:, -1:] - 2 * linear[:, :-1]
        norms = np.sqrt(np.maximum(squares, 0) * self._aim)
        safe = np.where(norms > 0, norms, 1.0)
        result: Floats = np.where(norms > 0, np.abs(dots) / safe, 1.0)
        return result
