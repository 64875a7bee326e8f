"""Merge calibrated bundles without training, torch or the original models.

Weights and biases are merged by a method of :mod:`.methods`, scales become weighted means,
BatchNorm moments are matched, and codes are rounded by :mod:`.rounding`. Weights are read from
mapped files and written tensor by tensor, so that the parents never have to fit into memory
together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ..comparison.golden import check_merge
from ..errors import MergeError
from ..formats.atomic_files import check_output
from ..formats.bundle import Bundle
from ..formats.bundle_manifest import Manifest, ParentRecord
from ..formats.file_kinds import BUNDLE
from ..formats.records import Tolerances
from ..graph.biases import bias_sites, fitted, shifts
from ..numerics.batchnorm_fold import graph_tensors
from ..numerics.quantization import along, dequantize
from ..numerics.spec import check_seed
from ..typing import Array
from .merge_weights import check_different, check_merge_weights
from .methods import MethodOptions, method_of
from .methods.base import float64
from .methods.mean import matched_variance, weighted_mean
from .rounding import ROUNDINGS, merge_codes, round_target

__all__ = ["Merger", "golden_inputs", "in_parallel", "merge"]

Progress = Callable[[int, int], None]


def merge(
    bundles: Sequence[Bundle | str | os.PathLike[str]],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    rounding: str = "advanced",
    candidates: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    method: str = "mean",
) -> Bundle:
    """Merge two or more bundles of one architecture, source and scheme.

    Args:
        bundles: Bundles or their paths.
        output: Folder of the merged bundle.
        weights: One per bundle, >= 0, sum 1; equal by default.
        rounding: Name of one of ``ROUNDINGS``.
        candidates: Draws of ``advanced``.
        seed: Seed of the draws.
        progress: Called with (tensors done, tensors in all).
        threads: Tensors merged at a time; one per core by default. The result is the same.
        options: Further entries of the manifest's record of this merge.
        method: Name of one of ``METHODS`` that needs no source checkpoint.

    Raises:
        MergeError: Fewer than two bundles, one named twice, weights, a rounding or a method that
            do not fit, or bundles that differ in something a merge needs equal; the first
            difference is named.
        SpecError: A seed that NumPy does not take.
        BundleError: A path is no bundle, or a bundle is damaged.
        CheckFailed: The merged graph gives no finite output for a golden input.

    Source:
        Shin et al., ICML 2025, section 4.3 (rounding); Li et al., ECCV 2024 (BatchNorm).
    """
    merger = Merger(bundles, rounding, candidates, seed, method)
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


class Merger:
    """Parents that fit each other, and their merge at any merge weights.

    Args:
        bundles: Two or more bundles or paths.
        rounding: Name of one of ``ROUNDINGS``.
        candidates: Draws of ``advanced``.
        seed: Seed of the draws.
        method: Name of one of ``METHODS`` that needs no source checkpoint.

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
    ) -> None:
        check_merge_weights(None, len(bundles), "bundle")
        _check_method(method, rounding)
        if candidates < 1:
            raise MergeError(f"found candidates={candidates}; needed 1 or more")
        if seed < 0:
            raise MergeError(f"found seed={seed}; needed 0 or more")
        check_seed(seed)
        self.parents = [b if isinstance(b, Bundle) else Bundle.open(b) for b in bundles]
        for other in self.parents[1:]:
            _check_compatible(self.parents[0], other)
        self.rounding, self.candidates, self.seed = rounding, candidates, seed
        self.method = method
        entries = self.parents[0].manifest.tensors
        self.code_names = sorted(n for n, entry in entries.items() if entry.role == "codes")
        self._sites = bias_sites(self.parents[0].graph_ir())

    def check_weights(self, weights: Sequence[float] | None) -> list[float]:
        """See :func:`.merge_weights.check_merge_weights`."""
        return check_merge_weights(weights, len(self.parents), "bundle")

    def write(
        self,
        output: str | os.PathLike[str],
        merge_weights: Sequence[float],
        progress: Progress | None = None,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Bundle:
        """The merge as a bundle; see :func:`merge`."""
        check_output(output, BUNDLE, [parent.path for parent in self.parents])
        layers: dict[str, Any] = {}
        done = 0

        def put_all(put: Callable[[str, Array], None]) -> Manifest:
            names = self.parents[0].manifest.tensors
            small = self.floats(merge_weights)
            for name, value in small.items():
                put(name, value)

            def one(name: str) -> None:
                nonlocal done
                codes, layers[name] = self.codes(name, merge_weights, small)
                put(name, codes)
                done += 1
                if progress:
                    progress(len(small) + done, len(names))

            in_parallel(one, self.code_names, threads)
            return self.manifest(merge_weights, dict(sorted(layers.items())), options or {})

        golden = golden_inputs(self.parents)
        return Bundle.write_like(output, self.parents[0], put_all, golden, check_merge)

    def tensors(self, merge_weights: Sequence[float]) -> dict[str, Array]:
        """All tensors of a merge, in memory."""
        merged = self.floats(merge_weights)
        for name in self.code_names:
            merged[name] = self.codes(name, merge_weights, merged)[0]
        return merged

    def floats(self, merge_weights: Sequence[float]) -> dict[str, Array]:
        """Everything but the codes; what follows from a fold is computed from its parts."""
        manifest = self.parents[0].manifest
        derived = {name for fold in manifest.folds.values() for name in (fold.scale, fold.bias)}
        merged = {
            name: self._float(name, merge_weights)
            for name, entry in manifest.tensors.items()
            if entry.role != "codes" and name not in derived
        }
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
        return merged | fitted(merged, self._sites, shifts(manifest.tensors), manifest.folds)

    def codes(
        self, name: str, merge_weights: Sequence[float], floats: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Any]]:
        """Merged codes of one tensor, and statistics of its rounding."""
        entry, scale = self.parents[0].manifest.tensors[name], self._scale_of(name)
        if method_of(self.method).is_mean:
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
        statistics = {
            "codes": merged.codes.size,
            "ambiguous": merged.ambiguous,
            "changed": merged.changed,
            "cosines": merged.cosines,
            "nearest_cosines": merged.nearest_cosines,
        }
        return merged.codes, statistics

    def unrounded(
        self, merge_weights: Sequence[float], floats: Mapping[str, Array]
    ) -> dict[str, Array]:
        """``floats``, and in place of codes the real weights (float32) that they stand for."""
        manifest = self.parents[0].manifest
        result = dict(floats)
        for name in self.code_names:
            merged = self._merged(self._dequantized(name), merge_weights)
            real: Array = merged.astype(np.float32)
            if fold := manifest.folds.get(name):
                gain = np.asarray(floats[fold.scale] / floats[fold.raw_scale])
                real = real * along(gain, real.ndim, manifest.tensors[name].axis)
            result[name] = real
        return result

    def manifest(
        self, merge_weights: Sequence[float], layers: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Manifest:
        """The manifest of a merge; ``layers`` are the statistics of each tensor of codes."""
        return _manifest(self, merge_weights, layers, options)

    def _dequantized(self, codes: str) -> list[Array]:
        """The real weights that each parent's codes stand for, BatchNorm not applied."""
        axis, scale = self.parents[0].manifest.tensors[codes].axis, self._scale_of(codes)
        return [dequantize(p.tensor(codes), p.tensor(scale), axis) for p in self.parents]

    def _merged(self, tensors: Sequence[Array], merge_weights: Sequence[float]) -> Array:
        """Trained parameters merged by the method, float64."""
        method = method_of(self.method)
        return method.merge(float64(tensors), merge_weights, None, MethodOptions())

    def _scale_of(self, codes: str) -> str:
        """The tensor with the scales that ``codes`` were rounded with, BatchNorm not applied."""
        manifest = self.parents[0].manifest
        fold = manifest.folds.get(codes)
        scale = fold.raw_scale if fold else manifest.tensors[codes].scale
        assert scale is not None
        return scale

    def _float(self, name: str, merge_weights: Sequence[float]) -> Array:
        values = [parent.tensor(name) for parent in self.parents]
        role = self.parents[0].manifest.tensors[name].role
        if role == "bn_var":
            mean = _mean_of(name, self.parents[0].manifest)
            means = [parent.tensor(mean) for parent in self.parents]
            return matched_variance(values, means, merge_weights)
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


def _check_method(method: str, rounding: str) -> None:
    """Refuse a method or a rounding that does not work on bundles."""
    if rounding not in ROUNDINGS:
        raise MergeError(f"found rounding {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    chosen = method_of(method)
    if not chosen.merges_bundles:
        raise MergeError(
            f"found method {method!r} with bundles; it needs the source weights, which bundles do "
            "not hold: merge the float checkpoints and calibrate the result"
        )
    if not chosen.is_mean and ROUNDINGS[rounding].tosses:
        raise MergeError(
            f"found rounding {rounding!r} with method {method!r}; noise has known probabilities "
            "for the weighted mean only: choose nearest"
        )


def _mean_of(variance: str, manifest: Manifest) -> str:
    """The name of the mean that belongs to a BatchNorm's variance."""
    for fold in manifest.folds.values():
        if fold.variance == variance:
            return fold.mean
    mean = variance.removesuffix("running_var") + "running_mean"
    if mean in manifest.tensors:
        return mean
    raise MergeError(f"found a variance {variance} without a mean; make the bundle again")


def _check_compatible(first: Bundle, other: Bundle) -> None:
    a, b = first.manifest, other.manifest
    pairs: list[tuple[str, Any, Any]] = [
        ("model", a.model, b.model),
        ("method is float", a.method == "float", b.method == "float"),
        *((f"scheme {k}", v, getattr(b.scheme, k)) for k, v in a.scheme),
        ("source weights (sha256)", a.source_sha256[:12], b.source_sha256[:12]),
        ("classes", a.classes, b.classes),
        ("input shape", a.input_shape, b.input_shape),
        ("preprocessing", a.preprocessing, b.preprocessing),
        ("folds", sorted(a.folds.items()), sorted(b.folds.items())),
        ("tensor names", sorted(a.tensors), sorted(b.tensors)),
        *((f"tensor {name}", entry, b.tensors.get(name)) for name, entry in a.tensors.items()),
        ("graph (sha256)", first.graph_sha256[:12], other.graph_sha256[:12]),
    ]
    for what, mine, theirs in pairs:
        if mine != theirs:
            raise MergeError(
                f"found different {what}: {_short(mine, theirs)} in {first.path}, "
                f"{_short(theirs, mine)} in {other.path}; merging needs bundles of one model, "
                "source and scheme: calibrate them with the same options"
            )


def _short(value: Any, other: Any) -> str:
    """``value``, or for long sequences its first item that is not in ``other``."""
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        lacking = [item for item in value if item not in other]
        return f"{len(value)} items" + (f" with {lacking[0]}" if lacking else "")
    return str(value)


def _manifest(
    merger: Merger,
    merge_weights: Sequence[float],
    layers: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Manifest:
    parents = merger.parents
    domains: dict[str, float] = {}
    for parent, weight in zip(parents, merge_weights, strict=True):
        for domain, share in parent.manifest.domains.items():
            domains[domain] = domains.get(domain, 0.0) + weight * share
    first = parents[0].manifest
    methods = sorted({parent.manifest.method for parent in parents})
    return first.model_copy(
        update={
            "method": "+".join(methods),
            "domains": domains,
            "adapted_sha256": _union(p.manifest.adapted_sha256 for p in parents),
            "data_sha256": _union(p.manifest.data_sha256 for p in parents),
            "seed": merger.seed,
            "options": {
                "merge": {
                    "weights": list(merge_weights),
                    "rounding": merger.rounding,
                    "candidates": merger.candidates,
                    **({} if merger.method == "mean" else {"method": merger.method}),
                    **options,
                },
                "parents": [p.manifest.options for p in parents],
            },
            "metrics": {"layers": dict(layers)},
            "tolerances": _tolerances(parents),
            "parents": tuple(
                ParentRecord(
                    manifest_sha256=parent.manifest_sha256,
                    domains=parent.manifest.domains,
                    weight=weight,
                )
                for parent, weight in zip(parents, merge_weights, strict=True)
            ),
        }
    )


def _tolerances(parents: Sequence[Bundle]) -> Tolerances:
    """The loosest of the parents; how far ties spread in the merge nobody has measured."""
    loosest = max((p.manifest.tolerances for p in parents), key=lambda t: t.output_rms)
    return loosest.model_copy(update={"spread": None})


def _union(records: Any) -> dict[str, str]:
    return {key: value for record in records for key, value in record.items()}
