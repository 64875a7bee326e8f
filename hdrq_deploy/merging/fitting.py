"""A merge fitted, layer after layer, to what its parents put out on images without labels.

Averaging weights is a guess at a network that does what every parent does on its own domain. With
some images of each domain at hand it need not stay one. From the first layer to the last, a layer's
inputs are computed by the merged network as far as it is fitted, quantizers and rounded weights
included, and its targets by each domain's guide: its own parent, or a better model of the same
domain, such as one of more bits or a float one. The layer gets the weights and the bias of
least squares, held near the merged ones (:mod:`..numerics.guided_layer`), and is rounded with
compensated errors on these inputs. Scales of activations are searched on the way. Nothing is
trained, and no label and no torch is needed.

BatchNorm that a bundle keeps apart is part of the layer before it: targets are taken behind it, and
its moments become those of the new weights, so that a later merge averages what it should.

Source:
    After E-PMQ (arXiv 2605.16882: experts' outputs as targets, anchored to the merged weights; of
    which the abstract alone was at hand), by default with quantized parents instead of float
    experts.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from ..errors import DataError, EngineError, MergeError
from ..formats.bundle import Bundle
from ..graph.biases import added_bias, folded_tensors
from ..graph.operators import LAYERS
from ..graph.qdq import producer, quantizer_of, transposes_weight
from ..graph.stepwise import Steps, Walk
from ..numerics.batches import in_batches
from ..numerics.batchnorm_fold import BLIND_GAIN
from ..numerics.error_compensation import compensated, with_damping
from ..numerics.guided_layer import (
    GuidedLayer,
    RowSums,
    SplitMoments,
    convolution_rows,
    some_rows,
)
from ..numerics.layer_matrix import rows_of, weight_of
from ..numerics.quantization import along, dequantize, rounded, search_scale, some_values
from ..numerics.spec import QuantSpec, check_seed
from ..typing import Array, StepProgress
from .batchnorm_correction import Norm, fold_norm, norm_behind, norm_of, parameters_of
from .compatibility import refuse_different
from .rewriting import settled, write_again
from .scales import searched_scale
from .unrounded_network import put_weights

__all__ = ["ANCHOR", "check_domains", "check_guides", "check_sweeps", "fit"]

# The hold near the merged weights where there are too few images to choose it by: on one batch in
# four of every domain.
ANCHOR, _HELD_OUT = 0.01, 4
# Images that go through a layer at a time, rows of a layer and a domain at most, and values that a
# scale is searched on.
_BATCH, _ROWS, _SAMPLES = 8, 1 << 16, 1 << 14
Floats = npt.NDArray[np.float64]


def fit(
    bundle: Bundle,
    parents: Sequence[Bundle],
    images: Mapping[str, npt.NDArray[np.float32]],
    output: str | os.PathLike[str],
    anchor: float | None = None,
    seed: int = 0,
    progress: StepProgress | None = None,
    guides: Sequence[Bundle] = (),
    sweeps: int = 1,
) -> Bundle:
    """Write a merge again, its layers fitted to what its parents put out.

    Domains count as their parents do in the merge. A layer whose weight or bias others share, and
    a transposed convolution, stay as they are; the manifest names them.

    Args:
        bundle: The merge.
        parents: The bundles that it was merged from.
        images: Inputs (N, C, H, W) by domain, of every parent that counts.
        output: Folder of the new bundle.
        anchor: Strength of the hold near the merged weights, >= 0, relative to the mean variance
            of a layer's inputs. By default chosen for every layer: the best of 0.001, 0.01,
            0.1 and 1 on a quarter of the images when it is solved on the others, or its merged
            weights where none is better; 0.01 with fewer than four images of a domain.
        seed: Seed of the samples that scales and layers are fitted on.
        progress: Called with (layers done, layers in all).
        guides: Bundles of the same model and domains whose outputs are the targets instead of the
            parents'; of any bits, or float ones.
        sweeps: How often all layers are fitted, each time from what the sweep before left.

    Raises:
        MergeError: Other parents than the merge's, images of a domain that none of them has, a
            parent without images, an anchor < 0, no sweep, or guides of another model, of other
            domains or not of all of them.
        SpecError: A seed that NumPy does not take.
        DataError: Fewer than two images, or images that the graph does not take.
        CheckFailed: The new graph gives no finite output for a golden input.
    """
    if anchor is not None and not 0 <= anchor < float("inf"):
        raise MergeError(f"found anchor {anchor}; needed a number >= 0")
    check_sweeps(sweeps)
    check_seed(seed)
    by_domain = _guides(bundle, parents, images, guides)
    tensors, report = bundle.tensors(), progress or (lambda done, total: None)
    try:
        with threadpool_limits(1, user_api="blas"):
            for sweep in range(sweeps):
                work = _Fit(bundle, tensors, by_domain, anchor, seed)
                work.run(_part_of(report, sweep, sweeps))
                tensors = settled(bundle, work.tensors)
    except EngineError as error:
        raise DataError(f"the images do not fit {bundle.path}: {error}") from error
    record: dict[str, Any] = {
        "images": {name: len(rows) for name, rows in images.items()},
        "anchor": work.anchor,
        **({} if work.anchor is not None else {"anchors": work.anchors}),
        **({"guides": [guide.manifest_sha256 for guide in guides]} if guides else {}),
        **({"sweeps": sweeps} if sweeps > 1 else {}),
        "seed": seed,
        **({"left": work.left} if work.left else {}),
    }
    return write_again(bundle, tensors, {"fit": record}, output)


def check_sweeps(sweeps: int) -> None:
    """Refuse a fit that fits nothing.

    Raises:
        MergeError: Fewer than one sweep.
    """
    if sweeps < 1:
        raise MergeError(f"found {sweeps} sweeps; needed 1 or more")


def _part_of(progress: StepProgress, sweep: int, sweeps: int) -> StepProgress:
    """Progress of one of several sweeps over the same layers."""
    return lambda done, total: progress(sweep * total + done, sweeps * total)


@dataclass(frozen=True)
class _Guide:
    """A domain's images, the bundle whose outputs are the targets there, and how much it counts."""

    name: str
    bundle: Bundle
    images: Array
    share: float


