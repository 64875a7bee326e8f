"""Statistics of a merged model from a few unlabelled images, through ONNX Runtime.

Averaging models moves the means and variances that their BatchNorms normalise by. Where a
bundle keeps BatchNorm separately (it was folded into the scales, or the method is ``float``) they
are measured again: a variant of the graph normalises by the batch's own moments, so that one pass
yields those of all layers, each after corrected ones. Activation scales are then searched again on
what the corrected network computes, and the moments are measured once more behind these quantizers.
Codes stay as they are; nothing is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import DataError, MergeError
from ..formats.bundle import WEIGHTS, Bundle
from ..formats.safetensors_layout import serialize
from ..graph import reference_session
from ..graph.model_files import serialized
from ..graph.qdq import batch_norm_epsilon, chain
from ..numerics.batches import in_batches
from ..numerics.batchnorm_fold import SMALLEST_GAIN, gain
from ..numerics.quantization import search_scale, some_values
from ..numerics.spec import QuantSpec
from ..typing import Array
from .rewriting import folded, settled, write_again
from .unrounded_network import put_weights

__all__ = ["moved", "new_moments", "re_estimate"]

# A channel with a smaller BatchNorm gain shows nothing of its own moments.
_BLIND = 1e6 * SMALLEST_GAIN
_SAMPLES = 1 << 14


def re_estimate(
    bundle: Bundle,
    images: Mapping[str, npt.NDArray[np.float32]],
    output: str | os.PathLike[str],
    seed: int = 0,
) -> Bundle:
    """Write ``bundle`` again with BatchNorm moments and activation scales of ``images``.

    Args:
        bundle: A merged bundle with BatchNorm folded into the scales, or of method ``float``.
        images: Inputs (N, C, H, W) of each domain; all of them make one batch.
        output: Folder of the new bundle.
        seed: Seed of the sample of activations that scales are searched on.

    Raises:
        MergeError: The bundle keeps no BatchNorm separately.
        DataError: Fewer than two images, or images that the graph does not take.
        CheckFailed: The new graph gives no finite output for a golden input.
    """
    tensors = moved(bundle, bundle.tensors(), images, seed)
    record = {"images": {n: len(rows) for n, rows in images.items()}, "seed": seed}
    return write_again(bundle, tensors, {"re_estimate": record}, output)


def moved(
    bundle: Bundle,
    tensors: Mapping[str, Array],
    images: Mapping[str, npt.NDArray[np.float32]],
    seed: int = 0,
) -> dict[str, Array]:
    """``tensors`` with new moments and activation scales; ``bundle`` gives graph and entries.

    Each activation scale is multiplied by (scale found with the new statistics) / (scale found
    with the old ones), which preserves what calibration learned. Both are searched with real
    activations; the moments are those of the network with quantized ones.

    Raises:
        MergeError, DataError: See :func:`re_estimate`.
    """
    x = _together(images)
    # What integer kernels need of scales and biases would bend the moments.
    moments = _moments(bundle, {**tensors, **folded(bundle, tensors)}, x)
    _check_measured(bundle, moments)
    result = {**tensors, **moments}
    result |= folded(bundle, result)
    before = _activation_scales(bundle, tensors, x, seed)
    for name, scale in _activation_scales(bundle, result, x, seed).items():
        result[name] = (tensors[name] * (scale / before[name])).astype(np.float32)
    if before:
        # What the quantizers clip and round moves the moments again, at few bits by a lot.
        result |= _moments(bundle, result, x, quantized=True)
    return settled(bundle, result)


def new_moments(
    bundle: Bundle,
    unrounded: Mapping[str, Array],
    images: Mapping[str, npt.NDArray[np.float32]],
) -> dict[str, Array]:
    """Means and variances, by tensor name, of a network whose weights are not rounded to codes.

    This is one pass at the activation scales that there are, where :func:`moved` takes four, and
    serves to compare merges with each other. Moments of rounded weights would not fit weights that
    are run unrounded, least of all between the parents, whose own weights are codes already.

    Args:
        bundle: Gives graph and entries.
        unrounded: All tensors, real weights in place of codes; see :meth:`.Merger.unrounded`.
        images: Inputs (N, C, H, W) of each domain; all of them make one batch.

    Raises:
        MergeError, DataError: See :func:`re_estimate`.
    """
    moments = _moments(bundle, unrounded, _together(images), quantized=True, rounded=False)
    _check_measured(bundle, moments)
    return moments


def _together(images: Mapping[str, npt.NDArray[np.float32]]) -> Array:
    x = np.concatenate(list(images.values()))
    if len(x) < 2:
        raise DataError(f"found {len(x)} image; needed 2 or more to estimate a variance")
    return x


def _check_measured(bundle: Bundle, moments: Mapping[str, Array]) -> None:
    if not moments:
        raise MergeError(
            f"{bundle.path}: found no BatchNorm kept apart; re-estimation needs bundles that were "
            "calibrated with BatchNorm folded into the scales (`fold` steps), or `method` float"
        )


def _moments(
    bundle: Bundle,
    tensors: Mapping[str, Array],
    x: Array,
    quantized: bool = False,
    rounded: bool = True,
) -> dict[str, Array]:
    """New means and variances, by tensor name; of ``quantized`` activations, or of real ones.

    Where weights are not ``rounded``, ``tensors`` holds real ones in place of codes.
    """
    model = bundle.graph_ir()
    if not quantized:
        _drop_quantizers(model)
    if not rounded:
        tensors = {**tensors, **put_weights(model, bundle, tensors)}
    probes = [*_probe_folds(model, bundle, tensors), *_probe_norms(model, tensors)]
    if not probes:
        return {}
    model.graph.outputs.extend(value for probe in probes for value in (probe.mean, probe.variance))
    _, *measured = _runner(model, bundle, tensors, exact=rounded)(x)
    result = {}
    for probe, mean, variance in zip(probes, measured[::2], measured[1::2], strict=True):
        seen = probe.factor > _BLIND
        # The graph measures factor * (x - old mean) + shift.
        real = tensors[probe.mean_name] + (mean.ravel() - probe.shift) / probe.factor
        spread = variance.ravel() / probe.factor**2
        for name, new in ((probe.mean_name, real), (probe.variance_name, spread)):
            result[name] = np.where(seen, new, tensors[name]).astype(np.float32)
    return result


@dataclass(frozen=True)
class _Probe:
    """Graph outputs with the moments of factor * (x - mean) + shift, and the tensors to replace."""

    mean: ir.Value
    variance: ir.Value
    mean_name: str
    variance_name: str
    factor: Array
    shift: Array


def _probe_folds(model: ir.Model, bundle: Bundle, tensors: Mapping[str, Array]) -> list[_Probe]:
    """After every layer with a folded BatchNorm, insert nodes that normalise by the batch."""
    probes = []
    for fold in bundle.manifest.folds.values():
        (use,) = model.graph.initializers[fold.bias].uses()
        output = use.node.outputs[0]
        readers = list(output.uses())
        gamma, beta = tensors[fold.gamma], tensors[fold.beta]
        factor = gain(gamma, tensors[fold.variance], fold.eps)
        # The layer computes factor * (x - mean) + beta, and eps is added to the variance of x.
        norm = _normalise(output, gamma, beta, fold.eps * factor**2)
        model.graph.insert_after(use.node, norm.nodes)
        for reader in readers:
            reader.node.replace_input_with(reader.idx, norm.result)
        for i, value in enumerate(model.graph.outputs):
            if value is output:
                model.graph.outputs[i] = norm.result
        probes.append(_Probe(norm.mean, norm.variance, fold.mean, fold.variance, factor, beta))
    return probes


def _probe_norms(model: ir.Model, tensors: Mapping[str, Array]) -> list[_Probe]:
    """Replace every BatchNormalization by one that normalises by the batch."""
    probes = []
    for node in [n for n in model.graph if n.op_type == "BatchNormalization"]:
        x = node.inputs[0]
        names = [str(value.name) for value in node.inputs[1:5] if value is not None]
        if x is None or not set(names) <= set(tensors):
            continue
        gamma, beta, mean, _ = (tensors[name] for name in names)
        eps = batch_norm_epsilon(node)
        norm = _normalise(x, gamma, beta, np.full(gamma.shape, eps))
        model.graph.insert_before(node, norm.nodes)
        ir.convenience.replace_all_uses_with(
            node.outputs[0], norm.result, replace_graph_outputs=True
        )
        # x itself is measured: its mean moves by its distance from the old one.
        one = np.ones(gamma.shape)
        probes.append(_Probe(norm.mean, norm.variance, names[2], names[3], one, mean))
    return probes


@dataclass(frozen=True)
class _Norm:
    """Nodes that normalise a tensor by its own moments; the last one's output is the result."""

    nodes: list[ir.Node]
    mean: ir.Value
    variance: ir.Value

    @property
    def result(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


def _normalise(x: ir.Value, gamma: Array, beta: Array, eps: Array) -> _Norm:
    """gamma * (x - mean) / sqrt(variance + eps) + beta, channels on axis 1."""
    rank = len(x.shape) if x.shape is not None else 4
    shape = [1, -1, *[1] * (rank - 2)]
    axes = ir.node("Constant", [], {"value": ir.tensor(np.array([0, *range(2, rank)], np.int64))})
    terms = [
        ir.node("Constant", [], {"value": ir.tensor(v.astype(np.float32).reshape(shape))})
        for v in (eps, gamma, beta)
    ]
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value) -> ir.Value:
        nodes.append(ir.node(op, list(inputs)))
        return nodes[-1].outputs[0]

    mean = add("ReduceMean", x, axes.outputs[0])
    away = add("Sub", x, mean)
    square = add("Mul", away, away)
    variance = add("ReduceMean", square, axes.outputs[0])
    spread = add("Sqrt", add("Add", variance, terms[0].outputs[0]))
    scaled = add("Mul", add("Div", away, spread), terms[1].outputs[0])
    add("Add", scaled, terms[2].outputs[0])
    return _Norm([axes, *terms, *nodes], mean, variance)


