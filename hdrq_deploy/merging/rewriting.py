"""A merged bundle written again, with tensors that images gave it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..comparison.golden import check_merge
from ..formats.bundle import GRAPH, Bundle
from ..graph.biases import bias_sites, fitted, folded_tensors, shifts
from ..typing import Array
from .merged_statistics import in_turn, merged_statistics

__all__ = ["folded", "settled", "write_again"]


def folded(bundle: Bundle, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Scales and biases as their BatchNorms give them."""
    found: dict[str, Array] = {}
    for fold in bundle.manifest.folds.values():
        found[fold.scale], found[fold.bias] = folded_tensors(tensors, fold)
    return found


def settled(bundle: Bundle, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """All tensors with what follows from folds, and biases that integer kernels hold."""
    result = {**tensors, **folded(bundle, tensors)}
    manifest, sites = bundle.manifest, bias_sites(bundle.graph_ir())
    return result | fitted(result, sites, shifts(manifest.tensors), manifest.folds)


def write_again(
    bundle: Bundle,
    tensors: Mapping[str, Array],
    options: Mapping[str, Any],
    output: str | os.PathLike[str],
) -> Bundle:
    """The bundle with other tensors.

    Args:
        bundle: A merged bundle.
        tensors: All of its tensors, as they are to be.
        options: What the manifest says of how they were found, beside the options that it has.
        output: Folder of the new bundle.

    Raises:
        CheckFailed: The new graph gives no finite output for a golden input.
    """
    manifest = bundle.manifest
    updated = manifest.model_copy(
        update={"options": {**manifest.options, **options}, "statistics": None}
    )
    golden = {name: value for name, value in bundle.golden().items() if name == "input"}
    # Inputs of layers are about what they were; a later merge is better off with these.
    statistics = merged_statistics([bundle], [1.0], in_turn)
    graph = (bundle.path / GRAPH).read_bytes()
    return Bundle.write(output, updated, tensors, graph, golden, check_merge, statistics)
