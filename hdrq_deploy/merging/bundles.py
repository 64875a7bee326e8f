"""Merge calibrated bundles without training, torch or the original models.

Weights and biases are merged by a method of :mod:`.methods`, scales become weighted means,
BatchNorm moments are matched, and codes are rounded by :mod:`.rounding`. Parents are read from
mapped files, so that they never have to fit into memory together. The merge is written tensor by
tensor, but for one with statistics, whose tensors are in memory until all layers are merged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ..comparison.golden import check_merge
from ..errors import MergeError
from ..formats.atomic_files import check_output
from ..formats.bundle import GRAPH, Bundle
from ..formats.bundle_manifest import Manifest
from ..formats.file_kinds import BUNDLE
from ..formats.statistics import Statistics
from ..graph.biases import bias_sites, fitted, shifts
from ..numerics.batchnorm_fold import graph_tensors
from ..numerics.quantization import along, dequantize
from ..numerics.spec import check_seed
from ..typing import Array, StepProgress
from .activation_scales import ACTIVATION_SCALES, check_activation_scales
from .compatibility import check_compatible
from .layers import LayerMerge, scale_of
from .merge_weights import check_different, check_merge_weights
from .merged_manifest import merged_manifest
from .merged_statistics import merged_statistics
from .methods import MethodOptions, method_of
from .methods.base import float64
from .methods.mean import matched_variance, weighted_mean
from .requantize import graph_with, requantized, requantized_entries
from .rounding import ROUNDINGS, MergedCodes, merge_codes, round_target
from .ways import check_grid, check_way, way_of

__all__ = ["MergedLayers", "Merger", "golden_inputs", "in_parallel", "merge"]


def merge(
    bundles: Sequence[Bundle | str | os.PathLike[str]],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    rounding: str | None = None,
    candidates: int = 100,
    seed: int = 0,
    progress: StepProgress | None = None,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    method: str | None = None,
    method_options: MethodOptions | None = None,
    wbits: int | None = None,
    activation_scales: str = "mean",
) -> Bundle:
    """Merge two or more bundles of one architecture, source and scheme.

    Args:
        bundles: Bundles or their paths.
        output: Folder of the merged bundle.
        weights: One per bundle, >= 0, sum 1; equal by default.
        rounding: Name of one of ``ROUNDINGS``; by default the best that the bundles allow, see
            :func:`.ways.way_of`.
        candidates: Draws of ``advanced``.
        seed: Seed of the draws.
        progress: Called with (tensors done, tensors in all).
        threads: Tensors merged at a time; one per core by default. The result is the same.
        options: Further entries of the manifest's record of this merge.
        method: Name of one of ``METHODS`` that needs no source checkpoint; by default regression
            where all bundles hold statistics, else the mean.
        method_options: Numbers that the method reads.
        wbits: Weight bits of the merge, 2 to 8, where they are others than the parents'; the
            first layer and the last ones keep 8.
        activation_scales: Name of one of ``ACTIVATION_SCALES``.

    Raises:
        MergeError: Fewer than two bundles, one named twice, weights, a rounding or a method that
            do not fit, or bundles that differ in something a merge needs equal; the first
            difference is named.
        SpecError: A seed that NumPy does not take, or bits that codes cannot have.
        BundleError: A path is no bundle, or a bundle is damaged.
        CheckFailed: The merged graph gives no finite output for a golden input.

    Source:
        Shin et al., ICML 2025, section 4.3 (rounding); Li et al., ECCV 2024 (BatchNorm); Jin et
        al., ICLR 2023 (regression); Frantar et al., ICLR 2023 (compensated rounding).
    """
    check_merge_weights(None, len(bundles), "bundle")
    parents = [b if isinstance(b, Bundle) else Bundle.open(b) for b in bundles]
    method, rounding = way_of(parents, method, rounding, wbits is not None)
    merger = Merger(
        parents,
        rounding,
        candidates,
        seed,
        method,
        method_options,
        wbits=wbits,
        activation_scales=activation_scales,
    )
    merge_weights = merger.check_weights(weights)
    check_different([parent.path for parent in merger.parents])
    return merger.write(output, merge_weights, progress, threads, options)


def golden_inputs(parents: Sequence[Bundle]) -> dict[str, Array]:
    """One golden input of every parent, without outputs: the merged graph gives those."""
    inputs = [golden["input"][:1] for golden in (p.golden() for p in parents) if golden]
    return {"input": np.concatenate(inputs)} if inputs else {}


def in_parallel(
    work: Callable[[Any], None], items: Sequence[Any], threads: int | None = None
) -> None:
    """Call ``work`` on every item with one thread per core; each uses one BLAS thread."""
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool,
    ):
        list(pool.map(work, items))


@dataclass(frozen=True)
class MergedLayers:
    """A merge before rounding, BatchNorm not applied to its weights.

    Attributes:
        weights: Real weights (float32) by the names of their codes.
        others: All other tensors but those that follow from BatchNorm.
    """

    weights: Mapping[str, Array]
    others: Mapping[str, Array]


class Merger:
    """Parents that fit each other, and their merge at any merge weights.

    Args:
        bundles: Two or more bundles or paths.
        rounding: Name of one of ``ROUNDINGS``.
        candidates: Draws of ``advanced``.
        seed: Seed of the draws.
        method: Name of one of ``METHODS`` that needs no source checkpoint.
        method_options: Numbers that the method reads.
        keep: Keep every layer's system of a regression in memory: merges at further weights then
            cost little, and differ in the last digits of single precision.
        wbits: Weight bits of the merge; None for those of the parents.
        activation_scales: Name of one of ``ACTIVATION_SCALES``.

    Raises:
        MergeError: See :func:`merge`.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle | str | os.PathLike[str]],
        rounding: str = "nearest",
        candidates: int = 1,
        seed: int = 0,
        method: str = "mean",
        method_options: MethodOptions | None = None,
        keep: bool = False,
        *,
        wbits: int | None = None,
        activation_scales: str = "mean",
    ) -> None:
        check_merge_weights(None, len(bundles), "bundle")
        check_way(method, rounding, wbits is not None)
        check_activation_scales(activation_scales)
        self.method_options = method_options or MethodOptions()
        if candidates < 1:
            raise MergeError(f"found candidates={candidates}; needed 1 or more")
        if seed < 0:
            raise MergeError(f"found seed={seed}; needed 0 or more")
        check_seed(seed)
        self.parents = [b if isinstance(b, Bundle) else Bundle.open(b) for b in bundles]
        for other in self.parents[1:]:
            check_compatible(self.parents[0], other)
        check_grid(self.parents[0].manifest.scheme.grid, rounding, wbits is not None)
        self.rounding, self.candidates, self.seed = rounding, candidates, seed
        self.method, self.wbits, self.activation_scales = method, wbits, activation_scales
        self._activations = {a.scale: a for a in self.parents[0].manifest.activations}
        entries = self.parents[0].manifest.tensors
        if wbits is not None:
            entries = requantized_entries(self.parents[0], wbits)
        self.entries = entries
        self.code_names = sorted(n for n, entry in entries.items() if entry.role == "codes")
        self._sites = bias_sites(self.parents[0].graph_ir())
        chosen = method_of(method)
        self._layers: LayerMerge | None = None
        by_layers = chosen.needs_statistics or ROUNDINGS[rounding].needs_statistics
        if by_layers or wbits is not None:
            self._layers = LayerMerge(
                self.parents, chosen, rounding, self.method_options, entries, keep
            )

    def in_memory(self) -> Merger:
        """The same merger, which reads every tensor of its parents once; for many merges."""
        merger = copy(self)
        merger.parents = [parent.in_memory() for parent in self.parents]
        if self._layers is not None:
            merger._layers = self._layers.of(merger.parents)
        return merger

    def check_weights(self, weights: Sequence[float] | None) -> list[float]:
        """See :func:`.merge_weights.check_merge_weights`."""
        return check_merge_weights(weights, len(self.parents), "bundle")

    def write(
        self,
        output: str | os.PathLike[str],
        merge_weights: Sequence[float],
        progress: StepProgress | None = None,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
        statistics: bool = True,
    ) -> Bundle:
        """The merge as a bundle; see :func:`merge`.

        Without ``statistics`` those of the parents are not merged: nobody will merge the result.
        """
        check_output(output, BUNDLE, [parent.path for parent in self.parents])
        report = _counter(progress, len(self.entries))
        golden = golden_inputs(self.parents)
        layers: dict[str, Any] = {}

        def weighted() -> Statistics | None:
            if not statistics:
                return None
            return merged_statistics(
                self.parents,
                merge_weights,
                lambda work, names: in_parallel(work, names, threads),
            )

        def put_all(put: Callable[[str, Array], None]) -> Manifest:
            small = self.floats(merge_weights)
            for name, value in small.items():
                put(name, value)
                report()

            def one(name: str) -> None:
                codes, layers[name] = self.codes(name, merge_weights, small)
                put(name, codes)
                report()

            in_parallel(one, self.code_names, threads)
            return self.manifest(merge_weights, dict(sorted(layers.items())), options or {})

        like = self.parents[0]
        if self._layers is None:
            return Bundle.write_like(output, like, put_all, golden, check_merge, weighted)
        merged, fallbacks = self._by_layers(self._layers, merge_weights, layers, threads, report)
        record = {**(options or {}), **({"fallbacks": fallbacks} if fallbacks else {})}
        manifest = self.manifest(merge_weights, dict(sorted(layers.items())), record)
        graph = (like.path / GRAPH).read_bytes()
        if self.wbits is not None:
            manifest = requantized(manifest, self.entries, self.wbits)
            graph = graph_with(like, merged, self.entries)
        return Bundle.write(output, manifest, merged, graph, golden, check_merge, weighted())

    def tensors(self, merge_weights: Sequence[float]) -> dict[str, Array]:
        """All tensors of a merge, in memory."""
        if self._layers is not None:
            return self._by_layers(self._layers, merge_weights, {}, None, lambda: None)[0]
        merged = self.floats(merge_weights)
        for name in self.code_names:
            merged[name] = self.codes(name, merge_weights, merged)[0]
        return merged

    def floats(self, merge_weights: Sequence[float]) -> dict[str, Array]:
        """Everything but the codes; what follows from a fold is computed from its parts.

        Scales and biases are weighted means here, also where a merge with statistics gives its
        layers others.
        """
        return self._fitted(self._means(merge_weights))

    def _means(self, merge_weights: Sequence[float]) -> dict[str, Array]:
        """Everything but the codes and what follows from folds."""
        manifest = self.parents[0].manifest
        derived = {name for fold in manifest.folds.values() for name in (fold.scale, fold.bias)}
        return {
            name: self._float(name, merge_weights)
            for name, entry in manifest.tensors.items()
            if entry.role != "codes" and name not in derived
        }

    def _fitted(self, merged: dict[str, Array]) -> dict[str, Array]:
        """With what follows from folds, and biases that integer kernels hold."""
        manifest = self.parents[0].manifest
        for fold in manifest.folds.values():
            merged[fold.scale], merged[fold.bias] = graph_tensors(
                merged[fold.raw_scale],
                merged[fold.gamma],
                merged[fold.beta],
                merged[fold.mean],
                merged[fold.variance],
                fold.eps,
                None if fold.raw_bias is None else merged[fold.raw_bias],
            )
        return merged | fitted(merged, self._sites, shifts(self.entries), manifest.folds)

    def _by_layers(
        self,
        merging: LayerMerge,
        merge_weights: Sequence[float],
        layers: dict[str, Any],
        threads: int | None,
        report: Callable[[], None],
    ) -> tuple[dict[str, Array], dict[str, str]]:
        """All tensors, layer by layer, and why layers are not as asked for, by weight.

        ``layers`` is given the statistics of each tensor of codes.
        """
        merged, fallbacks = self._means(merge_weights), dict[str, str]()
        found: dict[str, dict[str, Array]] = {}

        def one(name: str) -> None:
            found[name], fallback, codes = self._layer(merging, name, merge_weights, merged)
            if fallback:
                fallbacks[name] = fallback
            if codes is not None:
                layers[name] = codes.record()
            report()

        in_parallel(one, sorted({*self.code_names, *merging.weights}), threads)
        for name in sorted(found):
            merged |= found[name]
        return self._fitted(merged), dict(sorted(fallbacks.items()))

    def _layer(
        self,
        merging: LayerMerge,
        name: str,
        merge_weights: Sequence[float],
        means: Mapping[str, Array],
    ) -> tuple[dict[str, Array], str, MergedCodes | None]:
        """The tensors of one layer, why it is not as asked for, and what rounding did."""
        scale = scale_of(name, self.parents[0]) if name in self.code_names else None
        if scale is not None:
            per_channel = self.parents[0].manifest.scheme.per_channel
            layer = merging.rounded(name, merge_weights, means[scale], per_channel)
            values: dict[str, Array] = {name: layer.codes.codes, scale: layer.scale}
            bias: Array | None
            bias, fallback, codes = layer.bias, layer.fallback, layer.codes
            behind = layer.behind
            weight = dequantize(layer.codes.codes, layer.scale, self.entries[name].axis)
        else:
            real = merging.real(name, merge_weights)
            weight = real.weight.astype(np.float32)
            values = {name: weight}
            bias, fallback, codes, behind = real.bias, real.fallback, None, real.behind
        values |= self._bias(merging, name, bias)
        return values | merging.moments(name, weight, merge_weights, behind), fallback, codes

    @staticmethod
    def _bias(merging: LayerMerge, name: str, bias: Array | None) -> dict[str, Array]:
        """The bias that was merged with a layer's weight, where the layer has one."""
        record = merging.record(name)
        if bias is None or record is None or record.bias is None:
            return {}
        return {record.bias: bias.astype(np.float32)}

    def codes(
        self, name: str, merge_weights: Sequence[float], floats: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Any]]:
        """Merged codes of one tensor, and statistics of its rounding."""
        entry, scale = self.parents[0].manifest.tensors[name], scale_of(name, self.parents[0])
        if method_of(self.method).is_mean and not entry.spec.floating:
            merged = merge_codes(
                [parent.tensor(name) for parent in self.parents],
                [parent.tensor(scale) for parent in self.parents],
                floats[scale],
                merge_weights,
                entry.spec,
                self.rounding,
                self.candidates,
                (self.seed, self.code_names.index(name)),
            )
        else:
            real = self._dequantized(name)
            merged = round_target(
                self._merged(real, merge_weights), real, floats[scale], entry.spec
            )
        return merged.codes, merged.record()

    def unrounded(
        self, merge_weights: Sequence[float], moments: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """All tensors of a merge, in place of codes the real weights (float32) before rounding.

        Args:
            merge_weights: One per parent, sum 1.
            moments: Means and variances of BatchNorms in place of the merged ones, by tensor name;
                where they are given, none is corrected from the parents' statistics.
        """
        layers = self.merged_layers(merge_weights, corrected=moments is None)
        return self.folded(layers, moments or {})

    def merged_layers(self, merge_weights: Sequence[float], corrected: bool = True) -> MergedLayers:
        """The layers of a merge before rounding, which :meth:`folded` makes a network of.

        Args:
            merge_weights: One per parent, sum 1.
            corrected: Correct the moments of BatchNorm from the parents' statistics.
        """
        merged, real = self._means(merge_weights), dict[str, Array]()
        if self._layers is None:
            for name in self.code_names:
                weight = self._merged(self._dequantized(name), merge_weights)
                real[name] = weight.astype(np.float32)
            return MergedLayers(real, merged)
        for name in sorted({*self.code_names, *self._layers.weights}):
            layer = self._layers.real(name, merge_weights)
            place = real if name in self.code_names else merged
            place[name] = layer.weight.astype(np.float32)
            merged |= self._bias(self._layers, name, layer.bias)
            if corrected:
                merged |= self._layers.moments(name, layer.weight, merge_weights, layer.behind)
        return MergedLayers(real, merged)

    def folded(self, layers: MergedLayers, moments: Mapping[str, Array]) -> dict[str, Array]:
        """All tensors of merged layers at these BatchNorm moments; see :meth:`unrounded`."""
        merged = self._fitted({**layers.others, **moments})
        manifest, real = self.parents[0].manifest, dict(layers.weights)
        for name in real.keys() & manifest.folds.keys():
            fold = manifest.folds[name]
            gain = np.asarray(merged[fold.scale] / merged[fold.raw_scale])
            real[name] = real[name] * along(gain, real[name].ndim, manifest.tensors[name].axis)
        return merged | real

    def manifest(
        self, merge_weights: Sequence[float], layers: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Manifest:
        """The manifest of a merge; ``layers`` are the statistics of each tensor of codes."""
        record = {
            "rounding": self.rounding,
            **({"candidates": self.candidates} if self.rounding == "advanced" else {}),
            **({} if self.method == "mean" else {"method": self.method}),
            **{n: getattr(self.method_options, n) for n in method_of(self.method).options},
            **({} if self.wbits is None else {"wbits": self.wbits}),
            **(
                {}
                if self.activation_scales == "mean"
                else {"activation_scales": self.activation_scales}
            ),
            **options,
        }
        return merged_manifest(self.parents, merge_weights, record, layers, self.seed)

    def _dequantized(self, codes: str) -> list[Array]:
        """The real weights that each parent's codes stand for, BatchNorm not applied."""
        axis = self.parents[0].manifest.tensors[codes].axis
        scale = scale_of(codes, self.parents[0])
        return [dequantize(p.tensor(codes), p.tensor(scale), axis) for p in self.parents]

    def _merged(self, tensors: Sequence[Array], merge_weights: Sequence[float]) -> Array:
        """Trained parameters merged by the method, float64."""
        method = method_of(self.method)
        return method.merge(float64(tensors), merge_weights, None, self.method_options)

    def _float(self, name: str, merge_weights: Sequence[float]) -> Array:
        values = [parent.tensor(name) for parent in self.parents]
        role = self.parents[0].manifest.tensors[name].role
        if role == "bn_var":
            mean = _mean_of(name, self.parents[0].manifest)
            means = [parent.tensor(mean) for parent in self.parents]
            return matched_variance(values, means, merge_weights)
        if name in self._activations:
            way = ACTIVATION_SCALES[self.activation_scales]
            return way.merged(self.parents, values, merge_weights, self._activations[name])
        if role == "constant":
            if any(not np.array_equal(value, values[0]) for value in values):
                raise MergeError(
                    f"found different constants {name} in {self.parents[0].path} and another "
                    "bundle; needed models that differ in trained weights only"
                )
            return values[0]
        if role == "float" and values[0].size > 0 and values[0].ndim > 0:
            return self._merged(values, merge_weights).astype(values[0].dtype)
        return weighted_mean(values, merge_weights)


def _counter(progress: StepProgress | None, total: int) -> Callable[[], None]:
    """Calls ``progress`` with one more tensor done each time it is called."""
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    return report


def _mean_of(variance: str, manifest: Manifest) -> str:
    """The name of the mean that belongs to a BatchNorm's variance."""
    for fold in manifest.folds.values():
        if fold.variance == variance:
            return fold.mean
    mean = variance.removesuffix("running_var") + "running_mean"
    if mean in manifest.tensors:
        return mean
    raise MergeError(f"found a variance {variance} without a mean; make the bundle again")
