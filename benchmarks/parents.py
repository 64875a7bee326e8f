"""What quantization does to the models that are merged, layer by layer, and what averaging leaves.

    python benchmarks/parents.py build/pacs ... --results benchmarks/results

Each folder is one of ``hdrq reproduce pacs --settings ours --pairs``, whose bundles, merges and
float models are read; no image is. Weights are compared as the network multiplies by them,
BatchNorm's factor in them, with those of the domain's own float model:

- ``moved``: weights whose code is not the one nearest to the float weight;
- ``distance``: of two models, over that of their float models;
- ``correlation``: of two models' errors, which an average halves the less the higher it is;
- ``noise`` and ``shift``: how far a layer's outputs are from the float model's on what its domain
  feeds it, by the statistics in the bundles: the variance of the difference, and the square of its
  mean, over the variance of the outputs.

A figure is the median over layers, and the mean over models, pairs, or domains of a merge.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from evidence.records import write_record

from hdrq_deploy import Bundle
from hdrq_deploy.analysis.landscape import real_weights
from hdrq_deploy.experiments.grid import Merge, Run, bundle_path
from hdrq_deploy.merging.batchnorm_correction import norm_behind, norm_of
from hdrq_deploy.merging.layers import statistics_of
from hdrq_deploy.numerics.layer_matrix import LayerMatrix, rows_of
from hdrq_deploy.numerics.layer_statistics import InputStatistics
from hdrq_deploy.numerics.moments import covariance
from hdrq_deploy.numerics.quantization import along, quantize
from hdrq_deploy.runtime.bench.environment import environment

Floats = npt.NDArray[np.float64]
DOMAINS = ("art_painting", "cartoon", "sketch")
GROUPS = (*combinations(DOMAINS, 2), DOMAINS)
METHODS = ("rtn", "rtn-corrected", "qdrop", "hdrq")
BITS = ((8, 8), (6, 6), (4, 8), (8, 4), (4, 4), (3, 3))
WAYS = ("nearest", "regression")
FLOAT = Run("ours", "float", 8, 8, 0)


@dataclass(frozen=True)
class Layer:
    """What the network computes with: weight (outputs, ...), bias (outputs,), BatchNorm in both."""

    weight: Floats
    bias: Floats


@cache
def layers_of(path: Path) -> dict[str, Layer]:
    """All layers of a bundle that have weights, by their module."""
    bundle = Bundle.open(path)
    real = {name: value.double().numpy() for name, value in real_weights(bundle).items()}
    norms, folds = _norms(bundle, real), bundle.manifest.folds
    layers = {}
    for layer in bundle.manifest.layers:
        name = layer.weight or f"{layer.module}.weight"
        weight, none = real[name], np.zeros(len(real[name]))
        bias = real.get(folds[name].bias if name in folds else f"{layer.module}.bias", none)
        gain, summand = norms.get(name, (none + 1, none))
        weight = weight * along(gain, weight.ndim, 0)
        layers[layer.module] = Layer(weight, bias * gain + summand)
    return layers


def _norms(bundle: Bundle, real: Mapping[str, Floats]) -> dict[str, tuple[Floats, Floats]]:
    """Factor and summand of the BatchNorm nodes of a graph, by the weight in front of them."""
    found = {}
    for node in bundle.graph_ir().graph:
        behind = norm_behind(node) if node.op_type == "Conv" else None
        if behind is not None:
            norm = norm_of(behind, real)
            (weight,) = (value.name for value in node.inputs[1:2] if value)
            found[str(weight)] = norm.gain(real), norm.summand(real)
    return found


def moved(bundle: Bundle, floats: Mapping[str, Layer]) -> float:
    """Share of the weights whose code is not the one nearest to the float weight."""
    counted = total = 0
    for layer in bundle.manifest.layers:
        entry = bundle.manifest.tensors[layer.weight or ""]
        assert layer.weight and entry.scale
        nearest = quantize(floats[layer.module].weight, bundle.tensor(entry.scale), entry.spec)
        counted += int(np.sum(bundle.tensor(layer.weight) != nearest))
        total += nearest.size
    return counted / total


def output_errors(
    layers: Mapping[str, Layer], floats: Mapping[str, Layer], bundle: Bundle
) -> tuple[float, float]:
    """Noise and shift, medians over the layers, on what ``bundle`` saw of their inputs."""
    seen = statistics_of(bundle)
    noises, shifts = [], []
    for layer in bundle.manifest.layers:
        name = layer.weight or f"{layer.module}.weight"
        record = seen.record.layer(name)
        if record is not None:
            own, other = floats[layer.module], layers[layer.module]
            noise, shift = _output_error(other, own, record, seen.layer(name))
            noises.append(noise)
            shifts.append(shift)
    return statistics.median(noises), statistics.median(shifts)


def _output_error(
    layer: Layer, own: Layer, record: LayerMatrix, seen: InputStatistics
) -> tuple[float, float]:
    spread = covariance([seen], [1.0])
    rows = rows_of(own.weight, record)  # (groups, features, outputs of a group)
    off = rows_of(layer.weight - own.weight, record)
    variance = (rows * spread.times(rows)).sum()
    mean = np.einsum("gf,gfo->go", seen.mean, off).reshape(-1) + layer.bias - own.bias
    return float((off * spread.times(off)).sum() / variance), float((mean**2).sum() / variance)


def compared(a: Mapping[str, Layer], b: Mapping[str, Layer], f: Any, g: Any) -> tuple[float, float]:
    """Distance and correlation of models ``a`` and ``b``; theirs in float are ``f`` and ``g``."""
    distances, correlations = [], []
    for name, first in a.items():
        x, y = first.weight, b[name].weight
        left, right = x - f[name].weight, y - g[name].weight
        apart = np.linalg.norm(f[name].weight - g[name].weight)
        distances.append(float(np.linalg.norm(x - y) / apart))
        sizes = np.linalg.norm(left) * np.linalg.norm(right)
        correlations.append(float((left * right).sum() / sizes) if sizes > 0 else 0.0)
    return statistics.median(distances), statistics.median(correlations)


def merges_of(run: Run) -> list[Merge]:
    """The merges that are looked at."""
    return [Merge(run, members, way, 1) for members in GROUPS for way in WAYS]


def is_whole(out: Path, run: Run) -> bool:
    """Whether all models and merges of a run are there."""
    cells = [*map(run.single, DOMAINS), *(merge.cell(0) for merge in merges_of(run))]
    return all(bundle_path(out, cell).exists() for cell in cells)


def row_of(out: Path, run: Run) -> dict[str, Any]:
    """All figures of the models of one method, and of their merges."""
    paths = {name: bundle_path(out, run.single(name)) for name in DOMAINS}
    bundles = {name: Bundle.open(path) for name, path in paths.items()}
    floats = {name: layers_of(bundle_path(out, FLOAT.single(name))) for name in DOMAINS}
    own = {name: layers_of(path) for name, path in paths.items()}

    def errors(members: Iterable[str], at: Mapping[str, Mapping[str, Layer]]) -> dict[str, float]:
        found = [output_errors(at[name], floats[name], bundles[name]) for name in members]
        return {
            "noise": statistics.fmean(noise for noise, _ in found),
            "shift": statistics.fmean(shift for _, shift in found),
        }

    pairs = [compared(own[a], own[b], floats[a], floats[b]) for a, b in combinations(DOMAINS, 2)]
    quantizes = run.method != "float"
    merges = []
    for merge in merges_of(run):
        merged = dict.fromkeys(merge.members, layers_of(bundle_path(out, merge.cell(0))))
        about = {"members": list(merge.members), "way": merge.way}
        merges.append({**about, **errors(merge.members, merged)})
    return {
        "method": run.method,
        "bits": run.bits,
        "seed": run.seed,
        "moved": [moved(bundles[n], floats[n]) for n in DOMAINS] if quantizes else [],
        "distance": [distance for distance, _ in pairs],
        "correlation": [correlation for _, correlation in pairs],
        "single": errors(DOMAINS, own),
        "merges": merges,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="OUT of hdrq reproduce pacs")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    rows = [row_of(args.runs[0], FLOAT)]
    for run in (Run("ours", method, *bits, 0) for bits in BITS for method in METHODS):
        out = next((out for out in args.runs if is_whole(out, run)), None)
        if out is not None:
            rows.append(row_of(out, run))
            print(run.name, flush=True)
    record = {"schema_version": 1, "environment": environment(), "rows": rows}
    target = args.results / "parents.json"
    write_record(target, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
