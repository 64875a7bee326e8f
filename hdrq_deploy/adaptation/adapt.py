"""From a source model and unlabelled images of a domain to an adapted checkpoint.

Classifiers: SHOT (Liang et al., ICML 2020). The last linear layer stays; features are trained so
that predictions are sure one by one and diverse together (information maximisation), and agree
with pseudo-labels, the nearest of class centroids found anew every epoch.

Segmentation: class-balanced self-training (Zou et al., ECCV 2018), without source images. Every
epoch the model labels the pixels it is surest of, the same share of every class and a growing one,
and learns them on images that are photographed again.

Source:
    github.com/tim-learn/SHOT, object/image_target.py (losses, rates, centroids).
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ..calibration.capture import single_output
from ..calibration.devices import torch_device
from ..calibration.inputs import own_wanted
from ..calibration.loading import load_model, load_state, state_sha256
from ..calibration_data.readers import ImageSet, Wanted, read
from ..calibration_data.readers.street_scenes import IGNORE
from ..errors import DataError, ModelError, SpecError
from ..formats.atomic_files import check_output, remove_file, replaced, write_bytes
from ..formats.file_kinds import ADAPTED, ADAPTING
from ..numerics.spec import check_seed

__all__ = ["Recipe", "adapt", "centroid_labels", "confident_labels", "information"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """How a model is adapted.

    Attributes:
        epochs: Passes over the images.
        batch: Images per step.
        lr: Rate of SGD, of layers in front of the classifier's bottleneck a tenth of it.
        pseudo: Weight of the pseudo-labels beside information maximisation (classifiers).
        share: Of the pixels of every class that are labelled, in the first and the last epoch.
        flip: Mirror half of the images.
        pull: Weight of the squared distance to the source weights (L2-SP, Li et al., ICML 2018):
            models that stay close to their source merge better.
    """

    epochs: int = 15
    batch: int = 64
    lr: float = 1e-2
    pseudo: float = 0.3
    share: tuple[float, float] = (0.2, 0.5)
    flip: bool = True
    pull: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise SpecError(
                f"found epochs={self.epochs}, batch={self.batch}; needed 1 or more, 2 or more"
            )
        first, last = self.share
        if not 0 < first <= last <= 1:
            raise SpecError(f"found share {first} {last}; needed 0 < FIRST <= LAST <= 1")
        for name in ("lr", "pseudo", "pull"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SpecError(f"found {name}={value}; needed a number >= 0")


def adapt(
    model: str,
    data: str | Path | ImageSet,
    output: str | os.PathLike[str],
    weights: str | Path,
    recipe: Recipe | None = None,
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
        recipe: How.
        images: At most so many.
        wanted: Size and normalisation of images.
        seed: Of order and augmentation.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: Go on behind the last epoch of a run that was stopped.
        progress: Called with (steps done, steps in all, epoch).
        skip_corrupt: Leave out images that cannot be decoded.

    Raises:
        HdrqError: The input does not fit; the message says what to do.
    """
    recipe = recipe or Recipe()
    target = Path(output).absolute()
    if target.suffix != ".safetensors":
        raise SpecError(f"found -o {output}; needed a .safetensors file")
    given = None if isinstance(data, ImageSet) else data
    partial = target.with_name(target.name + ".partial")
    check_output(target, ADAPTED, [weights, given])
    check_output(partial, ADAPTING, [weights, given])
    check_seed(seed)
    network = load_model(model)
    source = state_sha256(load_state(network, weights, "source"))
    wanted = own_wanted(network, wanted)
    found = (
        data
        if isinstance(data, ImageSet)
        else read(data, wanted, images, seed, skip_corrupt=skip_corrupt)
    )
    if len(found.x) < recipe.batch:
        raise DataError(
            f"found {len(found.x)} images; needed {recipe.batch} or more (one batch): add images "
            "or pass a smaller --batch"
        )
    where = torch_device(device)
    run = _Run(network.to(where), torch.from_numpy(found.x), recipe, seed, where)
    origin = {"model": model, "source_sha256": source, "data_sha256": found.sha256}
    run.train(partial, origin, resume, progress)
    # Clones: tied weights may not share their memory in the file.
    state = {name: value.cpu().clone() for name, value in network.state_dict().items()}
    # One entry: safetensors writes several in any order.
    notes = json.dumps({"method": run.method, "seed": seed, **run.notes})
    write_bytes(target, save(state, {"adapted": notes}), ADAPTED)
    remove_file(partial, ADAPTING)
    return target


