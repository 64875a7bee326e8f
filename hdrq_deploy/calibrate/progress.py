"""Finished blocks of a calibration that has not ended, so that it can go on.

Beside ``night.hdrq`` lies ``night.hdrq.partial/`` while a calibration runs: ``run.json``
says of which run, and ``block-0003.safetensors`` holds the codes and steps of one block.
Files are written whole or not at all, and the folder goes when the bundle is there.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save
from torch import Tensor

from ..errors import BundleError, HdrqError, SpecError
from ..files import make_directory, write_bytes

__all__ = ["Partial", "Stored"]

_RUN = "run.json"


@dataclass(frozen=True)
class Stored:
    """One finished block."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class Partial:
    """The finished blocks of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, output: Path, run: dict[str, Any], resume: bool) -> Partial:
        """Start anew, or go on where ``resume`` says so.

        Args:
            output: The bundle to be; the folder is its sibling.
            run: All that the result depends on; a run goes on only where it is equal.
            resume: Keep the blocks that are there.

        Raises:
            SpecError: The blocks that are there belong to another run; the first difference
                is named.
            HdrqError: The folder cannot be made.
        """
        folder = output.with_name(output.name + ".partial")
        text = json.dumps(run, indent=1, sort_keys=True)
        if folder.exists() and not (folder / _RUN).is_file() and any(folder.iterdir()):
            raise HdrqError(
                f"found other content at {folder}; needed this place for unfinished work: "
                "choose another -o"
            )
        if resume and (folder / _RUN).is_file():
            before = json.loads((folder / _RUN).read_text())
            for key in sorted({*before, *run}):
                if before.get(key) != run.get(key):
                    raise SpecError(
                        f"{folder}: found a run with {key} {before.get(key)!r}, asked "
                        f"{run.get(key)!r}; --resume needs the same options and data: repeat "
                        "them, or leave out --resume to start anew"
                    )
            return cls(folder)
        shutil.rmtree(folder, ignore_errors=True)
        make_directory(folder)
        write_bytes(folder / _RUN, text.encode())
        return cls(folder)

    def load(self, index: int) -> Stored | None:
        """A finished block, or None.

        Raises:
            BundleError: Its file was altered.
        """
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Stored(tensors, json.loads(meta["record"]))
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise BundleError(
                f"{path}: cannot be read ({error}); remove it to calibrate this block again"
            ) from error

    def save(self, index: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a finished block."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_bytes(self._path(index), save(whole, {"record": json.dumps(record)}))

    def close(self) -> None:
        """Remove the folder; the bundle is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"
