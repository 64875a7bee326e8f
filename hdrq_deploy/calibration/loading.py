"""Models and checkpoints, from the names of models and the paths of checkpoints."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError
from ..formats.checkpoints import bare_names, shot_parts, torch_state

__all__ = [
    "checkpoint_classes",
    "checkpoint_names",
    "current_folder_importable",
    "is_lazy",
    "load_checkpoint",
    "load_model",
    "load_state",
    "put_state",
    "state_sha256",
    "with_classes",
]

# What DataParallel, torch.compile and Lightning put before every key.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")


def load_model(name: str) -> nn.Module:
    """Build a model with its initial weights.

    Args:
        name: ``PKG.MOD:FACTORY``, ``timm:NAME``, ``torchvision:NAME`` or ``transformers:NAME``
            (a model type such as ``segformer``, or a folder with config.json). A number of
            classes may follow the name of a library's model: ``timm:resnet18:7``.

    Raises:
        ModelError: Nothing of that name can be built.
    """
    kind, _, rest = name.partition(":")
    if not rest:
        raise ModelError(
            f"found `model` {name!r}; needed PKG.MOD:FACTORY, timm:NAME, torchvision:NAME or "
            "transformers:NAME"
        )
    if kind in _LIBRARIES:
        own, classes = _named_classes(rest)
        return _build(name, lambda: _LIBRARIES[kind](own, classes))
    with current_folder_importable():
        try:
            factory = getattr(importlib.import_module(kind), rest)
        except (ImportError, AttributeError) as error:
            raise ModelError(
                f"cannot import the model {name} ({error}); run from the folder that holds the "
                "module, or install it"
            ) from error
        except (Exception, SystemExit) as error:  # a user's module may raise anything
            raise ModelError(
                f"`model` {name}: importing {kind} failed ({_one_line(error)}); needed a module "
                "that can be imported: put what runs in it behind if __name__ == '__main__'"
            ) from error
        return _build(name, factory)


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Modules of the current folder can be imported; afterwards ``sys.path`` is as it was.

    Python searches the current folder for scripts and modules, but not for console scripts. A
    user's model may import its neighbours in ``forward``, so whoever runs one keeps this open.
    """
    added = "" not in sys.path
    if added:
        sys.path.insert(0, "")
    try:
        yield
    finally:
        # What the user's module itself has added stays.
        if added and "" in sys.path:
            sys.path.remove("")


def _build(name: str, factory: Callable[[], Any]) -> nn.Module:
    try:
        model = factory()
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # a user's factory may raise anything
        raise ModelError(f"`model` {name} failed: {_one_line(error)}") from error
    model = _unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"`model` {name} gave a ScriptModule, whose graph cannot be captured; needed the torch "
            "module that it was scripted or traced from"
        )
    if not isinstance(model, nn.Module):
        raise ModelError(f"`model` {name} gave a {type(model).__name__}; needed a torch module")
    # Engines compute from float32; half and double models are brought to it first.
    return model.float().eval()


def _unwrap(model: Any) -> Any:
    """What DataParallel, DistributedDataParallel or torch.compile was put around."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def _one_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def is_lazy(model: nn.Module) -> bool:
    """Parameters are missing until the model has seen an input (nn.LazyConv2d and its like)."""
    tensors = [*model.parameters(), *model.buffers()]
    return any(nn.parameter.is_lazy(tensor) for tensor in tensors)


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"{module} is not installed: pip install 'hdrq-deploy[models]'") from error


def _named_classes(rest: str) -> tuple[str, int | None]:
    """``resnet18:7`` as the name and the classes; None where no number follows."""
    name, _, number = rest.rpartition(":")
    if not (name and number.isascii() and number.isdigit()):
        return rest, None
    if int(number) < 1:
        raise ModelError(f"found {number} classes in `model` {rest!r}; needed 1 or more")
    return name, int(number)


def with_classes(name: str, classes: int) -> str | None:
    """The name of a library's model with a number of classes, where it does not say one yet.

    >>> with_classes("timm:resnet18", 7)
    'timm:resnet18:7'
    """
    kind, _, rest = name.partition(":")
    says = kind not in _LIBRARIES or _named_classes(rest)[1] is not None
    return None if says else f"{name}:{classes}"


def _timm(name: str, classes: int | None) -> nn.Module:
    given = {} if classes is None else {"num_classes": classes}
    model: nn.Module = _need("timm").create_model(name, pretrained=False, **given)
    return model


def _torchvision(name: str, classes: int | None) -> nn.Module:
    models = _need("torchvision").models
    # Models with a backbone of its own weights would fetch them.
    segments = models.get_model_builder(name).__module__.startswith(
        "torchvision.models.segmentation"
    )
    given: dict[str, Any] = {"weights_backbone": None} if segments else {}
    if classes is not None:
        given["num_classes"] = classes
    model: nn.Module = models.get_model(name, weights=None, **given)
    if segments:
        model.map_checkpoint = _without_auxiliary  # type: ignore[assignment]
    return model


def _without_auxiliary(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Public checkpoints have a second head that only training looks at."""
    return {key: value for key, value in state.items() if not key.startswith("aux_classifier.")}


def _transformers(name: str, classes: int | None) -> nn.Module:
    library = _need("transformers")
    auto = library.AutoConfig
    config = auto.from_pretrained(name) if Path(name).exists() else auto.for_model(name)
    if classes is not None:
        config.num_labels = classes
    tasks = (library.AutoModelForSemanticSegmentation, library.AutoModelForImageClassification)
    for task in tasks:
        if type(config) in task._model_mapping:
            model: nn.Module = task.from_config(config)
            return model
    raise ModelError(f"transformers:{name} is no image classification or segmentation model")


