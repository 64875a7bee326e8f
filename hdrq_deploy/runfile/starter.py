"""A commented run file, written after a look at the checkpoints and the images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..calibration_data.readers import Wanted
from ..errors import HdrqError
from ..formats.atomic_files import check_name
from ..typing import Progress, no_progress
from .document import emitted

__all__ = ["ADAPT", "Given", "Seen", "given_domain", "look", "text"]

# In the place of a checkpoint: it is made from the source model.
ADAPT = "adapt"
_LOOKED_AT = 32
# Class names that a comment shows.
_SHOWN = 8


@dataclass(frozen=True)
class Given:
    """What the user says of a domain.

    Attributes:
        name: Name of the domain.
        checkpoint: Adapted checkpoint, or :data:`ADAPT`.
        images: Calibration images.
        test: Labelled images, or None.
    """

    name: str
    checkpoint: str
    images: str
    test: str | None = None


@dataclass(frozen=True)
class Seen:
    """What the images and the model of a run look like.

    Attributes:
        model: Name of the model, with the checkpoint's number of classes where it needs that.
        count: Images of each domain that were looked at (a few).
        size: Height and width of all of them; None where sizes differ.
        classes: Names of class folders, where there are any.
        outputs: Classes that the model tells apart.
        own: What the model's own configuration says of its inputs.
        notes: What the user should know.
    """

    model: str
    count: Mapping[str, int]
    size: tuple[int, int] | None
    classes: tuple[str, ...] | None
    outputs: int | None
    own: Wanted
    notes: tuple[str, ...]


def given_domain(word: str) -> Given:
    """``night=night.safetensors:images/night:test/night`` as its parts; the test may be missing.

    Raises:
        HdrqError: Another form.
    """
    name, sign, rest = word.partition("=")
    parts = rest.split(":")
    if not sign or len(parts) not in {2, 3} or not all(parts):
        raise HdrqError(
            f"found `domain` {word!r}; needed NAME=CHECKPOINT:IMAGES or "
            f"NAME=CHECKPOINT:IMAGES:TEST ({ADAPT} in place of CHECKPOINT: made from the source)"
        )
    return Given(check_name(name, "the name"), *parts)


def look(
    model: str,
    source: str,
    domains: Sequence[Given],
    wanted: Wanted,
    progress: Progress = no_progress,
) -> Seen:
    """Load every checkpoint into the model, and run it on a few images of each domain.

    Args:
        model: Name of the model.
        source: Checkpoint that all domains started from.
        domains: What is given of each domain.
        wanted: How images become inputs, where the user says so.
        progress: Called with (looks taken, looks in all, what is looked at now).

    Raises:
        HdrqError: A checkpoint does not fit the model, or images do not fit it or cannot be read.
    """
    from ..calibration.first_look import first_look

    own = {d.name: d.checkpoint for d in domains if d.checkpoint != ADAPT}
    tests = {d.name: d.test for d in domains if d.test is not None}
    images = {domain.name: domain.images for domain in domains}
    seen = first_look(model, source, own, images, tests, wanted, _LOOKED_AT, progress)
    sets, outputs = seen.images, seen.outputs
    sizes = {images.x.shape[2:] for images in sets.values()}
    common = sizes.pop() if len(sizes) == 1 else None
    named = {name: images.classes for name, images in sets.items() if images.classes}
    classes = next(iter(named.values()), None)
    notes = _notes(named, outputs)
    if seen.model != model:
        notes.insert(0, f"the source checkpoint has {outputs} classes: the model is {seen.model}")
    return Seen(
        seen.model,
        {name: len(images) for name, images in sets.items()},
        None if common is None else (int(common[0]), int(common[1])),
        classes,
        outputs,
        seen.own,
        (*notes, *_checkpoint_notes(seen.recognised)),
    )


def _checkpoint_notes(recognised: Mapping[str, tuple[int, int]]) -> list[str]:
    """What the checkpoints recognise: images that are read otherwise than in training show here."""
    told = [f"{right} of {total} of {name}" for name, (right, total) in recognised.items()]
    if not told:
        return []
    return [
        f"the checkpoints recognise these test images: {', '.join(told)}; if you know them to be "
        "better, say how training read images (size, mean, std)"
    ]


def _notes(named: Mapping[str, tuple[str, ...]], outputs: int | None) -> list[str]:
    notes = []
    first = next(iter(named), "")
    for name, classes in named.items():
        if classes != named[first]:
            notes.append(
                f"{name} has other class folders than {first}: check that both are numbered alike"
            )
        if outputs is not None and len(classes) != outputs:
            notes.append(
                f"{name} has {len(classes)} class folders, and the model {outputs} classes"
            )
    return notes


def text(source: str, domains: Sequence[Given], seen: Seen, wanted: Wanted, folder: Path) -> str:
    """The run file.

    Args:
        source: Checkpoint that all domains started from.
        domains: What is given of each domain.
        seen: What :func:`look` found.
        wanted: How images become inputs, where the user says so.
        folder: Folder of the file, which paths are relative to.
    """
    first = domains[0].name
    iters = "# iterations a block, for a first look; 20000 as published (hours on a CPU)"
    lines = [
        "# A run of hdrq-deploy. `hdrq run` makes what is missing or stale, `hdrq run --dry-run`",
        "# says what that is, `hdrq run --schema` prints the schema that editors complete this",
        "# file with. Paths are relative to this file; ${NAME} is an environment variable.",
        f"model: {_plain(seen.model)}" + (f"  # {seen.outputs} classes" if seen.outputs else ""),
        f"source: {_path(source, folder)}  # all domains were adapted from this checkpoint",
        "",
        "domains:",
    ]
    for domain in domains:
        lines += _domain_lines(domain, folder)
    lines += ["", *_preprocess_lines(seen, wanted), ""]
    lines += [
        "# Lists make a grid: every method with every bit-width. float and rtn (round to nearest)",
        "# are what hdrq is compared with.",
        "methods: [hdrq]",
        "bits: [w8a8]  # w4a8: 4-bit weights",
        "calibrate:",
        f"  iters: 200  {iters}",
        "  scale_rates: true  # fewer iterations learn at higher rates",
        "",
    ]
    if len(domains) > 1:
        names = ", ".join(_plain(domain.name) for domain in domains)
        lines += [
            "merges:",
            "  merged:",
            f"    domains: [{names}]",
            "    # weights: statistics  # or auto: on unlabelled images; or numbers:",
            f"    # weights: {{{_plain(first)}: 0.6, ...}}",
            "    # re_estimate: true   # measure BatchNorm again on unlabelled images",
            "    # fit: true           # fit every layer to the parents on unlabelled images",
            "",
        ]
    lines += [
        "engines: [ort]  # openvino, onnx, trt (NVIDIA GPU), trt-rtx; auto: the fastest here",
        "# verify: true  # compare PyTorch, bundle, lowered graph and engine on the test images",
        "",
        "bench:",
        "  threads: 1",
    ]
    return "\n".join(lines) + "\n"


def _domain_lines(domain: Given, folder: Path) -> list[str]:
    lines = [f"  {_plain(domain.name)}:"]
    if domain.checkpoint == ADAPT:
        lines.append("    adapt: true  # from the source model, on unlabelled images")
    else:
        lines.append(f"    checkpoint: {_path(domain.checkpoint, folder)}")
    lines.append(f"    calibration: {_path(domain.images, folder)}  # labels are not looked at")
    if domain.test is None:
        lines.append("    # test: DIR  # one folder per class; without it accuracy is not measured")
    else:
        lines.append(f"    test: {_path(domain.test, folder)}")
    return lines


def _preprocess_lines(seen: Seen, wanted: Wanted) -> list[str]:
    lines = []
    if seen.classes:
        names = ", ".join(seen.classes[:_SHOWN])
        more = ", ..." if len(seen.classes) > _SHOWN else ""
        lines.append(f"# {len(seen.classes)} class folders: {names}{more}")
    own = seen.own
    if own.size is not None:
        lines.append("# What is not said here is the model's own: " + ", ".join(_pairs(own)))
    elif wanted.size is None and seen.size is not None:
        lines.append(f"# Images of {seen.size[0]} x {seen.size[1]} are read as they are.")
    given = _pairs(wanted)
    if given:
        return [*lines, "preprocess:", *(f"  {pair}" for pair in given)]
    return [*lines, "# preprocess: {size: [224, 224], mean: [...], std: [...]}"]


def _pairs(wanted: Wanted) -> list[str]:
    """The keys of ``preprocess`` and their values, where there are any."""
    values = {name: getattr(wanted, name) for name in ("size", "resize", "mean", "std")}
    return [f"{name}: [{', '.join(map(str, value))}]" for name, value in values.items() if value]


def _path(path: str, folder: Path) -> str:
    """A path relative to the folder of the file, where it lies there or beside it."""
    full = os.path.abspath(path)  # noqa: PTH100 - links stay as they are
    relative = os.path.relpath(full, folder)
    return _plain(full if relative.startswith(os.path.join("..", "..")) else relative)  # noqa: PTH118


def _plain(word: str) -> str:
    """A word as YAML writes it, quoted where it must be; `${` stays what it is."""
    return emitted([word]).removeprefix("- ").rstrip("\n")
