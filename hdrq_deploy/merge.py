"""Merge calibrated bundles without training, torch or the original models.

Steps, biases and activation steps become weighted means. Codes are the weighted sum of the
parents' real weights divided by the merged step, rounded:

``nearest``   to the nearest code;
``noise``     after a draw of the parents' rounding errors, but only where the sum is
              ambiguous, so that ties are not all broken one way (paper section 4.3);
``advanced``  the same, and of many draws the last one that points from every parent more
              nearly towards the real midpoint than the best before it.

Ambiguous means: two parents at equal weights whose codes have an odd sum. Any other mix has
no exact ties; there a position is ambiguous when the scaled sum lies within
``TIE_DISTANCE`` of a half.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import affine
from .bundle import GRAPH, Bundle
from .errors import MergeError
from .files import sha256_bytes
from .manifest import Manifest, ParentRecord, Tensor
from .spec import QuantSpec

__all__ = ["ROUNDINGS", "TIE_DISTANCE", "ambiguous", "merge", "merge_codes"]

ROUNDINGS = ("nearest", "noise", "advanced")
TIE_DISTANCE = 0.25

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]


def merge(
    bundles: Sequence[Bundle | str | os.PathLike[str]],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    rounding: str = "advanced",
    candidates: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bundle:
    """Merge two or more bundles of one architecture, source and scheme.

    Args:
        bundles: Bundles or their paths.
        output: Folder of the merged bundle.
        weights: One per bundle, >= 0, sum 1; equal by default.
        rounding: One of ``ROUNDINGS``.
        candidates: Draws of ``advanced``.
        seed: Seed of the draws.
        progress: Called with (tensors done, tensors in all).

    Raises:
        MergeError: Fewer than two bundles, weights that do not fit, or bundles that differ
            in something a merge needs equal; the first difference is named.

    Source:
        Shin et al., ICML 2025, section 4.3 (rounding); Li et al., ECCV 2024 (BatchNorm).
    """
    parents = [b if isinstance(b, Bundle) else Bundle.open(b) for b in bundles]
    mix = _check_weights(parents, weights)
    if rounding not in ROUNDINGS:
        raise MergeError(f"found rounding {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    if candidates < 1:
        raise MergeError(f"found candidates={candidates}; needed 1 or more")
    for other in parents[1:]:
        _check_compatible(parents[0], other)

    entries = parents[0].manifest.tensors
    merged: dict[str, Array] = {}
    order = sorted(entries, key=lambda name: entries[name].role == "codes")  # scales first
    rng = np.random.default_rng(seed)
    for done, name in enumerate(order):
        values = [parent.tensor(name) for parent in parents]
        if entries[name].role == "codes":
            scale = entries[name].scale
            assert scale is not None
            scales = [parent.tensor(scale) for parent in parents]
            merged[name] = merge_codes(
                values, scales, merged[scale], mix, entries[name].spec, rounding, candidates, rng
            )
        else:
            merged[name] = _merge_floats(name, entries, values, parents, mix)
        if progress:
            progress(done + 1, len(order))
    manifest = _manifest(parents, mix, rounding, candidates, seed)
    return Bundle.write(output, manifest, merged, (parents[0].path / GRAPH).read_bytes())


def merge_codes(
    codes: Sequence[Array],
    scales: Sequence[Array],
    scale: Array,
    mix: Sequence[float],
    spec: QuantSpec,
    rounding: str,
    candidates: int,
    rng: np.random.Generator,
) -> Array:
    """Codes of the weighted mean of ``scales[i] * codes[i]`` on the step ``scale``.

    Args:
        codes: Parents' codes, one shape.
        scales: Parents' steps, () or (codes.shape[spec.axis],).
        scale: Merged step, shape of ``scales[0]``.
        mix: Weights of the parents, sum 1.
        spec: Range and axis of the codes.
        rounding: One of ``ROUNDINGS``.
        candidates: Draws of ``advanced``.
        rng: Source of the draws.

    Returns:
        int8 codes, shape of ``codes[0]``.
    """
    ndim, axis = codes[0].ndim, spec.axis
    steps = [affine.along(s.astype(np.float64), ndim, axis) for s in scales]
    step = affine.along(scale.astype(np.float64), ndim, axis)
    real = [s * q for s, q in zip(steps, codes, strict=True)]
    middle: Array = np.sum([m * r for m, r in zip(mix, real, strict=True)], axis=0)
    nearest = _saturate(middle / step, spec)
    if rounding == "nearest":
        return nearest
    where = np.nonzero(ambiguous(codes, middle / step, mix))
    flat = np.broadcast_to(step, nearest.shape)[where]
    noises = [m * np.broadcast_to(s, nearest.shape)[where] for m, s in zip(mix, steps, strict=True)]

    def draw() -> Array:
        errors: Array = np.sum([n * rng.uniform(-0.5, 0.5, n.shape) for n in noises], axis=0)
        return _saturate((middle[where] - errors) / flat, spec)

    best = nearest.copy()
    if rounding == "noise":
        best[where] = draw()
        return best
    score = _Directions(real, middle, step, nearest, where)
    highest = score(best[where])
    for _ in range(candidates):
        candidate = draw()
        found = score(candidate)
        if (found > highest).all():
            best[where], highest = candidate, found
    return best


def ambiguous(codes: Sequence[Array], scaled: Array, mix: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Where rounding is a toss-up (see the module's text).

    Args:
        codes: Parents' integer codes.
        scaled: Weighted sum of the real weights over the merged step, same shape.
        mix: Weights of the parents.
    """
    odd: npt.NDArray[np.bool_]
    if len(codes) == 2 and mix[0] == mix[1]:
        odd = (codes[0].astype(np.int16) + codes[1]) % 2 != 0
        return odd
    odd = np.abs(scaled - np.floor(scaled) - 0.5) <= TIE_DISTANCE
    return odd


