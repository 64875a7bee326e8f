"""Learning of a prepared model, and the record of the run that bundle and resume read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from ..typing import Progress
from .activation_cache import Caches
from .block_module import Quantizers
from .inputs import CalibrationInputs
from .loading import state_sha256
from .preparation import Preparation
from .reconstruction import reconstruct
from .request import BLOCKS, PLACEMENTS, CalibrationRequest
from .resume import Partial
from .statistics import Watch

__all__ = ["RunRecord", "learn"]

_LIBRARIES = ("hdrq-deploy", "torch", "onnx", "onnxruntime", "onnxscript", "numpy")


@dataclass(frozen=True)
class RunRecord:
    """What a calibration's bytes depend on, beside its codes and its method.

    Attributes:
        hashes: Hashes of source weights, adapted weights and images.
        options: How it learned, on how many images, where and with how many threads.
        versions: Versions of this package and of the libraries that compute.
    """

    hashes: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(cls, request: CalibrationRequest, inputs: CalibrationInputs) -> RunRecord:
        """The record of a run that begins."""
        adapted = state_sha256(inputs.state)
        return cls(
            hashes={
                "source_sha256": state_sha256(inputs.base) if inputs.base else adapted,
                "adapted_sha256": dict.fromkeys(inputs.datasets, adapted),
                "data_sha256": {domain: d.sha256 for domain, d in inputs.datasets.items()},
            },
            options={
                "images": len(inputs.images),
                "device": str(inputs.device),
                "threads": torch.get_num_threads(),
                **asdict(request.learning),
                **_placement_and_blocks(request),
            },
            versions={name: version(name) for name in _LIBRARIES},
        )


def _placement_and_blocks(request: CalibrationRequest) -> dict[str, str]:
    """Placement and blocks where they are not the default, which earlier records do not name."""
    chosen = {"placement": request.placement, "blocks": request.blocks}
    defaults = {"placement": PLACEMENTS[0], "blocks": BLOCKS[0]}
    return {name: value for name, value in chosen.items() if value != defaults[name]}


def learn(
    request: CalibrationRequest,
    inputs: CalibrationInputs,
    preparation: Preparation,
    record: RunRecord,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> tuple[Quantizers, Partial]:
    """Learn all quantizers, block by block; resume where the request says so.

    Returns:
        The quantizers, and the finished blocks on disk, to be closed when the bundle is written.

    Raises:
        SpecError: The unfinished blocks belong to another run.
        ModelError: NaN or infinity appears in a block's activations.
        DataError: No room for the activations.
    """
    codes = request.quantization
    run = {
        "model": request.model,
        "method": request.method,
        "fold": request.fold,
        "seed": request.seed,
        "versions": record.versions,
        "grid": codes.grid,
        "wbits": codes.wbits,
        "abits": codes.abits,
        "per_channel": codes.per_channel,
        **record.options,
        **record.hashes,
    }
    partial = Partial.open(inputs.target, run, request.resume, len(preparation.blocks))
    caches = Caches(round(request.cache_gb * 1e9), partial.folder)
    quantizers = reconstruct(
        preparation,
        inputs.images,
        request.learning,
        request.seed,
        inputs.device,
        caches,
        partial,
        progress,
        watch,
    )
    preparation.capture.module.cpu()
    return quantizers, partial
