"""Parameters and buffers of a graph module by their dotted names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..numerics import e4m3
from ..typing import Array

__all__ = ["attribute", "free_name", "from_numpy", "set_attribute", "to_numpy"]


def attribute(module: nn.Module, target: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def set_attribute(module: nn.Module, target: str, value: Tensor) -> None:
    """Register ``value`` as a buffer at a dotted path, making the modules on the way."""
    *path, name = target.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    if name in module._parameters:
        del module._parameters[name]
    if name in module.__dict__:
        del module.__dict__[name]
    module.register_buffer(name, value.detach())


def free_name(module: nn.Module, wanted: str, taken: Collection[str] = ()) -> str:
    """A dotted name for a new tensor that neither the user's tensors nor PyTorch have taken.

    Args:
        module: The new tensor's root.
        wanted: The name where nothing stands in its way; else a part of it gets a number.
        taken: Further names that are given away.

    >>> free_name(nn.Linear(1, 1), "weight"), free_name(nn.Linear(1, 1), "bias.scale")
    ('weight_2', 'bias_2.scale')
    """
    *path, last = wanted.split(".")
    owner: nn.Module | None = module
    prefix = ""
    for part in path:
        inside = owner
        name = _numbered(part, lambda n: _is_module(inside, n) or _free(inside, n))  # noqa: B023
        owner = None if owner is None else owner._modules.get(name)
        prefix += f"{name}."
    return prefix + _numbered(last, lambda n: prefix + n not in taken and _free(owner, n))


def _is_module(owner: nn.Module | None, name: str) -> bool:
    return owner is not None and owner._modules.get(name) is not None


def _free(owner: nn.Module | None, name: str) -> bool:
    return owner is None or not hasattr(owner, name)


def _numbered(name: str, fits: Callable[[str], bool]) -> str:
    """``name``, or the first of ``name_2``, ``name_3``, ... that fits."""
    number, tried = 1, name
    while not fits(tried):
        number += 1
        tried = f"{name}_{number}"
    return tried


def to_numpy(value: Tensor) -> Array:
    """A tensor on the CPU as NumPy has it, the same memory; numbers of E4M3 too."""
    floating = value.dtype == torch.float8_e4m3fn
    array: Array = (value.view(torch.uint8) if floating else value).numpy()
    return array.view(e4m3.DTYPE) if floating else array


def from_numpy(value: Array) -> Tensor:
    """The other way; the array must be writable."""
    if value.dtype == e4m3.DTYPE:
        return torch.from_numpy(value.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(value)
