"""``statistics.safetensors`` of a bundle: what calibration saw of every layer's inputs.

A merge by regression, and rounding that compensates its own errors, read it; an engine does not.
The file is optional and lies outside the bundle's identity: a bundle without it is the same
bundle. ``NAME`` is a weight's tensor in the manifest, and for every layer the file holds

* ``NAME/moments``, float16 (groups, 2, features): the mean and what the factor leaves of the
  covariance's diagonal;
* ``NAME/factor``, int8 (groups, rank, features): eigenvectors times the roots of their
  eigenvalues, as codes of -127 to 127;
* ``NAME/scales``, float32 (groups, 2 + rank): what mean, diagonal and each row of the factor are
  multiplied by.

A code's error is 0.4% of its row's largest entry, and the diagonal takes up what it does to the
variances; at equal bytes the rank is twice that of float16. For every activation quantizer the file
holds ``NAME/histogram``, float16 counts over equal bins, the largest of them 1, and
``NAME/range``, float32: lowest value, highest value, largest count; ``NAME`` is its scale's tensor.

The same tensors are a file of their own for a float checkpoint: names are then the checkpoint's,
and the record lies in the file's metadata (:func:`read_statistics`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from pydantic import Field, ValidationError, model_validator

from ..errors import BundleError
from ..numerics.layer_statistics import InputStatistics
from ..typing import Array
from .atomic_files import sha256_bytes
from .records import MOST_ELEMENTS, FileRecord, Frozen, first_fault
from .safetensors_layout import read_header, read_metadata

__all__ = [
    "STATISTICS",
    "CheckpointStatistics",
    "Histogram",
    "LayerRecord",
    "Layout",
    "NormRecord",
    "Rank",
    "Statistics",
    "StatisticsFile",
    "StatisticsRecord",
    "file_bytes",
    "read_statistics",
]

STATISTICS = "statistics.safetensors"
_METADATA = "statistics"
# Of one tensor's entry in a header: name, dtype, shape and place.
_ENTRY = 120
_LARGEST_CODE = 127
# What is smaller everywhere is nothing: float32 holds few digits of it, or none.
_SMALLEST = 1e-30

Layout = Literal["conv", "linear", "matmul", "transposed"]
Count = Annotated[int, Field(ge=1)]
# Eigenvectors of a layer: so many at most, all, or as many as there is room for.
Rank = Annotated[int, Field(ge=0)] | Literal["auto", "full"]


class LayerRecord(Frozen):
    """One layer whose inputs were seen.

    ``weight`` and ``bias`` name tensors of the bundle; without a ``bias`` the layer has none, or
    what stands there is not its own (BatchNorm carried by the scales). ``layout`` says how the
    weight's axes are made of outputs and features: ``conv`` (outputs, inputs / groups, kernel...),
    ``linear`` (outputs, features), ``matmul`` (features, outputs), ``transposed``
    (features = inputs, outputs / groups, kernel...).
    """

    weight: str
    bias: str | None
    layout: Layout
    groups: Count
    features: Count
    rank: Annotated[int, Field(ge=0)]
    rows: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> LayerRecord:
        if self.rank > self.features or self.groups * self.features**2 > MOST_ELEMENTS:
            raise ValueError(f"found rank {self.rank} of {self.groups} x {self.features} features")
        return self

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape multiplies rows of these groups and features."""
        if self.layout == "conv":
            return (
                len(shape) > 2
                and math.prod(shape[1:]) == self.features
                and shape[0] % self.groups == 0
            )
        if self.layout == "transposed":
            return len(shape) > 2 and shape[0] == self.features * self.groups
        if len(shape) != 2 or self.groups != 1:
            return False
        return shape[1 if self.layout == "linear" else 0] == self.features


class NormRecord(Frozen):
    """The BatchNorm that alone reads a layer's output; its tensors' names.

    Without ``gamma`` it multiplies by 1, without ``beta`` it adds 0; ``raw_bias`` is the layer's
    own bias, in front of it.
    """

    gamma: str | None
    beta: str | None
    mean: str
    variance: str
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    raw_bias: str | None = None

    @property
    def tensors(self) -> set[str]:
        """The names that it holds."""
        names = (self.gamma, self.beta, self.mean, self.variance, self.raw_bias)
        return {name for name in names if name is not None}

    def renamed(self, names: Mapping[str, str]) -> NormRecord:
        """The same by other names."""
        given = self.model_dump(exclude={"eps"})
        new = {part: None if name is None else names[name] for part, name in given.items()}
        return self.model_copy(update=new)


class _Contents(Frozen):
    """Tensors of a file of statistics."""

    schema_version: Literal[1] = 1
    rank: Rank
    layers: tuple[LayerRecord, ...]
    histograms: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> _Contents:
        names = [layer.weight for layer in self.layers]
        if len({*names}) < len(names) or len({*self.histograms}) < len(self.histograms):
            raise ValueError("found a layer or a histogram twice")
        return self

    def layer(self, weight: str) -> LayerRecord | None:
        """The record of a weight; None where nothing was seen of its inputs."""
        return next((layer for layer in self.layers if layer.weight == weight), None)