def check_domains(
    parents: Sequence[Bundle], merge_weights: Sequence[float], names: Collection[str]
) -> None:
    """Refuse images of other domains than the parents', before any work.

    Args:
        parents: The bundles of a merge.
        merge_weights: One per parent; a parent of weight 0 needs no images.
        names: Domains that there are images of.

    Raises:
        MergeError: Says which domain lacks images or a parent.
    """
    known = [name for parent in parents for name in parent.manifest.domains]
    if unknown := [name for name in names if name not in known]:
        raise MergeError(
            f"found images of {unknown[0]}, which no bundle is of; name the images by the bundles' "
            f"domains: {', '.join(known)}"
        )
    for parent, weight in zip(parents, merge_weights, strict=True):
        if weight > 0 and not any(name in names for name in parent.manifest.domains):
            raise MergeError(
                f"{parent.path}: found no images of {' or '.join(parent.manifest.domains)}; a fit "
                "needs some of every bundle's domain"
            )
    if twice := [name for name in names if known.count(name) > 1]:
        raise MergeError(
            f"found two bundles of {twice[0]}; a fit needs to know which of them its images are of"
        )


def check_guides(guides: Sequence[Bundle], like: Bundle, names: Collection[str]) -> None:
    """Refuse bundles that cannot guide a fit, before any work.

    Args:
        guides: Bundles whose outputs are to be the targets; none where the parents guide.
        like: A parent of the merge.
        names: Domains that there are images of.

    Raises:
        MergeError: Says which guide is of another model or domain, or which domain has none or two.
    """
    layers = _kinds_of(like) if guides else {}
    for guide in guides:
        domains = guide.manifest.domains
        if not set(domains) & set(names):
            raise MergeError(
                f"{guide.path}: found no images of {' or '.join(domains)}; needed a bundle of "
                f"one of {', '.join(names)}"
            )
        _check_guide(guide, like, layers)
    for name in names if guides else ():
        own = [guide for guide in guides if name in guide.manifest.domains]
        if len(own) != 1:
            found = f": {', '.join(str(guide.path) for guide in own)}" if own else ""
            raise MergeError(
                f"found {len(own)} bundles of {name} to fit to{found}; needed one of every domain "
                "that there are images of"
            )


