"""The whole calibration: checkpoints and images in, a bundle out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..calibration_data.readers import Wanted
from ..formats.bundle import Bundle
from ..typing import Progress
from .activation_cache import Caches
from .devices import keep_freed_memory, torch_threads
from .graph_cache import GraphCache
from .inputs import CalibrationInputs, load
from .learning import RunRecord, learn
from .loading import current_folder_importable
from .methods import Options
from .preparation import Preparation, prepare
from .rebuilding import fake_quantized, folded_weights
from .reconstruction import observe_float
from .request import CalibrationRequest, Source
from .statistics import Watch
from .writing import write

__all__ = ["calibrate", "fake_quantized", "folded_weights", "run_calibration", "torch_threads"]


def calibrate(
    model: str,
    data: Source | Sequence[Source],
    domain: str | Sequence[str],
    output: str | os.PathLike[str],
    weights: str | Path | None = None,
    base: str | Path | None = None,
    method: str = "hdrq",
    wbits: int = 8,
    abits: int = 8,
    per_channel: bool = False,
    grid: str = "int8",
    fold: str = "weights",
    options: Options | None = None,
    images: int | None = 1024,
    wanted: Wanted | None = None,
    skip_corrupt: bool = False,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    cache_gb: float = 1.0,
    progress: Progress | None = None,
    placement: str = "engine",
    blocks: str = "live",
    statistics: int | Literal["auto", "full", "off"] = "auto",
) -> Bundle:
    """Calibrate a model and write its bundle.

    Args:
        model: ``PKG.MOD:FACTORY``, ``timm:NAME``, ``torchvision:NAME`` or ``transformers:NAME``.
        data: Image folder, street scenes, .npz, or images already read; one for every domain.
        domain: Name of the domain the weights were adapted to; several for a merge of several.
        output: Folder of the bundle.
        weights: Adapted checkpoint; without it the factory's own weights are used.
        base: Source checkpoint that all domains were adapted from; needed by the distance
            term of ``hdrq``.
        method: A row of :data:`.methods.METHODS`.
        wbits: Bits of the weights, 2 to 8; the first and the last layers keep 8.
        abits: Bits of the activations that heavy layers read, 2 to 8.
        per_channel: One weight scale per output channel instead of one per tensor (the paper).
        grid: ``int8``, ``paper`` (see ``spec.activation_range``) or ``e4m3`` (FP8).
        fold: Where BatchNorm is folded: into the ``weights`` (the paper), or (``steps``) into
            the per-channel scales of the weights, so that a merge averages it separately.
        options: How to learn; by default as ``method`` does.
        images: Calibration images of a domain at most.
        wanted: Size and normalisation of images.
        skip_corrupt: Leave out images that cannot be decoded.
        seed: Seed of every random number.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: Resume after the last finished block of a run that was stopped.
        cache_gb: Gigabytes of activations that are held in memory; more go to mapped files.
        progress: Called with (steps done, steps in all, block name).
        placement: Where quantizers go: so that an ``engine`` runs every layer in INT8, or as in
            the ``paper`` (:mod:`.placement`).
        blocks: What is learned together: what lies between two cuts where one tensor is
            ``live``, or a residual ``unit`` (:mod:`.blocks`).
        statistics: Rank of the covariances kept of the layers' inputs, which merges may use, or
            ``auto`` (no more room than codes at 8 bits), ``full`` or ``off``.

    Raises:
        HdrqError: The input does not fit; the message says what to do.
        CheckFailed: The captured graph disagrees with the model, or the written graph with the
            fake-quantized one.
    """
    request = CalibrationRequest(
        model=model,
        data=data,
        domain=domain,
        output=output,
        weights=weights,
        base=base,
        method=method,
        wbits=wbits,
        abits=abits,
        per_channel=per_channel,
        grid=grid,
        fold=fold,
        options=options,
        images=images,
        wanted=wanted,
        skip_corrupt=skip_corrupt,
        seed=seed,
        device=device,
        resume=resume,
        cache_gb=cache_gb,
        placement=placement,
        blocks=blocks,
        statistics=statistics,
    )
    return run_calibration(request, progress=progress)


def run_calibration(
    request: CalibrationRequest,
    graphs: GraphCache | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """:func:`calibrate` for a request.

    Args:
        request: What to calibrate.
        graphs: Shared by the calibrations of several domains of one model, so that it is
            captured once; by default nothing is shared.
        progress: Called with (steps done, steps in all, block name).

    Raises:
        HdrqError, CheckFailed: As :func:`calibrate`.
    """
    keep_freed_memory()
    graphs = graphs or GraphCache()
    with current_folder_importable():
        inputs = load(request)
        preparation = prepare(request, inputs, graphs)
        record = RunRecord.of(request, inputs)
        watch = _watch(request, inputs, preparation)
        if preparation.plan is None:
            if watch:
                caches = Caches(round(request.cache_gb * 1e9))
                observe_float(preparation, inputs.images, watch, inputs.device, caches)
            return write(request, inputs, preparation, None, record, graphs, watch)
        quantizers, partial = learn(request, inputs, preparation, record, progress, watch)
        bundle = write(request, inputs, preparation, quantizers, record, graphs, watch)
        partial.close()
        return bundle


def _watch(
    request: CalibrationRequest, inputs: CalibrationInputs, preparation: Preparation
) -> Watch | None:
    """What looks at the inputs of the layers; None where that is switched off."""
    rank = request.statistics
    if rank == "off":
        return None
    count = len(preparation.plan.activations) if preparation.plan else 0
    return Watch(preparation.capture, rank, len(inputs.images), request.seed, count)
