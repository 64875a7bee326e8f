"""Finished blocks of a calibration that has not ended, so that it can be resumed.

Beside ``night.hdrq`` lies ``night.hdrq.partial/`` while a calibration runs: ``run.json``
says of which run, and ``block-0003.safetensors`` holds the codes and scales of one block.
Files are written whole or not at all, and the folder goes when the bundle is there.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save
from torch import Tensor

from ..errors import BundleError, HdrqError, OtherRunError
from ..formats.atomic_files import (
    check_output,
    make_directory,
    remove_folder,
    sha256_bytes,
    write_bytes,
)
from ..formats.file_kinds import PARTIAL, partial_of
from ..formats.staleness import CALIBRATION, code_of, first_change

__all__ = ["FinishedBlock", "Partial"]

_RUN = PARTIAL.marker


@dataclass(frozen=True)
class FinishedBlock:
    """One finished block."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class Partial:
    """The finished blocks of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(
        cls, output: Path, run: dict[str, Any], resume: bool, blocks: int | None = None
    ) -> Partial:
        """Start anew, or resume where ``resume`` says so.

        Args:
            output: The bundle that the run will write; the folder is its sibling.
            run: All that the result depends on; the code of this package is added. A run is
                resumed only where it is equal.
            resume: Keep the finished blocks.
            blocks: Blocks in all, for whoever asks how far the run is.

        Raises:
            OtherRunError: The finished blocks belong to another run; the first difference is
                named.
            BundleError: The record of their run cannot be read.
            HdrqError: The folder is not ours, or cannot be made.
        """
        folder = partial_of(output)
        check_output(folder, PARTIAL)
        run = {**run, "code": code_of(*CALIBRATION)}
        text = json.dumps({**run, "kind": PARTIAL.kind, "blocks": blocks}, indent=1, sort_keys=True)
        if resume and (folder / _RUN).is_file():
            before = _read_run(folder)
            for key in ("kind", "blocks"):
                before.pop(key, None)
            change = first_change(before, run)
            if change:
                raise OtherRunError(
                    f"{folder}: found blocks of another run ({change}); resume needs the same "
                    "options, data and versions: repeat them, or start anew without `resume`"
                )
            return cls(folder)
        remove_folder(folder, PARTIAL)
        make_directory(folder)
        write_bytes(folder / _RUN, text.encode())
        return cls(folder)

    def load(self, index: int) -> FinishedBlock | None:
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
            if _digest(tensors, meta["record"]) != meta["sha256"]:
                raise ValueError("altered since it was written")
            return FinishedBlock(tensors, json.loads(meta["record"]))
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            raise BundleError(
                f"{path}: cannot be read ({error}); remove it to calibrate this block again"
            ) from error

    def save(self, index: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a finished block."""
        values = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = json.dumps(record)
        meta = {"record": text, "sha256": _digest(values, text)}
        write_bytes(self._path(index), save(values, meta))

    def close(self) -> None:
        """Remove the folder when the bundle is written; it stays where it holds files of others."""
        with contextlib.suppress(HdrqError):
            remove_folder(self.folder, PARTIAL)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / _RUN).read_text())
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{folder / _RUN}: cannot be read ({error}); start anew without `resume`"
        ) from error
    return record


def _digest(tensors: dict[str, Tensor], record: str) -> str:
    """Hash of a block: values, names, shapes, dtypes and record."""
    return sha256_bytes(save(tensors) + record.encode())
