"""Activations between blocks: in memory up to a budget, beyond it in memory-mapped files."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from ..formats.atomic_files import mapped_file

__all__ = ["Caches", "Rows", "run_batch"]

# Images per forward pass when nothing is learned: so many, and values of the input, at most.
_RUN_BATCH, _RUN_VALUES = 32, 1 << 23

# After so many bytes of a mapped file were touched its pages leave the process again.
_RESIDENT = 256 << 20
_REMEDY = "calibrate with fewer images, or hold more in memory (cache_gb)"


def run_batch(images: Tensor) -> int:
    """Images (N, ...) per forward pass when nothing is learned."""
    return max(1, min(_RUN_BATCH, _RUN_VALUES // max(images[0].numel(), 1)))


class Rows:
    """One tensor for every calibration image, on the CPU.

    A network that cuts images into parts and takes those for a batch has several rows an image:
    (N * rows, *shape) float32, those of one image together. All indices count images.
    """

    def __init__(
        self, owner: Caches, tensor: Tensor, mapped: mmap.mmap | None, rows: int = 1
    ) -> None:
        self._owner, self._tensor, self._mapped, self._rows = owner, tensor, mapped, rows
        self._touched = 0

    def __len__(self) -> int:
        return len(self._tensor) // self._rows

    @property
    def shape(self) -> torch.Size:
        """(N * rows, *shape)."""
        return self._tensor.shape

    def write(self, first: int, part: Tensor) -> None:
        """Set the rows of the images from ``first`` on, all rows of every image.

        Raises:
            ModelError: Part of an image's rows is missing; the rest would never be written.
        """
        if len(part) % self._rows or part.shape[1:] != self._tensor.shape[1:]:
            raise ModelError(
                f"found activations of shape {tuple(part.shape)} for rows of "
                f"{tuple(self._tensor.shape[1:])}, {self._rows} an image; the model does not keep "
                "the images on axis 0: please report it"
            )
        start = first * self._rows
        self._tensor[start : start + len(part)] = part
        self._touch(part)

    def read(self, first: int, last: int) -> Tensor:
        """Rows of the images ``first`` to ``last``; a view where they are in memory."""
        part = self._tensor[first * self._rows : last * self._rows]
        if self._mapped is not None:
            part = part.clone()
        self._touch(part)
        return part

    def take(self, index: Tensor) -> Tensor:
        """The rows of the images ``index``, copied."""
        if self._rows > 1:
            index = (index[:, None] * self._rows + torch.arange(self._rows)).flatten()
        part = self._tensor.index_select(0, index)
        self._touch(part)
        return part

    def free(self) -> None:
        """Give the space back; the rows are gone."""
        self._owner.released(self._tensor.nbytes, self._mapped is not None)
        self._tensor, self._mapped = self._tensor.new_empty(0), None

    def _touch(self, part: Tensor) -> None:
        if self._mapped is None:
            return
        self._touched += part.nbytes
        if self._touched >= _RESIDENT:
            self._touched = 0
            # The file keeps the data; only this process lets go of the pages.
            self._mapped.madvise(mmap.MADV_DONTNEED)


class Caches:
    """Makes ``Rows`` within a budget of memory.

    Args:
        budget: Bytes that may be held in memory at a time.
        folder: Folder of mapped files; they have no name there and vanish with the process.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self._left = budget
        self._folder = folder
        self.spilled = 0

    def rows(self, count: int, shape: torch.Size, rows: int = 1) -> Rows:
        """Rows for ``count`` images, ``rows`` of ``shape`` each.

        Raises:
            DataError: Memory is used up and the disk has no room either.
        """
        count *= rows
        size = 4 * count * shape.numel()
        if size <= self._left or size == 0:
            self._left -= size
            return Rows(self, torch.empty(count, *shape), None, rows)
        mapped = mapped_file(size, "activations", self._folder, _REMEDY)
        self.spilled += size
        values = np.frombuffer(mapped, np.float32)
        return Rows(self, torch.from_numpy(values).reshape(count, *shape), mapped, rows)

    def released(self, size: int, mapped: bool) -> None:
        """Called by ``Rows.free``."""
        if not mapped:
            self._left += size
