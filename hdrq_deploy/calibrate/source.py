"""Models and checkpoints, from the names that ``--model``, ``--weights`` and ``--base`` take."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError

__all__ = ["load_checkpoint", "load_model", "load_state", "state_sha256"]


def load_model(name: str) -> nn.Module:
    """Build a model with its initial weights.

    Args:
        name: ``PKG.MOD:FACTORY``, ``timm:NAME``, ``torchvision:NAME`` or ``transformers:NAME``
            (a model type such as ``segformer``, or a folder with config.json).

    Raises:
        ModelError: Nothing of that name can be built.
    """
    kind, _, rest = name.partition(":")
    if not rest:
        raise ModelError(
            f"found --model {name!r}; needed PKG.MOD:FACTORY, timm:NAME, torchvision:NAME or "
            "transformers:NAME"
        )
    if kind == "timm":
        return _built(name, lambda: _need("timm").create_model(rest, pretrained=False))
    if kind == "torchvision":
        return _built(name, lambda: _torchvision(rest))
    if kind == "transformers":
        return _built(name, lambda: _transformers(rest))
    if "" not in sys.path:
        sys.path.insert(0, "")  # console scripts do not search the current folder
    try:
        factory = getattr(importlib.import_module(kind), rest)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"cannot import --model {name} ({error}); run from the folder that holds the "
            "module, or install it"
        ) from error
    return _built(name, factory)


def _built(name: str, factory: Callable[[], Any]) -> nn.Module:
    try:
        model = factory()
    except ModelError:
        raise
    except Exception as error:  # a user's factory may raise anything
        raise ModelError(f"--model {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"--model {name} gave a {type(model).__name__}; needed a torch module")
    return model.eval()


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"{module} is not installed: pip install 'hdrq-deploy[models]'") from error


def _torchvision(name: str) -> nn.Module:
    models = _need("torchvision").models
    # Models with a backbone of its own weights would fetch them.
    whole = models.get_model_builder(name).__module__.startswith("torchvision.models.segmentation")
    built: nn.Module = models.get_model(
        name, weights=None, **({"weights_backbone": None} if whole else {})
    )
    if whole:
        built.map_checkpoint = _without_auxiliary  # type: ignore[assignment]
    return built


def _without_auxiliary(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Public checkpoints have a second head that only training looks at."""
    return {key: value for key, value in state.items() if not key.startswith("aux_classifier.")}


def _transformers(name: str) -> nn.Module:
    library = _need("transformers")
    auto = library.AutoConfig
    config = auto.from_pretrained(name) if Path(name).exists() else auto.for_model(name)
    tasks = (library.AutoModelForSemanticSegmentation, library.AutoModelForImageClassification)
    for task in tasks:
        if type(config) in task._model_mapping:
            built: nn.Module = task.from_config(config)
            return built
    raise ModelError(f"transformers:{name} is no image classification or segmentation model")


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch checkpoint (never unpickling code).

    Raises:
        ModelError: Missing, unreadable, or no tensors inside.
    """
    path = Path(path)
    if path.is_dir():
        return _joined(path)
    if not path.is_file():
        raise ModelError(f"{path}: found no file; needed a checkpoint (.safetensors, .pt, .pth)")
    try:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path}: cannot be read as a checkpoint ({text}); needed a safetensors file or a "
            "state_dict saved with torch.save"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ModelError(f"{path}: found a {type(loaded).__name__}; needed a state_dict")
    state = {k.removeprefix("module."): v for k, v in loaded.items() if isinstance(v, Tensor)}
    if not state:
        raise ModelError(f"{path}: found no tensors; needed a state_dict")
    return state


def _joined(folder: Path) -> dict[str, Tensor]:
    """SHOT's three files ``*_F*.pt``, ``*_B*.pt``, ``*_C*.pt`` as one: netF., netB., netC."""
    state: dict[str, Tensor] = {}
    for letter in "FBC":
        files = sorted(folder.glob(f"*_{letter}*.pt"))
        if len(files) != 1:
            raise ModelError(
                f"{folder}: found {len(files)} files *_{letter}*.pt; needed one each of _F, _B and "
                "_C, as SHOT writes them, or pass a checkpoint file"
            )
        part = load_checkpoint(files[0])
        state |= {f"net{letter}.{key}": value for key, value in part.items()}
    return state


def load_state(model: nn.Module, path: str | Path, what: str) -> dict[str, Tensor]:
    """Load a checkpoint into ``model``; all keys and shapes must fit.

    Args:
        model: Changed in place.
        path: Checkpoint.
        what: ``adapted`` or ``source``, for the error.

    Raises:
        ModelError: Names the first missing, unexpected and mis-shaped key, or the first
            tensor with NaN.
    """
    state, own = load_checkpoint(path), model.state_dict()
    if callable(rename := getattr(model, "map_checkpoint", None)):
        state = rename(state)
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [k for k in own if k not in state and k not in counters]
    unexpected = [k for k in state if k not in own]
    misshaped = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    problems = [
        f"{len(keys)} {kind} (first: {keys[0]})"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", misshaped),
        )
        if keys
    ]
    if problems:
        raise ModelError(
            f"{path}: the {what} checkpoint does not fit the model: {', '.join(problems)}; "
            "adapted and source model must both be of the --model architecture"
        )
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(
                f"{path}: found NaN or infinity in {key}; needed finite weights: export the "
                "checkpoint again"
            )
    model.load_state_dict(state, strict=False)
    return {key: value.clone() for key, value in model.state_dict().items()}


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names and values, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            values = state[name].detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
