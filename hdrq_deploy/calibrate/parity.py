"""A bundle's fake-quantized torch model as a stage that shows its codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from ..bundle import Bundle
from ..errors import ModelError
from ..verification import Tapped
from .pipeline import fake_quantized

__all__ = ["torch_stage"]

Array = npt.NDArray[Any]


def torch_stage(bundle: Bundle, example: Array) -> Tapped:
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
    scales = {a.scale: float(bundle.tensor(a.scale)) for a in bundle.manifest.activations}

    def run(x: Array) -> tuple[Array, dict[str, Array]]:
        codes: dict[str, Array] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.target is torch.ops.hdrq.quantize_dequantize.default:
                    step = n.args[1]
                    assert isinstance(step, fx.Node)
                    name = str(step.target)
                    codes[name] = np.rint(result.numpy() / scales[name]).astype(np.int16)
                return result

        with torch.no_grad():
            output = Recorder(module).run(torch.from_numpy(x))
        return output.numpy(), codes

    return Tapped("PyTorch", run)
