"""``manifest.json`` of a bundle: how the bundle was made and what its tensors are."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ..errors import BundleError, HdrqError
from ..numerics import e4m3
from ..numerics.spec import QuantSpec
from .records import (
    MOST_ELEMENTS,
    SCHEMA,
    Files,
    Frozen,
    Preprocessing,
    Scheme,
    Share,
    Tolerances,
    first_fault,
)
from .statistics import StatisticsRecord

__all__ = [
    "CODED",
    "Activation",
    "FoldRecord",
    "Layer",
    "Manifest",
    "ParentRecord",
    "Tensor",
    "weight_name",
]

# What is asked of a layer all of whose operands are codes.
CODED = ("int8", "fp8")
Role = Literal[
    "codes", "scale", "activation_scale", "float", "bn_mean", "bn_var", "constant", "raw_scale"
]


class Tensor(Frozen):
    """One tensor of ``weights.safetensors``.

    ``shape`` is that of the codes; 4-bit codes are stored packed, as uint8 of half the
    length, and E4M3 numbers as uint8, for not every reader of safetensors knows them. ``scale``
    names the tensor with the scales of these codes.
    """

    role: Role
    dtype: str
    shape: tuple[int, ...]
    bits: int | None = None
    lo: int | None = None
    hi: int | None = None
    axis: int | None = None
    scale: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Tensor:
        if any(side < 0 for side in self.shape) or math.prod(self.shape) > MOST_ELEMENTS:
            raise ValueError(f"found a tensor of shape {self.shape}")
        if self.axis is not None and not 0 <= self.axis < len(self.shape):
            raise ValueError(f"found axis {self.axis} of a tensor of shape {self.shape}")
        if self.role == "codes":
            self._check_codes()
        return self

    def _check_codes(self) -> None:
        if self.bits is None or self.lo is None or self.hi is None or self.scale is None:
            raise ValueError("found codes without bits, lo, hi or scale")
        try:
            spec = self.spec
        except HdrqError as error:
            raise ValueError(str(error)) from error
        limits = {"int8": (-128, 127), "int4": (-8, 7), e4m3.NAME: (-e4m3.LARGEST, e4m3.LARGEST)}
        least, most = limits.get(self.dtype, (0, 0))
        fits = least <= spec.lo and spec.hi <= most and spec.floating == (self.dtype == e4m3.NAME)
        if not fits:
            raise ValueError(f"found codes {spec.lo} to {spec.hi} in {self.dtype}")

    @property
    def spec(self) -> QuantSpec:
        """The codes' width, range and axis (role ``codes`` only)."""
        assert self.bits is not None and self.lo is not None and self.hi is not None
        return QuantSpec(self.bits, self.lo, self.hi, self.axis)

    @property
    def packed(self) -> bool:
        """Two codes share a byte."""
        return self.dtype == "int4"


def weight_name(codes: str) -> str:
    """The weight whose codes a tensor holds, by its name in the model.

    >>> weight_name("conv1.weight_codes"), weight_name("conv1.weight_codes_2")
    ('conv1.weight', 'conv1.weight')
    """
    return re.sub(r"_codes(_\d+)?$", "", codes)


