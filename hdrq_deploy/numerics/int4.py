"""Codes of 4 bits, two in a byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import SpecError

__all__ = ["pack_int4", "unpack_int4"]

Codes = npt.NDArray[np.int8]


def pack_int4(codes: Codes) -> npt.NDArray[np.uint8]:
    """Pack codes in [-8, 7] two per byte, low nibble first; shape (ceil(n / 2),).

    Source:
        ONNX INT4 storage: onnx.ai/onnx/technical/int4.html

    >>> pack_int4(np.array([1, -1, 7], np.int8))
    array([241,   7], dtype=uint8)
    """
    if codes.size and (codes.min() < -8 or codes.max() > 7):
        raise SpecError(f"found codes {codes.min()} to {codes.max()}; 4 bits hold -8 to 7")
    nibbles = codes.reshape(-1).view(np.uint8) & np.uint8(0xF)
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    packed: npt.NDArray[np.uint8] = nibbles[0::2] | nibbles[1::2] << np.uint8(4)
    return packed


def unpack_int4(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Codes:
    """Undo :func:`pack_int4`; ``shape`` is that of the codes.

    >>> unpack_int4(np.array([241, 7], np.uint8), (3,))
    array([ 1, -1,  7], dtype=int8)
    """
    size = int(np.prod(shape))
    if packed.shape != ((size + 1) // 2,):
        raise SpecError(
            f"found {packed.shape} packed bytes; codes of shape {shape} need {(size + 1) // 2}"
        )
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)[:size]
    codes: Codes = ((nibbles ^ 8).astype(np.int8) - 8).reshape(shape)
    return codes
