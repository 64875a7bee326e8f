"""One bundle in several runtimes: where, and by how much, do their integers part?

The reference is the bundle's graph computed as written: every QuantizeLinear, DequantizeLinear and
layer for itself. The codes of every activation quantizer are compared with it twice. *Free*: each
runtime computes the whole network, and a code that fell to the other side of a tie changes those
behind it. *From the same codes*: the reference is run again on the runtime's own codes, so that a
difference is of one layer alone; it is a tie, or it is wrong
(:mod:`~hdrq_deploy.comparison.differences`).

The codes of a run on another machine come in a file: :func:`record` writes it there.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..comparison import golden, openvino_tap
from ..comparison.differences import KERNEL, Stage, Stepwise, TensorDifference, difference
from ..comparison.taps import Ran, Shows
from ..errors import DataError
from ..exporters import export
from ..formats.atomic_files import scratch_folder, write_bytes
from ..formats.bundle import Bundle
from ..formats.engine_folder import GRAPH
from ..typing import Array

__all__ = ["RUNTIMES", "Codes", "Parted", "Recorded", "compare", "record"]


@dataclass(frozen=True)
class Codes:
    """One activation quantizer in a runtime and in the reference.

    Attributes:
        module: Module path whose output it is.
        free_off: Share of the codes that differ (0 to 1) where both compute the whole network.
        free_steps: Largest of these differences.
        off: Share of the codes that differ, computed from the same codes.
        steps: Largest of these differences.
        ties: How many of them are off by one at a tie.
        wrong: How many differ otherwise.
    """

    module: str
    free_off: float
    free_steps: int
    off: float
    steps: int
    ties: int
    wrong: int


@dataclass(frozen=True)
class Parted:
    """A runtime beside the reference.

    Attributes:
        name: The runtime.
        tensors: Quantizers in the order of the graph; those that it does not show are left out.
        hidden: How many it does not show, for they lie inside a kernel.
        output_rms: Relative RMS of the output, free run.
        failure: What no tie explains, the first in the order of the graph; None for nothing.
    """

    name: str
    tensors: tuple[Codes, ...]
    hidden: int
    output_rms: float
    failure: str | None

    @property
    def most_off(self) -> float:
        """The largest share of a quantizer's codes that differ, computed from the same codes."""
        return max((codes.off for codes in self.tensors), default=0.0)


class Recorded:
    """What a runtime computed of one batch, kept; see :class:`~..comparison.taps.Shows`."""

    def __init__(self, name: str, ran: Ran) -> None:
        self.name, self._ran = name, ran

    def run(self, x: Array) -> Ran:
        """The batch that is known, whatever ``x`` is."""
        return self._ran

    @classmethod
    def of_file(cls, path: Path, name: str, bundle: Bundle, x: Array) -> Recorded:
        """The codes that :func:`record` wrote.

        Raises:
            DataError: The file is none of these, or of another bundle or other inputs.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                held = {key: file[key] for key in file.files}
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: found no codes of a run ({error}); record them") from error
        for key, wanted in _marks(bundle, x).items():
            found = str(held.pop(key, "none"))
            if found != wanted:
                raise DataError(
                    f"{path}: found codes of {key} {found[:12]}; needed {wanted[:12]}: record them "
                    "with this bundle and these inputs"
                )
        output = held.pop("output", None)
        if output is None:
            raise DataError(f"{path}: found no output; record the codes again")
        hidden = frozenset(map(str, held.pop("hidden", np.array([], str))))
        codes = {key.removeprefix("codes/"): value for key, value in held.items()}
        return cls(name, Ran(output, output, codes, hidden=hidden))


def compare(bundle: Bundle, runtimes: Mapping[str, Shows], x: Array) -> list[Parted]:
    """Every runtime beside the bundle's graph computed as written.

    Args:
        bundle: Calibrated or merged.
        runtimes: What is compared, by name; :data:`RUNTIMES` opens some.
        x: Network inputs (N, C, H, W) float32, one batch.

    Raises:
        CheckFailed: A runtime does not load or run.
    """
    reference = golden.bundle_tap(bundle)
    truth = reference.run(x)
    how = Stepwise.of_bundle(bundle, KERNEL)
    found = []
    for name, runtime in runtimes.items():
        ran = runtime.run(x)
        stage = difference(reference, Recorded(name, ran), lambda: iter([(x, x)]), how)
        found.append(_parted(name, stage, how, truth, ran))
    return found


def _parted(name: str, stage: Stage, how: Stepwise, truth: Ran, ran: Ran) -> Parted:
    shown = [scale for scale in how.modules if scale in how.ranges and scale in ran.codes]
    pairs = zip(stage.tensors, shown, strict=True) if stage.tensors else ()
    tensors = [_codes(local, truth.codes[scale], ran.codes[scale]) for local, scale in pairs]
    return Parted(name, tuple(tensors), stage.hidden, stage.output_rms, stage.failure)


def _codes(local: TensorDifference, truth: Array, mine: Array) -> Codes:
    away = np.abs(mine.astype(np.int32) - truth)
    return Codes(
        module=local.module,
        free_off=float((away > 0).mean()),
        free_steps=int(away.max(initial=0)),
        off=local.share_off,
        steps=local.steps,
        ties=local.ties,
        wrong=local.wrong,
    )


def _exported(engine: str, bundle: Bundle, folder: Path) -> Path:
    return export(bundle, folder / engine, engine) / GRAPH


# How each runtime is opened, given a bundle and a folder for its engine.
RUNTIMES: dict[str, Callable[[Bundle, Path], Shows]] = {
    "ort": lambda bundle, folder: golden.ort_engine(_exported("ort", bundle, folder)),
    "openvino": lambda bundle, folder: openvino_tap.of_file(_exported("openvino", bundle, folder)),
    "unfused": lambda bundle, folder: golden.bundle_tap(bundle),
}


def record(bundle: Bundle, runtime: str, x: Array, path: str | os.PathLike[str]) -> None:
    """Write the codes of a run on this machine, to be compared on another one.

    Args:
        bundle: Calibrated or merged.
        runtime: One of :data:`RUNTIMES`.
        x: Network inputs (N, C, H, W) float32, one batch.
        path: An .npz with an array of codes for each activation, named ``codes/`` and the name of
            its scale, and the output.

    Raises:
        DataError: There is no such runtime.
        ExportError: Its library is missing.
        CheckFailed: It does not load or run.
    """
    if runtime not in RUNTIMES:
        raise DataError(f"found runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")
    with scratch_folder() as folder:
        ran = RUNTIMES[runtime](bundle, folder).run(x)
    held: dict[str, Array] = {f"codes/{scale}": codes for scale, codes in ran.codes.items()}
    held |= {key: np.array(mark) for key, mark in _marks(bundle, x).items()}
    held |= {"output": ran.output, "hidden": np.array(sorted(ran.hidden), str)}
    text = io.BytesIO()
    np.savez_compressed(text, **held)  # type: ignore[arg-type]
    write_bytes(Path(path).absolute(), text.getvalue())


def _marks(bundle: Bundle, x: Array) -> dict[str, str]:
    """What tells that codes are of this bundle and of these inputs."""
    return {
        "bundle": bundle.manifest_sha256,
        "inputs": hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest(),
    }
