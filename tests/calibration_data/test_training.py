"""Checkpoints are those of the repository, or trained once where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hdrq_deploy.calibration_data.digits.make_checkpoints import TRAINING as DIGITS
from hdrq_deploy.calibration_data.streets.make_checkpoints import TRAINING as STREETS
from hdrq_deploy.calibration_data.training import BenchmarkTraining
from hdrq_deploy.errors import HdrqError

RECIPES = {"plain": {"lr": 1.0}, "night": {"lr": 0.5}}


def training(shipped: Path, learnt: list[str], seed: int = 0) -> BenchmarkTraining[Any]:
    def learn(domain: str, start: nn.Linear | None, seed: int, report: Any) -> nn.Linear:
        learnt.append(domain)
        if "stop" in learnt:
            raise KeyboardInterrupt
        report(1, 4)
        model = nn.Linear(2, 1, bias=False)
        before = 0.0 if start is None else float(start.weight.detach()[0, 0])
        nn.init.constant_(model.weight, before + RECIPES[domain]["lr"] + seed)
        return model

    def make() -> nn.Linear:
        return nn.Linear(2, 1, bias=False)

    return BenchmarkTraining(
        shipped, RECIPES, make, learn, "accuracy", lambda model, domain: 1.0, seed
    )


@pytest.mark.parametrize("benchmark", [DIGITS, STREETS])
def test_the_repository_carries_the_checkpoints(
    benchmark: BenchmarkTraining[Any], tmp_path: Path
) -> None:
    assert benchmark.folder(tmp_path) == benchmark.shipped
    for domain in benchmark.recipes:
        benchmark.load(benchmark.shipped / f"{domain}.safetensors")


def test_missing_checkpoints_are_trained_once(tmp_path: Path) -> None:
    learnt: list[str] = []
    own = tmp_path / "own"
    ours = training(tmp_path / "absent", learnt)
    assert ours.folder(own) == own
    seen: list[tuple[int, int, str]] = []
    ours.train_missing(own, lambda *report: seen.append(report))
    assert learnt == ["plain", "night"] and seen[-1] == (200, 200, "night")
    assert (25, 200, "plain") in seen and (125, 200, "night") in seen
    # Each domain starts from the source model.
    assert float(load_file(own / "night.safetensors")["weight"][0, 0]) == 1.5
    ours.train_missing(own)
    assert learnt == ["plain", "night"]
    training(tmp_path / "absent", learnt, seed=1).train_missing(own)
    assert learnt == ["plain", "night"] * 2
    assert float(load_file(own / "night.safetensors")["weight"][0, 0]) == 3.5


def test_an_interrupted_training_goes_on_with_the_next_model(tmp_path: Path) -> None:
    learnt = ["stop"]
    ours = training(tmp_path / "absent", learnt)
    own = tmp_path / "own"
    with pytest.raises(KeyboardInterrupt):
        ours.train_missing(own)
    learnt.clear()
    ours.train_missing(own)
    (own / "night.safetensors").unlink()
    learnt.clear()
    ours.train_missing(own)
    assert learnt == ["night"]


def test_a_checkpoint_of_somebody_else_stays(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    save_file({"weight": torch.full((1, 2), 7.0)}, own / "plain.safetensors")
    with pytest.raises(HdrqError, match="plain.safetensors"):
        training(tmp_path / "absent", []).train_missing(own)
    assert float(load_file(own / "plain.safetensors")["weight"][0, 0]) == 7.0


def test_a_damaged_checkpoint_is_no_reason_to_stop(tmp_path: Path) -> None:
    learnt: list[str] = []
    own = tmp_path / "own"
    ours = training(tmp_path / "absent", learnt)
    ours.train_missing(own)
    (own / "night.safetensors").write_bytes((own / "night.safetensors").read_bytes()[:-4])
    ours.train_missing(own)
    assert learnt == ["plain", "night", "night"]
    # Whole, and other weights under the same notes.
    whole = bytearray((own / "night.safetensors").read_bytes())
    whole[-1] ^= 1
    (own / "night.safetensors").write_bytes(whole)
    ours.train_missing(own)
    assert learnt == ["plain", "night", "night", "night"]
    assert float(load_file(own / "night.safetensors")["weight"][0, 0]) == 1.5
    # Notes of earlier versions do not say what the weights are.
    with safe_open(own / "night.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["trained"])
    del notes["weights_sha256"]
    state = load_file(own / "night.safetensors")
    save_file(state, own / "night.safetensors", {"trained": json.dumps(notes)})
    ours.train_missing(own)
    assert learnt == ["plain", "night", "night", "night"]
