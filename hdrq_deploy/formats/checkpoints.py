"""Checkpoints as training codes write them: .safetensors, and torch files where torch is there.

A training run saves more than a state_dict: it lies under a key of its own, beside an averaged
copy, an optimizer and options, and its names begin with what wrapped the model. What is taken is
the same for a calibration and for a merge of checkpoints, which reads tensor by tensor and needs
no torch for .safetensors.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..typing import Array
from .records import MANIFEST
from .safetensors_layout import read_header

__all__ = [
    "FLOATS",
    "Checkpoint",
    "Stored",
    "bare_names",
    "checkpoint_sha256",
    "from_float32",
    "is_checkpoint",
    "open_checkpoint",
    "shot_parts",
    "torch_state",
]


# What training codes call a state_dict in their files; averaged weights are what they validate,
# and what timm takes where a file holds both.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema_model", "ema")
_PLAIN = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "params",
    "network",
    "net",
)
_SUFFIXES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar"}
# Bytes of a tensor without values of its own (an expanded one) that are let through.
_EXPANDED = 1 << 24
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.float32}
_OTHERS = {
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_TORCH = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_log = logging.getLogger("hdrq_deploy")


@dataclass(frozen=True)
class Stored:
    """One tensor as it is stored: safetensors' tag of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are read one by one.

    Attributes:
        path: File, or folder of SHOT's three files.
        tensors: By the names that the model has.
        read: Values by name; bfloat16 as float32, which holds all of its values.
    """

    path: Path
    tensors: Mapping[str, Stored]
    read: Callable[[str], Array]


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` looks like a checkpoint, and not like a bundle."""
    if path.is_dir():
        return not (path / MANIFEST).exists() and any(path.glob("*_F*.pt"))
    return path.suffix.lower() in _SUFFIXES or (path.is_file() and path.suffix != ".hdrq")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .safetensors file, a torch file, or a folder as SHOT writes it.

    Raises:
        ModelError: Missing, unreadable, no tensors inside, or tensors of a dtype that is not
            merged; a torch file where torch is not installed.
        BundleError: Not safetensors.
    """
    if path.is_dir():
        return _together(path, {start: open_checkpoint(f) for start, f in shot_parts(path).items()})
    if not path.is_file():
        raise ModelError(f"{path}: found no file; needed a checkpoint (.safetensors, .pt, .pth)")
    opened = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    for name, stored in opened.tensors.items():
        if stored.dtype not in FLOATS and stored.dtype not in _OTHERS:
            raise ModelError(
                f"{path}: found {name} of dtype {stored.dtype}; needed float32, float16 or "
                "bfloat16: convert it"
            )
    return opened


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """Hash of names and values, whatever format and metadata the file has.

    Counters of batches are left out: no network computes with them.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name}\0{checkpoint.tensors[name].shape}\0".encode())
            digest.update(np.ascontiguousarray(checkpoint.read(name)).tobytes())
    return digest.hexdigest()


def _together(folder: Path, parts: Mapping[str, Checkpoint]) -> Checkpoint:
    tensors = {
        start + name: stored
        for start, part in parts.items()
        for name, stored in part.tensors.items()
    }

    def read(name: str) -> Array:
        start, dot, rest = name.partition(".")
        return parts[start + dot].read(rest)

    return Checkpoint(folder, tensors, read)


def _safetensors(path: Path) -> Checkpoint:
    spans = read_header(path)
    names = bare_names(spans)
    if not names:
        raise ModelError(f"{path}: found no tensors; needed a state_dict")

    def read(name: str) -> Array:
        span = spans[names[name]]
        with path.open("rb") as file:
            file.seek(span.offset)
            data = file.read(span.length)
        if span.dtype == "BF16":
            wide = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(span.shape)
        return np.frombuffer(data, {**FLOATS, **_OTHERS}[span.dtype]).reshape(span.shape)

    tensors = {n: Stored(spans[old].dtype, spans[old].shape) for n, old in names.items()}
    return Checkpoint(path, tensors, read)


def _torch(path: Path) -> Checkpoint:
    state = torch_state(path)

    def read(name: str) -> Array:
        value = state[name].detach()
        values: Array = (value.float() if tags[name] == "BF16" else value).contiguous().numpy()
        return values

    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()}
    tags = {name: _TORCH.get(dtype, dtype) for name, dtype in dtypes.items()}
    return Checkpoint(
        path, {n: Stored(tags[n], tuple(value.shape)) for n, value in state.items()}, read
    )


