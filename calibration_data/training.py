"""Training of the models of the made benchmarks: one source, and one adapted from it per domain.

The checkpoints lie in the repository and in the source distribution. An installed wheel does not
carry them (15 MB that no device needs); there they are trained where they are first used.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..formats.atomic_files import Kind, make_directory, sha256_bytes, write_bytes
from ..formats.file_kinds import TRAINED
from ..typing import Progress, StepProgress, no_progress

__all__ = ["CHECKPOINTS", "BenchmarkTraining", "command", "fit", "silent"]

Model = TypeVar("Model", bound=torch.nn.Module)
CHECKPOINTS = Path(__file__).with_name("checkpoints")
RECORD = "checkpoints.json"
# The entry of a checkpoint's notes that says what its weights are.
_WEIGHTS = "weights_sha256"


@dataclass(frozen=True)
class BenchmarkTraining(Generic[Model]):
    """How the checkpoints of one benchmark are made.

    Attributes:
        shipped: Folder of the checkpoints in the repository.
        recipes: Recipe of each domain, the source first: epochs or steps, learning rate, pull.
        make: A model with random weights.
        learn: Trains one domain, from the source model or (None) from random weights, by a seed;
            it tells the last argument the steps done and the steps in all.
        metric: Name of what ``measure`` measures.
        measure: Measures a model on the test split of a domain, 0 to 1.
        seed: Seed of the training; the same seed gives the same models.
    """

    shipped: Path
    recipes: Mapping[str, Mapping[str, float]]
    make: Callable[[], Model]
    learn: Callable[[str, Model | None, int, StepProgress], Model]
    metric: str
    measure: Callable[[torch.nn.Module, str], float]
    seed: int = 0

    def folder(self, own: Path) -> Path:
        """Where the checkpoints are: those of the repository, else ``own``."""
        whole = all((self.shipped / f"{name}.safetensors").is_file() for name in self.recipes)
        return self.shipped if whole else own

    def outputs(self) -> Iterator[tuple[str, Kind]]:
        """Name and kind of the files that :meth:`train_missing` writes."""
        for domain in self.recipes:
            yield f"{domain}.safetensors", TRAINED

    def train_missing(
        self,
        folder: Path,
        progress: Progress = no_progress,
    ) -> None:
        """Train what is not in ``folder`` yet; a file is whole or not there.

        Args:
            folder: A folder of :meth:`folder`.
            progress: Called with the percent done, the percent of all models (100 each), and the
                domain.

        Raises:
            HdrqError: Other files are in the way, no permission, or a full disk.
        """
        if folder != self.shipped:
            self._fill(folder, progress, self.learn)

    def provide(self, folder: Path, progress: Progress = no_progress) -> None:
        """Fill a folder with the checkpoints of the repository, or train what it lacks.

        Args:
            folder: Where they go; a file is whole or not there.
            progress: As for :meth:`train_missing`.

        Raises:
            HdrqError: Other files are in the way, no permission, or a full disk.
        """
        if self.folder(folder) != self.shipped:
            self.train_missing(folder, progress)
            return

        def copied(domain: str, source: Model | None, seed: int, report: StepProgress) -> Model:
            return self.load(self.shipped / f"{domain}.safetensors")

        self._fill(folder, progress, copied)

    def _fill(
        self,
        folder: Path,
        progress: Progress,
        learn: Callable[[str, Model | None, int, StepProgress], Model],
    ) -> None:
        make_directory(folder)
        source: Model | None = None
        for done, domain in enumerate(self.recipes):
            report = _percent_of(progress, done, len(self.recipes), domain)
            report(0, 1)
            path = folder / f"{domain}.safetensors"
            if not self._is_trained(path, domain):
                state = learn(domain, source, self.seed, report).state_dict()
                notes = json.dumps({**self._notes(domain), _WEIGHTS: _sha256(state)})
                write_bytes(path, save(state, {"trained": notes}), TRAINED)
            source = source or self.load(path)
            report(1, 1)

    def load(self, path: str | os.PathLike[str]) -> Model:
        """The model of a checkpoint, in inference mode."""
        model = self.make()
        model.load_state_dict(load_file(path))
        return model.eval()

    def publish(self, out: Path) -> Iterator[tuple[str, dict[str, float]]]:
        """Train all models again; yields each domain and its metric on every domain's test split.

        Args:
            out: Folder of the checkpoints and of ``checkpoints.json``.
        """
        make_directory(out)
        source: Model | None = None
        record: dict[str, Any] = {}
        for domain, recipe in self.recipes.items():
            model = self.learn(domain, source, self.seed, silent)
            source = source or model
            data = save(model.state_dict())
            write_bytes(out / f"{domain}.safetensors", data)
            measured = {name: self.measure(model, name) for name in self.recipes}
            record[domain] = {
                "sha256": sha256_bytes(data),
                "seed": self.seed,
                "recipe": recipe,
                self.metric: measured,
            }
            yield domain, measured
        write_bytes(out / RECORD, (json.dumps(record, indent=2) + "\n").encode())

    def _is_trained(self, path: Path, domain: str) -> bool:
        """Whether the checkpoint at ``path`` is whole and made by this recipe.

        Those of earlier versions do not say what their weights are.
        """
        if not path.is_file():
            return False
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                notes = json.loads((file.metadata() or {}).get("trained", "null"))
            state = load_file(path)
        except (OSError, ValueError, safetensors.SafetensorError):
            return False
        if not isinstance(notes, dict) or notes.pop(_WEIGHTS, None) not in (None, _sha256(state)):
            return False
        return bool(notes == json.loads(json.dumps(self._notes(domain))))

    def _notes(self, domain: str) -> dict[str, Any]:
        return {"method": "training", "seed": self.seed, "recipe": dict(self.recipes[domain])}


def _sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of the weights as a file without notes holds them."""
    return sha256_bytes(save(dict(state)))


def _percent_of(progress: Progress, done: int, total: int, domain: str) -> StepProgress:
    """Report the steps of one model out of several as percent of all of them."""

    def report(step: int, steps: int) -> None:
        progress(100 * done + 100 * step // steps, 100 * total, domain)

    return report


def silent(step: int, steps: int) -> None:
    """A :data:`StepProgress` that nobody watches."""


def command(training: BenchmarkTraining[Any], text: str, argv: Sequence[str] | None) -> int:
    """The command line of a benchmark's training: write its checkpoints anew.

    Args:
        training: What is trained.
        text: Description of the command.
        argv: Arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--out", type=Path, default=training.shipped)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for domain, measured in replace(training, seed=args.seed).publish(args.out):
        print(domain, measured, flush=True)
    return 0


def fit(
    model: Model,
    start: Model | None,
    recipe: Mapping[str, float],
    steps: int,
    losses: Iterator[Tensor],
    report: StepProgress,
) -> Model:
    """Train a model, from ``start`` and pulled towards its weights where there is one.

    Args:
        model: What is trained.
        start: The source model.
        recipe: ``lr`` of the one-cycle schedule and ``pull``.
        steps: How many losses there are.
        losses: Computes the next one with the model as it is then.
        report: Called with the steps done and the steps in all.
    """
    if start is not None:
        model.load_state_dict(start.state_dict())
    source = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], steps)
    model.train()
    for done, loss in enumerate(losses):
        report(done, steps)
        if start is not None:
            pairs = zip(model.parameters(), source, strict=True)
            away = torch.stack([(p - s).square().sum() for p, s in pairs]).sum()
            loss = loss + recipe["pull"] * away
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()