def _check_guide(guide: Bundle, like: Bundle, layers: Mapping[str, _Kind]) -> None:
    """Refuse a guide whose outputs mean something else than those of a parent."""
    mine, theirs = guide.manifest, like.manifest
    own = _kinds_of(guide)
    pairs: list[tuple[str, Any, Any]] = [
        ("model", mine.model, theirs.model),
        ("input shape", mine.input_shape, theirs.input_shape),
        ("preprocessing", mine.preprocessing, theirs.preprocessing),
        *(
            [("classes", mine.classes, theirs.classes)]
            if mine.classes is not None and theirs.classes is not None
            else []
        ),
        *((f"layer {name}", own.get(name), kind) for name, kind in layers.items()),
    ]
    need = "a merge is fitted to bundles of its own model: calibrate them with one version of it"
    refuse_different(pairs, guide, like, need)


@dataclass(frozen=True)
class _Kind:
    """What layers of one name have in common, whatever their bits."""

    operator: str
    groups: int
    features: int
    outputs: int
    geometry: tuple[tuple[str, tuple[int, ...]], ...]

    def __str__(self) -> str:
        geometry = "".join(f", {name} {' '.join(map(str, v))}" for name, v in self.geometry)
        return (
            f"{self.operator} of {self.features} features to {self.outputs} outputs in "
            f"{self.groups} groups{geometry}"
        )


def _kinds_of(bundle: Bundle) -> dict[str, _Kind]:
    """The layers of a bundle that can be fitted, by the names of their nodes."""
    found, model = {}, bundle.graph_ir()
    # Their shapes are those of the weights.
    put_weights(model, bundle, lambda name: _constant(name, bundle.tensor(name)))
    for layer in _layers_of(model, bundle)[0]:
        outputs = bundle.manifest.tensors[layer.weight].shape[layer.axis]
        geometry = tuple(
            (name, tuple(layer.node.attributes[name].as_ints()))
            for name in ("strides", "dilations", "pads")
            if name in layer.node.attributes
        )
        kind = _Kind(
            "Conv" if layer.node.op_type == "Conv" else "matrix product",
            layer.groups,
            layer.features,
            outputs,
            geometry,
        )
        found[str(layer.node.name)] = kind
    return found


def _guides(
    bundle: Bundle,
    parents: Sequence[Bundle],
    images: Mapping[str, Array],
    others: Sequence[Bundle],
) -> list[_Guide]:
    """The guides of a fit, their shares of sum 1."""
    check_guides(others, bundle, images)
    recorded = {record.manifest_sha256: record.weight for record in bundle.manifest.parents}
    for parent in parents:
        if parent.manifest_sha256 not in recorded:
            raise MergeError(f"{parent.path}: found a bundle that {bundle.path} is not merged from")
    weights = [recorded[parent.manifest_sha256] for parent in parents]
    check_domains(parents, weights, images)
    guides = []
    for parent, weight in zip(parents, weights, strict=True):
        shares = {n: share for n, share in parent.manifest.domains.items() if n in images}
        for name, share in shares.items() if weight > 0 else ():
            if len(images[name]) < 2:
                raise DataError(f"found {len(images[name])} image of {name}; needed 2 or more")
            guide = next((other for other in others if name in other.manifest.domains), parent)
            guides.append(_Guide(name, guide, images[name], weight * share / sum(shares.values())))
    if abs(sum(guide.share for guide in guides) - 1) > 1e-6:
        raise MergeError(
            f"found {len(parents)} of the bundles that {bundle.path} is merged from; needed all of "
            "its parents"
        )
    return guides