class _Directions:
    """|cos(candidate - parent, midpoint - parent)| for every parent.

    Candidates differ only at the ambiguous positions, so all sums are a constant plus a sum
    over those positions.
    """

    def __init__(
        self, real: list[Array], middle: Array, step: Array, nearest: Array, where: Any
    ) -> None:
        self._step = np.broadcast_to(step, nearest.shape)[where]
        self._parents = []
        fixed = np.ones(nearest.shape, bool)
        fixed[where] = False
        settled = nearest * step
        for parent in real:
            to_middle, to_fixed = middle - parent, np.where(fixed, settled - parent, 0)
            self._parents.append(
                (
                    parent[where],
                    to_middle[where],
                    float((to_fixed * to_middle).sum()),
                    float((to_fixed**2).sum()),
                    float(np.sqrt((to_middle**2).sum())),
                )
            )

    def __call__(self, codes: Array) -> npt.NDArray[np.float64]:
        """Codes at the ambiguous positions to one cosine per parent."""
        real = codes * self._step
        cosines = []
        for parent, to_middle, dot, square, length in self._parents:
            away = real - parent
            norm = np.sqrt(square + float(away @ away)) * length
            cosines.append(abs(dot + float(away @ to_middle)) / norm if norm > 0 else 1.0)
        return np.array(cosines)


def _saturate(real: Array, spec: QuantSpec) -> Array:
    codes: Array = np.clip(np.rint(real), spec.lo, spec.hi).astype(np.int8)
    return codes


def _merge_floats(
    name: str,
    entries: Mapping[str, Tensor],
    values: list[Array],
    parents: list[Bundle],
    mix: Sequence[float],
) -> Array:
    if all(np.array_equal(value, values[0]) for value in values):
        same = values[0]
    elif entries[name].role == "constant":
        raise MergeError(
            f"found different constants {name} in {parents[0].path} and another bundle; "
            "needed models that differ in trained weights only"
        )
    else:
        same = None
    if entries[name].role != "bn_var":
        if same is not None:
            return same
        return _mean(values, mix)
    mean = name[: -len("running_var")] + "running_mean"
    means = [parent.tensor(mean).astype(np.float64) for parent in parents]
    centre = sum(m * mu for m, mu in zip(mix, means, strict=True))
    spread = [v + (mu - centre) ** 2 for v, mu in zip(values, means, strict=True)]
    return _mean(spread, mix)


def _mean(values: Sequence[Array], mix: Sequence[float]) -> Array:
    total = sum(m * v.astype(np.float64) for m, v in zip(mix, values, strict=True))
    return np.asarray(total).astype(np.float32)


def _check_weights(parents: list[Bundle], weights: Sequence[float] | None) -> list[float]:
    if len(parents) < 2:
        raise MergeError(f"found {len(parents)} bundle; a merge needs two or more")
    if weights is None:
        return [1 / len(parents)] * len(parents)
    mix = [float(w) for w in weights]
    if len(mix) != len(parents):
        raise MergeError(f"found {len(mix)} weights for {len(parents)} bundles; give one for each")
    if not all(w >= 0 for w in mix) or abs(sum(mix) - 1) > 1e-6:
        raise MergeError(
            f"found weights {' '.join(map(str, mix))} with sum {sum(mix):g}; "
            "needed weights >= 0 with sum 1"
        )
    return mix


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
    parents: list[Bundle], mix: list[float], rounding: str, candidates: int, seed: int
) -> Manifest:
    domains: dict[str, float] = {}
    for parent, weight in zip(parents, mix, strict=True):
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
            "seed": seed,
            "options": {
                "merge": {"weights": mix, "rounding": rounding, "candidates": candidates},
                "parents": [p.manifest.options for p in parents],
            },
            "metrics": {},
            "parents": tuple(
                ParentRecord(
                    manifest_sha256=sha256_bytes(parent.manifest.to_json()),
                    domains=parent.manifest.domains,
                    weight=weight,
                )
                for parent, weight in zip(parents, mix, strict=True)
            ),
        }
    )


def _union(records: Any) -> dict[str, str]:
    return {key: value for record in records for key, value in record.items()}
