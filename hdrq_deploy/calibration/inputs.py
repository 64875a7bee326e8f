"""What a calibration starts from: the model, its checkpoints and the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration_data.readers import ImageSet, Wanted, joined, read
from ..errors import DataError
from ..formats.atomic_files import Kind, check_output
from ..formats.file_kinds import BUNDLE, PARTIAL, partial_of
from .capture import run_model
from .devices import torch_device
from .loading import is_lazy, load_model, load_state, put_state
from .request import CalibrationRequest, Source

__all__ = ["CalibrationInputs", "load", "own_wanted"]


@dataclass(frozen=True)
class CalibrationInputs:
    """A model with the weights of its domain, and the domain's images.

    Attributes:
        target: Absolute path of what will be written.
        device: Device that learns.
        network: The user's module, with ``state``.
        state: The adapted weights.
        base: The source weights, or None.
        datasets: The calibration images of every domain.
        dataset: All of them, one domain after the other.
        images: The same as a tensor (N, C, H, W).
    """

    target: Path
    device: torch.device
    network: nn.Module
    state: Mapping[str, Tensor]
    base: Mapping[str, Tensor] | None
    datasets: Mapping[str, ImageSet]
    dataset: ImageSet
    images: Tensor


def load(request: CalibrationRequest, kind: Kind = BUNDLE) -> CalibrationInputs:
    """Read model, checkpoints and images.

    Args:
        request: What to read.
        kind: What will be written.

    Raises:
        HdrqError: One of them cannot be read, they do not fit each other, or the output may
            not be written.
    """
    target = check_output(request.output, kind, request.inputs)
    if kind is BUNDLE:
        check_output(partial_of(target), PARTIAL, request.inputs)
    device = torch_device(request.device)
    network = load_model(request.model)
    wanted = own_wanted(network, request.wanted)
    # Lazy modules have no parameters before they have seen an image; others fail early.
    datasets = _read_all(request, wanted) if is_lazy(network) else None
    if datasets is not None:
        run_model(network, torch.from_numpy(datasets[request.domains[0]].x[:2]))
    own = {name: value.clone() for name, value in network.state_dict().items()}
    base = load_state(network, request.base, "source") if request.base else None
    state = load_state(network, request.weights, "adapted") if request.weights else own
    put_state(network, state)
    datasets = _read_all(request, wanted) if datasets is None else datasets
    names = [
        _name(source, domain) for source, domain in zip(request.sources, datasets, strict=True)
    ]
    dataset = joined(list(datasets.values()), names)
    _check_count(request, len(dataset.x), names)
    images = torch.from_numpy(dataset.x)
    return CalibrationInputs(target, device, network, state, base, datasets, dataset, images)


def _read_all(request: CalibrationRequest, wanted: Wanted) -> dict[str, ImageSet]:
    pairs = zip(request.domains, request.sources, strict=True)
    return {domain: _read(request, source, wanted) for domain, source in pairs}


def _read(request: CalibrationRequest, source: Source, wanted: Wanted) -> ImageSet:
    if isinstance(source, ImageSet):
        return source
    return read(source, wanted, request.images, request.seed, request.skip_corrupt)


def _name(source: Source, domain: str) -> str:
    return f"the data of {domain}" if isinstance(source, ImageSet) else str(source)


def _check_count(request: CalibrationRequest, count: int, names: Sequence[str]) -> None:
    needed = max(2, request.learning.batch if request.learns else 2)
    if count < needed:
        raise DataError(
            f"{', '.join(names)}: found {count} images; needed {needed} or more (one batch): add "
            "images" + (" or choose a smaller `batch`" if request.learns else "")
        )


def own_wanted(network: nn.Module, wanted: Wanted | None) -> Wanted:
    """``wanted`` with what it leaves open filled from a timm model's own configuration."""
    wanted = wanted or Wanted()
    config = getattr(network, "pretrained_cfg", None) or {}
    if not config.get("input_size"):
        return wanted
    return Wanted(
        wanted.size or tuple(config["input_size"][1:]),
        wanted.mean or tuple(config["mean"]),
        wanted.std or tuple(config["std"]),
        wanted.channels or config["input_size"][0],
        wanted.resize,
        wanted.ignore_case,
    )
