"""Activations between blocks: in memory up to a budget, beyond it in memory-mapped files."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

__all__ = ["Caches", "Rows"]

# After so many bytes of a mapped file were touched its pages leave the process again.
_RESIDENT = 256 << 20


class Rows:
    """One tensor for every calibration image, (N, *shape) float32, on the CPU."""

    def __init__(self, owner: Caches, tensor: Tensor, mapped: mmap.mmap | None) -> None:
        self._owner, self._tensor, self._mapped = owner, tensor, mapped
        self._touched = 0

    def __len__(self) -> int:
        return len(self._tensor)

    @property
    def shape(self) -> torch.Size:
        """(N, *shape)."""
        return self._tensor.shape

    def write(self, first: int, part: Tensor) -> None:
        """Set the rows from ``first`` on."""
        self._tensor[first : first + len(part)] = part
        self._touch(part)

    def read(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last``; a view where they are in memory."""
        part = self._tensor[first:last]
        if self._mapped is not None:
            part = part.clone()
        self._touch(part)
        return part

    def take(self, index: Tensor) -> Tensor:
        """The rows of ``index``, copied."""
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
        folder: Where mapped files go; they have no name there and vanish with the process.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self._left = budget
        self._folder = folder
        self.spilled = 0

    def rows(self, count: int, shape: torch.Size) -> Rows:
        """New rows.

        Raises:
            DataError: Memory is used up and the disk has no room either.
        """
        size = 4 * count * shape.numel()
        if size <= self._left or size == 0:
            self._left -= size
            return Rows(self, torch.empty(count, *shape), None)
        mapped = self._map(size)
        self.spilled += size
        values = np.frombuffer(mapped, np.float32)
        return Rows(self, torch.from_numpy(values).reshape(count, *shape), mapped)

    def released(self, size: int, mapped: bool) -> None:
        """Called by ``Rows.free``."""
        if not mapped:
            self._left += size

    def _map(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # Without reserved blocks a full disk would be a bus error on a later write.
                os.posix_fallocate(file.fileno(), 0, size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise
            raise DataError(
                f"found no room for {size / 1e9:.1f} GB of activations on the disk of "
                f"{self._folder or tempfile.gettempdir()} ({error.strerror}); free some, pass "
                "fewer --images, or raise --cache-gb"
            ) from error
