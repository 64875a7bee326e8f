"""The torch model and the graph in ONNX Runtime, compared tensor by tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, fx

from .. import reference
from ..bundle import GRAPH, Bundle
from ..errors import ModelError
from .pipeline import fake_quantized

__all__ = ["parity"]

Array = npt.NDArray[Any]


def parity(bundle: Bundle, x: Array, batch: int = 64) -> dict[str, Any]:
    """Run a bundle's fake-quantized torch model and its graph (ONNX Runtime, unfused).

    Args:
        bundle: Calibrated or merged.
        x: Inputs (N, C, H, W) float32.
        batch: Images at a time.

    Returns:
        ``images``, ``decision_flips``, ``max_steps`` (largest difference of any quantized
        activation, in steps of its own grid), ``share_off`` (elements that differ by half a
        step or more) and ``max_abs`` of the outputs.

    Raises:
        ModelError: The bundle's model cannot be built here.
    """
    example = torch.from_numpy(x[:2])
    module = fake_quantized(bundle, example)
    session, names = _session(bundle)
    scales = {a.scale: float(bundle.tensor(a.scale)) for a in bundle.manifest.activations}
    flips, largest, off, elements, farthest = 0, 0.0, 0, 0, 0.0
    for first in range(0, len(x), batch):
        rows = x[first : first + batch]
        expected, codes = _run_torch(module, torch.from_numpy(rows))
        got, *others = session.run(None, {session.get_inputs()[0].name: rows})
        comparison = reference.compare(expected, got)
        flips += int(comparison["decision_flips"])
        farthest = max(farthest, float(comparison["max_abs"]))
        for name, other in zip(names, others, strict=True):
            steps = np.abs(codes[name] - other) / scales[name]
            largest = max(largest, float(steps.max()))
            off += int((steps >= 0.5).sum())
            elements += steps.size
    return {
        "images": len(x),
        "decision_flips": flips,
        "max_steps": round(largest, 3),
        "share_off": off / max(elements, 1),
        "max_abs": farthest,
    }


def _session(bundle: Bundle) -> tuple[Any, list[str]]:
    """The bundle's graph with every quantized activation as a further output."""
    model = onnx.load(str(bundle.path / GRAPH), load_external_data=True)
    producers = {output: node for node in model.graph.node for output in node.output}
    names = []
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in producers:
            continue
        names.append(node.input[1])
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    return reference.unfused_session(model.SerializeToString()), names


def _run_torch(module: torch.nn.Module, x: Tensor) -> tuple[Array, dict[str, Array]]:
    if not isinstance(module, fx.GraphModule):
        raise ModelError("found no graph in the rebuilt model; build the bundle again")
    codes: dict[str, Array] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is torch.ops.hdrq.quantize_dequantize.default:
                scale = n.args[1]
                assert isinstance(scale, fx.Node)
                codes[str(scale.target)] = result.numpy()
            return result

    with torch.no_grad():
        output = Recorder(module).run(x)
    return output.numpy(), codes
