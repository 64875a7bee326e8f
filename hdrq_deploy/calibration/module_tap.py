"""A fake-quantized torch model as a stage that shows its codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..comparison.taps import Ran
from ..formats.bundle_manifest import Layer
from ..numerics import e4m3
from ..typing import Array
from .placement import HEAVY

__all__ = ["TorchTap"]


def _whole(codes: Array) -> Array:
    whole: Array = np.rint(codes).astype(np.int16)
    return whole


class TorchTap:
    """See :class:`hdrq_deploy.comparison.taps.Ran`.

    Args:
        module: The model of :mod:`.bundle_model`.
        scales: Activation scales, by name.
        layers: All layers in the order of the graph. Those that ONNX writes as a product and an
            addition are not shown: their output without the bias is not known here.
    """

    name = "PyTorch"

    def __init__(
        self, module: fx.GraphModule, scales: Mapping[str, float], layers: Sequence[Layer]
    ) -> None:
        self._module, self._scales = module, scales
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
        names, scales = self._layers, self._scales

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.target is torch.ops.hdrq.quantize_dequantize.default:
                    scale = n.args[1]
                    assert isinstance(scale, fx.Node)
                    name = str(scale.target)
                    given = result.numpy() / np.float32(scales[name])
                    on_grid = n.args[3] == e4m3.LARGEST
                    codes[name] = e4m3.places(given) if on_grid else _whole(given)
                elif n in names:
                    layers[names[n]] = result.numpy().copy()  # what follows may change it
                return result

        with torch.no_grad():
            output = Recorder(self._module).run(torch.from_numpy(x)).numpy()
        return Ran(output, output, codes, layers)
