"""Training epoch by epoch, with labels or without: rates, and the file to resume from."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..calibration.capture import single_output
from ..calibration.devices import keep_freed_memory
from ..errors import ModelError, OtherRunError
from ..formats.atomic_files import replaced
from ..formats.file_kinds import ADAPTING
from ..typing import Progress
from .options import AdaptationOptions, FineTuningOptions

__all__ = ["Training"]

Chosen = TypeVar("Chosen", bound=AdaptationOptions | FineTuningOptions)


class Training(ABC, Generic[Chosen]):
    """One training; every epoch depends on the seed, its number and the weights alone.

    Args:
        model: Trained in place.
        x: Images (N, C, H, W).
        options: How.
        seed: Seed of order and augmentation.
        device: Device that computes; the model is on it.
    """

    method: str
    weight_decay = 1e-3

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        options: Chosen,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.x, self.options = model, x, options
        self.seed, self.device = seed, device
        self.notes: dict[str, Any] = {"images": len(x), **asdict(options)}
        self._source = [p.detach().clone() for p in model.parameters()] if options.pull else []

    def train(
        self, partial: Path, origin: dict[str, str], resume: bool, progress: Progress | None
    ) -> None:
        """Run all epochs, and keep what each reached in a file.

        Args:
            partial: The file.
            origin: What the run starts from; it resumes only where that is equal.
            resume: Resume after the last epoch in ``partial``.
            progress: Called with (iterations done, iterations in all, epoch).

        Raises:
            OtherRunError: ``partial`` holds another run.
            ModelError: ``partial`` cannot be read, or a weight became NaN.
        """
        keep_freed_memory()
        options, model = self.options, self.model
        optimizer = torch.optim.SGD(
            self._groups(),
            lr=options.lr,
            momentum=0.9,
            weight_decay=self.weight_decay,
            nesterov=True,
        )
        run = {"seed": self.seed, **origin, **{k: str(v) for k, v in self.notes.items()}}
        first = 0
        if resume and partial.is_file():
            state = _stored(partial, run, self.device)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["epoch"]
        for epoch in range(first, options.epochs):
            self._epoch(epoch, optimizer, progress)
            with replaced(partial, ADAPTING) as file:
                record = {"run": run, "epoch": epoch + 1, "model": model.state_dict()}
                torch.save({**record, "optimizer": optimizer.state_dict()}, file)
        model.eval()

    def _epoch(
        self, epoch: int, optimizer: torch.optim.Optimizer, progress: Progress | None
    ) -> None:
        own = (1000 * self.seed + epoch) % (1 << 63)
        generator = torch.Generator().manual_seed(own)
        torch.manual_seed(own)  # dropout and the like
        self.model.eval()
        with torch.no_grad():
            labels = self._pseudo_labels(epoch)
        self.model.train()
        for module in self._frozen():
            module.eval()
        batch = self.options.batch
        count = len(self.x) // batch
        total = self.options.epochs * count
        order = torch.randperm(len(self.x), generator=generator)[: count * batch]
        for i, rows in enumerate(order.split(batch)):  # type: ignore[no-untyped-call]
            done = epoch * count + i
            for group in optimizer.param_groups:
                group["lr"] = group["first"] * self._share_of_rate(done / total)
            loss = self._loss(rows, labels, generator)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if progress:
                progress(done + 1, total, f"epoch {epoch + 1}")
        values = [v for v in self.model.state_dict().values() if v.is_floating_point()]
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise ModelError(
                f"found NaN in the weights after epoch {epoch + 1}; choose a smaller `lr`"
            )

    @abstractmethod
    def _loss(self, rows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of the images ``rows``; ``labels`` are those of all images."""

    @abstractmethod
    def _pseudo_labels(self, epoch: int) -> Tensor:
        """Labels of all images, (N,) or (N, h, w); the model is in evaluation mode."""

    def _share_of_rate(self, done: float) -> float:
        """SHOT's schedule of the rate, by the share of the iterations that are done."""
        return float((1 + 10 * done) ** -0.75)

    def _frozen(self) -> list[nn.Module]:
        """Modules that are not trained."""
        return []

    def _groups(self) -> list[dict[str, Any]]:
        """SHOT's rates: a tenth for the backbone; frozen modules have none."""
        frozen = {id(p) for module in self._frozen() for p in module.parameters()}
        groups = []
        for name, p in self.model.named_parameters():
            if id(p) in frozen:
                p.requires_grad_(False)
                continue
            rate = self.options.lr * (1.0 if name.startswith("netB.") else 0.1)
            groups.append({"params": [p], "lr": rate, "first": rate})
        return groups

    def _pull(self) -> Tensor | float:
        """Weighted squared distance to the source weights."""
        if not self._source:
            return 0.0
        pairs = zip(self.model.parameters(), self._source, strict=True)
        away = torch.stack([(p - s).square().sum() for p, s in pairs]).sum()
        return self.options.pull * away

    def _scores(self, x: Tensor) -> Tensor:
        return single_output(self.model(x))

    def _batches(self) -> Iterator[Tensor]:
        for part in self.x.split(self.options.batch):  # type: ignore[no-untyped-call]
            yield self._scores(part.to(self.device)).cpu()


def _stored(partial: Path, run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a stopped run has reached.

    Raises:
        OtherRunError: It was another run.
        ModelError: The file is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged file; the error says it
            state = torch.load(partial, map_location=device, weights_only=True)
        if not isinstance(state, dict) or set(state) != {"run", "epoch", "model", "optimizer"}:
            raise ValueError(f"a {type(state).__name__} of other content")
    except Exception as error:  # a damaged pickle may raise anything
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if "eights only" in text:
            text = "damaged"
        raise ModelError(
            f"{partial}: cannot be read ({text}); remove it, or start anew without `resume`"
        ) from error
    if state["run"] != run:
        raise OtherRunError(
            f"{partial}: found a run of other options, images or checkpoint; resume needs the "
            "same: repeat them, or start anew without `resume`"
        )
    return state