# Whose models are built by name, with the number of classes where one is given.
_LIBRARIES: dict[str, Callable[[str, int | None], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch checkpoint (never unpickling code).

    Where a file holds several state_dicts, the log says which was taken: averaged (EMA) weights
    where they are complete, as timm does.

    Raises:
        ModelError: Missing, unreadable, no tensors inside, or values beyond float32.
    """
    path = Path(path)
    if path.is_dir():
        parts = {start: load_checkpoint(file) for start, file in shot_parts(path).items()}
        return {start + key: value for start, part in parts.items() for key, value in part.items()}
    if not path.is_file():
        raise ModelError(f"{path}: found no file; needed a checkpoint (.safetensors, .pt, .pth)")
    state = _safetensors(path) if path.suffix == ".safetensors" else torch_state(path)
    if not state:
        raise ModelError(f"{path}: found no tensors; needed a state_dict")
    for name, value in state.items():
        _check_range(name, value, path)
    return state


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        loaded = load_file(path)
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path}: cannot be read as a checkpoint ({text}); needed a safetensors file or a "
            "state_dict saved with torch.save"
        ) from error
    return {new: loaded[old] for new, old in bare_names(loaded).items()}


def _check_range(name: str, value: Tensor, path: Path) -> None:
    """A float64 that float32 cannot hold would become infinity in the model."""
    if value.dtype != torch.float64 or value.numel() == 0:
        return
    largest = float(value[torch.isfinite(value)].abs().amax()) if value.isfinite().any() else 0.0
    if largest > torch.finfo(torch.float32).max:
        raise ModelError(
            f"{path}: found {largest:g} in {name}, which float32 cannot hold; needed weights of a "
            "model that computes in float32"
        )


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
    own = model.state_dict()
    counters = _counters(own)
    state = _as_model(model, load_checkpoint(path), path)
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
        classes = None if missing or unexpected else _other_classes(own, state)
        raise ModelError(
            f"{path}: the {what} checkpoint does not fit the model: {', '.join(problems)}; "
            + (
                "adapted and source model must both be of the architecture that model names"
                if classes is None
                else f"it has {classes[1]} classes and the model {classes[0]}; needed one number "
                f"for all (a library's model takes it behind its name: timm:resnet18:{classes[1]})"
            )
        )
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(
                f"{path}: found NaN or infinity in {key}; needed finite weights: export the "
                "checkpoint again"
            )
    _load(model, state, str(path))
    return {key: value.clone() for key, value in model.state_dict().items()}


def checkpoint_classes(model: nn.Module, path: str | Path) -> tuple[int, int] | None:
    """Classes of a model and of a checkpoint that fits it but for their number; else None.

    Raises:
        ModelError: The checkpoint cannot be read.
    """
    own = model.state_dict()
    state = _as_model(model, load_checkpoint(path), path)
    if not set(own) - _counters(own) <= state.keys() <= own.keys():
        return None
    return _other_classes(own, state)


def _other_classes(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[int, int] | None:
    """Outputs of the last layers in the model and in a checkpoint, where nothing else differs.

    All tensors of another shape have the same two numbers of outputs.
    """
    names = [n for n in own if n in state and own[n].shape != state[n].shape]
    pairs = {(own[n].shape[:1], state[n].shape[:1]) for n in names}
    rest = all(own[n].shape[1:] == state[n].shape[1:] for n in names)
    if not names or not rest or len(pairs) != 1:
        return None
    ((ours, theirs),) = pairs
    return (ours[0], theirs[0]) if ours and theirs else None


def checkpoint_names(model: nn.Module, path: str | Path) -> dict[str, str]:
    """Names of a model's tensors in a checkpoint that :func:`load_state` takes.

    A tensor that the model's own ``map_checkpoint`` computes anew has none.

    Raises:
        ModelError: The checkpoint cannot be read.
    """
    stored = load_checkpoint(path)
    names = {id(value): name for name, value in stored.items()}
    state = _as_model(model, stored, path)
    return {key: names[id(value)] for key, value in state.items() if id(value) in names}


def _as_model(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names of the model, where they can be brought to fit."""
    if callable(rename := getattr(model, "map_checkpoint", None)):
        try:
            state = rename(state)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
    own = model.state_dict()
    return _fitted(state, own, _counters(own))


def _counters(state: Mapping[str, Tensor]) -> set[str]:
    """Tensors that no network computes with."""
    return {key for key in state if key.endswith("num_batches_tracked")}


def _fitted(
    state: dict[str, Tensor], own: Mapping[str, Tensor], counters: set[str]
) -> dict[str, Tensor]:
    """``state`` with a wrapper's prefix taken off, or put on, where only that makes it fit."""
    needed = set(own) - counters
    tried = [state]
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            tried.append({key.removeprefix(prefix): value for key, value in state.items()})
        tried.append({prefix + key: value for key, value in state.items()})
    fits = (s for s in tried if needed <= s.keys() <= own.keys())
    return next(fits, state)


def _load(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """``load_state_dict`` of a state whose keys and shapes fit, whatever the model makes of it."""
    values = OrderedDict(state)
    # Overrides read versions from here (torchvision's MNASNet); the keys are the model's own.
    values._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    try:
        model.load_state_dict(values, strict=False)
    except Exception as error:  # a model may override it and raise anything
        raise ModelError(
            f"{path}: the model's load_state_dict failed ({_one_line(error)}); needed a checkpoint "
            "that this version of the model takes: save it again from the model"
        ) from error


@torch.no_grad()
def put_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the values of ``model.state_dict()`` back, as :func:`load_state` returns them."""
    for name, value in model.state_dict().items():
        value.copy_(state[name])


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names and values, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            values = state[name].detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
