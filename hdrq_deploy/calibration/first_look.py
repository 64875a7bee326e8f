"""A look at checkpoints and images before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration_data.readers import ImageSet, Wanted, read
from .capture import run_model
from .inputs import own_wanted
from .loading import current_folder_importable, load_model, load_state

__all__ = ["FirstLook", "first_look"]


@dataclass(frozen=True)
class FirstLook:
    """What a model and its images look like.

    Attributes:
        images: A few images of each domain, as the model reads them.
        outputs: Classes that the model tells apart; None where its output has another form.
        own_size: Height and width that the model's own configuration names, or None.
    """

    images: Mapping[str, ImageSet]
    outputs: int | None
    own_size: tuple[int, int] | None


def first_look(
    model: str,
    source: str | Path,
    checkpoints: Sequence[str | Path],
    images: Mapping[str, str | Path],
    size: tuple[int, int] | None = None,
    count: int = 32,
) -> FirstLook:
    """Load every checkpoint into a model, and run the model on images of each domain.

    Args:
        model: ``PKG.MOD:FACTORY``, ``timm:NAME``, ``torchvision:NAME`` or ``transformers:NAME``.
        source: Source checkpoint.
        checkpoints: Adapted checkpoints.
        images: Image folder, street scenes or .npz of each domain.
        size: Height and width that images are resized to, or None.
        count: Images of each domain that are read.

    Raises:
        ModelError: A checkpoint cannot be read or does not fit the model.
        DataError: Images cannot be read, or the model does not take them.
    """
    with current_folder_importable():
        network = load_model(model)
        load_state(network, source, "source")
        for checkpoint in checkpoints:
            load_state(network, checkpoint, "adapted")
        wanted, outputs = own_wanted(network, Wanted(size=size)), None
        sets = {name: read(path, wanted, count) for name, path in images.items()}
        for some in sets.values():
            answer = run_model(network, torch.from_numpy(some.x[:2]))
            outputs = int(answer.shape[1]) if answer.ndim in {2, 4} else None
        own = own_wanted(network, None).size
    return FirstLook(sets, outputs, own)