class StatisticsRecord(_Contents):
    """What the manifest says of ``statistics.safetensors``."""

    file: FileRecord


class CheckpointStatistics(_Contents):
    """What a file of statistics of a float checkpoint says of itself.

    ``checkpoint_sha256`` is :func:`.checkpoints.checkpoint_sha256` of the checkpoint whose network
    was seen; names of weights and biases are that checkpoint's. ``norms`` holds the BatchNorm
    behind each weight that has one; earlier files do not say.
    """

    kind: Literal["hdrq-statistics"] = "hdrq-statistics"
    model: str
    checkpoint_sha256: str
    data_sha256: str
    norms: Mapping[str, NormRecord] = {}


@dataclass(frozen=True)
class Histogram:
    """Values of one activation, before it was quantized.

    Attributes:
        low, high: Edges of the first and the last of the equal bins.
        counts: (bins,) float32.
    """

    low: float
    high: float
    counts: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Statistics:
    """Statistics of a bundle in memory, by the names of its tensors.

    Attributes:
        rank: Rank that was asked for: a number, ``full``, or ``auto``.
        layouts: Bias, layout and so on of every layer; see :class:`LayerRecord`.
        layers: Statistics of the inputs of every layer in ``layouts``, by its weight.
        histograms: Values of every activation, by its scale.
        norms: The BatchNorm behind a weight; a bundle's graph says so itself.
    """

    rank: Rank
    layouts: Mapping[str, tuple[str | None, Layout]]
    layers: Mapping[str, InputStatistics]
    histograms: Mapping[str, Histogram]
    norms: Mapping[str, NormRecord] = field(default_factory=dict)

    def serialize(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """The bytes of ``statistics.safetensors``."""
        tensors: dict[str, Array] = {}
        for name, statistics in self.layers.items():
            parts = _stored(statistics)
            tensors |= {f"{name}/{part}": value for part, value in parts.items()}
        for name, histogram in self.histograms.items():
            largest = max(float(histogram.counts.max(initial=0)), 1.0)
            span = (histogram.low, histogram.high, largest)
            tensors[f"{name}/histogram"] = (histogram.counts / largest).astype(np.float16)
            tensors[f"{name}/range"] = np.array(span, np.float32)
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        return safetensors.numpy.save(contiguous, dict(metadata) if metadata else None)

    def record(self, data: bytes) -> StatisticsRecord:
        """The entry of the manifest; ``data`` is what :meth:`serialize` gave."""
        return StatisticsRecord(
            rank=self.rank,
            layers=self._layer_records(),
            histograms=tuple(self.histograms),
            file=FileRecord(bytes=len(data), sha256=sha256_bytes(data)),
        )

    def serialize_for_checkpoint(
        self, model: str, checkpoint_sha256: str, data_sha256: str
    ) -> bytes:
        """The bytes of a file of its own, which :func:`read_statistics` reads.

        Args:
            model: Name of the model, as for a calibration.
            checkpoint_sha256: Hash of the checkpoint (:func:`.checkpoints.checkpoint_sha256`).
            data_sha256: Hash of the images.
        """
        record = CheckpointStatistics(
            rank=self.rank,
            layers=self._layer_records(),
            histograms=tuple(self.histograms),
            model=model,
            checkpoint_sha256=checkpoint_sha256,
            data_sha256=data_sha256,
            norms=self.norms,
        )
        return self.serialize({_METADATA: record.model_dump_json()})

    def _layer_records(self) -> tuple[LayerRecord, ...]:
        return tuple(
            LayerRecord(
                weight=name,
                bias=self.layouts[name][0],
                layout=self.layouts[name][1],
                groups=statistics.groups,
                features=statistics.features,
                rank=statistics.rank,
                rows=statistics.rows,
            )
            for name, statistics in self.layers.items()
        )


class StatisticsFile:
    """``statistics.safetensors``, read layer by layer.

    Raises:
        BundleError: The file cannot be read, or holds other tensors than the record says.
    """

    def __init__(self, path: Path, record: StatisticsRecord | CheckpointStatistics) -> None:
        self.path, self.record = path, record
        bundled = isinstance(record, StatisticsRecord)
        self._remedy = (
            "run hdrq strip, or calibrate again" if bundled else "run hdrq statistics again"
        )
        self._layers = {layer.weight: layer for layer in record.layers}
        needed = _needed(record.layers, record.histograms)
        spans = read_header(path)
        given = {name: (span.dtype, span.shape) for name, span in spans.items()}
        for name in [*needed, *given]:
            wanted, has = needed.get(name), given.get(name)
            fits = has is not None and wanted is not None and has[0] == wanted[0]
            if not fits or (wanted and wanted[1] and has and has[1] != wanted[1]):
                raise BundleError(
                    f"{path}: found {name} as {has}, the record says {wanted}; {self._remedy}"
                )

    @property
    def weights(self) -> tuple[str, ...]:
        """Weights of the layers that were seen."""
        return tuple(self._layers)

    def layer(self, weight: str) -> InputStatistics:
        """Statistics of the inputs of one layer.

        Raises:
            BundleError: The file cannot be read, or holds values that are not finite.
        """
        names = (f"{weight}/{part}" for part in ("moments", "factor", "scales"))
        moments, codes, scales = self._read(*names)
        with np.errstate(over="ignore"):
            mean, diagonal = (moments * scales[:, :2, None]).swapaxes(0, 1)
            factor = codes * scales[:, 2:, None]
        if not all(np.isfinite(values).all() for values in (mean, diagonal, factor)):
            raise BundleError(f"{self.path}: found {weight} beyond float32; {self._remedy}")
        rows = self._layers[weight].rows
        return InputStatistics(rows, mean, np.maximum(diagonal, 0), factor)

    def histogram(self, scale: str) -> Histogram:
        """Values of one activation, by the name of its scale.

        Raises:
            BundleError: The file cannot be read, or holds values that are not finite.
        """
        counts, span = self._read(f"{scale}/histogram", f"{scale}/range")
        low, high, largest = (float(value) for value in span)
        if counts.ndim != 1 or not len(counts) or counts.min() < 0 or largest < 0 or low >= high:
            raise BundleError(
                f"{self.path}: found {scale}/histogram of shape {counts.shape} from {low:g} to "
                f"{high:g}, or counts below 0; {self._remedy}"
            )
        return Histogram(low, high, counts.astype(np.float32) * np.float32(largest))

    def _read(self, *names: str) -> list[Array]:
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                arrays = [file.get_tensor(name) for name in names]
        except (OSError, safetensors.SafetensorError) as error:
            raise BundleError(f"{self.path}: cannot be read ({error}); {self._remedy}") from error
        for name, array in zip(names, arrays, strict=True):
            if not np.isfinite(array).all():
                raise BundleError(f"{self.path}: found NaN or infinity in {name}; {self._remedy}")
        return arrays


def file_bytes(layers: Mapping[str, tuple[int, int, int]], histograms: int, bins: int) -> int:
    """About the bytes of a file of statistics, its header included.

    Args:
        layers: (groups, features, rank) of every layer.
        histograms: Their number.
        bins: Of every histogram.
    """
    sizes = [
        3 * _ENTRY + groups * (4 * features + rank * features + 4 * (2 + rank))
        for groups, features, rank in layers.values()
    ]
    return sum(sizes) + histograms * (2 * _ENTRY + 2 * bins + 12)


def _stored(statistics: InputStatistics) -> dict[str, Array]:
    """A layer's tensors by the last part of their names."""
    factor = statistics.factor.astype(np.float64)
    steps = np.abs(factor).max(2, initial=0.0) / _LARGEST_CODE
    divisors = np.where(steps > _SMALLEST, steps, 1.0)
    codes = np.round(factor / divisors[:, :, None])
    scales = divisors.astype(np.float32)
    # Variances stay what they are, whatever rounding does to the factor.
    variances = statistics.diagonal + (factor**2).sum(1)
    rest = np.maximum(variances - ((codes * scales[:, :, None]) ** 2).sum(1), 0.0)
    moments = np.stack([statistics.mean, rest], 1)
    largest = np.abs(moments).max(2)
    largest = np.where(largest > _SMALLEST, largest, 1.0).astype(np.float32)
    return {
        "moments": (moments / largest[:, :, None]).astype(np.float16),
        "factor": codes.astype(np.int8),
        "scales": np.concatenate([largest, scales], 1),
    }


def read_statistics(path: Path) -> StatisticsFile:
    """Open the statistics of a float checkpoint, as ``hdrq statistics`` writes them.

    The record of the file is a :class:`CheckpointStatistics`; whether it belongs to a checkpoint,
    its ``checkpoint_sha256`` says.

    Raises:
        BundleError: No such file, no statistics of a checkpoint, or other tensors than its record
            says.
    """
    read_header(path)
    try:
        record = CheckpointStatistics.model_validate_json(read_metadata(path).get(_METADATA, ""))
    except ValidationError as error:
        field, how = first_fault(error, "its metadata")
        raise BundleError(
            f"{path}: found no statistics of a checkpoint ({field}: {how}); "
            "needed a file as hdrq statistics writes it"
        ) from error
    return StatisticsFile(path, record)


def _needed(
    layers: Sequence[LayerRecord], histograms: Sequence[str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor; an empty shape is any."""
    needed: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in layers:
        groups, rank, features = layer.groups, layer.rank, layer.features
        needed[f"{layer.weight}/moments"] = ("F16", (groups, 2, features))
        needed[f"{layer.weight}/factor"] = ("I8", (groups, rank, features))
        needed[f"{layer.weight}/scales"] = ("F32", (groups, 2 + rank))
    for name in histograms:
        needed[f"{name}/histogram"] = ("F16", ())
        needed[f"{name}/range"] = ("F32", (3,))
    return needed
