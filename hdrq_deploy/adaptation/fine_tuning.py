"""From labelled images to a checkpoint: the source model, and one of a domain with its labels.

The models of real images are trained here, from ImageNet's trunk, from random weights or from
the source model: one cycle of rates (Smith and Topin, 2019), Nesterov's momentum, images shifted
(classifiers) or of other contrast (segmentation) and mirrored.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ..calibration.capture import single_output
from ..calibration.devices import torch_device
from ..calibration.loading import load_checkpoint, load_model, load_state, state_sha256
from ..calibration_data.readers import ImageSet, Wanted, read
from ..calibration_data.readers.street_scenes import IGNORE, find_scenes, is_scenes
from ..errors import DataError, ModelError, SpecError
from ..formats.atomic_files import check_output, remove_file, write_bytes
from ..formats.file_kinds import ADAPTING, TRAINED, partial_of
from ..numerics.spec import check_seed
from ..typing import Progress
from .options import FineTuningOptions
from .self_training import changed_photos
from .shot import shifted
from .training import Training

__all__ = ["FineTuning", "fine_tune", "labelled_images", "started"]


class FineTuning(Training[FineTuningOptions]):
    """Training on labelled images, of classes (N,) or of pixels (N, H, W) with 255 left out."""

    method = "training with labels"
    weight_decay = 1e-4

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        options: FineTuningOptions,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(model, x, options, seed, device)
        self._y = y
        with torch.no_grad():
            self._classes = single_output(model.eval()(x[:1].to(device))).shape[1]
        counted = y[y != IGNORE]
        if not len(counted) or int(counted.max()) >= self._classes:
            found = int(counted.max()) if len(counted) else "none"
            raise DataError(
                f"found label {found}; needed labels below {self._classes}, the classes of the "
                "model"
            )
        self._weight = self._balance(counted).to(device) if y.ndim == 3 else None

    def _balance(self, counted: Tensor) -> Tensor:
        """Weights of the classes: small things count beside road and sky."""
        share = torch.bincount(counted.flatten().long(), minlength=self._classes).float()
        weight = (share.sum() / share.clamp(min=1)) ** self.options.balance
        weight[share == 0] = 0
        return weight / weight[share > 0].mean()

    def _loss(self, rows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        x, y = self.x[rows], labels[rows]
        if y.ndim == 3:
            x, y = changed_photos(x, y, self.options.flip, generator)
        else:
            x = shifted(x, self.options.flip, generator)
        x = x.to(self.device).contiguous(memory_format=torch.channels_last)
        scores = self._scores(x)
        if y.ndim == 3:
            size = (y.shape[1], y.shape[2])
            scores = functional.interpolate(scores, size, mode="bilinear", align_corners=False)
        loss = functional.cross_entropy(
            scores,
            y.to(self.device).long(),
            self._weight,
            ignore_index=IGNORE,
            label_smoothing=self.options.smoothing,
        )
        return loss + self._pull()

    def _pseudo_labels(self, epoch: int) -> Tensor:
        return self._y

    def _share_of_rate(self, done: float) -> float:
        """One cycle: from a 25th up in a fifth of the iterations, then down to nothing."""
        rising = 0.2
        if done < rising:
            return 1 - 0.96 * (1 + math.cos(math.pi * done / rising)) / 2
        return (1 + math.cos(math.pi * (done - rising) / (1 - rising))) / 2

    def _groups(self) -> list[dict[str, Any]]:
        rate = self.options.lr
        return [{"params": list(self.model.parameters()), "lr": rate, "first": rate}]


def fine_tune(
    model: str,
    data: str | Path,
    output: str | os.PathLike[str],
    weights: str | Path | None = None,
    imagenet: str | Path | None = None,
    options: FineTuningOptions | None = None,
    wanted: Wanted | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Train a model on labelled images and write its checkpoint.

    Args:
        model: As that of :func:`.adapt.adapt`.
        data: Image folder with a folder for every class, or street scenes.
        output: The .safetensors file.
        weights: Checkpoint to start from.
        imagenet: ImageNet checkpoint of the trunk, for a model that has ``load_imagenet``. With
            neither, training starts from random weights.
        options: How to train.
        wanted: Size and normalisation of the images.
        seed: Seed of random weights, order and augmentation.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: Resume after the last epoch of a run that was stopped.
        progress: Called with (iterations done, iterations in all, epoch).

    Raises:
        HdrqError: The input does not fit; the message says what to do.
    """
    chosen = options or FineTuningOptions()
    target = Path(output).absolute()
    if target.suffix != ".safetensors":
        raise SpecError(f"found output {output}; needed a .safetensors file")
    partial = partial_of(target)
    check_output(target, TRAINED, [weights, imagenet, data])
    check_output(partial, ADAPTING, [weights, imagenet, data])
    check_seed(seed)
    network = started(model, weights, imagenet, seed)
    source = state_sha256(network.state_dict())
    images, y = labelled_images(data, wanted)
    if len(images.x) < chosen.batch:
        raise DataError(
            f"{data}: found {len(images.x)} images; needed {chosen.batch} or more (one batch): add "
            "images or choose a smaller `batch`"
        )
    where = torch_device(device)
    network = network.to(where).to(memory_format=torch.channels_last)
    try:
        training = FineTuning(network, torch.from_numpy(images.x), y, chosen, seed, where)
    except DataError as error:
        raise DataError(f"{data}: {error}") from error
    origin = {"model": model, "source_sha256": source, "data_sha256": images.sha256}
    training.train(partial, origin, resume, progress)
    state = {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    notes = json.dumps({"method": training.method, "seed": seed, **training.notes})
    write_bytes(target, save(state, {"trained": notes}), TRAINED)
    remove_file(partial, ADAPTING)
    return target


def started(
    model: str, weights: str | Path | None, imagenet: str | Path | None, seed: int
) -> nn.Module:
    """The model with the weights that training starts from.

    Args:
        model: As that of :func:`fine_tune`, like all others.
        weights: Checkpoint to start from.
        imagenet: ImageNet checkpoint of the trunk.
        seed: Seed of what is random.

    Raises:
        ModelError: A file is no checkpoint, or does not fit.
    """
    torch.manual_seed(seed)
    network = load_model(model)
    if weights is not None:
        load_state(network, weights, "source")
    elif imagenet is not None:
        take = getattr(network, "load_imagenet", None)
        if take is None:
            raise ModelError(
                f"found ImageNet weights for {model}, which is trained from random ones; leave "
                "them out"
            )
        state = load_checkpoint(imagenet)
        try:
            take(state)
        except ModelError as error:
            raise ModelError(f"{imagenet}: {error}") from error
    return network


def labelled_images(data: str | Path, wanted: Wanted | None) -> tuple[ImageSet, Tensor]:
    """Images and their labels: (N,) of class folders, or (N, H, W) uint8 of street scenes.

    Raises:
        DataError: Nothing readable, no labels, or scenes of several sizes.
    """
    images = read(data, wanted)
    if not is_scenes(Path(data)):
        if images.y is None:
            raise DataError(f"{data}: found no folder of a class; needed one for every class")
        return images, torch.from_numpy(images.y)
    scenes = replace(find_scenes(data), size=images.x.shape[2:])
    labels = [y.astype(np.uint8) for _, y in scenes.batches(8)]
    return images, torch.from_numpy(np.concatenate(labels))
