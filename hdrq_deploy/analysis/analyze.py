"""The whole analysis of some bundles and their merge, as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MergeError, SpecError
from ..formats.bench_result import harmonic_mean
from ..formats.bundle import Bundle
from ..formats.bundle_manifest import weight_name
from ..merging import Merger
from ..typing import Array, Progress
from .landscape import Landscape, Scores, Weights, real_weights, top_eigenvalue, trace

__all__ = ["Settings", "analyze"]


@dataclass(frozen=True)
class Settings:
    """How fine to look.

    Attributes:
        points: Values of lambda along a barrier.
        noises: Draws of the noise at every one of them.
        grid: Points of the loss surface along each axis; 0 for none.
        seeds: Rounding seeds of ``noise`` and ``advanced``.
        candidates: Draws of ``advanced``.
        products: Products with the Hessian for its top eigenvalue, and again for its trace.
        seed: Seed of every random number.
    """

    points: int = 11
    noises: int = 3
    grid: int = 13
    seeds: int = 32
    candidates: int = 100
    products: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"points": 3, "noises": 1, "seeds": 2, "candidates": 1, "products": 2}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise SpecError(f"found {name}={getattr(self, name)}; needed {least} or more")
        if self.grid < 0 or self.grid in {1, 2}:
            raise SpecError(f"found grid={self.grid}; needed 3 or more, or 0 for no surface")


def analyze(
    bundles: Sequence[Bundle],
    data: Mapping[str, tuple[Array, Array]],
    base: Mapping[str, Array] | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Look at bundles of one source and at the merges between them.

    Args:
        bundles: Two or more, each of one domain.
        data: Inputs and labels of every domain.
        base: The source model's weights as the bundles' graph reads them, where they are
            known; distances are taken to them.
        settings: How fine to look.
        progress: Called with (parts done, parts in all, part).

    Returns:
        Plain data for JSON: ``models``, ``barriers``, ``curvature``, ``distances``,
        ``surface``, ``rounding``, ``layers`` and ``settings``.

    Raises:
        MergeError: Bundles that cannot be merged, or two of one name.

    Source:
        Shin et al., ICML 2025: barriers, equations 2 and 3; surface, figure 2; spread over
        rounding seeds, figure 3.
    """
    settings = settings or Settings()
    merger = Merger(bundles, "nearest", settings.candidates, settings.seed)
    names = ["+".join(b.manifest.domains) for b in bundles]
    if len(set(names)) < len(names):
        raise MergeError(f"found two bundles of {max(names, key=names.count)}; give each a domain")
    if bundles[0].manifest.scheme.wbits is None:
        raise MergeError("found float bundles; the analysis is about quantized ones")
    land = Landscape(bundles[0], data)
    work = _Work(merger, names, land, settings, base)
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("models", work.models),
        ("barriers", work.barriers),
        ("curvature", work.curvature),
        ("distances", work.distances),
        ("surface", work.surface),
        ("rounding", work.rounding),
        ("layers", work.layers),
    ]
    result: dict[str, Any] = {"schema_version": 1, "kind": "hdrq-analysis"}
    for i, (name, part) in enumerate(parts):
        if progress:
            progress(i, len(parts), name)
        result[name] = part()
    first = bundles[0].manifest
    result["scheme"] = {"model": first.model, "method": first.method, **dict(first.scheme)}
    result["images"] = {name: len(x) for name, (x, _) in data.items()}
    result["settings"] = asdict(settings)
    return result


