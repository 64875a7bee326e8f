"""Statistics of a float checkpoint, as a file of their own for a merge of checkpoints."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..calibration_data.readers import ImageSet, Wanted
from ..errors import ModelError
from ..formats.atomic_files import write_bytes
from ..formats.checkpoints import checkpoint_sha256, open_checkpoint
from ..formats.file_kinds import CHECKPOINT_STATISTICS
from ..formats.statistics import Statistics
from .activation_cache import Caches
from .bundle_model import emit_float
from .fold_batch_norm import norms_behind
from .graph_cache import GraphCache
from .inputs import load
from .loading import checkpoint_names, current_folder_importable
from .preparation import prepare
from .reconstruction import observe_float
from .request import CalibrationRequest
from .statistics import Watch

__all__ = ["write_statistics"]

_log = logging.getLogger("hdrq_deploy")


def write_statistics(
    model: str,
    weights: str | Path,
    data: str | Path | ImageSet,
    output: str | os.PathLike[str],
    rank: int | Literal["auto", "full"] = "auto",
    images: int | None = 1024,
    wanted: Wanted | None = None,
    skip_corrupt: bool = False,
    seed: int = 0,
    device: str = "auto",
    cache_gb: float = 1.0,
) -> Path:
    """See what the layers of a float network read, and write it down.

    Weights are called as in the checkpoint, and BatchNorm is not folded into them. The file is
    read by :func:`hdrq_deploy.formats.statistics.read_statistics`.

    Args:
        model: Name of the model, as for :func:`.pipeline.calibrate`.
        weights: Checkpoint of that model.
        data: Image folder, street scenes, .npz, or images already read.
        output: File to write.
        rank: Eigenvectors kept of every covariance: a number, ``full``, or ``auto`` for as many
            as take no more room than the weights would at 8 bits, but 8 or more.
        images: Images at most.
        wanted: Size and normalisation of images.
        skip_corrupt: Leave out images that cannot be decoded.
        seed: Seed of every random number.
        device: ``auto``, ``cpu`` or ``cuda``.
        cache_gb: Gigabytes of activations that are held in memory; more go to mapped files.

    Raises:
        HdrqError: The input does not fit; the message says what to do.
        CheckFailed: The captured graph disagrees with the model.
    """
    request = CalibrationRequest(
        model=model,
        data=data,
        domain="data",
        output=output,
        weights=weights,
        method="float",
        images=images,
        wanted=wanted,
        skip_corrupt=skip_corrupt,
        seed=seed,
        device=device,
        statistics=rank,
    )
    with current_folder_importable():
        inputs = load(request, CHECKPOINT_STATISTICS)
        preparation = prepare(request, inputs, GraphCache())
        watch = Watch(preparation.capture, rank, len(inputs.images), seed)
        caches = Caches(round(cache_gb * 1e9))
        observe_float(preparation, inputs.images, watch, inputs.device, caches)
        seen = watch.statistics(emit_float(preparation.capture))
        norms = norms_behind(preparation.capture.graph)
        names = checkpoint_names(inputs.network, weights)
    statistics = seen and _renamed(replace(seen, norms=norms), names)
    if not statistics or not statistics.layers:
        raise ModelError(
            f"found no layer of `model` {model} whose weight is a tensor of {weights}; a merge of "
            "this checkpoint needs no statistics"
        )
    hashed = checkpoint_sha256(open_checkpoint(Path(weights)))
    text = statistics.serialize_for_checkpoint(model, hashed, inputs.dataset.sha256)
    write_bytes(inputs.target, text, CHECKPOINT_STATISTICS)
    return inputs.target


def _renamed(statistics: Statistics, names: dict[str, str]) -> Statistics:
    """Statistics by the names of the checkpoint; without layers whose weight it does not hold."""
    layouts, layers = {}, {}
    for weight, (bias, layout) in statistics.layouts.items():
        if weight not in names:
            _log.info("%s is no tensor of the checkpoint, and has no statistics", weight)
            continue
        own = None if bias is None else names.get(bias)
        layouts[names[weight]] = (own, layout)
        layers[names[weight]] = statistics.layers[weight]
    norms = {
        names[weight]: norm.renamed(names)
        for weight, norm in statistics.norms.items()
        if {weight, *norm.tensors} <= names.keys() and weight in statistics.layers
    }
    return replace(statistics, layouts=layouts, layers=layers, norms=norms)