class FoldRecord(Frozen):
    """A BatchNorm carried by the scales of one weight (``hdrq_deploy.numerics.batchnorm_fold``).

    All fields but ``eps`` name tensors. ``scale`` and ``bias`` are what the graph reads; they
    follow from the others, which a merge averages.
    """

    scale: str
    bias: str
    raw_scale: str
    gamma: str
    beta: str
    mean: str
    variance: str
    eps: Share
    raw_bias: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Tensors that the graph does not read."""
        names = (self.raw_scale, self.gamma, self.beta, self.mean, self.variance, self.raw_bias)
        return tuple(name for name in names if name is not None)


class Activation(Frozen):
    """One quantized activation: where it is, its codes, the tensor with its scale."""

    scale: str
    module: str
    bits: int
    lo: int
    hi: int


class Layer(Frozen):
    """One convolution, linear or matrix product and what was asked of it.

    ``node`` is its ONNX node; ``requested`` is ``int8`` when all its operands are codes, ``fp8``
    when these are numbers of E4M3, ``int4`` when only its weight is (an export may choose that),
    else ``float32`` with the ``reason``.
    """

    node: str
    op: str
    module: str
    weight: str | None
    weight_bits: int | None
    activation_bits: tuple[int, ...]
    requested: Literal["int8", "fp8", "int4", "float32"]
    reason: str = ""


class ParentRecord(Frozen):
    """A bundle that was merged into this one."""

    manifest_sha256: str
    domains: dict[str, float]
    weight: float


class Manifest(Frozen):
    """Everything a bundle says of itself. The JSON schema is ``Manifest.model_json_schema()``."""

    schema_version: Literal[1] = SCHEMA
    kind: Literal["hdrq-bundle"] = "hdrq-bundle"
    model: str
    method: str
    domains: Annotated[dict[str, Share], Field(min_length=1)]
    scheme: Scheme
    layers: tuple[Layer, ...]
    activations: tuple[Activation, ...]
    tensors: dict[str, Tensor]
    folds: dict[str, FoldRecord] = Field(default_factory=dict)
    source_sha256: str
    adapted_sha256: dict[str, str]
    data_sha256: dict[str, str]
    options: dict[str, Any]
    seed: int
    input_shape: tuple[Annotated[int, Field(ge=1)], ...]
    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None
    metrics: dict[str, Any] = Field(default_factory=dict)
    tolerances: Tolerances = Tolerances()
    parents: tuple[ParentRecord, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    files: Files = Field(default_factory=dict)
    # Outside the bundle's identity: see ``identity``.
    statistics: StatisticsRecord | None = None

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if math.prod(self.input_shape) > MOST_ELEMENTS:
            raise ValueError(f"found inputs of shape {self.input_shape}")
        for name, entry in self.tensors.items():
            if entry.role == "codes":
                self._check_scale(name, entry)
        for name, fold in self.folds.items():
            self._check_fold(name, fold)
        for activation in self.activations:
            self._need(activation.scale, (), f"the scale of {activation.module}")
        for layer in self.layers:
            if layer.weight is not None:
                self._need(layer.weight, None, f"the weight of {layer.module}")
        if self.statistics is not None:
            self._check_statistics(self.statistics)
        return self

    def _check_statistics(self, statistics: StatisticsRecord) -> None:
        for layer in statistics.layers:
            weight = self._need(layer.weight, None, "statistics")
            if not layer.fits(weight.shape):
                raise ValueError(
                    f"found statistics of {layer.groups} x {layer.features} features for "
                    f"{layer.weight} of shape {weight.shape}"
                )
            if layer.bias is not None:
                self._need(layer.bias, None, f"the bias of {layer.weight}")
        for name in statistics.histograms:
            self._need(name, (), "a histogram")

    def _need(self, name: str, shape: tuple[int, ...] | None, what: str) -> Tensor:
        entry = self.tensors.get(name)
        if entry is None or (shape is not None and entry.shape != shape):
            state = "no tensor" if entry is None else f"a tensor of shape {entry.shape}"
            raise ValueError(f"found {state} {name!r} for {what}")
        return entry

    def _check_scale(self, name: str, entry: Tensor) -> None:
        shape = () if entry.axis is None else (entry.shape[entry.axis],)
        self._need(str(entry.scale), shape, f"the scales of {name}")

    def _check_fold(self, name: str, fold: FoldRecord) -> None:
        codes = self._need(name, None, "a fold")
        count = 1 if codes.axis is None else codes.shape[codes.axis]
        for part in (fold.scale, fold.bias, *fold.sources):
            entry = self._need(part, None, f"the fold of {name}")
            if math.prod(entry.shape) != count or entry.dtype != "float32":
                raise ValueError(f"found {part} of shape {entry.shape} for the fold of {name}")

    @property
    def graph_tensors(self) -> set[str]:
        """Tensors that the graph reads; the others are there for a merge."""
        return set(self.tensors) - {name for fold in self.folds.values() for name in fold.sources}

    def to_json(self) -> bytes:
        """The text of ``manifest.json``."""
        return self.identity() if self.statistics is None else self._text(set())

    def identity(self) -> bytes:
        """The text without the statistics: bundles of equal text are the same bundle."""
        return self._text({"statistics"})

    def _text(self, left_out: set[str]) -> bytes:
        return (self.model_dump_json(indent=1, exclude=left_out) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, origin: str) -> Manifest:
        """Read a manifest; ``origin`` names it in errors.

        Raises:
            BundleError: Not JSON, another schema version, or a field that does not fit.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            field, how = first_fault(error)
            raise BundleError(
                f"{origin}: found a manifest that does not fit schema {SCHEMA} at {field} "
                f"({how}); make the bundle again with this version"
            ) from error
