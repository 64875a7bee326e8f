"""GPTQ calibration beside the algorithm as its paper writes it, on inputs of the written graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional

from hdrq_deploy import Bundle
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.layer_rows import LayerShape, some_rows
from hdrq_deploy.calibration.methods import Options
from hdrq_deploy.calibration.pipeline import folded_weights
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.formats.bundle import GRAPH
from hdrq_deploy.numerics.spec import QuantSpec


def gptq(weight: Any, hessian: Any, scale: Any, spec: QuantSpec) -> Any:
    """Codes (outputs, features) of Frantar et al., algorithm 1, one column at a time."""
    if not hessian.any():  # a channel that is always zero says nothing
        return np.clip(np.rint(weight / scale[:, None]), spec.lo, spec.hi)
    hessian = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    left, codes = weight[:, order].astype(np.float64), np.zeros(weight.shape)
    for j, feature in enumerate(order):
        codes[:, feature] = np.clip(np.rint(left[:, j] / scale), spec.lo, spec.hi)
        error = (left[:, j] - scale * codes[:, feature]) / factor[j, j]
        left[:, j:] -= np.outer(error, factor[j, j:])
    return codes


def layer_inputs(bundle: Bundle, images: Any) -> dict[str, Any]:
    """What every convolution and product of the graph reads, by the name of its weight's codes."""
    model = onnx.load(bundle.path / GRAPH, load_external_data=False)
    made = {output: node for node in model.graph.node for output in node.output}
    read = {}
    for node in model.graph.node:
        if node.op_type in {"Conv", "Gemm", "MatMul"} and node.input[1] in made:
            source = made[node.input[1]]
            while source.op_type != "DequantizeLinear":
                source = made[source.input[0]]
            read[source.input[0]] = node.input[0]
    outputs = dict.fromkeys(read.values())
    for name in outputs:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = bundle.path / "tapped.onnx"
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, options)
    path.unlink()
    found = dict(zip(outputs, session.run(list(outputs), {"input": images}), strict=True))
    return {weight: found[name] for weight, name in read.items()}


def rows(x: Any, shape: tuple[int, ...], groups: int, stride: int, padding: int) -> list[Any]:
    """Matrices (rows, features), one a group."""
    if len(shape) == 2:
        return [x.reshape(-1, shape[1]).astype(np.float64)]
    patches = functional.unfold(
        torch.from_numpy(x), shape[2:], padding=padding, stride=stride
    ).numpy()
    flat = patches.transpose(0, 2, 1).reshape(-1, patches.shape[1]).astype(np.float64)
    return np.split(flat, groups, axis=1)


CASES = {
    "Tiny": {"stem": (1, 1, 1), "conv1": (1, 1, 1), "conv2": (8, 1, 1), "fc": (1, 1, 0)},
    "Attention": {"patch": (1, 4, 0), "qkv": (1, 1, 0), "proj": (1, 1, 0), "head": (1, 1, 0)},
}


@pytest.mark.parametrize(
    ("name", "per_channel", "granularity"),
    [("Tiny", False, "layer"), ("Tiny", True, "block"), ("Attention", False, "block")],
)
def test_codes_are_those_of_gptq_in_the_quantized_network(
    work: Path, tmp_path: Path, inputs: Any, name: str, per_channel: bool, granularity: str
) -> None:
    bundle = calibrate(
        f"tiny_models:{name}",
        work / "data.npz",
        "night",
        tmp_path / "b.hdrq",
        work / f"{name}-night.safetensors",
        method="gptq",
        wbits=3,
        abits=4,
        per_channel=per_channel,
        options=Options.of("gptq", granularity=granularity),
    )
    seen = layer_inputs(bundle, inputs)
    float_weights = folded_weights(
        f"tiny_models:{name}", work / f"{name}-night.safetensors", inputs[:2]
    )
    entries, moved = bundle.manifest.tensors, 0
    for layer, (groups, stride, padding) in CASES[name].items():
        codes_name = f"{layer}.weight_codes"
        entry, codes = entries[codes_name], bundle.tensor(codes_name)
        scale = np.atleast_1d(bundle.tensor(entry.scale).astype(np.float64))
        weight = float_weights[f"{layer}.weight"]
        parts = rows(seen[codes_name], weight.shape, groups, stride, padding)
        each = np.split(weight.reshape(len(weight), -1), groups)
        steps = np.split(np.broadcast_to(scale, len(weight)), groups)
        found = np.split(codes.reshape(len(codes), -1), groups)
        for x, w, step, own in zip(parts, each, steps, found, strict=True):
            expected = gptq(w, x.T @ x / len(x), step, entry.spec)
            # Sums of other orders decide a code that lies between two.
            assert (own != expected).mean() < 0.01, layer
            nearest = np.clip(np.rint(w / step[:, None]), entry.spec.lo, entry.spec.hi)
            moved += int((own != nearest).sum())
    assert moved > 20  # rounding to nearest would not be it
    assert bundle.manifest.method == "gptq"
    blocks = [block for block in bundle.manifest.metrics["blocks"] if block["layers"]]
    assert all(block["learned"] for block in blocks)
    before, after = (sum(block[key] for block in blocks) for key in ("loss_before", "loss_after"))
    assert after < before


def test_it_needs_no_batch_and_no_source() -> None:
    request = CalibrationRequest("m:F", "x.npz", "d", "b", method="gptq")
    assert not request.learns and request.quantizes and not request.learning.iterates


def test_rows_are_even_over_images_and_positions() -> None:
    shape = LayerShape("linear", 1, 2, 3)
    view = torch.arange(1000.0).repeat(2, 1).T  # every row says its place
    draws = torch.Generator().manual_seed(0)
    some = some_rows(view, 1, shape, 10, draws)
    assert some.shape == (1, 10, 2)
    assert (some[0, :, 0] // 100).tolist() == list(range(10))
    assert len(set((some[0, :, 0] % 100).tolist())) > 5
    assert torch.equal(some_rows(view, 1, shape, 1000, draws)[0], view)
