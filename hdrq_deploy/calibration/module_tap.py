"""A fake-quantized torch model as a stage that shows its codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from ..comparison.taps import Ran
from ..formats.bundle_manifest import Layer
from .placement import HEAVY

__all__ = ["TorchTap"]

Array = npt.NDArray[Any]


class TorchTap:
    """See :class:`hdrq_deploy.comparison.taps.Ran`.

    Args:
        module: As ``emit`` makes it.
        steps: Of the activations, by name.
        layers: In the order of the graph. Of those that ONNX writes as a product and an
            addition the bias cannot be told apart, and they are not shown.
    """

    name = "PyTorch"

    def __init__(
        self, module: fx.GraphModule, steps: Mapping[str, float], layers: Sequence[Layer]
    ) -> None:
        self._module, self._steps = module, steps
        heavy = [node for node in module.graph.nodes if node.target in HEAVY]
        self._layers = {
            node: layer.node
            for node, layer in zip(heavy, layers, strict=True)
            if layer.op != "MatMul" or len(node.args) < 3
        }

    def run(self, x: Array) -> Ran:
        """A batch (N, C, H, W) float32."""
        codes: dict[str, Array] = {}
        layers: dict[str, Array] = {}
        names, steps = self._layers, self._steps

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.target is torch.ops.hdrq.quantize_dequantize.default:
                    step = n.args[1]
                    assert isinstance(step, fx.Node)
                    name = str(step.target)
                    codes[name] = np.rint(result.numpy() / steps[name]).astype(np.int16)
                elif n in names:
                    layers[names[n]] = result.numpy().copy()  # what follows may change it
                return result

        with torch.no_grad():
            output = Recorder(self._module).run(torch.from_numpy(x)).numpy()
        return Ran(output, output, codes, layers)