def _activation_scales(
    bundle: Bundle, tensors: Mapping[str, Array], x: Array, seed: int
) -> dict[str, Array]:
    """Scales by search on the values that the quantizers read, activations unquantized."""
    model = bundle.graph_ir()
    sources = _drop_quantizers(model)
    if not sources:
        return {}
    model.graph.outputs.extend(sources.values())
    rng = np.random.default_rng(seed)
    seen: dict[str, list[Array]] = {name: [] for name in sources}
    run = _runner(model, bundle, tensors)
    parts = list(in_batches(x, 8))
    share = max(_SAMPLES // len(parts), 256)
    for rows in parts:
        _, *values = run(rows)
        for name, value in zip(sources, values, strict=True):
            seen[name].append(some_values(value, share, rng))
    specs = {a.scale: QuantSpec(a.bits, a.lo, a.hi) for a in bundle.manifest.activations}
    return {name: search_scale(np.concatenate(parts), specs[name]) for name, parts in seen.items()}


def _drop_quantizers(model: ir.Model) -> dict[str, ir.Value]:
    """Remove the quantizers in place; returns what each one read, by the name of its scale."""
    sources: dict[str, ir.Value] = {}
    for node in [n for n in model.graph if n.op_type == "QuantizeLinear"]:
        source, scale = node.inputs[:2]
        assert source is not None and scale is not None
        sources[str(scale.name)] = source
        chain(node)[-1].outputs[0].replace_all_uses_with(source)
    return sources


def _runner(
    model: ir.Model, bundle: Bundle, tensors: Mapping[str, Array], exact: bool = True
) -> Callable[[Array], list[Array]]:
    """One session of an edited graph; one that is not ``exact`` is fast."""
    weights = serialize(tensors, bundle.manifest.tensors)
    how = reference_session.unfused_session if exact else reference_session.float_session
    session = how(serialized(model), {WEIGHTS: weights})
    port = session.get_inputs()[0].name

    def run(x: Array) -> list[Array]:
        try:
            outputs: list[Array] = session.run(None, {port: x})
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            raise DataError(
                f"the images do not fit {bundle.path}: {' '.join(str(error).split())[:200]}"
            ) from error
        return outputs

    return run
