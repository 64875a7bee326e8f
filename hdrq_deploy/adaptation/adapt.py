"""From a source model and unlabelled images of a domain to an adapted checkpoint.

Classifiers are adapted by SHOT (:mod:`.shot`), segmentation models by class-balanced
self-training (:mod:`.self_training`).
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..calibration.capture import single_output
from ..calibration.devices import torch_device
from ..calibration.inputs import own_wanted
from ..calibration.loading import (
    current_folder_importable,
    load_model,
    load_state,
    state_sha256,
)
from ..calibration_data.readers import ImageSet, Wanted, read
from ..errors import DataError, ModelError, SpecError
from ..formats.atomic_files import check_output, remove_file, write_bytes
from ..formats.file_kinds import ADAPTED, ADAPTING, partial_of
from ..numerics.spec import check_seed
from ..typing import Progress
from .options import FEWEST, AdaptationOptions
from .self_training import SelfTraining, confident_labels
from .shot import ShotTraining, centroid_labels, information
from .training import Training

__all__ = ["AdaptationOptions", "adapt", "centroid_labels", "confident_labels", "information"]

_log = logging.getLogger("hdrq_deploy")


def adapt(
    model: str,
    data: str | Path | ImageSet,
    output: str | os.PathLike[str],
    weights: str | Path,
    recipe: AdaptationOptions | None = None,
    images: int | None = None,
    wanted: Wanted | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
    skip_corrupt: bool = False,
) -> Path:
    """Adapt a source model to a domain and write its checkpoint.

    Args:
        model: ``PKG.MOD:FACTORY``, ``timm:NAME``, ``torchvision:NAME`` or ``transformers:NAME``.
        data: Image folder, street scenes or .npz; labels are not looked at.
        output: The .safetensors file.
        weights: Source checkpoint.
        recipe: How to adapt.
        images: Images at most.
        wanted: Size and normalisation of images.
        seed: Seed of order and augmentation.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: Resume after the last epoch of a run that was stopped.
        progress: Called with (iterations done, iterations in all, epoch).
        skip_corrupt: Leave out images that cannot be decoded.

    Raises:
        HdrqError: The input does not fit; the message says what to do.
    """
    options = recipe or AdaptationOptions()
    target = Path(output).absolute()
    if target.suffix != ".safetensors":
        raise SpecError(f"found output {output}; needed a .safetensors file")
    inputs = [weights, None if isinstance(data, ImageSet) else data]
    partial = partial_of(target)
    check_output(target, ADAPTED, inputs)
    check_output(partial, ADAPTING, inputs)
    check_seed(seed)
    with current_folder_importable():
        network = load_model(model)
        source = state_sha256(load_state(network, weights, "source"))
        if not isinstance(data, ImageSet):
            wanted = own_wanted(network, wanted)
            data = read(data, wanted, images, seed, skip_corrupt=skip_corrupt)
        options = _of_so_many(options, len(data.x))
        where = torch_device(device)
        training = _training(network.to(where), torch.from_numpy(data.x), options, seed, where)
        origin = {"model": model, "source_sha256": source, "data_sha256": data.sha256}
        training.train(partial, origin, resume, progress)
    # Clones: tied weights may not share their memory in the file.
    state = {name: value.cpu().clone() for name, value in network.state_dict().items()}
    # One entry: safetensors writes several in any order.
    notes = json.dumps({"method": training.method, "seed": seed, **training.notes})
    write_bytes(target, save(state, {"adapted": notes}), ADAPTED)
    remove_file(partial, ADAPTING)
    return target


def _of_so_many(options: AdaptationOptions, images: int) -> AdaptationOptions:
    """All images are one batch where they are fewer than one.

    Raises:
        DataError: Fewer than two images.
    """
    if images < FEWEST:
        raise DataError(f"found {images} images; needed {FEWEST} or more: add images")
    if images >= options.batch:
        return options
    _log.warning(
        "%d images are fewer than a batch of %d; all of them are one batch", images, options.batch
    )
    return replace(options, batch=images)


def _training(
    network: nn.Module, x: Tensor, options: AdaptationOptions, seed: int, device: torch.device
) -> Training[AdaptationOptions]:
    """SHOT for class scores, self-training for those of pixels.

    Raises:
        DataError: The model does not take the images.
        ModelError: Its outputs are neither.
    """
    try:
        with torch.no_grad():
            example = single_output(network(x[:2].to(device)))
    except (RuntimeError, IndexError, TypeError) as error:
        text = str(error).splitlines()[0]
        raise DataError(
            f"the model does not take images of shape {tuple(x.shape[1:])} ({text}); needed "
            "what it was made for: choose another `size`, or convert the images"
        ) from error
    if example.ndim not in {2, 4}:
        raise ModelError(
            f"found outputs of shape {tuple(example.shape)}; needed class scores (N, classes) "
            "or (N, classes, h, w)"
        )
    kind = SelfTraining if example.ndim == 4 else ShotTraining
    return kind(network, x, options, seed, device)