def from_float32(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """bfloat16 as its 16 bits, rounded to the nearest, ties to even; ``values`` are finite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def shot_parts(folder: Path) -> dict[str, Path]:
    """SHOT's three files ``*_F*.pt``, ``*_B*.pt``, ``*_C*.pt`` by the names' beginning.

    Raises:
        ModelError: They are not there, or there are several of one.
    """
    parts = {}
    for letter in "FBC":
        files = sorted(folder.glob(f"*_{letter}*.pt"))
        if len(files) != 1:
            raise ModelError(
                f"{folder}: found {len(files)} files *_{letter}*.pt; needed one each of _F, _B and "
                "_C, as SHOT writes them, or pass a checkpoint file"
            )
        parts[f"net{letter}."] = files[0]
    return parts


def torch_state(path: Path) -> dict[str, Any]:
    """The tensors of a torch file's state_dict, by the names that the model has.

    Where the file holds several, the log (``hdrq_deploy``, level INFO) says which was taken.

    Raises:
        ModelError: torch is not installed, the file is no torch file or holds objects that
            only running code would restore, or there is no one state_dict inside.
    """
    loaded = _loaded(path)
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{path}: found a {type(loaded).__name__}; needed a state_dict: save "
            "model.state_dict() with torch.save"
        )
    chosen = _chosen(loaded, path)
    state = {new: chosen[old] for new, old in bare_names(chosen).items()}
    for name, value in state.items():
        _check_values(name, value, path)
    return state


def _loaded(path: Path) -> Any:
    """What ``torch.load`` gives, no code of the file being run."""
    if importlib.util.find_spec("torch") is None:
        raise ModelError(
            f"{path}: a torch file, and torch is not installed: pip install "
            "'hdrq-deploy[calibrate]', or save the state_dict as .safetensors"
        )
    torch: Any = importlib.import_module("torch")
    # Training scripts keep their options beside the weights; a Namespace only holds attributes.
    harmless = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with harmless, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise ModelError(_refusal(path, str(error), type(error).__name__)) from error


def _refusal(path: Path, text: str, kind: str) -> str:
    """Why a torch file is not read; never torch's own advice to run the code in it."""
    match = re.search(r"(?:GLOBAL|class) ([\w.]+)", text)
    if match and "llowed" in text:
        return (
            f"{path}: found a {match[1]} beside the tensors, and restoring it can run code; needed "
            "tensors alone: where you trust the file, load it and save its state_dict again, "
            "torch.save(model.state_dict(), PATH)"
        )
    if "TorchScript" in text:
        return (
            f"{path}: found a TorchScript archive; needed a state_dict: "
            "torch.save(torch.jit.load(PATH).state_dict(), NEW)"
        )
    if "legacy .tar" in text:
        return (
            f"{path}: found torch's oldest format (.tar); load it and save its state_dict again: "
            "torch.save(model.state_dict(), PATH)"
        )
    first = text.splitlines()[0] if text else kind
    if "eights_only" in text or "eights only" in text:
        first = "damaged, or not written by torch.save"
    return (
        f"{path}: cannot be read as a checkpoint ({first}); needed a safetensors file or a "
        "state_dict saved with torch.save"
    )


def _chosen(loaded: Mapping[Any, Any], path: Path) -> Mapping[str, Any]:
    """The state_dict that is meant, tensors alone."""
    leaves = dict(_leaves(loaded)) or _only_child(loaded)
    if not leaves:
        named = ", ".join(str(key) for key in list(loaded)[:8]) or "nothing"
        raise ModelError(
            f"{path}: found no tensors under a known key (there is {named}); needed a state_dict: "
            "torch.save(model.state_dict(), PATH)"
        )
    states = {".".join(keys): _tensors(leaf) for keys, leaf in leaves.items()}
    averaged = [".".join(keys) for keys in leaves if set(keys) & set(_AVERAGED)]
    plain = [name for name in states if name not in averaged]
    taken, why = (plain or averaged)[0], ""
    if averaged and plain:
        lacking = sorted(set(bare_names(states[plain[0]])) - set(bare_names(states[averaged[0]])))
        if lacking:
            why = f", because {averaged[0]} lacks {len(lacking)} of its tensors ({lacking[0]})"
        else:
            taken, why = averaged[0], ", the averaged weights"
    if len(states) > 1:
        _log.info("%s: found %s; took %s%s", path, ", ".join(states), taken, why)
    return states[taken]


def _leaves(
    loaded: Mapping[Any, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """State_dicts under known keys, whatever lies between; ``loaded`` itself where none is."""
    inner = [
        (key, loaded[key])
        for key in (*_PLAIN, *_AVERAGED)
        if isinstance(loaded.get(key), Mapping) and len(keys) < 4
    ]
    below = [leaf for key, value in inner for leaf in _leaves(value, (*keys, key))]
    if below:
        yield from below
    elif _tensors(loaded):
        yield keys, loaded


def _only_child(loaded: Mapping[Any, Any]) -> dict[tuple[str, ...], Mapping[Any, Any]]:
    """The one entry that holds tensors by name, whatever it is called."""
    children: dict[tuple[str, ...], Mapping[Any, Any]] = {
        (str(key),): value
        for key, value in loaded.items()
        if isinstance(value, Mapping) and _tensors(value)
    }
    return children if len(children) == 1 else {}


def _tensors(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    tensor = importlib.import_module("torch").Tensor
    return {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, tensor)}


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Names as the model has them, each with the one it was stored by.

    ``module.`` of DataParallel and AveragedModel goes where all names begin with it, and
    ``_orig_mod.`` of ``torch.compile`` wherever it stands.
    """
    given = list(names)
    bare = {name.replace("_orig_mod.", ""): name for name in given}
    if len(bare) < len(given):  # two would be called the same
        bare = {name: name for name in given}
    while bare:
        wrapped = [name for name in bare if name.startswith("module.")]
        if not wrapped or set(bare) - set(wrapped) - {"n_averaged"}:
            break
        bare = {name.removeprefix("module."): bare[name] for name in wrapped}
    return bare


def _check_values(name: str, value: Any, path: Path) -> None:
    """Refuse tensors without values of their own, which an array cannot be made of."""
    torch: Any = importlib.import_module("torch")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        kind = "quantized" if value.is_quantized else f"{value.layout} on {value.device}"
        raise ModelError(
            f"{path}: found {name} as a tensor that is {kind}; needed plain values: save it dense, "
            "float and on the CPU"
        )
    held = value.untyped_storage().nbytes()
    size = value.numel() * value.element_size()
    if size > max(held, _EXPANDED):
        raise ModelError(
            f"{path}: found {name} of shape {tuple(value.shape)} with {held} bytes of values; "
            "needed a value for every element: save it contiguous"
        )
