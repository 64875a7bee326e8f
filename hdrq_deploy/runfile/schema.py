"""What a run file may say. Its JSON schema is published as ``hdrq.schema.json`` beside this file.

Types are checked here; that paths exist and names fit each other is checked in :mod:`.loading`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
)

from ..calibration.methods import METHODS
from ..calibration.recipe import Recipe
from ..checks.fastest_engine import AUTO
from ..errors import HdrqError
from ..experiments.grid import parse_bits
from ..exporters import ENGINES
from ..formats.atomic_files import check_name
from ..merging import ACTIVATION_SCALES, CRITERIA, ROUNDINGS
from ..merging import METHODS as MERGE_METHODS

__all__ = [
    "CHOSEN_WEIGHTS",
    "SCHEMA_FILE",
    "Adapt",
    "Bench",
    "Domain",
    "Merge",
    "Preprocess",
    "RunFile",
    "named_engines",
    "schema",
]

SCHEMA_FILE = "hdrq.schema.json"
# Words for merge weights that are no numbers.
CHOSEN_WEIGHTS = ("auto", "statistics")
# Keys of a recipe that a run file says in another place.
_ELSEWHERE = {"method", "wbits", "abits", "seed"}


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """A check that a word is one of these; the message names the nearest one."""
    known = list(names)

    def check(word: str) -> str:
        if word in known:
            return word
        near = difflib.get_close_matches(word, known, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"found {word!r}; {meant}choose one of {', '.join(known)}")

    return check


def _bits(word: str) -> str:
    try:
        ((wbits, abits),) = parse_bits([word])
    except HdrqError as error:
        raise ValueError(str(error)) from error
    return f"w{wbits}a{abits}"


def _name(word: str) -> str:
    try:
        return check_name(word, "the name")
    except HdrqError as error:
        raise ValueError(str(error)) from error


def _listed(value: Any) -> Any:
    """One word stands for a list of it."""
    return [value] if isinstance(value, str) else value


def _weights(value: Any) -> Any:
    numbers = list(value.values()) if isinstance(value, Mapping) else value
    plain = isinstance(numbers, list) and all(
        isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers
    )
    if value is None or value in CHOSEN_WEIGHTS or plain:
        return value
    raise ValueError(
        f"found {value!r}; needed {' or '.join(CHOSEN_WEIGHTS)}, a list of numbers, or a number "
        "per domain"
    )


def _engine(value: Any) -> str | dict[str, list[str]]:
    """The name of an engine, or the bundles that it is for by its name."""
    check = one_of((*ENGINES, AUTO))
    if isinstance(value, str):
        return check(value)
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, bundles),) = value.items()
        return {check(str(name)): _listed_names(bundles)}
    raise ValueError(f"found {value!r}; needed the name of an engine, or NAME: [bundle, ...]")


def _listed_names(value: Any) -> list[str]:
    names = _listed(value)
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return names
    raise ValueError(f"found {value!r}; needed names of bundles, such as hdrq-w4a8-merged")


def _verify(value: Any) -> bool | list[str]:
    return value if isinstance(value, bool) else _listed_names(value)


def _singles(value: Any) -> Any:
    if isinstance(value, bool) or value == "float":
        return value
    raise ValueError(f"found {value!r}; needed true, false or float")


def _rank(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return one_of(("auto", "full", "off"))(value) if isinstance(value, str) else value


def _pair(value: Any) -> Any:
    """One number stands for height and width."""
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


def _switch(value: Any) -> Any:
    """``true`` stands for a section with its defaults, ``false`` for none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def _enum(names: Iterable[str], many: bool = False) -> WithJsonSchema:
    one: dict[str, Any] = {"type": "string", "enum": list(names)}
    return WithJsonSchema(_or_list(one) if many else one)


