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
        name: ``PKG.MOD:FACTORY``, ``timm:NAME`` or ``transformers:NAME`` (a model type such
            as ``segformer``, or a folder with config.json).

    Raises:
        ModelError: Nothing of that name can be built.
    """
    kind, _, rest = name.partition(":")
    if not rest:
        raise ModelError(
            f"found --model {name!r}; needed PKG.MOD:FACTORY, timm:NAME or transformers:NAME"
        )
    if kind == "timm":
        return _built(name, lambda: _need("timm").create_model(rest, pretrained=False))
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
