"""``golden.safetensors`` of a bundle or engine: inputs, and outputs where they are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import safetensors.numpy

from ..errors import BundleError
from ..typing import Array
from .safetensors_layout import read_header

__all__ = ["GOLDEN", "GOLDEN_IMAGES", "read_golden"]

GOLDEN = "golden.safetensors"
GOLDEN_IMAGES = 2


def read_golden(path: Path) -> dict[str, Array]:
    """Golden inputs, and outputs where they are known.

    Raises:
        BundleError: The file cannot be read, or holds no inputs, or none for each output.
    """
    wrong = {
        name: span
        for name, span in read_header(path).items()
        if span.dtype not in {"F32", "I64", "I32"} or not span.shape or not math.prod(span.shape)
    }
    if wrong:
        name, span = next(iter(wrong.items()))
        raise BundleError(
            f"{path}: found {name} of {span.dtype} {span.shape}; needed float32 inputs and "
            "outputs: make the file again"
        )
    try:
        golden: dict[str, Array] = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy or make it again") from error
    counts = {len(values) for values in golden.values()}
    if "input" not in golden or len(counts) > 1 or golden["input"].dtype != np.float32:
        raise BundleError(
            f"{path}: found {', '.join(golden) or 'nothing'}; needed float32 input and as many "
            "outputs: make the file again"
        )
    if not all(np.isfinite(values).all() for values in golden.values()):
        raise BundleError(f"{path}: found NaN or infinity; needed finite values: make it again")
    return golden