class _OrSwitch:
    """In the JSON schema, ``true`` and ``false`` are allowed beside a section."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "boolean"}, handler(core)]}


def _or_list(one: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


_BITS = {"type": "string", "pattern": "^[wW][2-8][aA][2-8]$"}
_NUMBERS = {"type": "number", "minimum": 0}
Names = Annotated[
    list[str],
    BeforeValidator(_listed),
    Field(min_length=1),
    WithJsonSchema(_or_list({"type": "string"})),
]
# Methods of models that stay float.
_REAL = tuple(name for name, row in METHODS.items() if not row.quantizes)
Methods = Annotated[
    list[Annotated[str, AfterValidator(one_of(METHODS))]],
    BeforeValidator(_listed),
    Field(min_length=1),
    _enum(METHODS, many=True),
]
Bits = Annotated[
    list[Annotated[str, AfterValidator(_bits)]],
    BeforeValidator(_listed),
    Field(min_length=1),
    WithJsonSchema(_or_list(_BITS)),
]
_ENGINE = {
    "anyOf": [
        {"type": "string", "enum": [*ENGINES, AUTO]},
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "properties": {name: _or_list({"type": "string"}) for name in (*ENGINES, AUTO)},
            "additionalProperties": False,
        },
    ]
}
Engines = Annotated[
    list[Annotated[Any, AfterValidator(_engine)]],
    BeforeValidator(_listed),
    Field(min_length=1),
    WithJsonSchema(_or_list(_ENGINE)),
]
Sides = Annotated[
    Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)],
    BeforeValidator(_pair),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 1},
                    "minItems": 2,
                    "maxItems": 2,
                },
            ]
        }
    ),
]
Count = Annotated[int, Field(ge=1)]
Weights = Annotated[
    Any,
    AfterValidator(_weights),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(CHOSEN_WEIGHTS)},
                {"type": "array", "items": _NUMBERS},
                {"type": "object", "additionalProperties": _NUMBERS},
            ]
        }
    ),
]
Name = Annotated[str, AfterValidator(_name)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Adapt(_Section):
    """How a source model learns a domain from unlabelled images (as hdrq adapt)."""

    images: Count | None = Field(default=None, description="largest number of images (all)")
    epochs: Count = Field(default=15, description="passes over the images")
    batch: Count = Field(default=64, description="images per step (all, where they are fewer)")
    lr: float = Field(default=1e-2, description="learning rate of SGD")
    pseudo: float = Field(default=0.3, description="weight of SHOT's pseudo-labels")
    flip: bool = Field(default=True, description="mirror half of the images")
    pull: float = Field(
        default=0.0, description="weight of the distance to the source weights (L2-SP)"
    )


class Domain(_Section):
    """Where the checkpoint and the images of a domain are."""

    checkpoint: str | None = Field(
        default=None, description="adapted checkpoint (.safetensors, .pt)"
    )
    adapt: Annotated[Adapt | None, BeforeValidator(_switch), _OrSwitch()] = Field(
        default=None,
        description="make the checkpoint from the source and unlabelled images; true: as default",
    )
    calibration: str = Field(description="calibration images: folder or .npz; labels unused")
    unlabelled: str | None = Field(
        default=None, description="images for adapt (the calibration images)"
    )
    test: str | None = Field(
        default=None, description="labelled images that accuracy is measured on"
    )


class Preprocess(_Section):
    """How images become inputs; a timm model brings its own."""

    size: Sides | None = Field(default=None, description="height and width of the input")
    resize: Sides | None = Field(default=None, description="resize to this before cropping to size")
    mean: list[float] | None = Field(default=None, description="per channel, of pixels in [0, 1]")
    std: list[float] | None = Field(default=None, description="per channel, of pixels in [0, 1]")
    skip_corrupt: bool = Field(default=False, description="leave out images that cannot be decoded")


class Merge(_Section):
    """One merge; it is made of the bundles of every method and bit-width."""

    domains: Names | None = Field(default=None, description="domains that are merged (all)")
    method: Annotated[str, AfterValidator(one_of(MERGE_METHODS)), _enum(MERGE_METHODS)] | None = (
        Field(
            default=None, description="how parameters are merged (the best that the bundles allow)"
        )
    )
    rounding: Annotated[str, AfterValidator(one_of(ROUNDINGS)), _enum(ROUNDINGS)] | None = Field(
        default=None, description="how merged codes are rounded (the best that the bundles allow)"
    )
    weights: Weights | None = Field(
        default=None,
        description="merge weights (equal); auto: by images; statistics: by those in the bundles",
    )
    criterion: Annotated[str, AfterValidator(one_of(CRITERIA)), _enum(CRITERIA)] | None = Field(
        default=None, description="what weights: auto looks for"
    )
    images: Annotated[int, Field(ge=2)] = Field(default=256, description="images a domain for auto")
    re_estimate: bool = Field(
        default=False,
        description="measure BatchNorm and activation scales again on unlabelled images",
    )
    re_estimate_images: Annotated[int, Field(ge=2)] = Field(
        default=64, description="images a domain for re_estimate"
    )
    fit: bool = Field(
        default=False,
        description="fit every layer to what the parents, or those of fit_to, put out on "
        "unlabelled images",
    )
    fit_images: Annotated[int, Field(ge=2)] = Field(
        default=256, description="images a domain for fit"
    )
    fit_to: Annotated[str, AfterValidator(one_of(_REAL)), _enum(_REAL)] | None = Field(
        default=None,
        description="method of this file whose models a merge is fitted to instead of its parents",
    )
    fit_sweeps: Count = Field(default=1, description="how often a fit goes over all layers")
    candidates: Count | None = Field(default=None, description="draws of advanced rounding (100)")
    wbits: Annotated[int, Field(ge=2, le=8)] | None = Field(
        default=None, description="weight bits of the merge, 2 to 8"
    )
    activation_scales: Annotated[
        str, AfterValidator(one_of(ACTIVATION_SCALES)), _enum(ACTIVATION_SCALES)
    ] = Field(default="mean", description="scales of merged activations")


class Bench(_Section):
    """How engines are measured."""

    threads: Count = Field(default=1, description="threads of an engine on the CPU")
    warmup: Annotated[int, Field(ge=0)] = Field(
        default=10, description="calls before the clock counts"
    )
    iterations: Count = Field(default=100, description="timed calls")
    batch: Count | None = Field(default=None, description="images per call (1)")
    split: str = Field(default="val", description="split of street scenes that is measured")
    image_size: Sides | None = Field(default=None, description="street scenes are brought to this")
    singles: Annotated[
        Any, AfterValidator(_singles), WithJsonSchema({"enum": [True, False, "float"]})
    ] = Field(
        default=True,
        description="measure the model of each domain too; float: those that stay float only",
    )


def _calibrate_section() -> type[BaseModel]:
    """The keys of a recipe but for those that the run file has in other places."""
    fields: dict[str, Any] = {
        name: (field.annotation, field.default)
        for name, field in Recipe.model_fields.items()
        if name not in _ELSEWHERE
    }
    fields["settings"] = (fields["settings"][0], "ours")
    # A union of types would put their names into the path of an error.
    rank = {"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["auto", "full", "off"]}]}
    fields["statistics"] = (Annotated[Any, AfterValidator(_rank), WithJsonSchema(rank)], None)
    section: type[BaseModel] = create_model(
        "Calibrate",
        __base__=_Section,
        __doc__="Settings of the calibration, as in a recipe of hdrq-calibrate.",
        **fields,
    )
    return section


Calibrate = _calibrate_section()


class RunFile(_Section):
    """A run of hdrq-deploy: from checkpoints to measured engines."""

    model: str = Field(description="PKG.MOD:FACTORY, or timm:, torchvision:, transformers:NAME")
    source: str = Field(description="checkpoint that all domains started from")
    domains: dict[Name, Domain] = Field(min_length=1, description="by name")
    preprocess: Preprocess = Preprocess()
    methods: Methods = Field(default=["hdrq"], description="calibration methods")
    bits: Bits = Field(default=["w8a8"], description="bits of weights and activations")
    calibrate: Calibrate = Calibrate()  # type: ignore[valid-type]
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        default=0, description="of all random numbers"
    )
    merges: dict[Name, Merge] | None = Field(
        default=None, description="by name (one, of all domains)"
    )
    engines: Engines = Field(
        default=["ort"],
        description="what merges are exported for; auto: the fastest that runs here; "
        "NAME: [bundle, ...] is for these bundles only",
    )
    verify: Annotated[
        Any,
        AfterValidator(_verify),
        WithJsonSchema({"anyOf": [{"type": "boolean"}, _or_list({"type": "string"})]}),
    ] = Field(
        default=False,
        description="compare PyTorch, bundle, lowered graph and engine on the test images: of "
        "all merges, or of the bundles that are named",
    )
    bench: Annotated[Bench | None, BeforeValidator(_switch), _OrSwitch()] = Field(
        default=Bench(), description="how engines are measured; false: they are not"
    )
    device: Annotated[
        str, AfterValidator(one_of(("auto", "cpu", "cuda"))), _enum(("auto", "cpu", "cuda"))
    ] = Field(default="auto", description="where models are adapted and calibrated")
    out: str | None = Field(
        default=None, description="folder of all results (NAME-run beside the file)"
    )


def named_engines(file: RunFile) -> list[tuple[str, list[str] | None]]:
    """Name of every engine, and the bundles that it is for; None for all."""
    return [
        (entry, None) if isinstance(entry, str) else next(iter(entry.items()))
        for entry in file.engines
    ]


def schema() -> str:
    """The JSON schema of a run file."""
    values = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**values, **RunFile.model_json_schema()}, indent=1) + "\n"