@dataclass(frozen=True)
class _Layer:
    """A layer that can be fitted.

    Attributes:
        node: Its node.
        output: What its targets are: behind its bias, and behind a BatchNorm that is a node.
        weight: Its weight's tensor.
        bias: Its bias; None where it has none, or BatchNorm stands for it.
        norm: BatchNorm behind it.
        layout, groups, features: As :class:`..formats.statistics.LayerRecord`.
        axis: Axis of the outputs in its weight.
    """

    node: ir.Node
    output: ir.Value
    weight: str
    bias: str | None
    norm: Norm | None
    layout: str
    groups: int
    features: int
    axis: int

    def rows(self, x: Array, weight: Array, most: int, draws: np.random.Generator) -> Array:
        """Rows of an input, (groups, rows, features)."""
        if self.layout != "conv":
            return some_rows(x, x.ndim - 1, 1, most, draws)
        kernel = weight.shape[2:]
        view = convolution_rows(x, kernel, *_geometry(self.node, x.shape[2:], kernel))
        return some_rows(view, 1 + len(kernel), self.groups, most, draws)

    def targets(self, y: Array, most: int, draws: np.random.Generator) -> Array:
        """The same rows of an output, (groups, rows, outputs of a group)."""
        view = np.moveaxis(y, 1, -1) if self.layout == "conv" else y
        return some_rows(view, view.ndim - 1, self.groups, most, draws)


