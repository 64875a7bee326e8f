"""Recipe files.

A recipe is a plain YAML or JSON file with any of the keys of :class:`Recipe`; a flag on the
command line overrides a key. The resolved form travels in the bundle's manifest.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import SpecError
from .methods import FOLDS, GRANULARITIES, LEARNERS, METHODS, NOISES, Options
from .settings import SETTINGS

__all__ = ["FOLDS", "GRANULARITIES", "LEARNERS", "METHODS", "NOISES", "Options", "Recipe"]

_LONGEST_FILE = 1 << 20


class Recipe(BaseModel):
    """A recipe file; a key that is left out has the method's own value.

    ``settings`` names a row of :data:`.settings.SETTINGS`, whose keys stand for those left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    settings: Literal["paper", "ours"] | None = None
    method: str | None = None
    wbits: int | None = None
    abits: int | None = None
    per_channel: bool | None = None
    fold: Literal["weights", "steps"] | None = None
    grid: Literal["int8", "paper", "e4m3"] | None = None
    placement: Literal["engine", "paper"] | None = None
    blocks: Literal["live", "unit"] | None = None
    images: int | None = None
    statistics: int | str | None = None
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
    schedule: str | None = None
    stages: int | None = None
    act_init: str | None = None
    scale_rates: bool | None = None
    distance_form: str | None = None
    bias_correction: bool | None = None

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
            value = reprlib.repr(first["input"])
            raise SpecError(
                f"{path}: found {key}: {value} ({first['msg'].lower()}); correct it"
            ) from error

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """This recipe with every value of ``values`` that is not None."""
        return self.model_copy(update={k: v for k, v in values.items() if v is not None})

    def resolved(self) -> Recipe:
        """This recipe with the keys of its setting where it leaves them out."""
        preset = SETTINGS[self.settings].recipe(self.method or "hdrq") if self.settings else {}
        return self.model_copy(update={k: v for k, v in preset.items() if getattr(self, k) is None})

    def options(self) -> Options:
        """The learning options, those of its setting included.

        Raises:
            SpecError: An unknown method or a value out of range.
        """
        recipe = self.resolved()
        names = [field.name for field in fields(Options)]
        given = {n: getattr(recipe, n) for n in names if getattr(recipe, n) is not None}
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
        # YAML 1.1 reads 1e-3 as text and off as false; a recipe means the number and the word.
        return {k: _meant(k, v) for k, v in dict(yaml.safe_load(path.read_text())).items()}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except TypeError as error:
        raise ValueError("found no mapping of keys to values") from error


def _meant(key: Any, value: Any) -> Any:
    if value is False and key in {"noise", "statistics"}:
        return "off"
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
