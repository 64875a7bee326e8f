"""What a calibration does: methods, their options, and recipe files.

A recipe is a plain YAML or JSON file with any of the keys of :class:`Recipe`; a flag on the
command line overrides a key. The resolved form travels in the bundle's manifest.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import SpecError

__all__ = ["FOLDS", "GRANULARITIES", "LEARNERS", "METHODS", "NOISES", "Options", "Recipe"]

_LONGEST_FILE = 1 << 20
FOLDS = ("weights", "steps")
NOISES = ("off", "empirical", "uniform")
LEARNERS = ("none", "latent", "adaround")
GRANULARITIES = ("block", "layer")


@dataclass(frozen=True)
class Options:
    """How a network is reconstructed, block by block.

    Attributes:
        learner: ``none`` (steps by search only), ``latent`` (weights and steps, as HDRQ) or
            ``adaround`` (up or down for every weight).
        granularity: ``block``, or ``layer`` (each convolution or linear alone).
        iters: Iterations per block.
        batch: Images per iteration.
        lr: Adam's rate for what is learned of the weights; the paper's text says 1e-3.
        act_lr: Adam's rate for activation steps.
        noise: What replaces rounding at first: ``empirical`` (resampled rounding errors),
            ``uniform`` or ``off``.
        noise_fraction: Share of the iterations with noise; the rest, the tail, rounds.
        distance: lambda, weight of the distance to the source weights; 0 for none.
        warmup: Share of the iterations with a rising learning rate, and of AdaRound's without
            its regularizer.
        input_prob: Probability that an input element comes from the quantized network.
        drop_prob: Probability that an activation element inside a block stays real.
        step_change: Most that one update may change a step, relative to its first value. The
            reference has no such bound (0); its rates are absolute, so that the fine steps
            of 8-bit tensors are lost in a few updates.
        round_weight: Weight of AdaRound's regularizer.
        beta_first: Its exponent after the warm-up.
        beta_last: Its exponent at the end.
        keep_best: Return a block to its first state where learning raised its error.
    """

    learner: str = "latent"
    granularity: str = "block"
    iters: int = 20000
    batch: int = 32
    lr: float = 1e-4
    act_lr: float = 4e-5
    noise: str = "empirical"
    noise_fraction: float = 0.8
    distance: float = 0.05
    warmup: float = 0.2
    input_prob: float = 0.5
    drop_prob: float = 0.5
    step_change: float = 2e-3
    round_weight: float = 0.01
    beta_first: float = 20.0
    beta_last: float = 2.0
    keep_best: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("learner", LEARNERS),
            ("granularity", GRANULARITIES),
            ("noise", NOISES),
        ):
            if getattr(self, name) not in allowed:
                raise SpecError(
                    f"found {name}={getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
        if self.learner != "latent" and (self.noise != "off" or self.distance > 0):
            raise SpecError(
                f"found noise={self.noise}, distance={self.distance} with learner={self.learner}; "
                "both act on latent weights: pass learner latent, or noise off and distance 0"
            )
        if self.iters < 1 or self.batch < 1:
            raise SpecError(f"found iters={self.iters}, batch={self.batch}; needed both 1 or more")
        for name, value in asdict(self).items():
            if isinstance(value, str):
                continue
            if isinstance(value, int) and value >= 1 << 63:
                raise SpecError(f"found {name} of {len(str(value))} digits; needed less than 2**63")
            if not math.isfinite(value) or value < 0:
                raise SpecError(f"found {name}={value}; needed a number >= 0")
            if name.endswith(("prob", "fraction", "warmup")) and value > 1:
                raise SpecError(f"found {name}={value}; needed 0 to 1")

    @classmethod
    def of(cls, method: str, **changes: Any) -> Options:
        """The options of a method, with some of them changed.

        Raises:
            SpecError: The method is unknown, or a value is out of range.
        """
        if method not in METHODS:
            raise SpecError(f"found method {method!r}; choose one of {', '.join(METHODS)}")
        return replace(METHODS[method], **changes)


# AdaRound's own rate; the learned rounding of BRECQ and QDrop uses it too.
_ROUNDING = Options(learner="adaround", noise="off", distance=0.0, lr=1e-3)
METHODS: Mapping[str, Options] = {
    # No quantization: the baseline row, merged and exported by the same commands.
    "float": Options(learner="none", noise="off", distance=0.0),
    # Steps by search.
    "rtn": Options(learner="none", noise="off", distance=0.0),
    # Nagel et al., ICML 2020: layer by layer, on the inputs of the quantized network.
    "adaround": replace(_ROUNDING, granularity="layer", input_prob=1.0, drop_prob=0.0),
    # Li et al., ICLR 2021: block by block.
    "brecq": replace(_ROUNDING, input_prob=1.0, drop_prob=0.0),
    # Wei et al., ICLR 2022: with mixed inputs and dropped activation quantizers.
    "qdrop": _ROUNDING,
    # Shin et al., ICML 2025.
    "hdrq": Options(),
}


class Recipe(BaseModel):
    """A recipe file; a key that is left out has the method's own value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: str | None = None
    wbits: int | None = None
    abits: int | None = None
    per_channel: bool | None = None
    fold: Literal["weights", "steps"] | None = None
    grid: Literal["int8", "paper"] | None = None
    images: int | None = None
    seed: int | None = None
    learner: str | None = None
    granularity: str | None = None
    iters: int | None = None
    batch: int | None = None
    lr: float | None = None
    act_lr: float | None = None
    noise: str | None = None
    noise_fraction: float | None = None
    distance: float | None = None
    warmup: float | None = None
    input_prob: float | None = None
    drop_prob: float | None = None
    step_change: float | None = None
    round_weight: float | None = None
    beta_first: float | None = None
    beta_last: float | None = None
    keep_best: bool | None = None

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe file (.yaml, .yml or .json).

        Raises:
            SpecError: No such file, not YAML or JSON, an unknown key, or a value of the wrong
                type; the first is named.
        """
        path = Path(path)
        if not path.is_file():
            raise SpecError(f"{path}: found no file; needed a recipe (.yaml or .json)")
        try:
            if path.stat().st_size > _LONGEST_FILE:
                raise ValueError(f"more than {_LONGEST_FILE} bytes")
            values = _parse(path)
        except (ValueError, OSError, RecursionError) as error:
            text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise SpecError(f"{path}: cannot be read as YAML or JSON ({text})") from error
        if not isinstance(values, dict):
            raise SpecError(f"{path}: found a {type(values).__name__}; needed keys and values")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                raise SpecError(
                    f"{path}: found the unknown key {key!r}; keys are {known}"
                ) from error
            # A few lines of YAML can name a value of any size.
            found = reprlib.repr(first["input"])
            raise SpecError(
                f"{path}: found {key}: {found} ({first['msg'].lower()}); correct it"
            ) from error

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """This recipe with every value of ``values`` that is not None."""
        return self.model_copy(update={k: v for k, v in values.items() if v is not None})

    def options(self) -> Options:
        """The learning options, resolved.

        Raises:
            SpecError: An unknown method or a value out of range.
        """
        names = [field.name for field in fields(Options)]
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return Options.of(self.method or "hdrq", **given)


def _parse(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    try:
        import yaml
    except ImportError as error:
        raise SpecError(
            f"{path}: YAML recipes need pyyaml: pip install 'hdrq-deploy[calibrate]', or write "
            "the recipe as .json"
        ) from error
    try:
        # YAML 1.1 reads 1e-3 as text; a recipe means the number.
        return {k: _number(v) for k, v in dict(yaml.safe_load(path.read_text())).items()}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except TypeError as error:
        raise ValueError("found no mapping of keys to values") from error


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
