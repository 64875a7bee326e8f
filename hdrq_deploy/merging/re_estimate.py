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
from ..graph.model_files import OutsideTensors, serialized
from ..graph.qdq import chain
from ..numerics.batches import in_batches
from ..numerics.batchnorm_fold import BLIND_GAIN, gain
from ..numerics.quantization import search_scale, some_values
from ..numerics.spec import QuantSpec
from ..typing import Array
from .batchnorm_correction import Norm, fold_norm, norm_of
from .rewriting import folded, settled, write_again
from .unrounded_network import RealWeights

__all__ = ["NewMoments", "check_batch_norm", "moved", "re_estimate"]

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
    probed = _Probed(bundle)
    _check_probes(bundle, probed)
    result = {**tensors, **probed.moments({**tensors, **folded(bundle, tensors)}, x)}
    result |= folded(bundle, result)
    before = _activation_scales(bundle, tensors, x, seed)
    for name, scale in _activation_scales(bundle, result, x, seed).items():
        result[name] = (tensors[name] * (scale / before[name])).astype(np.float32)
    if before:
        # What the quantizers clip and round moves the moments again, at few bits by a lot.
        result |= _Probed(bundle, quantized=True).moments(result, x)
    return settled(bundle, result)


class NewMoments:
    """Means and variances of a network whose weights are not rounded to codes.

    One pass at the activation scales that there are, where :func:`moved` takes four, serves to
    compare merges with each other. Moments of rounded weights would not fit weights that are run
    unrounded, least of all between the parents, whose own weights are codes already.

    Args:
        bundle: Gives graph and entries.

    Raises:
        MergeError: See :func:`re_estimate`.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._probed = _Probed(bundle, quantized=True, rounded=False)
        _check_probes(bundle, self._probed)

    def of(
        self, unrounded: Mapping[str, Array], images: Mapping[str, npt.NDArray[np.float32]]
    ) -> dict[str, Array]:
        """The moments behind these weights, each (C,) float32, by tensor name.

        Args:
            unrounded: All tensors, real weights in place of codes; see :meth:`.Merger.unrounded`.
            images: Inputs (N, C, H, W) of each domain; all of them make one batch.

        Raises:
            DataError: See :func:`re_estimate`.
        """
        return self._probed.moments(unrounded, _together(images))


def _together(images: Mapping[str, npt.NDArray[np.float32]]) -> Array:
    x = np.concatenate(list(images.values()))
    if len(x) < 2:
        raise DataError(f"found {len(x)} image; needed 2 or more to estimate a variance")
    return x


def check_batch_norm(bundle: Bundle) -> None:
    """Refuse a bundle whose BatchNorm cannot be measured again.

    Raises:
        MergeError: BatchNorm is folded into its weights.
    """
    _check_probes(bundle, _Probed(bundle))


def _check_probes(bundle: Bundle, probed: _Probed) -> None:
    if not probed.probes:
        raise MergeError(
            f"{bundle.path}: found no BatchNorm kept apart; re-estimation needs bundles that were "
            "calibrated with BatchNorm folded into the scales (`fold` steps), or `method` float"
        )


class _Probed:
    """A bundle's graph that normalises by the moments of the batch, and puts them out.

    Args:
        bundle: Gives graph and entries.
        quantized: Measure behind activations as they are quantized, not behind real ones.
        rounded: Run the codes; else tensors hold real weights in their place.
    """

    def __init__(self, bundle: Bundle, quantized: bool = False, rounded: bool = True) -> None:
        self._bundle = bundle
        model = bundle.graph_ir()
        if not quantized:
            _drop_quantizers(model)
        self._real = None if rounded else RealWeights(model, bundle)
        self._terms = OutsideTensors("terms")
        probes = _probe_folds(model, bundle, self._terms)
        self.probes = [*probes, *_probe_norms(model, bundle, self._terms)]
        for probe in self.probes:
            model.graph.outputs.extend([probe.mean, probe.variance])
        self._text = serialized(model)

    def moments(self, tensors: Mapping[str, Array], x: Array) -> dict[str, Array]:
        """New means and variances, by tensor name."""
        if not self.probes:
            return {}
        terms: dict[str, Array] = {}
        for probe in self.probes:
            terms |= probe.terms(tensors)
        files = self._real.files(tensors) if self._real else _file_of(self._bundle, tensors)
        files |= self._terms.file(terms)
        _, *measured = _runner(self._text, self._bundle, files, exact=self._real is None)(x)
        result: dict[str, Array] = {}
        for probe, mean, variance in zip(self.probes, measured[::2], measured[1::2], strict=True):
            result |= probe.found(tensors, mean.ravel(), variance.ravel())
        return result


@dataclass(frozen=True)
class _Probe:
    """Graph outputs with the moments of factor * (x - mean) + shift, and the tensors to replace.

    Attributes:
        mean, variance: The outputs.
        norm: Names of gamma, beta, mean and variance, and what is added to the variance of x.
        is_fold: Whether a layer gives factor * (x - mean) + beta, as one with a folded BatchNorm
            does; else x itself is measured.
        at: The start of the names of its terms.
    """

    mean: ir.Value
    variance: ir.Value
    norm: Norm
    is_fold: bool
    at: str

    def _values(self, tensors: Mapping[str, Array]) -> list[Array]:
        """Gamma, beta, mean and variance, each (C,)."""
        known, norm = {**tensors, **self.norm.constants}, self.norm
        return [known[name] for name in (norm.gamma, norm.beta, norm.mean, norm.variance)]

    def _factor(self, tensors: Mapping[str, Array]) -> Array:
        gamma, _, _, variance = self._values(tensors)
        return gain(gamma, variance, self.norm.eps) if self.is_fold else np.ones(gamma.shape)

    def terms(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """What the nodes of :func:`_normalise` read."""
        gamma, beta, _, _ = self._values(tensors)
        eps = self.norm.eps * self._factor(tensors) ** 2
        return dict(zip(_terms_of(self.at), (eps, gamma, beta), strict=True))

    def found(self, tensors: Mapping[str, Array], mean: Array, variance: Array) -> dict[str, Array]:
        """The moments of x, in place of the old ones; (C,)."""
        _, beta, old_mean, old_variance = self._values(tensors)
        # An x that is measured itself moves by its distance from the old mean.
        factor, shift = self._factor(tensors), beta if self.is_fold else old_mean
        seen = factor > BLIND_GAIN
        real = old_mean + (mean - shift) / factor
        spread = np.where(seen, variance / factor**2, old_variance)
        return {
            self.norm.mean: np.where(seen, real, old_mean).astype(np.float32),
            self.norm.variance: spread.astype(np.float32),
        }


def _terms_of(at: str) -> tuple[str, str, str]:
    """Names of eps, gamma and beta as :func:`_normalise` reads them."""
    return f"{at}/eps", f"{at}/gamma", f"{at}/beta"


def _probe_folds(model: ir.Model, bundle: Bundle, terms: OutsideTensors) -> list[_Probe]:
    """After every layer with a folded BatchNorm, insert nodes that normalise by the batch."""
    probes = []
    for fold in bundle.manifest.folds.values():
        (use,) = model.graph.initializers[fold.bias].uses()
        output = use.node.outputs[0]
        readers = list(output.uses())
        at, size = f"probe/{fold.bias}", bundle.manifest.tensors[fold.gamma].shape[0]
        norm = _normalise(model, output, terms, at, size)
        model.graph.insert_after(use.node, norm.nodes)
        for reader in readers:
            reader.node.replace_input_with(reader.idx, norm.result)
        for i, value in enumerate(model.graph.outputs):
            if value is output:
                model.graph.outputs[i] = norm.result
        probes.append(_Probe(norm.mean, norm.variance, fold_norm(fold), True, at))
    return probes


def _probe_norms(model: ir.Model, bundle: Bundle, terms: OutsideTensors) -> list[_Probe]:
    """Replace every BatchNormalization by one that normalises by the batch."""
    probes = []
    for node in [n for n in model.graph if n.op_type == "BatchNormalization"]:
        x = node.inputs[0]
        known = bundle.manifest.tensors
        own = norm_of(node, known)
        if x is None or not set(own.stored) <= set(known):
            continue
        at, size = f"probe/{node.name}", known[own.mean].shape[0]
        norm = _normalise(model, x, terms, at, size)
        model.graph.insert_before(node, norm.nodes)
        ir.convenience.replace_all_uses_with(
            node.outputs[0], norm.result, replace_graph_outputs=True
        )
        probes.append(_Probe(norm.mean, norm.variance, own, False, at))
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


def _normalise(
    model: ir.Model, x: ir.Value, terms: OutsideTensors, at: str, channels: int
) -> _Norm:
    """gamma * (x - mean) / sqrt(variance + eps) + beta, channels on axis 1."""
    rank = len(x.shape) if x.shape is not None else 4
    shape = [1, channels, *[1] * (rank - 2)]
    axes = ir.node("Constant", [], {"value": ir.tensor(np.array([0, *range(2, rank)], np.int64))})
    eps, gamma, beta = (terms.add(name, shape) for name in _terms_of(at))
    for value in (eps, gamma, beta):
        model.graph.register_initializer(value)
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value) -> ir.Value:
        nodes.append(ir.node(op, list(inputs)))
        return nodes[-1].outputs[0]

    mean = add("ReduceMean", x, axes.outputs[0])
    away = add("Sub", x, mean)
    square = add("Mul", away, away)
    variance = add("ReduceMean", square, axes.outputs[0])
    spread = add("Sqrt", add("Add", variance, eps))
    scaled = add("Mul", add("Div", away, spread), gamma)
    add("Add", scaled, beta)
    return _Norm([axes, *nodes], mean, variance)


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
    run = _runner(serialized(model), bundle, _file_of(bundle, tensors))
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


def _file_of(bundle: Bundle, tensors: Mapping[str, Array]) -> dict[str, bytes]:
    return {WEIGHTS: serialize(tensors, bundle.manifest.tensors)}


def _runner(
    text: bytes, bundle: Bundle, files: Mapping[str, bytes], exact: bool = True
) -> Callable[[Array], list[Array]]:
    """One session of an edited graph; one that is not ``exact`` is fast."""
    how = reference_session.unfused_session if exact else reference_session.float_session
    session = how(text, files)
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
