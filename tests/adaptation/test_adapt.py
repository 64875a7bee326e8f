"""Adaptation without labels: its losses and labels by hand, its effect, its resuming."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional

from hdrq_deploy.adaptation.adapt import (
    AdaptationOptions,
    adapt,
    centroid_labels,
    confident_labels,
    information,
)
from hdrq_deploy.calibration_data.digits import make_checkpoints
from hdrq_deploy.calibration_data.models import resnet14, streetnet
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.calibration_data.readers.street_scenes import IGNORE
from hdrq_deploy.calibration_data.streets import make_checkpoints as make_street_checkpoints
from hdrq_deploy.cli import adapt as command
from hdrq_deploy.errors import DataError, HdrqError, ModelError, SpecError

MODELS = "hdrq_deploy.calibration_data.models"


def image_set(x: Any) -> ImageSet:
    return ImageSet(np.asarray(x, np.float32), None, None, None)


def test_information_is_entropy_less_that_of_the_mean() -> None:
    scores = np.random.default_rng(0).normal(size=(7, 4)) * 3
    share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    mean = share.mean(0)
    expected = -(share * np.log(share)).sum(1).mean() + (mean * np.log(mean + 1e-5)).sum()
    assert float(information(torch.from_numpy(scores))) == pytest.approx(expected)


def test_pseudo_labels_are_those_of_the_nearest_centroid() -> None:
    rng = np.random.default_rng(1)
    features, scores = rng.normal(size=(60, 5)).astype(np.float32), rng.normal(size=(60, 4))
    scores[:, 3] -= 100  # nobody is predicted as the last class
    # As SHOT's obtain_label does with SciPy's cosine distance.
    whole = np.concatenate([features, np.ones((60, 1), np.float32)], 1)
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    weight = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    predicted = weight.argmax(1)
    for _ in range(2):
        centroids = weight.T @ whole / (1e-8 + weight.sum(0)[:, None])
        there = np.flatnonzero(np.eye(4)[predicted].sum(0) > 0)
        lengths = np.linalg.norm(centroids[there], axis=1)
        distance = 1 - whole @ centroids[there].T / lengths
        predicted = there[distance.argmin(1)]
        weight = np.eye(4)[predicted]
    found = centroid_labels(torch.from_numpy(features), torch.from_numpy(scores).float())
    assert np.array_equal(found.numpy(), predicted)
    assert 3 not in predicted


def test_the_surest_pixels_of_every_class_are_labelled() -> None:
    scores = torch.from_numpy(np.random.default_rng(2).normal(size=(4, 3, 8, 8)) * 4).float()
    found = confident_labels(lambda: iter(scores.split(3)), 0.25)
    sure, label = scores.softmax(1).max(1)
    for which in range(3):
        of_class = label == which
        kept = found == which
        assert bool((label[kept] == which).all())
        assert int(kept.sum()) == pytest.approx(0.25 * int(of_class.sum()), abs=2)
        left = of_class & (found == IGNORE)
        assert float(sure[kept].min()) >= float(sure[left].max()) - 1e-3
    assert found.dtype == torch.uint8


def test_a_classifier_learns_its_domain(tmp_path: Path) -> None:
    x, _ = make_checkpoints.tensors("handwriting", "train")
    source = make_checkpoints.load("fonts")
    before = make_checkpoints.accuracy(source, "handwriting")
    target = tmp_path / "handwriting.safetensors"
    recipe = AdaptationOptions(epochs=2, lr=3e-2, flip=False)
    weights = make_checkpoints.CHECKPOINTS / "fonts.safetensors"
    adapt(f"{MODELS}:resnet14", image_set(x[:3000]), target, weights, recipe)
    model = resnet14()
    model.load_state_dict(load_file(target))
    # 47 % before; SHOT's classifier is left as it was.
    assert make_checkpoints.accuracy(model, "handwriting") > before + 0.05
    assert torch.equal(model.fc.weight, source.fc.weight)
    assert not torch.equal(model.conv1.weight, source.conv1.weight)
    with safe_open(target, "pt") as file:
        assert json.loads(file.metadata()["adapted"])["method"] == "SHOT"


@pytest.mark.slow
def test_a_segmentation_model_learns_its_domain(tmp_path: Path) -> None:
    x, _ = make_street_checkpoints.tensors("dusk", "train")
    before = make_street_checkpoints.mean_iou(make_street_checkpoints.load("clean"), "dusk")
    target = tmp_path / "dusk.safetensors"
    weights = make_street_checkpoints.CHECKPOINTS / "clean.safetensors"
    recipe = AdaptationOptions(epochs=2, batch=8)
    adapt(f"{MODELS}:streetnet", image_set(x[:80].float() / 255), target, weights, recipe)
    model = streetnet()
    model.load_state_dict(load_file(target))
    assert make_street_checkpoints.mean_iou(model, "dusk") > before + 0.02


class Stop(Exception):
    """Ends a run from its progress."""


def test_a_stopped_adaptation_goes_on_to_the_same_bytes(work: Path, tmp_path: Path) -> None:
    images = np.load(work / "data.npz")["x"]
    weights = work / "Tiny-base.safetensors"
    recipe = AdaptationOptions(epochs=3, batch=16, lr=1e-2, pull=1e-3)

    def stop(done: int, _: int, __: str) -> None:
        if done == 5:  # in the second epoch
            raise Stop

    whole = adapt(
        "tiny_models:Tiny", image_set(images), tmp_path / "a.safetensors", weights, recipe
    )
    target = tmp_path / "b.safetensors"
    with pytest.raises(Stop):
        adapt("tiny_models:Tiny", image_set(images), target, weights, recipe, progress=stop)
    assert not target.exists()
    other = AdaptationOptions(epochs=3, batch=16, lr=2e-2, pull=1e-3)
    with pytest.raises(SpecError, match="a run of other options"):
        adapt("tiny_models:Tiny", image_set(images), target, weights, other, resume=True)
    with pytest.raises(SpecError, match="a run of other options, images or checkpoint"):
        adapt(
            "tiny_models:Tiny", image_set(images[::-1].copy()), target, weights, recipe, resume=True
        )
    kept = tmp_path / "b.safetensors.partial"
    data = kept.read_bytes()
    for damaged in (data[: len(data) // 2], b"", pickle.dumps({"run": 1})):
        kept.write_bytes(damaged)
        with pytest.raises(HdrqError, match=r"found another file at .*move it away"):
            adapt("tiny_models:Tiny", image_set(images), target, weights, recipe, resume=True)
    kept.write_bytes(data)
    steps: list[int] = []
    adapt(
        "tiny_models:Tiny",
        image_set(images),
        target,
        weights,
        recipe,
        resume=True,
        progress=lambda done, *_: steps.append(done),
    )
    assert steps == [4, 5, 6, 7, 8, 9]  # three steps an epoch, the first was done
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_fewer_images_than_a_batch_are_one_batch(work: Path, tmp_path: Path) -> None:
    images, weights = np.load(work / "data.npz")["x"], work / "Tiny-base.safetensors"
    files = [tmp_path / f"{batch}.safetensors" for batch in (48, 64)]
    for batch, file in zip((48, 64), files, strict=True):
        recipe = AdaptationOptions(epochs=2, batch=batch)
        adapt("tiny_models:Tiny", image_set(images), file, weights, recipe)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_adapted(work: Path, tmp_path: Path) -> None:
    images, weights = np.load(work / "data.npz")["x"], work / "Tiny-base.safetensors"
    target = tmp_path / "a.safetensors"
    with pytest.raises(DataError, match="found 1 images; needed 2 or more"):
        adapt("tiny_models:Tiny", image_set(images[:1]), target, weights)
    with pytest.raises(SpecError, match=r"needed a .safetensors file"):
        adapt("tiny_models:Tiny", image_set(images), tmp_path / "a.pt", weights)
    with pytest.raises(DataError, match="does not take images of shape .1, 16, 16."):
        adapt(
            "tiny_models:Tiny",
            image_set(images[:, :1]),
            target,
            weights,
            AdaptationOptions(batch=16),
        )
    with pytest.raises(SpecError, match="found share 20 50"):
        AdaptationOptions(share=(20, 50))
    with pytest.raises(SpecError, match="found lr=nan"):
        AdaptationOptions(lr=float("nan"))
    recipe = AdaptationOptions(epochs=1, batch=16, lr=1e30)
    with pytest.raises(ModelError, match="found NaN in the weights after epoch 1.*smaller `lr`"):
        adapt("tiny_models:Tiny", image_set(images), target, weights, recipe)


def test_the_command_writes_what_calibration_reads(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "night.safetensors"
    argv = ["--model", "tiny_models:Tiny", "--weights", str(work / "Tiny-base.safetensors")]
    argv += ["--data", str(work / "images"), "--epochs", "1", "--batch", "4", "--no-flip"]
    assert command.main([*argv, "-o", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    base = load_file(work / "Tiny-base.safetensors")
    assert {k: v.shape for k, v in load_file(target).items()} == {
        k: v.shape for k, v in base.items()
    }
    assert command.main([*argv, "--images", "1", "-o", str(target)]) == 2
    assert "found 1 images; needed 2 or more" in capsys.readouterr().err


def test_flipping_mirrors_labels_with_their_images() -> None:
    from hdrq_deploy.adaptation.self_training import changed_photos

    x = torch.rand(16, 3, 4, 6)
    labels = (functional.avg_pool2d(x, 1)[:, 0] * 200).to(torch.uint8)
    seen, chosen = changed_photos(x, labels, True, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a, b.flip(1)) for a, b in zip(chosen, labels, strict=True)]
    assert 0 < sum(mirrored) < 16
    for image, label, was, flipped in zip(seen, chosen, x, mirrored, strict=True):
        order = np.argsort(image[0].flatten().numpy(), kind="stable")
        assert label.shape == was.shape[1:]
        # Contrast and brightness keep the order of values, so image and label stay in step.
        values = label.flatten().numpy()[order].astype(int)
        assert (np.diff(values) >= 0).all(), flipped


def test_the_old_name_of_the_options_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hdrq_deploy.adapt", raising=False)
    with pytest.warns(DeprecationWarning, match="hdrq_deploy.adapt is now"):
        from hdrq_deploy.adapt import Recipe
    assert Recipe is AdaptationOptions