class _Run:
    """One adaptation; every epoch depends on the seed, its number and the weights alone."""

    def __init__(
        self, model: nn.Module, x: Tensor, recipe: Recipe, seed: int, device: torch.device
    ) -> None:
        self.model, self.x, self.recipe = model, x, recipe
        self.seed, self.device = seed, device
        self.notes: dict[str, Any] = {"images": len(x), **asdict(recipe)}
        try:
            with torch.no_grad():
                example = self._scores(x[:2].to(device))
        except (RuntimeError, IndexError, TypeError) as error:
            text = str(error).splitlines()[0]
            raise DataError(
                f"the model does not take images of shape {tuple(x.shape[1:])} ({text}); needed "
                "what it was made for: pass --size, or convert the images"
            ) from error
        if example.ndim not in {2, 4}:
            raise ModelError(
                f"found outputs of shape {tuple(example.shape)}; needed class scores (N, classes) "
                "or (N, classes, h, w)"
            )
        self.pixels = example.ndim == 4
        self.method = "class-balanced self-training" if self.pixels else "SHOT"
        self.head = None if self.pixels else _last_linear(model, x[:2].to(device))
        self.source = [p.detach().clone() for p in model.parameters()] if recipe.pull else []

    def train(
        self, partial: Path, origin: dict[str, str], resume: bool, progress: Progress | None
    ) -> None:
        """All epochs; after each, ``partial`` keeps what was reached, for runs of ``origin``."""
        recipe, model = self.recipe, self.model
        optimizer = torch.optim.SGD(
            self._groups(), lr=recipe.lr, momentum=0.9, weight_decay=1e-3, nesterov=True
        )
        steps = len(self.x) // recipe.batch
        run = {"seed": self.seed, **origin, **{k: str(v) for k, v in self.notes.items()}}
        begin = 0
        if resume and partial.is_file():
            kept = _kept(partial, self.device)
            if kept["run"] != run:
                raise SpecError(
                    f"{partial}: found a run of other options, images or checkpoint; repeat them, "
                    "or leave out --resume"
                )
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            begin = kept["epoch"]
        total = recipe.epochs * steps
        for epoch in range(begin, recipe.epochs):
            own = (1000 * self.seed + epoch) % (1 << 63)
            generator = torch.Generator().manual_seed(own)
            torch.manual_seed(own)  # dropout and the like
            labels = self._labels(epoch)
            model.train()
            if self.head is not None:
                self.head.eval()
            order = torch.randperm(len(self.x), generator=generator)[: steps * recipe.batch]
            for step, rows in enumerate(order.split(recipe.batch)):  # type: ignore[no-untyped-call]
                done = epoch * steps + step
                for group in optimizer.param_groups:
                    group["lr"] = group["first"] * (1 + 10 * done / total) ** -0.75
                loss = self._loss(rows, labels, generator)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if progress:
                    progress(done + 1, total, f"epoch {epoch + 1}")
            values = [v for v in model.state_dict().values() if v.is_floating_point()]
            if not all(bool(torch.isfinite(value).all()) for value in values):
                raise ModelError(
                    f"found NaN in the weights after epoch {epoch + 1}; pass a smaller --lr"
                )
            with replaced(partial, ADAPTING) as file:
                record = {"run": run, "epoch": epoch + 1, "model": model.state_dict()}
                torch.save({**record, "optimizer": optimizer.state_dict()}, file)
        model.eval()

    def _groups(self) -> list[dict[str, Any]]:
        """SHOT's rates: a tenth for the backbone; the head is frozen."""
        frozen = {id(p) for p in self.head.parameters()} if self.head is not None else set()
        groups = []
        for name, p in self.model.named_parameters():
            if id(p) in frozen:
                p.requires_grad_(False)
                continue
            rate = self.recipe.lr * (1.0 if name.startswith("netB.") else 0.1)
            groups.append({"params": [p], "lr": rate, "first": rate})
        return groups

    def _scores(self, x: Tensor) -> Tensor:
        return single_output(self.model(x))

    def _loss(self, rows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        x, chosen = self.x[rows], labels[rows]
        if self.pixels:
            x, chosen = _again(x, chosen, self.recipe.flip, generator)
            scores = self._scores(x.to(self.device))
            wanted = chosen.to(self.device).long()
            if not (wanted != IGNORE).any():
                return scores.sum() * 0
            loss = functional.cross_entropy(scores, wanted, ignore_index=IGNORE)
        else:
            x = _shifted(x, self.recipe.flip, generator)
            scores = self._scores(x.to(self.device))
            loss = information(scores)
            loss = loss + self.recipe.pseudo * functional.cross_entropy(
                scores, chosen.to(self.device)
            )
        if self.source:
            pairs = zip(self.model.parameters(), self.source, strict=True)
            away = torch.stack([(p - s).square().sum() for p, s in pairs]).sum()
            loss = loss + self.recipe.pull * away
        return loss

    @torch.no_grad()
    def _labels(self, epoch: int) -> Tensor:
        """Pseudo-labels of all images, (N,) or (N, h, w)."""
        self.model.eval()
        if self.pixels:
            first, last = self.recipe.share
            share = first + (last - first) * epoch / max(self.recipe.epochs - 1, 1)
            return confident_labels(self._batches, share)
        features: list[Tensor] = []
        assert self.head is not None
        hook = self.head.register_forward_pre_hook(
            lambda _, inputs: features.append(inputs[0].flatten(1).cpu())
        )
        try:
            scores = torch.cat(list(self._batches()))
        finally:
            hook.remove()
        return centroid_labels(torch.cat(features), scores)

    def _batches(self) -> Iterator[Tensor]:
        for part in self.x.split(self.recipe.batch):  # type: ignore[no-untyped-call]
            yield self._scores(part.to(self.device)).cpu()


def _kept(partial: Path, device: torch.device) -> dict[str, Any]:
    """What a stopped run has kept.

    Raises:
        ModelError: The file is not whole.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged file; the error says it
            kept = torch.load(partial, map_location=device, weights_only=True)
        if not isinstance(kept, dict) or set(kept) != {"run", "epoch", "model", "optimizer"}:
            raise ValueError(f"a {type(kept).__name__} of other content")
    except Exception as error:  # a damaged pickle may raise anything
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if "eights only" in text:
            text = "damaged"
        raise ModelError(
            f"{partial}: cannot be read ({text}); leave out --resume to start anew"
        ) from error
    return kept


def information(scores: Tensor) -> Tensor:
    """Mean entropy of predictions less the entropy of their mean, in nats.

    Args:
        scores: Logits (N, classes).

    Source:
        Liang et al., ICML 2020, eq. 2 and 3.
    """
    share = scores.softmax(1)
    entropy = -(share * scores.log_softmax(1)).sum(1).mean()
    mean = share.mean(0)
    return entropy + (mean * (mean + 1e-5).log()).sum()


def centroid_labels(features: Tensor, scores: Tensor) -> Tensor:
    """Class of the nearest centroid by cosine, (N,).

    Args:
        features: What the last layer reads, (N, D).
        scores: Logits (N, classes); they weigh the first centroids, the labels the second.

    Source:
        Liang et al., ICML 2020, eq. 4 to 6; classes that nobody is predicted as get no centroid.
    """
    whole = torch.cat([features, torch.ones(len(features), 1)], 1)
    whole = functional.normalize(whole)
    share, labels = scores.softmax(1), scores.argmax(1)
    for _ in range(2):
        centroids = functional.normalize(share.T @ whole, dim=1)
        present = torch.bincount(labels, minlength=scores.shape[1]) > 0
        likeness = (whole @ centroids.T).masked_fill(~present, -2.0)
        labels = likeness.argmax(1)
        share = functional.one_hot(labels, scores.shape[1]).float()
    return labels


def confident_labels(batches: Callable[[], Iterator[Tensor]], share: float) -> Tensor:
    """Labels (N, h, w) uint8 of the surest ``share`` of the pixels of every class, else IGNORE.

    Args:
        batches: Gives the logits (n, classes, h, w) of all images, batch after batch.
        share: 0 to 1.

    Source:
        Zou et al., ECCV 2018, section 4 (class-balanced thresholds).
    """
    labels, sureness = [], []
    for scores in batches():
        sure, label = scores.softmax(1).max(1)
        labels.append(label.to(torch.uint8))
        sureness.append(sure.half())
    found, sure = torch.cat(labels), torch.cat(sureness)
    result = torch.full_like(found, IGNORE)
    for label in torch.unique(found).tolist():
        of_class = found == label
        values = sure[of_class].float().numpy()
        least = np.quantile(values, 1 - share)
        result[of_class & (sure.float() >= float(least))] = label
    return result


def _shifted(x: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Images shifted by up to a sixteenth of their sides, half of them mirrored.

    As SHOT's crop of 224 out of 256, edges repeated.
    """
    height, width = x.shape[2] // 16, x.shape[3] // 16
    padded = functional.pad(x, (width, width, height, height), mode="replicate")
    rows = []
    for image in padded:
        top = int(torch.randint(2 * height + 1, (), generator=generator))
        left = int(torch.randint(2 * width + 1, (), generator=generator))
        part = image[:, top : top + x.shape[2], left : left + x.shape[3]]
        mirrored = flip and bool(torch.rand((), generator=generator) < 0.5)
        rows.append(part.flip(2) if mirrored else part)
    return torch.stack(rows)


def _again(
    x: Tensor, labels: Tensor, flip: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images with other contrast and brightness, half of them mirrored with their labels."""
    shape = (len(x), 1, 1, 1)
    gain = 0.8 + 0.4 * torch.rand(shape, generator=generator)
    offset = 0.2 * x.std() * (2 * torch.rand(shape, generator=generator) - 1)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * gain + middle + offset
    mirrored = torch.rand(len(x), generator=generator) < (0.5 if flip else 0.0)
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    labels = torch.where(mirrored[:, None, None], labels.flip(2), labels)
    return x, labels


def _last_linear(model: nn.Module, example: Tensor) -> nn.Linear:
    """The linear layer that gives the model's output."""
    calls: list[tuple[nn.Linear, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda layer, _, output: calls.append((layer, output)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            output = model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
    scores = single_output(output)
    if not calls or calls[-1][1].shape != scores.shape:
        raise ModelError(
            "found no linear layer that gives the model's scores; SHOT keeps the classifier fixed "
            "and needs one"
        )
    return calls[-1][0]