def _geometry(
    node: ir.Node, sizes: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and pads of a convolution."""
    rank = len(kernel)
    strides = _numbers(node, "strides", [1] * rank)
    dilations = _numbers(node, "dilations", [1] * rank)
    auto = node.attributes.get("auto_pad")
    way = "NOTSET" if auto is None else auto.as_string()
    if way == "NOTSET":
        return strides, dilations, _numbers(node, "pads", [0] * 2 * rank)
    if way == "VALID":
        return strides, dilations, [0] * 2 * rank
    whole = [
        max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    less = [total // 2 for total in whole]
    more = [total - part for total, part in zip(whole, less, strict=True)]
    return strides, dilations, less + more if way == "SAME_UPPER" else more + less


def _numbers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    given = node.attributes.get(name)
    return default if given is None else [int(value) for value in given.as_ints()]


class _Fit:
    """The tensors of a merge, fitted layer by layer; ``tensors`` are where they start."""

    def __init__(
        self,
        bundle: Bundle,
        tensors: Mapping[str, Array],
        guides: Sequence[_Guide],
        anchor: float | None,
        seed: int,
    ) -> None:
        self._bundle, self._guides, self._seed = bundle, guides, seed
        few = min(len(guide.images) for guide in guides) < _HELD_OUT
        self.anchor = ANCHOR if anchor is None and few else anchor
        # What was chosen, by weight; None where no hold was best and the weight stayed.
        self.anchors: dict[str, float | None] = {}
        self._entries, self._folds = bundle.manifest.tensors, bundle.manifest.folds
        self.tensors = dict(tensors)
        self._real = _real_weights(bundle, self.tensors)
        model, self._steps = _steps_of(bundle, self._real)
        self._layers, self.left = _layers_of(model, bundle)
        self._quantizers = _own_quantizers(model, bundle)
        self._walk = Walk(self._steps, self._real, _batches([g.images for g in guides]))
        graphs: dict[str, tuple[Steps, dict[str, ir.Value]]] = {}
        self._targets = []
        for guide in guides:
            real = _real_weights(guide.bundle, guide.bundle.tensors())
            graph = guide.bundle.graph_sha256
            if graph not in graphs:
                graphs[graph] = self._outputs_of(guide.bundle, real)
            self._targets.append(_Targets(guide, real, *graphs[graph]))

    def _outputs_of(
        self, guide: Bundle, real: Mapping[str, Array]
    ) -> tuple[Steps, dict[str, ir.Value]]:
        """A guide's graph, and what of it each layer is fitted to, by the layer's node."""
        model, steps = _steps_of(guide, real)
        outputs = {str(layer.node.name): layer.output for layer in _layers_of(model, guide)[0]}
        return steps, {name: outputs[name] for name in (str(x.node.name) for x in self._layers)}

    def run(self, progress: StepProgress) -> None:
        """Fit all layers, in the order of the graph."""
        layers = {layer.node: layer for layer in self._layers}
        done = 0
        for node in list(self._steps.nodes):
            if node in self._quantizers:
                self._walk.to(self._steps.before(node))
                self._scale(node, self._quantizers[node])
            elif node in layers:
                self._walk.to(self._steps.before(node))
                self._settle(layers[node])
                done += 1
                progress(done, len(layers))

    def _scale(self, node: ir.Node, spec: QuantSpec) -> None:
        """Search an activation's scale on what its quantizer reads."""
        source, scale = node.inputs[:2]
        assert source is not None and scale is not None
        draws = np.random.default_rng((self._seed, self._steps.before(node)))
        parts = self._walk.values(str(source.name))
        share = max(_SAMPLES // len(parts), 256)
        some = np.concatenate([some_values(part, share, draws) for part in parts])
        found = search_scale(some, spec)
        self.tensors[str(scale.name)] = self._real[str(scale.name)] = found

    def _settle(self, layer: _Layer) -> None:
        """New weights, codes, scale and bias of one layer."""
        parts = self._seen(layer)
        seen = parts.whole
        entry, shape = self._entries[layer.weight], self._entries[layer.weight].shape
        centred = layer.bias is not None or layer.norm is not None
        factor = layer.norm.gain(self.tensors) if layer.norm else np.ones(shape[layer.axis])
        # The raw weight of a channel that is not seen gets a gain of 1.
        factor = np.where(np.abs(factor) > BLIND_GAIN, factor, 1.0)
        wide = along(factor, len(shape), layer.axis)
        start = rows_of(self._behind_norm(layer), layer)
        anchor = self.anchor
        if anchor is None:
            anchor = parts.best_anchor(start, centred)
            self.anchors[layer.weight] = anchor if np.isfinite(anchor) else None
        rows = seen.solved(start, anchor, centred)
        if entry.role == "codes":
            rows = self._rounded(layer, rows, wide, seen.covariance if centred else seen.inputs)
        else:
            self.tensors[layer.weight] = (weight_of(rows, layer, shape) / wide).astype(np.float32)
        if layer.norm is not None:
            raw_rows = rows / rows_of(np.broadcast_to(wide, shape), layer)
            self._put_norm(layer.norm, seen, factor, raw_rows, seen.bias(rows).reshape(-1))
        elif layer.bias is not None:
            self.tensors[layer.bias] = seen.bias(rows).reshape(-1).astype(np.float32)
        self._refresh(layer)

    def _rounded(self, layer: _Layer, rows: Floats, wide: Array, matrix: Floats) -> Floats:
        """Put a layer's codes and their scale, and return the rows that they stand for.

        Args:
            layer: The layer.
            rows: Its real rows, BatchNorm applied.
            wide: What BatchNorm multiplies by, as it broadcasts to the weight.
            matrix: What errors are measured by.
        """
        entry, fold = self._entries[layer.weight], self._folds.get(layer.weight)
        shape, spec = entry.shape, entry.spec
        name = str(entry.scale) if fold is None else fold.raw_scale
        raw = weight_of(rows, layer, shape) / wide
        per_channel = self._bundle.manifest.scheme.per_channel
        scale = searched_scale(raw, spec, self.tensors[name], per_channel)
        step = along(scale.astype(np.float64), len(shape), spec.axis) * wide
        steps = rows_of(np.broadcast_to(step, shape), layer)
        codes: Array
        if spec.floating:
            codes = rounded(rows / steps, spec)
        else:
            codes = compensated(rows, with_damping(matrix), steps, spec)
        kept = weight_of(codes, layer, shape).astype(self.tensors[layer.weight].dtype)
        self.tensors[name], self.tensors[layer.weight] = scale, kept
        return rows_of(kept.astype(np.float64) * step, layer)

    def _put_norm(
        self, norm: Norm, seen: GuidedLayer, factor: Floats, rows: Floats, bias: Floats
    ) -> None:
        """BatchNorm with the moments of the raw weight's outputs, and the gain that it had."""
        mean, variance = seen.output_moments(rows)
        if norm.raw_bias is not None:
            mean = mean + self.tensors[norm.raw_bias]
        own = {
            norm.mean: mean,
            norm.variance: variance,
            norm.gamma: factor * np.sqrt(variance + norm.eps),
        }
        self.tensors |= {name: value.astype(np.float32) for name, value in own.items()}
        # As a reader computes it from what single precision holds.
        shift = self.tensors[norm.mean].astype(np.float64)
        if norm.raw_bias is not None:
            shift = shift - self.tensors[norm.raw_bias]
        self.tensors[norm.beta] = (bias + shift * norm.gain(self.tensors)).astype(np.float32)

    def _refresh(self, layer: _Layer) -> None:
        """What the walk reads of a layer, from its tensors."""
        fold = self._folds.get(layer.weight)
        changed = [layer.weight, layer.bias]
        if fold is not None:
            scale, bias = folded_tensors(self.tensors, fold)
            self.tensors[fold.scale], self.tensors[fold.bias] = scale, bias
            changed.append(fold.bias)
        elif layer.norm is not None:
            norm = layer.norm
            changed += [norm.gamma, norm.beta, norm.mean, norm.variance]
        for name in changed:
            if name is not None:
                self._real[name] = _real_weight(name, self._bundle, self.tensors)

    def _behind_norm(self, layer: _Layer) -> Floats:
        """The layer's merged real weight, BatchNorm applied."""
        weight = _real_weight(layer.weight, self._bundle, self.tensors).astype(np.float64)
        if layer.norm is None or layer.weight in self._folds:
            return weight
        factor = layer.norm.gain(self.tensors)
        return np.asarray(weight * along(factor, weight.ndim, layer.axis))

    def _seen(self, layer: _Layer) -> SplitMoments:
        """Moments of a layer's inputs and targets, every domain's with its share."""
        weight, source = self._real[layer.weight], layer.node.inputs[0]
        assert source is not None
        inputs = iter(self._walk.values(str(source.name)))
        outputs = weight.shape[layer.axis] // layer.groups
        place, sets = self._steps.before(layer.node), []
        for domain, (guide, targets) in enumerate(zip(self._guides, self._targets, strict=True)):
            sums = [RowSums(layer.groups, layer.features, outputs) for _ in range(2)]
            for batch, y in enumerate(targets.of(str(layer.node.name))):
                x = next(inputs)
                most = max(1, _ROWS * len(x) // len(guide.images))
                # The same rows of both.
                draws = [
                    np.random.default_rng((self._seed, place, domain, batch)) for _ in range(2)
                ]
                part = sums[batch % _HELD_OUT == _HELD_OUT - 1]
                part.add(layer.rows(x, weight, most, draws[0]), layer.targets(y, most, draws[1]))
            whole = sums[0].with_rows_of(sums[1])
            used = [whole] if self.anchor is not None else [whole, *sums]
            sets.append([part.layer() for part in used])
        shares = [guide.share for guide in self._guides]
        return SplitMoments(
            *(GuidedLayer.mixed(domains, shares) for domains in zip(*sets, strict=True))
        )


class _Targets:
    """A guide's outputs of the layers to be fitted, on its own domain's images."""

    def __init__(
        self,
        guide: _Guide,
        real: dict[str, Array],
        steps: Steps,
        outputs: Mapping[str, ir.Value],
    ) -> None:
        self._steps, self._outputs = steps, outputs
        wanted = {str(value.name) for value in outputs.values()}
        self._walk = Walk(steps, real, _batches([guide.images]), wanted)

    def of(self, node: str) -> list[Array]:
        """Outputs of a layer, batch by batch."""
        output = self._outputs[node]
        self._walk.to(self._steps.behind(output))
        return self._walk.take(str(output.name))


def _batches(images: Sequence[Array]) -> list[Array]:
    """Images in batches, every domain's in as many as are held out and not."""
    sizes = [max(1, min(_BATCH, len(part) // _HELD_OUT)) for part in images]
    pairs = zip(images, sizes, strict=True)
    return [rows for part, size in pairs for rows in in_batches(part, size)]


def _real_weight(name: str, bundle: Bundle, tensors: Mapping[str, Array]) -> Array:
    """A tensor as the graph computes with it: codes times their scale."""
    entry = bundle.manifest.tensors[name]
    if entry.role != "codes":
        return tensors[name]
    return dequantize(tensors[name], tensors[str(entry.scale)], entry.axis)


def _real_weights(bundle: Bundle, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {name: _real_weight(name, bundle, tensors) for name in bundle.manifest.tensors}


def _steps_of(bundle: Bundle, real: Mapping[str, Array]) -> tuple[ir.Model, Steps]:
    """A bundle's graph that reads real weights."""
    model = bundle.graph_ir()
    put_weights(model, bundle, lambda name: _constant(name, real[name]))
    return model, Steps(model, bundle.manifest.tensors)


def _constant(name: str, value: Array) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(value, name=name))


def _own_quantizers(model: ir.Model, bundle: Bundle) -> dict[ir.Node, QuantSpec]:
    """Quantizers whose scale can be searched: no other tensor is rounded with it."""
    groups: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            groups.setdefault(str(node.inputs[1].name), []).append(node)  # type: ignore[union-attr]
    specs = {a.scale: QuantSpec(a.bits, a.lo, a.hi) for a in bundle.manifest.activations}
    found = {}
    for scale, (first, *others) in groups.items():
        again = all(_repeats(node, scale) for node in others)
        if again and scale in specs:
            found[first] = specs[scale]
    return found


def _repeats(node: ir.Node, scale: str) -> bool:
    """Whether a quantizer reads values that were rounded with its scale already."""
    before = quantizer_of(node.inputs[0])
    return before is not None and str(before[1].inputs[1].name) == scale  # type: ignore[union-attr]


def _layers_of(model: ir.Model, bundle: Bundle) -> tuple[list[_Layer], dict[str, str]]:
    """Layers that can be fitted, in graph order; and why others are not, by weight."""
    layers: list[_Layer] = []
    left: dict[str, str] = {}
    for node in model.graph:
        if node.op_type not in LAYERS:
            continue
        name, transposed = _weight_of(node)
        entry = bundle.manifest.tensors.get(name)
        if entry is None or entry.role not in {"codes", "float"}:
            continue
        found = _layer_of(model, bundle, node, name, transposed)
        if isinstance(found, str):
            left[name] = found
        else:
            layers.append(found)
    return layers, left


def _weight_of(node: ir.Node) -> tuple[str, bool]:
    """The tensor of a layer's second operand, "" where it is computed; is it transposed?"""
    value = node.inputs[1]
    source = producer(value)
    transposed = source is not None and source.op_type == "Transpose"
    if source is not None and transposed:
        value = source.inputs[0]
    return (str(value.name) if value is not None and value.const_value else "", transposed)


def _layer_of(
    model: ir.Model, bundle: Bundle, node: ir.Node, name: str, transposed: bool
) -> _Layer | str:
    """The layer, or why it cannot be fitted."""
    shape = bundle.manifest.tensors[name].shape
    if node.op_type == "ConvTranspose":
        return "a transposed convolution"
    if len(list(model.graph.initializers[name].uses())) > 1:
        return "its weight is shared"
    if node.op_type != "Conv" and len(shape) != 2:
        return "its weight is no matrix"
    if any(node.attributes[n].as_float() != 1.0 for n in ("alpha", "beta") if n in node.attributes):
        return "its product is scaled"
    value, last = added_bias(model, node)
    fold = bundle.manifest.folds.get(name)
    norm: Norm | None = None
    bias = None if value is None else str(value.name)
    if fold is not None:
        norm, bias = fold_norm(fold), None
    elif bias is not None and not _is_own(model, bundle, bias):
        return "its bias is shared"
    output = last.outputs[0]
    after = norm_behind(last) if fold is None else None
    if after is not None and set(parameters_of(after)) <= set(bundle.manifest.tensors):
        norm, bias, output = norm_of(after, bundle.manifest.tensors, bias), None, after.outputs[0]
    turned = transposed != transposes_weight(node)
    groups = node.attributes.get("group")
    layout = "conv" if node.op_type == "Conv" else "linear" if turned else "matmul"
    return _Layer(
        node=node,
        output=output,
        weight=name,
        bias=bias,
        norm=norm,
        layout=layout,
        groups=1 if groups is None else groups.as_int(),
        features=shape[0] if layout == "matmul" else int(np.prod(shape[1:])),
        axis=1 if layout == "matmul" else 0,
    )


def _is_own(model: ir.Model, bundle: Bundle, bias: str) -> bool:
    entry = bundle.manifest.tensors.get(bias)
    single = len(list(model.graph.initializers[bias].uses())) == 1
    return single and entry is not None and entry.role == "float"
