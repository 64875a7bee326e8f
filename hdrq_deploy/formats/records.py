"""What the manifests of bundles and engine folders share: names of files, and records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "GRAPH",
    "LARGEST_SIDE",
    "MANIFEST",
    "MOST_ELEMENTS",
    "SCHEMA",
    "FileRecord",
    "Files",
    "Frozen",
    "Preprocessing",
    "Scheme",
    "Share",
    "Tolerances",
    "first_fault",
]

MANIFEST, GRAPH = "manifest.json", "model.onnx"
SCHEMA: Literal[1] = 1

# A larger field is no mistake but an attack: sides of an input, elements of a tensor.
LARGEST_SIDE, MOST_ELEMENTS = 1 << 15, 1 << 40


Share = Annotated[float, Field(ge=0)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]


class Frozen(BaseModel):
    """A record that is never changed and has no other fields than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def first_fault(error: ValidationError, whole: str = "the whole file") -> tuple[str, str]:
    """Where a record does not fit, and how, in words; ``whole`` names all of it."""
    first = error.errors()[0]
    return ".".join(str(part) for part in first["loc"]) or whole, first["msg"].lower()


class FileRecord(Frozen):
    """Size and hash of one file of the bundle."""

    bytes: int
    sha256: str


def _in_folder(name: str) -> str:
    if not name or name.startswith(".") or set(name) & set("/\\\0") or len(name) > 255:
        raise ValueError("a file's name without folders is needed")
    return name


Files = dict[Annotated[str, AfterValidator(_in_folder)], FileRecord]


class Scheme(Frozen):
    """What two bundles must share to be merged, beside the graph."""

    grid: str | None
    wbits: int | None
    abits: int | None
    per_channel: bool
    fold: str


class Preprocessing(Frozen):
    """From an image file to the network's input: resize, scale to [0, 1], (x - mean) / std.

    With ``resize`` an image is brought to that (height, width), the input cut out of its middle.
    """

    height: Side
    width: Side
    channels: Side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    colour: Literal["RGB", "L"] = "RGB"
    layout: Literal["NCHW"] = "NCHW"
    resize: tuple[Side, Side] | None = None

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ValueError(
                f"found mean {self.mean[:4]} and std {self.std[:4]} for {self.channels} channels"
            )
        return self


class Tolerances(Frozen):
    """How far stages may be apart before a check fails.

    Attributes:
        decision_flips: Share of the decisions that may differ (0 to 1), over 100 images or more.
        output_rms: RMS of the outputs' difference over RMS of the outputs. More than 0.05
            counts only where ``measured`` says how it was found.
        spread: What flipping one in a hundred codes of the first quantizer did to the output,
            in the same measure, where it was calibrated; None where that was not measured.
        measured: How ``output_rms`` was found, where a kernel cannot do better.
    """

    decision_flips: float = 0.02
    output_rms: float = 0.05
    spread: float | None = None
    measured: str = ""
