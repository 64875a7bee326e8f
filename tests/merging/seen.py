"""Bundles with statistics of inputs that are drawn, as a calibration would have seen them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hdrq_deploy import Bundle
from hdrq_deploy.formats.bundle import GRAPH
from hdrq_deploy.formats.statistics import Histogram, Statistics
from hdrq_deploy.graph.biases import bias_sites
from hdrq_deploy.graph.qdq import transposes_weight, weight_dequantizer
from hdrq_deploy.numerics.layer_statistics import InputStatistics


def statistics_of(rows: Any, rank: int = 1000) -> InputStatistics:
    """Of rows (groups, N, features)."""
    mean = rows.mean(1)
    away = rows - mean[:, None]
    return InputStatistics.of(rows.shape[1], mean, away.swapaxes(1, 2) @ away / rows.shape[1], rank)


def drawn_rows(seed: int, groups: int, features: int) -> Any:
    """Correlated rows whose mean is not 0, (groups, N, features)."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((groups, 3 * features + 20, features))
    turn = rng.standard_normal((groups, features, features)) / np.sqrt(features)
    result = own @ turn + 0.3 * own + rng.uniform(-1, 1, (groups, 1, features))
    return np.maximum(result, -0.5)


def with_statistics(
    bundle: Bundle,
    path: Path,
    seed: int,
    rank: int = 1000,
    change: Callable[[str, InputStatistics], InputStatistics | None] = lambda name, s: s,
    tensors: Mapping[str, Any] | None = None,
) -> Bundle:
    """The bundle again, with statistics of drawn inputs of every layer with a weight.

    ``change`` may replace those of a layer by others, or by none; ``tensors`` replace its own.
    """
    manifest, model = bundle.manifest, bundle.graph_ir()
    folded = {fold.bias for fold in manifest.folds.values()}
    biases = {site.codes: site.bias for site in bias_sites(model) if site.bias not in folded}
    layers: dict[str, Any] = {}
    layouts: dict[str, Any] = {}
    heavy = [n for n in model.graph if n.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}]
    for number, node in enumerate(heavy):
        weight, _ = weight_dequantizer(node.inputs[1])
        name = str((weight.inputs[0] if weight is not None else node.inputs[1]).name)
        if name not in manifest.tensors:
            continue
        shape, groups, bias = manifest.tensors[name].shape, 1, biases.get(name)
        if len(node.inputs) > 2 and node.inputs[2] is not None and bias is None:
            own = str(node.inputs[2].name)
            bias = own if own in manifest.tensors and own not in folded else None
        if "Conv" in node.op_type:
            attribute = node.attributes.get("group")
            groups = attribute.as_int() if attribute is not None else 1
            layout = "transposed" if node.op_type == "ConvTranspose" else "conv"
        else:
            turned = transposes_weight(node) != weight_dequantizer(node.inputs[1])[1]
            layout = "linear" if turned else "matmul"
        features = (
            shape[0] // groups if layout in {"matmul", "transposed"} else (int(np.prod(shape[1:])))
        )
        statistics = change(name, statistics_of(drawn_rows(seed + number, groups, features), rank))
        if statistics is not None:
            layers[name] = statistics
            layouts[name] = (bias, layout)
    rng = np.random.default_rng(seed)
    histograms = {
        a.scale: Histogram(-1.0, 3.0, rng.integers(0, 100, 64).astype(np.float32))
        for a in manifest.activations
    }
    seen = Statistics(rank, layouts, layers, histograms)
    graph = (bundle.path / GRAPH).read_bytes()
    own = {**bundle.tensors(), **(tensors or {})}
    return Bundle.write(path, manifest, own, graph, bundle.golden(), statistics=seen)