class _Work:
    """One analysis; every method is one part of the result."""

    def __init__(
        self,
        merger: Merger,
        names: list[str],
        land: Landscape,
        settings: Settings,
        base: Mapping[str, Array] | None,
    ) -> None:
        self.merger, self.names, self.land, self.settings = merger, names, land, settings
        self.base = base
        self.even = [1 / len(names)] * len(names)
        self.real = [real_weights(bundle) for bundle in merger.parents]
        self.entries = merger.parents[0].manifest.tensors
        # In the order of the network.
        order = {layer.weight: i for i, layer in enumerate(merger.parents[0].manifest.layers)}
        self.codes = sorted(merger.code_names, key=lambda name: order.get(name, len(order)))

    def models(self) -> dict[str, Any]:
        """Losses and accuracies of every bundle."""
        return {
            name: _plain(self.land.quantized(bundle.tensors()))
            for name, bundle in zip(self.names, self.merger.parents, strict=True)
        }

    def barriers(self) -> list[dict[str, Any]]:
        """Along the line between every two models."""
        return [self._barrier(i, j) for i, j in combinations(range(len(self.names)), 2)]

    def _barrier(self, i: int, j: int) -> dict[str, Any]:
        pair = Merger([self.merger.parents[k] for k in (i, j)])
        lambdas = [k / (self.settings.points - 1) for k in range(self.settings.points)]
        generator = torch.Generator().manual_seed(self.settings.seed)
        curves: dict[str, list[Scores]] = {"float": [], "quantized": []}
        noisy: list[float] = []
        for share in lambdas:
            mix = [1 - share, share]
            middle = _mixed(pair, mix)
            curves["float"].append(self.land.real(middle))
            curves["quantized"].append(self.land.quantized(pair.tensors(mix)))
            draws = []
            for _ in range(self.settings.noises):
                shaken = self._shaken(middle, (i, j), mix, generator)
                draws.append(self.land.real(shaken).mean_loss)
            noisy.append(float(np.mean(draws)))
        losses = {name: [s.mean_loss for s in curve] for name, curve in curves.items()}
        losses["noise"] = noisy
        return {
            "between": [self.names[i], self.names[j]],
            "lambda": lambdas,
            "loss": losses,
            "accuracy": {n: [s.accuracy for s in curve] for n, curve in curves.items()},
            "barrier": {
                name: max(loss) - (loss[0] + loss[-1]) / 2 for name, loss in losses.items()
            },
        }

    def _shaken(
        self, middle: Weights, ends: tuple[int, int], mix: list[float], generator: torch.Generator
    ) -> Weights:
        """Quantization noise at both ends, mixed as the weights are (equation 3)."""
        result = dict(middle)
        for name in self.codes:
            scale, axis = self.entries[name].scale, self.entries[name].axis
            assert scale is not None
            value = middle[name].clone()
            for end, share in zip(ends, mix, strict=True):
                unit = torch.from_numpy(np.array(self.merger.parents[end].tensor(scale)))
                if axis is not None and unit.ndim:
                    unit = unit.reshape([-1 if k == axis else 1 for k in range(value.ndim)])
                value += share * unit * (torch.rand(value.shape, generator=generator) - 0.5)
            result[name] = value
        return result

    def curvature(self) -> dict[str, Any]:
        """Hessian of the loss on all domains by the dequantized weights, at every model."""
        result = {}
        for name, at in zip(self.names, self.real, strict=True):
            common = (self.land.loss, at, self.codes, self.settings.products, self.settings.seed)
            result[name] = {"top_eigenvalue": top_eigenvalue(*common), "trace": trace(*common)}
        return result

    def distances(self) -> list[dict[str, Any]]:
        """Relative distances of every layer: between the models, and of each to the source."""
        rows = []
        for name in self.codes:
            weights = [real[name] for real in self.real]
            row: dict[str, Any] = {"layer": weight_name(name), "between": {}}
            for i, j in combinations(range(len(weights)), 2):
                key = f"{self.names[i]} - {self.names[j]}"
                row["between"][key] = _relative(weights[i], weights[j])
            origin = None if self.base is None else self.base.get(weight_name(name))
            if origin is not None:
                source = torch.from_numpy(np.array(origin))
                row["to_source"] = {
                    n: _relative(w, source) for n, w in zip(self.names, weights, strict=True)
                }
            rows.append(row)
        return rows

    def surface(self) -> dict[str, Any] | None:
        """Loss on a plane: two models at (-1, 0) and (1, 0), and a third point.

        The third is the third model, or with two models their merge, whose rounding leads
        away from the line between them.
        """
        if self.settings.grid == 0:
            return None
        tensors = {
            r: Merger(self.merger.parents, r, self.settings.candidates, self.settings.seed).tensors(
                self.even
            )
            for r in ("nearest", "advanced")
        }
        like = self.merger.parents[0]
        merged = {r: real_weights(like, values) for r, values in tensors.items()}
        first, second = self.real[0], self.real[1]
        middle = {n: (first[n] + second[n]) / 2 for n in first}
        right = {n: (second[n] - first[n]) / 2 for n in first}
        third = self.real[2] if len(self.real) > 2 else merged["advanced"]
        length = math.sqrt(_dot(right, right)) or 1.0
        up = {n: third[n] - middle[n] for n in first}
        share = _dot(up, right) / length**2
        up = {n: up[n] - share * right[n] for n in first}
        height = math.sqrt(_dot(up, up))
        if height == 0:
            return None
        up = {n: v * (length / height) for n, v in up.items()}
        points = {
            **dict(zip(self.names, self.real, strict=True)),
            **{f"merged, {rounding}": weights for rounding, weights in merged.items()},
        }
        places = {}
        for name, weights in points.items():
            away = {n: weights[n] - middle[n] for n in first}
            places[name] = [_dot(away, right) / length**2, _dot(away, up) / length**2]
        tall = max(1.0, *(abs(y) for _, y in places.values())) * 1.25
        x = np.linspace(-1.5, 1.5, self.settings.grid)
        y = np.linspace(-tall, tall, self.settings.grid)
        loss = [
            [
                self.land.real(
                    {n: middle[n] + float(a) * right[n] + float(b) * up[n] for n in first}
                ).mean_loss
                for a in x
            ]
            for b in y
        ]
        return {"x": x.tolist(), "y": y.tolist(), "loss": loss, "points": places}

    def rounding(self) -> dict[str, Any]:
        """Harmonic mean accuracy of the even merge over rounding seeds."""
        result: dict[str, Any] = {}
        for rounding in ("nearest", "noise", "advanced"):
            count = 1 if rounding == "nearest" else self.settings.seeds
            means = []
            for seed in range(count):
                merger = Merger(self.merger.parents, rounding, self.settings.candidates, seed)
                scores = self.land.quantized(merger.tensors(self.even))
                means.append(harmonic_mean(list(scores.accuracy.values())))
            result[rounding] = {
                "harmonic_means": means,
                "mean": float(np.mean(means)),
                "standard_deviation": float(np.std(means, ddof=1)) if count > 1 else 0.0,
            }
        return result

    def layers(self) -> list[dict[str, Any]]:
        """Rounding of every layer in the even merge."""
        merger = Merger(
            self.merger.parents, "advanced", self.settings.candidates, self.settings.seed
        )
        floats = merger.floats(self.even)
        return [
            {"layer": weight_name(name), **merger.codes(name, self.even, floats)[1]}
            for name in self.codes
        ]


def _mixed(pair: Merger, mix: Sequence[float]) -> Weights:
    """Real weights of a merge before any code is rounded."""
    like, tensors = pair.parents[0].manifest, pair.unrounded(mix)
    return {
        name: torch.from_numpy(np.array(tensors[name]))
        for name in sorted(like.graph_tensors)
        if like.tensors[name].role in {"float", "bn_mean", "bn_var", "codes"}
    }


def _plain(scores: Scores) -> dict[str, Any]:
    return {"loss": scores.loss, "accuracy": scores.accuracy}


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def _dot(a: Weights, b: Weights) -> float:
    return sum(float((a[n].double() * b[n].double()).sum()) for n in a)
