"""A bundle's fake-quantized torch model as a stage that shows its codes."""

from __future__ import annotations

import torch
from torch import fx

from ..comparison.taps import Shows
from ..errors import ModelError
from ..formats.bundle import Bundle
from ..typing import Array
from .module_tap import TorchTap
from .rebuilding import fake_quantized

__all__ = ["torch_stage"]


def torch_stage(bundle: Bundle, example: Array) -> Shows:
    """The torch model that a bundle was emitted from, with the bundle's numbers.

    Args:
        bundle: Calibrated or merged.
        example: Two inputs (2, C, H, W) float32.

    Raises:
        ModelError: The bundle's model cannot be built here.
    """
    module = fake_quantized(bundle, torch.from_numpy(example))
    if not isinstance(module, fx.GraphModule):
        raise ModelError("found no graph in the rebuilt model; build the bundle again")
    manifest = bundle.manifest
    scales = {a.scale: float(bundle.tensor(a.scale)) for a in manifest.activations}
    return TorchTap(module, scales, manifest.layers)
