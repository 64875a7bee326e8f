"""How tensors become integer codes: the frozen descriptions everything else reads.

Notation (docs and papers): real value = scale * code, zero point always 0. Codes are integers, or
(grid ``e4m3``) the 8-bit floating-point numbers of :mod:`.e4m3`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SpecError
from .e4m3 import LARGEST

__all__ = ["GRIDS", "QuantSpec", "activation_range", "check_bits", "check_seed"]

GRIDS = ("int8", "paper", "e4m3")


def check_bits(bits: int, what: str) -> int:
    """Return ``bits`` or say which widths exist."""
    if not 2 <= bits <= 8:
        raise SpecError(f"found {what}={bits}; codes are stored in int8: choose 2 to 8")
    return bits


def check_seed(seed: int) -> int:
    """Return ``seed`` or say which seeds NumPy and PyTorch both take."""
    if not 0 <= seed < 1 << 63:
        shown = str(seed) if abs(seed) < 10**30 else "a longer number"
        raise SpecError(f"found seed {shown}; needed a whole number of 0 to 2**63 - 1")
    return seed


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """The codes of one tensor.

    Attributes:
        bits: Width of a code, 2 to 8.
        lo: Lowest code.
        hi: Highest code. Codes of -448 to 448 are those of E4M3, which no integers of 8 bits reach.
        axis: Axis that keeps one scale per index; None, one for the tensor.

    >>> QuantSpec.weight(4)
    QuantSpec(bits=4, lo=-8, hi=7, axis=None)
    """

    bits: int
    lo: int
    hi: int
    axis: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits")
        if self.floating and self.bits == 8 and self.lo == -LARGEST:
            return
        if not (self.lo <= 0 < self.hi and self.hi - self.lo < 1 << self.bits):
            raise SpecError(
                f"found codes {self.lo} to {self.hi} for {self.bits} bits; "
                f"they must hold 0 and at most {1 << self.bits} values"
            )

    @property
    def floating(self) -> bool:
        """Whether the codes are numbers of E4M3 and no integers."""
        return self.hi == LARGEST

    @classmethod
    def weight(cls, bits: int, axis: int | None = None, grid: str = "int8") -> QuantSpec:
        """Signed codes, -2^(b-1) to 2^(b-1) - 1, or all numbers of E4M3."""
        check_bits(bits, "wbits")
        if grid == "e4m3":
            return cls(bits, -LARGEST, LARGEST, axis)
        return cls(bits, -(1 << bits - 1), (1 << bits - 1) - 1, axis)

    @classmethod
    def activation(cls, bits: int, nonnegative: bool, grid: str = "int8") -> QuantSpec:
        """Codes of an activation, see :func:`activation_range`."""
        check_bits(bits, "abits")
        return cls(bits, *activation_range(bits, nonnegative, grid))


def activation_range(bits: int, nonnegative: bool, grid: str = "int8") -> tuple[int, int]:
    """Lowest and highest code of an activation.

    TensorRT executes signed int8 with zero point 0 only. On the grid ``int8`` a tensor that
    is never negative therefore ends at min(2^b - 1, 127); on ``paper`` it keeps 2^b - 1. E4M3 has
    a sign in any case.

    >>> activation_range(8, nonnegative=True), activation_range(8, True, "paper")
    ((0, 127), (0, 255))
    >>> activation_range(4, nonnegative=True), activation_range(4, nonnegative=False)
    ((0, 15), (-8, 7))
    """
    if grid not in GRIDS:
        raise SpecError(f"found grid {grid!r}; choose one of {', '.join(GRIDS)}")
    if grid == "e4m3":
        return -LARGEST, LARGEST
    if not nonnegative:
        return -(1 << bits - 1), (1 << bits - 1) - 1
    top = (1 << bits) - 1
    return 0, top if grid == "paper" else min(top, 127)
