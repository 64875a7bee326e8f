"""What the protocols run on: a model, its source and adapted checkpoints, images of each domain."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.methods import METHODS, Options
from ..calibration.settings import SETTINGS
from ..calibration_data import digits, streets
from ..calibration_data.readers import Wanted, read
from ..calibration_data.readers.decoding import folders_of
from ..calibration_data.readers.street_scenes import find_scenes, is_scenes
from ..errors import DataError, ModelError
from ..formats.atomic_files import FolderKind, Kind, check_output, new_directory
from ..formats.file_kinds import DIGITS, STREETS
from ..formats.staleness import code_of, record_written, versions_of, written_change
from ..typing import Progress, no_progress

if TYPE_CHECKING:
    from ..calibration_data.training import BenchmarkTraining

__all__ = [
    "HRDA",
    "OFFICE_HOME",
    "SEGMENTATION",
    "Domain",
    "Task",
    "check_images",
    "checkpoint_of",
    "is_written",
    "iterations",
    "learning_rates",
    "made",
    "made_checkpoints",
    "made_data",
    "office_home",
    "segmentation",
    "write_made",
]

_log = logging.getLogger("hdrq_deploy")
OFFICE_HOME = ("Art", "Clipart", "Product", "Real World")
SEGMENTATION = ("cityscapes", "idd", "bdd100k")
# HRDA's forms by factory; the first is that of the paper.
HRDA = {
    "hrda_resnet101_conv1x1": "ResNet-101, fusion by a 1x1 convolution, as published with HDRQ",
    "hrda_resnet101": "ResNet-101, fusion by separable ASPP",
    "hrda_mit_b5": "MiT-B5, fusion by separable ASPP",
}
_IMAGENET = Wanted(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# (height, width) that scenes are measured at: each data set's own shape, as tall as the window.
_SIZES = {"cityscapes": (1024, 2048), "idd": (1152, 2048), "bdd100k": (1152, 2048)}
# Said, before there was a record of all files, that the data are whole; they are kept.
_EARLIER = "written"
_ENDINGS = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Domain:
    """A target domain: its adapted checkpoint, and images to calibrate and to measure on.

    Street scenes are measured at ``image_size`` (height, width), or as they are.
    """

    name: str
    weights: str
    images: str
    test: str
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Task:
    """One protocol on one data set.

    Attributes:
        model: The model as ``hdrq-calibrate --model`` takes it.
        form: What tells this model from others of its name, in words.
        source_domain: The domain that the others are adapted from, where a protocol makes them so.
        adaptation: How they are adapted: ``supervised``, ``unlabelled``, or ``brought``.
        source: Checkpoint that all domains started from.
        wanted: Size and normalisation of the images.
        split: Split of street scenes that is measured.
        images: Calibration images of each domain.
        mix_images: Images of each domain that choose a mix, of our own setting.
        renew_images: Images of each domain for new BatchNorm moments.
        fit_images: Images of each domain that a merge is fitted on.
        learning: Options of ``calibrate`` by method, beside the method's own.
        rates: Learning rates by method, in settings that do not scale the published ones.
        published: Figures of the paper in %, by method and bits, single and merged.
    """

    name: str
    model: str
    source: str
    domains: tuple[Domain, ...]
    wanted: Wanted = field(default_factory=Wanted)
    split: str = "val"
    images: int = 1024
    mix_images: int = 256
    renew_images: int = 64
    fit_images: int = 256
    learning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    form: str = ""
    source_domain: str = ""
    adaptation: str = ""

    def options(self, method: str, setting: str, rate: float | None = None) -> Options:
        """How a method learns in a setting; one that quantizes nothing has none.

        Args:
            method: A row of the table of methods.
            setting: A row of the table of settings.
            rate: The learning rate of weights as it is applied, in place of the task's or the
                method's own; a setting that scales rates then scales that of activations only.

        Raises:
            SpecError: A value is out of range.
        """
        common = SETTINGS[setting].options(method) if METHODS[method].quantizes else {}
        rates = {} if common.get("scale_rates") else self.rates.get(method, {})
        options = Options.of(method, **{**common, **self.learning.get(method, {}), **rates})
        return options if rate is None else replace(options, lr=rate / options.rate_factor)

    def calibrated_with(self, **changes: Any) -> Task:
        """The task with options of every learning method changed; None changes nothing."""
        given = {key: value for key, value in changes.items() if value is not None}
        learning = {m: {**self.learning.get(m, {}), **given} for m in _learners()}
        return replace(self, learning=learning)


def office_home(
    data: Path, checkpoints: Path, source: str = "Real World", targets: Sequence[str] = ()
) -> Task:
    """Office-Home with SHOT's ResNet-50 (65 classes, 224x224 out of 256x256).

    Args:
        data: Folder of the domains' folders, each of class folders.
        checkpoints: ``source.pt`` and ``art.pt``, ``clipart.pt``, ... or what SHOT wrote
            (``R/source_F.pt``, ``RA/target_F_*.pt`` and so on, at any depth).
        source: The domain that the others were adapted from.
        targets: All others by default.

    Raises:
        DataError: A domain's folder or checkpoint is not there.
    """
    names = list(targets) or [name for name in OFFICE_HOME if _key(name) != _key(source)]
    folders = {name: _folder(data, name) for name in (source, *names)}
    letter = _key(source)[0].upper()
    domains = []
    for name in names:
        file = checkpoint_of(checkpoints, name, f"{letter}{_key(name)[0].upper()}", "target")
        domains.append(Domain(_key(name), str(file), str(folders[name]), str(folders[name])))
    figures = {"qdrop-w3a3": {"merged": 62.99}, "hdrq-w3a3": {"merged": 64.70}}
    known = _key(source) == "realworld" and len(domains) == len(OFFICE_HOME) - 1
    return Task(
        "office-home",
        "hdrq_deploy.models:shot_resnet50",
        str(checkpoint_of(checkpoints, "source", letter, "source")),
        tuple(domains),
        replace(_IMAGENET, size=(224, 224), resize=(256, 256), ignore_case=True),
        published=figures if known else {},
    )


def segmentation(
    data: Path,
    checkpoints: Path,
    model: str = "hrda_resnet101_conv1x1",
    targets: Sequence[str] = (),
) -> Task:
    """GTA5 to Cityscapes, IDD and BDD100K with HRDA.

    Args:
        data: Folder with ``cityscapes``, ``idd``, ``bdd100k`` as they are distributed.
        checkpoints: ``source.pth`` and ``cityscapes.pth``, ``idd.pth``, ...
        model: A key of ``HRDA``. Published figures are those of the first.
        targets: Those of which there are data by default.

    Raises:
        DataError: A data set or a checkpoint is not there.
        ModelError: There is no such form of HRDA.
    """
    if model not in HRDA:
        raise ModelError(f"found HRDA's form {model!r}; choose one of {', '.join(HRDA)}")
    names = list(targets) or [n for n in SEGMENTATION if (data / n).is_dir()]
    if not names:
        raise DataError(f"{data}: found none of {', '.join(SEGMENTATION)}; needed their folders")
    domains = []
    for name in names:
        folder = _folder(data, name)
        file = checkpoint_of(checkpoints, name)
        size = _SIZES.get(_key(name), _SIZES["cityscapes"])
        domains.append(Domain(_key(name), str(file), str(folder), str(folder), size))
    figures = {"qdrop-w4a4": {"merged": 58.92}, "hdrq-w4a4": {"merged": 63.00}}
    known = model == next(iter(HRDA)) and [d.name for d in domains] == ["cityscapes", "idd"]
    return Task(
        "segmentation",
        f"hdrq_deploy.models:{model}",
        str(checkpoint_of(checkpoints, "source")),
        tuple(domains),
        replace(_IMAGENET, size=(1024, 1024), resize=(1024, 2048)),
        images=32,  # ten crops of each: 20 GB of activations on the disk
        mix_images=8,
        renew_images=8,
        fit_images=8,
        learning={name: {"batch": 1} for name in _learners()},
        published=figures if known else {},
        form=HRDA[model],
    )


def made(name: str, out: Path, targets: Sequence[str] = ()) -> Task:
    """The same protocols on the small data that the project makes, in ``out/data``.

    :func:`write_made` writes them.

    Raises:
        DataError: No such target domain.
        ModelError: scikit-learn, whose digits they are, is not installed.
    """
    folder, _ = made_data(name)
    task = _digits(out / folder) if name == "office-home" else _streets(out / folder)
    domains = {domain.name: domain for domain in task.domains}
    unknown = [target for target in targets if target not in domains]
    if unknown:
        raise DataError(f"found the target {unknown[0]}; there are {', '.join(domains)}")
    return replace(task, domains=tuple(domains[name] for name in targets or domains))


def made_data(name: str) -> tuple[str, FolderKind]:
    """Where the data of a protocol lie in the folder of a run, and what they are."""
    return ("data/digits", DIGITS) if name == "office-home" else ("data/streets", STREETS)


def is_written(name: str, out: Path) -> bool:
    """Whether the data of a protocol lie in the folder of a run already.

    Raises:
        HdrqError: Something else is there.
    """
    folder, kind = made_data(name)
    if (out / folder / _EARLIER).is_file():
        return True
    return (check_output(out / folder, kind, label="out") / kind.marker).is_file()


def check_images(task: Task, needed: int) -> None:
    """Refuse domains without enough calibration images, or without labelled ones for the test.

    Args:
        task: The domains.
        needed: Calibration images that are needed, and read.

    Raises:
        DataError: Fewer, images that cannot be read, or test images without labels.
    """
    for domain in task.domains:
        found = len(read(domain.images, task.wanted, needed))
        if found < needed:
            raise DataError(
                f"{domain.images}: found {found} images of {domain.name} for calibration; needed "
                f"{needed} or more: add images"
            )
        if is_scenes(Path(domain.test)):
            find_scenes(domain.test, task.split)
        elif read(domain.test, task.wanted, 1).y is None:
            raise DataError(
                f"{domain.test}: found images of {domain.name} without labels for the test; needed "
                "one folder per class, or y in the .npz"
            )


def write_made(name: str, out: Path, progress: Progress = no_progress) -> None:
    """Write what :func:`made` describes, where it is missing or stale.

    Args:
        name: The protocol.
        out: Folder of the run.
        progress: Called while models are trained that this installation does not carry.

    Raises:
        HdrqError: Something else is there.
    """
    folder, kind = made_data(name)
    data = out / folder
    splits = ["calibration", "test"]
    module = "digits.images" if kind is DIGITS else "streets.drawing"
    record = {
        "splits": splits,
        "versions": versions_of("numpy", "pillow", "scikit-learn"),
        "code": code_of(f"calibration_data.{module}"),
    }
    change = _change(name, out, record)
    if change:
        _log.info("%s: %s; making it", data, change)
        benchmark: Any = digits if kind is DIGITS else streets
        with new_directory(data, kind, sync=False) as new:
            benchmark.write(new, benchmark.TARGETS, tuple(splits))
            record_written(new, kind, record)
    training = _training(name)
    training.train_missing(training.folder(_own_checkpoints(data)), progress)


def _change(name: str, out: Path, record: Mapping[str, Any]) -> str:
    """Why the data of a protocol are to be made; "" where they are up to date."""
    folder, kind = made_data(name)
    if not is_written(name, out):
        return "it is missing"
    if (out / folder / _EARLIER).is_file():
        return ""
    return written_change(out / folder, kind, record)


def made_checkpoints(name: str) -> list[tuple[str, Kind]]:
    """The checkpoints that :func:`write_made` writes: place in the folder of a run, and kind."""
    own = _own_checkpoints(Path(made_data(name)[0]))
    training = _training(name)
    if training.folder(own) != own:
        return []
    return [(str(own / file), kind) for file, kind in training.outputs()]


def _own_checkpoints(data: Path) -> Path:
    return data.with_name(f"{data.name}-checkpoints")


def _training(name: str) -> BenchmarkTraining[Any]:
    if name == "office-home":
        from ..calibration_data.digits.make_checkpoints import TRAINING as of_digits

        return of_digits
    from ..calibration_data.streets.make_checkpoints import TRAINING as of_streets

    return of_streets


def _digits(data: Path) -> Task:
    checkpoints = _training("office-home").folder(_own_checkpoints(data))
    if importlib.util.find_spec("sklearn") is None:
        raise ModelError("the digits need scikit-learn: pip install 'hdrq-deploy[demo]'")
    return Task(
        "digits",
        "hdrq_deploy.calibration_data.models:resnet14",
        str(checkpoints / "fonts.safetensors"),
        tuple(_made_domain(data, checkpoints, name) for name in digits.TARGETS),
        learning=iterations(1000),
        # The larger of HDRQ's two published rates, and the published one of the others scaled to a
        # thousand iterations; not searched (``hdrq reproduce --tune`` does).
        rates=learning_rates(rounding=2e-2, latent=1e-3),
    )


def _streets(data: Path) -> Task:
    checkpoints = _training("segmentation").folder(_own_checkpoints(data))
    return Task(
        "streetscape",
        "hdrq_deploy.calibration_data.models:streetnet",
        str(checkpoints / f"{streets.SOURCE}.safetensors"),
        tuple(_made_domain(data, checkpoints, name) for name in streets.TARGETS),
        mix_images=8,
        renew_images=16,
        fit_images=32,
        # Found by the search of benchmarks/merge_statistics.py (W4A4, one scale per tensor).
        learning=iterations(200, batch=4),
        rates=learning_rates(rounding=1e-1, latent=1e-4),
    )


def _learners() -> list[str]:
    return [name for name, row in METHODS.items() if row.options.iterates]


def iterations(iters: int, **others: Any) -> dict[str, dict[str, Any]]:
    """Iterations a block, and other options, of every method that learns."""
    return {name: {"iters": iters, **others} for name in _learners()}


def learning_rates(rounding: float, latent: float) -> dict[str, dict[str, float]]:
    """A rate for every method that learns to round up or down, one for those of latent weights."""
    by_learner = {"adaround": rounding, "latent": latent}
    return {name: {"lr": by_learner[METHODS[name].options.learner]} for name in _learners()}


def _made_domain(data: Path, checkpoints: Path, name: str) -> Domain:
    folder = data / name
    weights = checkpoints / f"{name}.safetensors"
    return Domain(name, str(weights), str(folder / "calibration"), str(folder / "test"))


def _key(name: str) -> str:
    """``Real World``, ``Real_World`` and ``RealWorld`` are one."""
    return "".join(c for c in name.lower() if c.isalnum())


def _folder(data: Path, name: str) -> Path:
    folders = folders_of(data) if data.is_dir() else []
    if found := [folder for folder in folders if _key(folder.name) == _key(name)]:
        return _only(found)
    raise DataError(
        f"{data / name}: not there; needed a folder of this domain's images "
        f"(found {', '.join(f.name for f in folders) or 'no folders'})"
    )


def _only(found: Sequence[Path]) -> Path:
    """The one of several places that may all be meant.

    Raises:
        DataError: There are more.
    """
    if len(found) > 1:
        raise DataError(f"{found[1]}: found {found[0]} beside it; needed one of the two")
    return found[0]


def checkpoint_of(folder: Path, name: str, letters: str = "", role: str = "") -> Path:
    """``NAME.pt`` and the like, or SHOT's folder ``LETTERS`` with ``ROLE_F*.pt``."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if found := [f for f in files if f.suffix in _ENDINGS and _key(f.stem) == _key(name)]:
        return _only(found)
    if letters and folder.is_dir():
        places = {file.parent for file in folder.rglob(f"{role}_F*.pt")}
        if found := sorted(place for place in places if place.name == letters):
            return _only(found)
    public = f", or SHOT's {letters}/{role}_F*.pt, _B and _C" if letters else ""
    raise DataError(
        f"{folder / _key(name)}: found no checkpoint; needed {_key(name)} with "
        f"{', '.join(_ENDINGS)}{public}"
    )
