"""A look at checkpoints and images before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count as count_up
from pathlib import Path

import torch

from ..calibration_data.readers import ImageSet, Wanted, read
from ..typing import Progress, no_progress
from .capture import run_model
from .inputs import own_wanted
from .loading import (
    checkpoint_classes,
    current_folder_importable,
    load_model,
    load_state,
    with_classes,
)

__all__ = ["FirstLook", "first_look"]


@dataclass(frozen=True)
class FirstLook:
    """What a model and its images look like.

    Attributes:
        model: Name of the model; that of a library's model with the checkpoint's classes, where
            these are others than the library's own.
        images: A few images of each domain, as the model reads them.
        outputs: Classes that the model tells apart; None where its output has another form.
        own: What the model's own configuration says of its inputs.
        recognised: Of domains with a checkpoint and labelled images: how many images of how many
            the model with that checkpoint takes for what they are.
    """

    model: str
    images: Mapping[str, ImageSet]
    outputs: int | None
    own: Wanted
    recognised: Mapping[str, tuple[int, int]]


def first_look(
    model: str,
    source: str | Path,
    checkpoints: Mapping[str, str | Path],
    images: Mapping[str, str | Path],
    tests: Mapping[str, str | Path],
    wanted: Wanted | None = None,
    count: int = 32,
    progress: Progress = no_progress,
) -> FirstLook:
    """Load every checkpoint into a model, and run the model on images of each domain.

    Args:
        model: ``PKG.MOD:FACTORY``, ``timm:NAME``, ``torchvision:NAME`` or ``transformers:NAME``.
        source: Source checkpoint.
        checkpoints: Adapted checkpoint of each domain that has one.
        images: Image folder, street scenes or .npz of each domain.
        tests: Labelled images of each domain that has some.
        wanted: How images become inputs; what it leaves open is taken from a timm model's own
            configuration, then from the images.
        count: Images of each domain that are read.
        progress: Called with (looks taken, looks in all, what is looked at now).

    Raises:
        ModelError: A checkpoint cannot be read or does not fit the model.
        DataError: Images cannot be read, or the model does not take them.
    """
    total = 1 + len(tests) + len(checkpoints) + len(images)
    looks = count_up()

    def begin(what: str) -> None:
        progress(next(looks), total, what)

    with current_folder_importable():
        begin("model and source")
        model, network = _with_the_classes_of(source, model)
        load_state(network, source, "source")
        own, outputs = own_wanted(network, None), None
        wanted = own_wanted(network, wanted)
        labelled: dict[str, ImageSet] = {}
        for name, path in tests.items():
            begin(f"test images of {name}")
            labelled[name] = read(path, wanted, count)
        recognised: dict[str, tuple[int, int]] = {}
        for name, checkpoint in checkpoints.items():
            begin(f"checkpoint of {name}")
            load_state(network, checkpoint, "adapted")
            if name in labelled:
                recognised |= _recognised(network, name, labelled[name])
        sets: dict[str, ImageSet] = {}
        for name, path in images.items():
            begin(f"images of {name}")
            sets[name] = read(path, wanted, count)
            answer = run_model(network, torch.from_numpy(sets[name].x[:2]))
            outputs = int(answer.shape[1]) if answer.ndim in {2, 4} else None
    return FirstLook(model, sets, outputs, own, recognised)


def _with_the_classes_of(source: str | Path, model: str) -> tuple[str, torch.nn.Module]:
    """The model and its name; a library's model is built with the classes of the checkpoint."""
    network = load_model(model)
    differing = checkpoint_classes(network, source)
    renamed = with_classes(model, differing[1]) if differing else None
    return (model, network) if renamed is None else (renamed, load_model(renamed))


def _recognised(
    network: torch.nn.Module, name: str, images: ImageSet
) -> dict[str, tuple[int, int]]:
    """Images taken for what they are, and all; nothing where labels are of another form."""
    scores = run_model(network, torch.from_numpy(images.x))
    if images.y is None or images.y.ndim != 1 or scores.ndim != 2:
        return {}
    if images.classes is not None and len(images.classes) != scores.shape[1]:
        return {}  # which folder is which class is not known
    right = scores.argmax(1).numpy() == images.y
    return {name: (int(right.sum()), len(right))}
