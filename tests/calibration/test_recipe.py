"""Recipes from files and flags, and what each option does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from hdrq_deploy import Bundle
from hdrq_deploy.calibration.recipe import METHODS, Options, Recipe
from hdrq_deploy.cli import calibrate as calibrate_command
from hdrq_deploy.errors import HdrqError

_LATENT = ("latent", "latent-noise")


def test_recipes_are_files_and_flags_win(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(
        "method: qdrop\nwbits: 4\niters: 4\nbatch: 8\nlr: 1e-3\ndrop_prob: 0.25\nseed: 3\n"
        "noise: off\nstatistics: off\n"
    )
    common = [
        "--model", "tiny_models:Tiny", "--weights", str(work / "Tiny-night.safetensors"),
        "--data", str(work / "data.npz"), "--domain", "night",
    ]  # fmt: skip
    out = tmp_path / "a.hdrq"
    argv = [*common, "--recipe", str(tmp_path / "r.yaml"), "--iters", "3", "-o", str(out)]
    assert calibrate_command.main(argv) == 0
    manifest = Bundle.open(out).manifest
    assert (manifest.method, manifest.seed, manifest.scheme.wbits) == ("qdrop", 3, 4)
    assert manifest.statistics is None
    resolved = manifest.options
    assert (resolved["iters"], resolved["drop_prob"], resolved["lr"]) == (3, 0.25, 1e-3)
    assert resolved["learner"] == "adaround" and resolved["noise"] == "off"
    # The resolved options of a manifest are a recipe again.
    again = {k: v for k, v in resolved.items() if k not in {"device", "threads"}}
    (tmp_path / "again.json").write_text(json.dumps({**again, "method": "qdrop"}))
    assert (
        Recipe.read(tmp_path / "again.json").options()
        == Recipe(method="qdrop", **{k: v for k, v in again.items() if k != "images"}).options()
    )
    cases = {
        "unknown.yaml": ("itres: 3", "unknown key 'itres'"),
        "type.json": ('{"iters": "many"}', "found iters: 'many'"),
        "range.yaml": ("drop_prob: 1.5", "found drop_prob=1.5; needed 0 to 1"),
        "method.yaml": ("method: magic", "choose one of"),
        "noise.yaml": ("method: qdrop\nnoise: uniform", "act on latent weights"),
        "rank.yaml": ("statistics: 0", "found statistics=0; needed a rank of 1 or more"),
        "word.yaml": ("statistics: some", "found statistics='some'; needed a rank"),
        "list.yaml": ("- 1", "no mapping"),
        "broken.json": ("{", "cannot be read"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        argv = [*common, "--recipe", str(tmp_path / name), "-o", str(tmp_path / "no.hdrq")]
        capsys.readouterr()
        assert calibrate_command.main(argv) == 2, name
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "no.hdrq").exists()


def test_a_setting_stands_where_recipe_and_flags_say_nothing(work: Path, tmp_path: Path) -> None:
    published = Recipe(settings="paper", iters=200).options()
    assert published == Options.of(
        "hdrq", iters=200, scale_rates=True, keep_best=False, step_change=0.0,
        act_init="per-image-max", distance_form="norm",
    )  # fmt: skip
    assert published.rate_factor == 100
    ours = Recipe(settings="ours").options()
    assert ours == Options.of("hdrq", distance_form="relative", distance=0.1)
    assert Recipe(settings="ours", distance=0.1).options().distance == 0.1
    assert Recipe(settings="ours", method="qdrop").options() == Options.of("qdrop")
    assert Recipe(settings="paper", method="qdrop", keep_best=True).options().keep_best
    (tmp_path / "r.json").write_text(
        json.dumps({"settings": "paper", "method": "rtn", "act_init": "pooled"})
    )
    out = tmp_path / "a.hdrq"
    argv = ["--model", "tiny_models:Tiny", "--data", str(work / "data.npz"), "--domain", "night"]
    argv += ["--recipe", str(tmp_path / "r.json"), "--step-change", "0.5", "-o", str(out)]
    assert calibrate_command.main(argv) == 0
    manifest = Bundle.open(out).manifest
    assert manifest.scheme.grid == "paper"
    found = {key: manifest.options[key] for key in ("act_init", "step_change", "keep_best")}
    assert found == {"act_init": "pooled", "step_change": 0.5, "keep_best": False}


def test_each_part_of_hdrq_can_be_switched(make: Any) -> None:
    assert Options.of("hdrq", noise="uniform").noise == "uniform"
    learned = {"adaround", "brecq", "brecq-one-stage", "qdrop", "hdrq", *_LATENT}
    assert set(METHODS) == {"float", "float-folded", "rtn", "rtn-corrected", "gptq", *learned}
    with pytest.raises(HdrqError, match="noise='loud'"):
        Options.of("hdrq", noise="loud")
    for a, b in itertools.combinations(sorted(learned), 2):
        assert Options.of(a) != Options.of(b)
    # The rows between QDrop and HDRQ differ from HDRQ in what their names leave out, no more.
    assert Options.of("latent", noise="empirical") == Options.of("latent-noise")
    assert Options.of("latent-noise", distance=0.05) == Options.of("hdrq")
    assert [Options.of(name).distance for name in _LATENT] == [0, 0]


@pytest.mark.parametrize("method", ["adaround", "brecq", "brecq-one-stage", "qdrop", "hdrq"])
def test_every_method_lowers_the_error_of_rounding(make: Any, method: str) -> None:
    blocks = make("Net", method=method, wbits=3, abits=4).manifest.metrics["blocks"]
    learned = [b for b in blocks if b["learned"]]
    assert learned
    for block in learned:
        assert block["loss_after"] < block["loss_before"]
