"""``hdrq init`` on a library's model with a number of classes that is not the library's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from hdrq_deploy.calibration.inputs import own_wanted
from hdrq_deploy.calibration.loading import load_model
from hdrq_deploy.calibration_data.readers import Wanted, read
from hdrq_deploy.cli import init as command
from hdrq_deploy.runfile.loading import load
from hdrq_deploy.runfile.plan import stages_of
from hdrq_deploy.runfile.starter import given_domain, look

Init = Callable[..., tuple[int, Path]]
CLASSES = ("bus", "car", "dog", "sign", "van")


def state(classes: int, name: str = "resnet18", seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    own: dict[str, torch.Tensor] = timm.create_model(name, num_classes=classes).state_dict()
    return own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as training scripts write them, and images of five classes."""
    folder = tmp_path_factory.mktemp("timm")
    save_file(state(5), folder / "source.safetensors")
    torch.save({"state_dict": state(5, seed=1), "epoch": 3}, folder / "night.pth")
    parallel = {f"module.{name}": value for name, value in state(5, seed=2).items()}
    torch.save(parallel, folder / "day.pth")
    save_file(state(6), folder / "six.safetensors")
    save_file(state(5, "resnet34"), folder / "deeper.safetensors")
    (folder / "broken.pth").write_bytes(b"no checkpoint")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    return folder


@pytest.fixture
def init(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Init:
    monkeypatch.chdir(folder)

    def call(*flags: str, model: str = "timm:resnet18") -> tuple[int, Path]:
        target = tmp_path / "hdrq.yaml"
        return command.main(["--from", model, *flags, "-o", str(target)]), target

    return call


def test_the_classes_are_those_of_the_checkpoint_and_inputs_those_of_timm(
    init: Init, capsys: pytest.CaptureFixture[str]
) -> None:
    domains = ["night=night.pth:images:images", "day=day.pth:images"]
    code, file = init("--source", "source.safetensors", "--domain", *domains)
    said = capsys.readouterr().out
    assert code == 0, said
    assert "note: the source checkpoint has 5 classes: the model is timm:resnet18:5" in said
    assert "of 10 of night" in said
    text = file.read_text()
    assert "model: timm:resnet18:5  # 5 classes" in text
    assert f"# 5 class folders: {', '.join(CLASSES)}" in text
    own = timm.create_model("resnet18").pretrained_cfg
    for key, values in (("size", (224, 224)), ("mean", own["mean"]), ("std", own["std"])):
        assert f"{key}: {list(values)}" in text
    assert len(stages_of(load(file))) == 9
    # Nothing is said in the file, and images are read as timm says.
    images = read("images", own_wanted(load_model("timm:resnet18:5"), Wanted()))
    assert images.preprocessing is not None
    assert (images.preprocessing.mean, images.x.shape[2:]) == (tuple(own["mean"]), (224, 224))


def test_every_look_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = ("night=night.pth:images:images", "day=adapt:images")
    told: list[tuple[int, int, str]] = []
    domains = [given_domain(word) for word in words]
    look("timm:resnet18", "source.safetensors", domains, Wanted(), lambda *said: told.append(said))
    steps = ["model and source", "test images of night", "checkpoint of night"]
    steps += ["images of night", "images of day"]
    assert told == [(i, len(steps), step) for i, step in enumerate(steps)]


def test_what_training_did_to_images_can_be_said(init: Init) -> None:
    flags = ["--size", "32", "32", "--mean", "0.40821073", "--std", "0.25", "0.5", "0.125"]
    domain = ["--domain", "night=night.pth:images"]
    code, file = init("--source", "source.safetensors", *domain, *flags)
    given = load(file).file.preprocess
    assert code == 0 and given.size == [32, 32]
    assert (given.mean, given.std) == ([0.40821073], [0.25, 0.5, 0.125])


@pytest.mark.parametrize(
    ("source", "domain", "model", "words"),
    [
        ("source.safetensors", "six.safetensors:images", "timm:resnet18", "6 classes and the m"),
        ("source.safetensors", "night.pth:images", "timm:resnet18:6", "timm:resnet18:5"),
        ("source.safetensors", "deeper.safetensors:images", "timm:resnet18", "does not fit"),
        ("deeper.safetensors", "night.pth:images", "timm:resnet18", "96 unexpected"),
        ("source.safetensors", "broken.pth:images", "timm:resnet18", "cannot be read"),
        ("source.safetensors", "night.pth:nowhere", "timm:resnet18", "nowhere: found nothing"),
        ("source.safetensors", "night.pth:images", "timm:resnet18:0", "found 0 classes"),
        ("source.safetensors", "night.pth:images", "timm:resnet18x", "--model timm:resnet18x"),
    ],
)
def test_what_does_not_fit_is_one_line(
    init: Init,
    capsys: pytest.CaptureFixture[str],
    source: str,
    domain: str,
    model: str,
    words: str,
) -> None:
    flags = ["--source", source, "--domain", f"night={domain}", "--size", "32", "32"]
    code, file = init(*flags, model=model)
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1) and words in said
    assert not file.exists()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("torchvision:resnet18:5", (2, 5)), ("transformers:resnet:5", (2, 5))],
)
def test_other_libraries_take_the_classes_too(name: str, shape: tuple[int, int]) -> None:
    answer = load_model(name)(torch.zeros(2, 3, 32, 32))
    scores = answer if isinstance(answer, torch.Tensor) else answer.logits
    assert scores.shape == shape
