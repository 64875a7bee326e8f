"""What a calibration is asked for, checked when it is made; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..calibration_data.readers import ImageSet, Wanted
from ..errors import SpecError
from ..formats.atomic_files import check_name
from ..numerics.spec import GRIDS, check_bits, check_seed
from .methods import FOLDS, METHODS, Options

__all__ = [
    "BLOCKS",
    "PLACEMENTS",
    "CalibrationRequest",
    "Quantization",
    "Source",
    "check_statistics",
]

# Where quantizers go (:mod:`.placement`), and what is learned together (:mod:`.blocks`). The
# first is the default.
PLACEMENTS = ("engine", "paper")
BLOCKS = ("live", "unit")
_STATISTICS = ("auto", "full", "off")
# Learners that round to nearest; the others choose between two neighbouring integers.
_OF_FLOATS = ("none", "latent")


def check_statistics(rank: int | str) -> None:
    """Raise where a rank of statistics is no number >= 1, nor auto, full or off.

    Raises:
        SpecError: As said.
    """
    if isinstance(rank, bool) or not (rank in _STATISTICS if isinstance(rank, str) else rank >= 1):
        raise SpecError(
            f"found statistics={rank!r}; needed a rank of 1 or more, or one of "
            f"{', '.join(_STATISTICS)}"
        )


@dataclass(frozen=True)
class Quantization:
    """Codes of weights and activations.

    Attributes:
        wbits: Bits of the weights, 2 to 8; the first and the last layers keep 8.
        abits: Bits of the activations that heavy layers read, 2 to 8.
        per_channel: One weight scale per output channel instead of one per tensor.
        grid: ``int8`` or ``paper`` (see ``spec.activation_range``), or ``e4m3`` (FP8).
        scales_carry_batch_norm: BatchNorm is folded into the weight scales, one per channel,
            instead of into the weights, so that a merge averages it separately.

    Raises:
        SpecError: A value is out of range.
    """

    wbits: int = 8
    abits: int = 8
    per_channel: bool = False
    grid: str = "int8"
    scales_carry_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise SpecError(f"found grid {self.grid!r}; choose one of {', '.join(GRIDS)}")
        check_bits(self.wbits, "wbits")
        check_bits(self.abits, "abits")
        if self.grid == "e4m3" and (self.wbits, self.abits) != (8, 8):
            raise SpecError(
                f"found wbits={self.wbits}, abits={self.abits} on the grid e4m3; FP8 has 8 bits: "
                "choose 8 of both, or the grid int8"
            )
        if self.scales_carry_batch_norm and not self.per_channel:
            raise SpecError(
                "found one weight scale per tensor; scales that carry BatchNorm need one per "
                "channel"
            )

    @classmethod
    def of(cls, wbits: int, abits: int, per_channel: bool, grid: str, fold: str) -> Quantization:
        """The codes that options and manifests name; ``fold`` ``steps`` implies per channel.

        Raises:
            SpecError: A value is out of range.
        """
        if fold not in FOLDS:
            raise SpecError(f"found fold {fold!r}; choose one of {', '.join(FOLDS)}")
        carried = fold == "steps"
        return cls(wbits, abits, per_channel or carried, grid, carried)


# Images of one domain: a folder, an .npz, or images already read.
Source = str | Path | ImageSet


@dataclass(frozen=True)
class CalibrationRequest:
    """One calibration; the attributes are the arguments of :func:`.pipeline.calibrate`.

    Raises:
        SpecError: A value is out of range, the distance term has no source checkpoint, or there
            are not as many ``data`` as domains.
    """

    model: str
    data: Source | Sequence[Source]
    domain: str | Sequence[str]
    output: str | os.PathLike[str]
    weights: str | Path | None = None
    base: str | Path | None = None
    method: str = "hdrq"
    wbits: int = 8
    abits: int = 8
    per_channel: bool = False
    grid: str = "int8"
    fold: str = "weights"
    options: Options | None = None
    images: int | None = 1024
    wanted: Wanted | None = None
    skip_corrupt: bool = False
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    cache_gb: float = 1.0
    placement: str = "engine"
    blocks: str = "live"
    statistics: int | Literal["auto", "full", "off"] = "auto"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)
        for domain in self.domains:
            check_name(domain, "domain")
        if len(self.sources) != len(self.domains) or not self.domains:
            raise SpecError(
                f"found {len(self.sources)} in `data` for {len(self.domains)} in `domain`; give "
                "the images of every domain"
            )
        if len(set(self.domains)) < len(self.domains):
            raise SpecError(f"found a name twice in `domain`: {', '.join(self.domains)}")
        check_seed(self.seed)
        Options.of(self.method)
        _ = self.quantization
        if self.grid == "e4m3" and self.learning.learner not in _OF_FLOATS and self.quantizes:
            able = [
                n for n, m in METHODS.items() if m.options.learner in _OF_FLOATS and m.quantizes
            ]
            raise SpecError(
                f"found learner={self.learning.learner} on the grid e4m3; FP8 numbers are rounded "
                f"to nearest: choose a method of {', '.join(able)}, or the grid int8"
            )
        for name, allowed in (("placement", PLACEMENTS), ("blocks", BLOCKS)):
            if getattr(self, name) not in allowed:
                raise SpecError(
                    f"found {name} {getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
        if self.learning.distance > 0 and self.base is None:
            raise SpecError(
                "found no source checkpoint; the distance term keeps the weights close to those "
                "that all domains started from: give `base`, or set `distance` to 0"
            )

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; the bundle is for all of them."""
        return (self.domain,) if isinstance(self.domain, str) else tuple(self.domain)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Images of every domain."""
        one = isinstance(self.data, (str, Path, ImageSet))
        return (self.data,) if one else tuple(self.data)  # type: ignore[arg-type, return-value]

    @property
    def learning(self) -> Options:
        """How to learn; by default as ``method`` does."""
        return self.options or Options.of(self.method)

    @property
    def learns(self) -> bool:
        """Whether weights are learned in iterations, and images needed for a batch."""
        return self.learning.iterates

    @property
    def quantizes(self) -> bool:
        """Whether weights and activations become codes."""
        return METHODS[self.method].quantizes

    @property
    def keeps_batch_norm(self) -> bool:
        """Whether BatchNorm stays a node of its own: only ``float`` does not fold it."""
        method = METHODS[self.method]
        return not (method.quantizes or method.folds)

    @property
    def quantization(self) -> Quantization:
        """The codes of weights and activations."""
        return Quantization.of(self.wbits, self.abits, self.per_channel, self.grid, self.fold)

    @property
    def inputs(self) -> list[str | Path | None]:
        """Files and folders that are read, which the output must not replace."""
        paths = [source for source in self.sources if not isinstance(source, ImageSet)]
        return [*paths, self.weights, self.base]
