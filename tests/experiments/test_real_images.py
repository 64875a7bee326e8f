"""Protocols on real images: what is made from a data set, what is kept, what stops them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from hdrq_deploy.adaptation.options import AdaptationOptions, FineTuningOptions
from hdrq_deploy.calibration.loading import load_model
from hdrq_deploy.calibration_data import camvid, pacs
from hdrq_deploy.cli import reproduce
from hdrq_deploy.errors import HdrqError, ModelError
from hdrq_deploy.experiments import cells, real_images
from hdrq_deploy.experiments.bundles import inputs_of
from hdrq_deploy.experiments.grid import bundle_path
from hdrq_deploy.experiments.real_images import (
    PROTOCOLS,
    Choice,
    Network,
    Preparation,
    prepare,
)
from hdrq_deploy.experiments.tasks import iterations
from hdrq_deploy.formats.atomic_files import alone_in
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.formats.file_kinds import REPRODUCE_JSON, TUNING_JSON
from hdrq_deploy.formats.staleness import WRITTEN, fingerprint

MODULE = """
from torch import nn


def colours():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7),
    )


def pixels():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 11, 1),
    )
"""
LEARNED = FineTuningOptions(epochs=2, batch=8, lr=0.1)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both protocols with tiny networks, on few and small images."""
    monkeypatch.setattr(camvid, "SIZE", (48, 64))
    (tmp_path / "colour_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("colour_models", None)
    for name, factory, size in (("pacs", "colours", (16, 16)), ("camvid", "pixels", (48, 64))):
        protocol = PROTOCOLS[name]
        network = Network(
            f"colour_models:{factory}", "tiny", False, LEARNED, LEARNED, AdaptationOptions(1, 8)
        )
        task = replace(
            protocol.task,
            wanted=replace(protocol.task.wanted, size=size),
            images=8,
            mix_images=4,
            renew_images=4,
            learning=iterations(2, batch=4),
        )
        protocol = replace(protocol, networks={"tiny": network}, task=task)
        monkeypatch.setitem(PROTOCOLS, name, protocol)  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path, tiny: None) -> Path:
    """PACS of flat colours, 12 images a class."""
    rng = np.random.default_rng(0)
    for d, domain in enumerate(pacs.DOMAINS):
        for c, name in enumerate(pacs.CLASSES):
            folder = tmp_path / "PACS" / domain / name
            folder.mkdir(parents=True)
            for n in range(1, 13):
                pixels = rng.integers(0, 90, (20, 20, 3)) + 30 * d
                pixels[..., c % 3] += 60 * (1 + c // 3)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{n:04}.png")
    return tmp_path / "PACS"


def empty_pacs(root: Path) -> Path:
    """The folders of PACS without images."""
    for domain in pacs.DOMAINS:
        for name in pacs.CLASSES:
            (root / "PACS" / domain / name).mkdir(parents=True, exist_ok=True)
    return root / "PACS"


def prepared(data: Path, **chosen: object) -> Preparation:
    return prepare("pacs", Choice(data, data.parent / "out", **chosen))  # type: ignore[arg-type]


def files_of(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*.safetensors")}


def test_checkpoints_are_made_once_and_again_where_their_images_change(data: Path) -> None:
    made, out = prepared(data), data.parent / "out"
    assert [d.name for d in made.task.domains] == ["art_painting", "cartoon", "sketch"]
    made.make("cpu", 1)
    before = files_of(out)
    assert sorted(before) == [
        "checkpoints/colours/photo-supervised/art_painting.safetensors",
        "checkpoints/colours/photo-supervised/cartoon.safetensors",
        "checkpoints/colours/photo-supervised/sketch.safetensors",
        "checkpoints/colours/photo.safetensors",
    ]
    assert made.task.source == str(out / "checkpoints/colours/photo.safetensors")
    prepared(data).make("cpu", 1)
    assert files_of(out) == before
    # A test image that goes moves no checkpoint; a training image that goes makes its own anew.
    (data / "cartoon" / "dog" / "0004.png").unlink()
    prepared(data).make("cpu", 1)
    assert files_of(out) == before
    assert not (out / "data/pacs/cartoon/test/dog/0004.png").exists()
    (data / "cartoon" / "dog" / "0001.png").unlink()
    prepared(data).make("cpu", 1)
    after = files_of(out)
    assert {name for name in after if after[name] != before[name]} == {
        "checkpoints/colours/photo-supervised/cartoon.safetensors"
    }


def test_domains_without_labels_and_any_source(data: Path) -> None:
    made = prepared(data, source="sketch", targets=["photo", "sketch"], adaptation="unlabelled")
    made.make("cpu", 1)
    source, photo = made.checkpoints
    assert made.task.source == str(source.file) and source.file.stem == "sketch"
    # The model of the source domain is the source model.
    assert [d.weights for d in made.task.domains] == [str(photo.file), str(source.file)]
    with safe_open(photo.file, "pt") as file:
        assert json.loads(file.metadata()["adapted"])["method"] == "SHOT"
    with safe_open(source.file, "pt") as file:
        assert json.loads(file.metadata()["trained"])["method"] == "training with labels"
    assert {f.name for f in (made.splits).iterdir()} == {"sketch", "photo", "hdrq-data.json"}


def test_an_unfinished_training_of_other_options_is_dropped(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(data).make("cpu", 1, stop)
    partial = next((data.parent / "out").rglob("*.partial"))
    assert partial.name == "photo.safetensors.partial"
    protocol = PROTOCOLS["pacs"]
    network = replace(protocol.networks["tiny"], source=replace(LEARNED, lr=0.05))
    monkeypatch.setitem(
        PROTOCOLS,  # type: ignore[arg-type]
        "pacs",
        replace(protocol, networks={"tiny": network}),
    )
    prepared(data, targets=["sketch", "cartoon"]).make("cpu", 1)
    assert not list((data.parent / "out").rglob("*.partial"))


def test_the_protocol_runs_as_a_user_would(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "out"
    argv = ["pacs", "--data", str(data), "--out", str(out), "--targets", "cartoon", "sketch"]
    argv += ["--methods", "rtn", "--bits", "w8a8", "--seeds", "0", "--rounding-seeds", "1"]
    argv += ["--threads", "1"]
    assert reproduce.main([*argv, "--prepare"]) == 0
    assert "the models" in capsys.readouterr().out and not (out / "table.md").exists()
    before = files_of(out / "checkpoints")
    assert reproduce.main(argv) == 0
    assert files_of(out / "checkpoints") == before
    table = (out / "table.md").read_text()
    assert (
        "| ours | rtn | W8A8 |" in table
        and "colour_models:colours (tiny; from photo, supervised)" in table
    )
    report = json.loads((out / "results.json").read_text())
    assert report["protocol"] == report["task"] == "pacs"
    row = json.loads((out / "rows" / "ours-rtn-w8a8-s0-sketch.json").read_text())
    assert row["images"] == {"sketch": 21}
    manifest = Bundle.open(out / "cells" / "ours-rtn-w8a8-s0-sketch.hdrq").manifest
    assert manifest.classes == pacs.CLASSES and manifest.options["images"] == 8
    # The same images, copied again: nothing is made or measured again.
    kept = {f: f.stat().st_mtime_ns for f in (*out.glob("*/*"), *out.rglob("*.png"))}
    for file in (*data.rglob("*.png"), *(out / "data").rglob("*.png")):
        os.utime(file, ns=(1, 1))
        kept[file] = 1
    assert reproduce.main(argv) == 0
    assert {f for f, when in kept.items() if f.stat().st_mtime_ns != when} == set()


def test_checkpoints_that_were_brought_are_not_trained(data: Path) -> None:
    folder = data.parent / "mine"
    folder.mkdir()
    for domain in ("photo", "sketch"):
        (folder / f"{domain}.pth").touch()
    made = prepared(data, targets=["sketch"], checkpoints=folder)
    with pytest.raises(ModelError, match="photo.pth: cannot be read as a checkpoint"):
        made.make("cpu", 1)
    assert not (data.parent / "out").exists()
    for domain in ("photo", "sketch"):
        torch.save(load_model("colour_models:colours").state_dict(), folder / f"{domain}.pth")
    assert made.task.source == str(folder / "photo.pth") and not made.checkpoints
    assert made.task.domains[0].weights == str(folder / "sketch.pth")
    made.make("cpu", 1)
    assert [f.name for f in (data.parent / "out").iterdir()] == ["data"]
    # The folder that an earlier run filled, by source and adaptation.
    (folder / "photo-unlabelled").mkdir()
    (folder / "sketch.pth").rename(folder / "photo-unlabelled" / "sketch.pth")
    again = prepared(data, targets=["sketch"], checkpoints=folder, adaptation="unlabelled")
    assert again.task.domains[0].weights == str(folder / "photo-unlabelled" / "sketch.pth")
    assert again.task.adaptation == "brought" and again.task.source_domain == "photo"
    # Or that run's folder, where they lie deeper.
    deep = data.parent / "earlier" / "checkpoints" / "colours"
    deep.parent.mkdir(parents=True)
    folder.rename(deep)
    earlier = data.parent / "earlier"
    with pytest.raises(HdrqError, match="sketch: found no checkpoint"):
        prepared(data, targets=["sketch"], checkpoints=earlier)
    found = prepared(data, targets=["sketch"], checkpoints=earlier, adaptation="unlabelled")
    assert found.task.source == str(deep / "photo.pth")
    assert found.task.domains[0].weights == str(deep / "photo-unlabelled" / "sketch.pth")
    with pytest.raises(HdrqError, match="found `adaptation` with `checkpoints`, and no folder"):
        prepared(data, targets=["sketch"], checkpoints=earlier, adaptation="supervised")


def spoil_picture(data: Path) -> None:
    (data / "sketch" / "person" / "0012.png").write_bytes(b"no picture")


def one_training_image(data: Path) -> None:
    for file in (data / "sketch").rglob("*.png"):
        if pacs.split_of(pacs.file_number(file)) == "training" and file.parent.name != "dog":
            file.unlink()


def one_image_to_adapt(data: Path) -> None:
    for file in (data / "sketch").rglob("*.png"):
        split = pacs.split_of(pacs.file_number(file))
        if split == "training" and (file.parent.name, file.stem) != ("dog", "0001"):
            file.unlink()


def two_calibration_images(data: Path) -> None:
    for file in (data / "sketch").rglob("*.png"):
        if pacs.split_of(pacs.file_number(file)) == "calibration" and file.parent.name != "dog":
            file.unlink()


def no_dogs(data: Path) -> None:
    shutil.rmtree(data / "sketch" / "dog")
    (data / "sketch" / "dog").mkdir()


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (spoil_picture, [], "PACS/sketch/person/0012.png: cannot be decoded"),
        (no_dogs, [], "sketch/dog: found no images"),
        (
            one_training_image,
            [],
            "found 7 images of sketch for training (one batch); needed 8 or more: add images",
        ),
        (None, ["--iters", "0", "--methods", "qdrop"], "found iters=0"),
        (None, ["--tune"], "found no method that learns among rtn, and so no rate to search"),
        (
            None,
            ["--methods", "qdrop", "--images", "3"],
            "found 3 calibration images of a domain; needed 4 or more (one batch)",
        ),
        (
            None,
            ["--methods", "qdrop", "--images", "4", "--tune"],
            "found 4 calibration images of a domain; a search needs 5 or more (one batch, beside",
        ),
        (
            two_calibration_images,
            ["--methods", "qdrop"],
            "found 2 images of sketch for calibration; needed 4 or more: add images",
        ),
        (None, ["--source", ""], "found --source without a name"),
        (None, ["--images", "1"], "of a domain; needed 2 or more: give more --images\n"),
        (
            one_image_to_adapt,
            ["--adaptation", "unlabelled"],
            "found 1 images of sketch for training; needed 2 or more: add images",
        ),
        (
            None,
            ["--ways", "regression-w4", "--bits", "w8a8", "w4a8"],
            "found no way to merge bundles of rtn at w4a8 (ours) among regression-w4; choose one",
        ),
        (None, ["--device", "cuda"], "found no CUDA device"),
        (
            None,
            ["--adaptation", "unlabelled", "--checkpoints", "{}"],
            "found --adaptation with --checkpoints",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    spoil: Callable[[Path], None] | None,
    flags: list[str],
    message: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if spoil:
        spoil(data)
    out = data.parent / "out"
    argv = ["pacs", "--data", str(data), "--out", str(out), "--bits", "w8a8", "--threads", "1"]
    given = [flag.format(data) for flag in flags]
    assert reproduce.main([*argv, "--methods", "rtn", *given]) == 2
    assert message in capsys.readouterr().err
    assert not files_of(out) and not (out / "checkpoints").exists()


def test_a_table_is_of_the_run_that_was_made(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / "out"
    argv = ["pacs", "--out", str(out), "--targets", "cartoon", "sketch", "--methods", "rtn"]
    argv += ["--bits", "w8a8", "--seeds", "0", "--rounding-seeds", "1", "--threads", "1"]
    assert reproduce.main([*argv, "--data", str(data)]) == 0
    kept = (out / "table.md").read_text()
    report = json.loads((out / "results.json").read_text())
    assert (report["source"], report["adaptation"]) == ("photo", "supervised")
    sketch = out / "checkpoints/colours/photo-supervised/sketch.safetensors"
    assert report["checkpoints_sha256"]["sketch"] == fingerprint(sketch)
    assert "(tiny; from photo, supervised)" in kept
    # Nothing is run, so that neither data nor weights are asked for.
    assert reproduce.main([*argv, "--table"]) == 0
    assert (out / "table.md").read_text() == kept
    capsys.readouterr()
    found = f"{out}: found a run of pacs, colour_models:colours, photo, supervised; needed"
    for flags, message in (
        (["--source", "art_painting"], f"{found} one of pacs, colour_models:colours, art_painting"),
        (["--adaptation", "unlabelled"], f"{found} one of pacs, colour_models:colours, photo, unl"),
        (["--images", "7"], "found figures of another run (option images: 8, now 7); give what"),
    ):
        assert reproduce.main([*argv, "--table", *flags]) == 2
        assert message in capsys.readouterr().err
        if flags[0] != "--images":  # nor is anything made
            assert reproduce.main([*argv, "--data", str(data), *flags]) == 2
            assert message in capsys.readouterr().err
    # Without the results the names of the checkpoints tell.
    results = (out / "results.json").read_bytes()
    (out / "results.json").unlink()
    assert reproduce.main([*argv, "--table", "--adaptation", "unlabelled"]) == 2
    assert (
        "found figures of another run (the adapted checkpoint changed)" in capsys.readouterr().err
    )
    (out / "results.json").write_bytes(results)
    # Nor does a search of rates take the place of the run's own before the refusal.
    other = out.with_name("other.json")
    record = {"kind": TUNING_JSON.kind, "task": "pacs", "searches": []}
    other.write_text(json.dumps(record))
    assert reproduce.main([*argv, "--table", "--rates", str(other), "--bits", "w4a4"]) == 2
    assert "would be lost or be of fewer seeds" in capsys.readouterr().err
    assert not (out / "tuning.json").exists()
    assert reproduce.main([*argv, "--table", "--rates", str(other)]) == 0
    assert json.loads((out / "tuning.json").read_text()) == record
    (out / "tuning.json").unlink()
    assert reproduce.main([*argv, "--table"]) == 0
    assert (out / "table.md").read_text() == kept
    assert json.loads((out / "results.json").read_text())["rows"] == report["rows"]
    # The table of a folder that moved, and whose checkpoints and images are gone.
    moved = out.rename(out.with_name("moved"))
    for name in ("checkpoints", "data"):
        shutil.rmtree(moved / name)
    argv[2] = str(moved)
    assert reproduce.main([*argv, "--table"]) == 0
    assert (moved / "table.md").read_text() == kept
    assert reproduce.main([*argv, "--table", "--adaptation", "unlabelled"]) == 2
    # What is no row is none.
    row, results = moved / "rows" / "ours-rtn-w8a8-s0-sketch.json", moved / "results.json"
    whole = results.read_bytes()
    assert reproduce.main([*argv, "--table", "--out", str(moved / "other")]) == 2
    assert "found no run" in capsys.readouterr().err and not (moved / "other").exists()
    figures = json.loads(row.read_text())
    for text in (
        "[1]",
        "{}",
        '{"domains": {"sketch": "x"}}',
        '{"domains": {}}',
        *(json.dumps({**figures, "domains": {"sketch": n}}) for n in (float("nan"), 5, -1, 0.123)),
        json.dumps({**figures, "domains": {"cartoon": 0.5}}),
        json.dumps({**figures, "images": {"sketch": "x"}}),
        json.dumps({**figures, "tests": 3}),
        json.dumps({**figures, "parents": 5}),
        json.dumps({**figures, "guides": [5]}),
        json.dumps({**figures, "decisions": {"sketch": {"shape": [], "bits": "AA=="}}}),
        json.dumps({**figures, "decisions": {"sketch": {"shape": [900], "bits": "AA=="}}}),
    ):
        row.write_text(text)
        capsys.readouterr()
        assert reproduce.main([*argv, "--table"]) == 2
        assert f"{row}: found no whole figures of this cell; remove" in capsys.readouterr().err
        assert results.read_bytes() == whole
    row.unlink()
    assert reproduce.main([*argv, "--table"]) == 2  # the results had that row
    assert "of which would be lost or be of fewer seeds" in capsys.readouterr().err
    results.write_text(json.dumps({**json.loads(whole), "rows": [{}]}))
    assert reproduce.main([*argv, "--table"]) == 2
    assert "found no rows of this version ('setting')" in capsys.readouterr().err
    results.unlink()
    assert reproduce.main([*argv, "--table"]) == 0
    assert "| rtn | W8A8 |" not in (moved / "table.md").read_text()


class Stopped(Exception):
    """Ends a run half-way, as a killed process would."""


def test_a_table_mixes_no_runs(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = data.parent / "out"
    argv = ["pacs", "--data", str(data), "--out", str(out), "--targets", "cartoon", "sketch"]
    argv += ["--methods", "rtn", "--bits", "w4a8", "--seeds", "0", "--rounding-seeds", "1"]
    argv += ["--ways", "nearest", "guided", "--threads", "1"]
    assert reproduce.main([*argv, "--images", "8"]) == 0
    whole = {path: path.read_bytes() for path in (out / "table.md", out / "results.json")}
    measured, waited = cells._measure, set[str]()

    def stopping(context: cells.CellContext, cell: str, *others: Any) -> None:
        """Stops where figures are to be measured of the cells to come."""
        if cell in waited:
            raise Stopped
        measured(context, cell, *others)

    def calibrated_again(cell: str) -> None:
        assert reproduce.main([*argv, "--images", "8"]) == 0
        waited.add(cell)
        with pytest.raises(Stopped):
            reproduce.main([*argv, "--images", "5"])
        waited.clear()
        capsys.readouterr()

    monkeypatch.setattr(cells, "_measure", stopping)
    single, merged = "ours-rtn-w4a8-s0-sketch", "ours-rtn-w4a8-s0-cartoon+sketch"
    table = [*argv, "--images", "5", "--table"]
    # The row of a bundle that is there no more, and merges of it.
    for cell, said in (
        (single, f"{single}.json: found figures of another bundle than "),
        (f"{merged}-nearest-r0", "nearest-r0.json: found figures of another bundle than "),
        (f"{merged}-guided-r0", "guided-r0.json: found figures of another bundle than "),
    ):
        calibrated_again(cell)
        assert reproduce.main(table) == 2
        assert said in capsys.readouterr().err
        assert reproduce.main([*argv, "--images", "5"]) == 0
        assert reproduce.main(table) == 0
    # Of rows alone, whose bundles are gone: a merge names those that it was made of.
    calibrated_again(f"{merged}-nearest-r0")
    shutil.rmtree(bundle_path(out, f"{merged}-nearest-r0"))
    assert reproduce.main(table) == 2
    assert "found figures of a merge of another bundle than " in capsys.readouterr().err
    # A calibration that was stopped while it ran: the old bundle without a record.
    assert reproduce.main([*argv, "--images", "5"]) == 0
    inputs_of(bundle_path(out, single)).unlink()
    assert reproduce.main(table) == 2
    assert "and no record of what that was made from; run without" in capsys.readouterr().err
    assert reproduce.main([*argv, "--images", "5"]) == 0
    # Rows on other test images.
    row = out / "rows" / f"{merged}-guided-r0.json"
    record = json.loads(row.read_text())
    record["tests"]["sketch"][0] = "0" * 64
    row.write_text(json.dumps(record))
    assert reproduce.main(table) == 2
    assert "found figures on other test images of sketch than " in capsys.readouterr().err
    # Float models that a merge was fitted to, and that are others now.
    assert reproduce.main([*argv, "--images", "5"]) == 0
    record = json.loads(row.read_text())
    record["guides"][0] = "0" * 64
    row.write_text(json.dumps(record))
    assert reproduce.main(table) == 2
    assert "of a merge of another bundle than " in capsys.readouterr().err
    assert reproduce.main([*argv, "--images", "8"]) == 0
    assert {path: path.read_bytes() for path in whole if path.suffix == ".md"} == {
        path: text for path, text in whole.items() if path.suffix == ".md"
    }


def test_a_table_mixes_no_models(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "out"
    argv = ["pacs", "--data", str(data), "--out", str(out), "--targets", "cartoon", "sketch"]
    argv += ["--bits", "w8a8", "--seeds", "0", "--ways", "nearest", "--threads", "1"]
    assert reproduce.main([*argv, "--methods", "rtn"]) == 0
    (data / "cartoon" / "dog" / "0001.png").unlink()  # of the training
    assert reproduce.main([*argv, "--methods", "rtn-corrected"]) == 0
    shutil.rmtree(out / "checkpoints")
    for methods in (["rtn"], ["rtn", "rtn-corrected"]):
        capsys.readouterr()
        assert reproduce.main([*argv, "--methods", *methods, "--table"]) == 2
        assert (
            "found figures of an adapted checkpoint other than that of " in capsys.readouterr().err
        )
    # Bundles that are gone are not missed, and nor are options that they alone tell.
    shutil.rmtree(out / "cells")
    (out / "results.json").unlink()
    assert reproduce.main([*argv, "--methods", "rtn-corrected", "--table"]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["options"] == {} for row in rows)


def test_a_table_of_models_that_were_brought(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, out = data.parent / "earlier", data.parent / "out"
    argv = ["pacs", "--data", str(data), "--targets", "cartoon", "sketch", "--methods", "rtn"]
    argv += ["--bits", "w8a8", "--seeds", "0", "--ways", "nearest", "--threads", "1"]
    assert reproduce.main([*argv, "--out", str(earlier), "--prepare"]) == 0
    argv += ["--out", str(out)]
    brought = ["--checkpoints", str(earlier)]
    models = earlier / "checkpoints/colours/photo-supervised"
    sketch = (models / "sketch.safetensors").read_bytes()
    (models / "sketch.safetensors").write_bytes((models / "cartoon.safetensors").read_bytes())
    assert reproduce.main([*argv, *brought]) == 2
    assert "sketch.safetensors: found another checkpoint than was" in capsys.readouterr().err
    (models / "sketch.safetensors").write_bytes(sketch)
    assert reproduce.main([*argv, *brought]) == 0
    text = (out / "table.md").read_text()
    assert "brought" in text
    assert reproduce.main([*argv, "--table"]) == 2
    assert "found a run of pacs, colour_models:colours, photo, brought" in capsys.readouterr().err
    shutil.rmtree(earlier)
    assert reproduce.main([*argv, "--table", *brought]) == 0
    assert (out / "table.md").read_text() == text


def test_statistics_that_were_removed_are_missed_in_words(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / "out"
    argv = ["pacs", "--data", str(data), "--out", str(out), "--targets", "cartoon", "sketch"]
    argv += ["--methods", "rtn", "--bits", "w8a8", "--seeds", "0", "--threads", "1"]
    assert reproduce.main([*argv, "--ways", "nearest"]) == 0
    bundle = bundle_path(out, "ours-rtn-w8a8-s0-sketch")
    Bundle.open(bundle).strip()
    assert reproduce.main([*argv, "--ways", "nearest"]) == 0
    capsys.readouterr()
    assert reproduce.main([*argv, "--ways", "regression"]) == 2
    said = capsys.readouterr().err
    assert f"{bundle}: found no statistics, which 1 of 2 bundles lack" in said
    shutil.rmtree(bundle)
    assert reproduce.main([*argv, "--ways", "regression"]) == 0


def test_splits_of_more_domains_and_in_another_order_are_kept(data: Path) -> None:
    prepared(data, targets=["sketch", "cartoon"]).make("cpu", 1)
    splits = data.parent / "out/data/pacs"
    before = splits.stat().st_ino
    for targets in (["cartoon", "sketch"], ["sketch"]):
        prepared(data, targets=targets).make("cpu", 1)
        assert splits.stat().st_ino == before
    prepared(data, targets=["sketch", "art_painting"]).make("cpu", 1)
    assert splits.stat().st_ino != before and (splits / "art_painting").is_dir()


def test_splits_of_fewer_domains_do_not_pass_for_those_of_more(data: Path) -> None:
    both = ["sketch", "cartoon"]
    prepared(data, targets=both).make("cpu", 1)
    (data / "sketch/dog/0001.png").unlink()
    prepared(data, targets=["sketch"]).make("cpu", 1)
    splits = data.parent / "out/data/pacs"
    assert not (splits / "cartoon").exists()
    prepared(data, targets=both).make("cpu", 1)
    assert (splits / "cartoon").is_dir() and (splits / "sketch").is_dir()


def test_a_table_of_seeds_in_any_order(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "out"
    argv = ["pacs", "--data", str(data), "--out", str(out), "--targets", "cartoon", "sketch"]
    argv += ["--methods", "rtn", "--bits", "w8a8", "--ways", "nearest", "--threads", "1"]
    assert reproduce.main([*argv, "--seeds", "0"]) == 0
    text = (out / "table.md").read_text()
    assert reproduce.main([*argv, "--table", "--seeds", "1", "0"]) == 0
    assert (out / "table.md").read_text() == text
    # What a later command leaves out of the table is told, and stays.
    capsys.readouterr()
    assert reproduce.main([*argv, "--seeds", "0", "--bits", "w6a6"]) == 0
    said = capsys.readouterr().out
    assert (
        "rows of an earlier command that are not in this table: 1; their" in said
        and "W8A8" not in said
    )
    assert reproduce.main([*argv, "--seeds", "0", "--bits", "w6a6", "w8a8", "--table"]) == 0
    said = capsys.readouterr().out
    assert "earlier command" not in said and "W8A8" in said and "W6A6" in said


def test_the_folder_of_another_run_is_left_alone(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / "out"
    out.mkdir()
    argv = ["pacs", "--data", str(data), "--out", str(out), "--methods", "rtn", "--bits", "w8a8"]
    for other in ({"task": "camvid"}, {"task": "pacs", "model": "m:other"}):
        results = json.dumps({"schema_version": 1, "kind": REPRODUCE_JSON.kind, **other})
        (out / "results.json").write_text(results)
        for flags in ([], ["--table"]):
            assert reproduce.main([*argv, *flags]) == 2
            assert "needed one of pacs, colour_models:colours, photo" in capsys.readouterr().err
        assert [f.name for f in out.iterdir()] == ["results.json"]
        assert (out / "results.json").read_text() == results


def cut_files(splits: Path) -> None:
    for file in (splits / "cartoon" / "test").rglob("*.png"):
        file.write_bytes(b"")


def without_dogs(splits: Path) -> None:
    shutil.rmtree(splits / "cartoon" / "test" / "dog")


def exchanged(splits: Path) -> None:
    dogs, horses = (splits / "cartoon" / "training" / name for name in ("dog", "horse"))
    dogs.rename(splits / "other")
    horses.rename(dogs)
    (splits / "other").rename(horses)


@pytest.mark.parametrize("damage", [cut_files, without_dogs, exchanged])
def test_splits_that_were_damaged_are_written_again(
    damage: Callable[[Path], None], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def contents() -> dict[str, bytes]:
        return {
            str(f.relative_to(made.splits)): f.read_bytes()
            for f in made.splits.rglob("*")
            if f.is_file() and f.suffix == ".png"
        }

    made = prepared(data)
    made.make("cpu", 1)
    whole, checkpoints = contents(), files_of(data.parent / "out")
    damage(made.splits)
    assert contents() != whole
    made.make("cpu", 1)
    assert contents() == whole and files_of(data.parent / "out") == checkpoints


def test_a_checkpoint_that_was_damaged_is_trained_again(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(data, targets=["sketch"])
    made.make("cpu", 1)
    file = made.checkpoints[1].file
    whole = file.read_bytes()
    file.write_bytes(made.checkpoints[0].file.read_bytes())  # whole, and another model
    made.make("cpu", 1)
    assert file.read_bytes() == whole
    # Without the hash, as earlier versions wrote it, it is taken.
    record = inputs_of(file)
    kept = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in kept.items() if k != WRITTEN}))
    before = file.stat().st_mtime_ns
    made.make("cpu", 1)
    assert file.stat().st_mtime_ns == before
    assert json.loads(record.read_text())[WRITTEN] == kept[WRITTEN]  # known from now on
    # While it is trained anew, nothing says that the old one is of these images.
    record.write_text(json.dumps({**kept, "seed": 1}))

    def stopped(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(real_images, "_run", stopped)
    with pytest.raises(Stopped):
        made.make("cpu", 1)
    assert not record.exists()


def test_one_run_at_a_time(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "out"
    out.mkdir()
    argv = ["pacs", "--data", str(data), "--out", str(out), "--methods", "rtn", "--bits", "w8a8"]
    with alone_in(out):
        assert reproduce.main([*argv, "--prepare"]) == 2
    assert f"{out}: found another run at work in it; wait" in capsys.readouterr().err
    assert not list(out.iterdir())
    assert reproduce.main([*argv, "--prepare", "--threads", "1"]) == 0


def test_a_refused_run_leaves_the_search_of_before(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = data.parent / "out", data.parent / "other.json"
    out.mkdir()
    kept = json.dumps({"kind": TUNING_JSON.kind, "task": "pacs", "searches": []})
    (out / "tuning.json").write_text(kept)
    other.write_text(json.dumps({**json.loads(kept), "task": "other"}))
    spoil_picture(data)
    argv = ["pacs", "--data", str(data), "--out", str(out), "--methods", "rtn", "--bits", "w8a8"]
    assert reproduce.main([*argv, "--rates", str(other)]) == 2
    assert "0012.png: cannot be decoded" in capsys.readouterr().err
    assert (out / "tuning.json").read_text() == kept
    assert not (out / "cells").exists() and not (out / "rows").exists()
    # Where the trials of a search would lie.
    (out / "tuning").touch()
    assert reproduce.main([*argv, "--methods", "qdrop", "--tune"]) == 2
    assert f"found a file at {out / 'tuning'}; needed a folder" in capsys.readouterr().err


def test_classes_that_change_their_names_are_noticed(data: Path) -> None:
    made = prepared(data, targets=["sketch"])
    made.make("cpu", 1)
    before = files_of(data.parent / "out")
    for first, second in (("dog", "other"), ("horse", "dog"), ("other", "horse")):
        (data / "sketch" / first).rename(data / "sketch" / second)
    prepared(data, targets=["sketch"]).make("cpu", 1)
    after = files_of(data.parent / "out")
    name = "checkpoints/colours/photo-supervised/sketch.safetensors"
    assert {n for n in after if after[n] != before[n]} == {name}


def test_camvid_runs_as_a_user_would(
    tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for light, number in (("day", 16), ("dusk", 1)):
        for kind in ("images", "labels"):
            (tmp_path / "CamVid" / light / kind).mkdir(parents=True)
        for frame in range(60, 3600, 180):
            name = f"{number:04}E5_{frame:05}.png"
            labels = rng.integers(0, 12, (6, 8), np.uint8).repeat(8, 0).repeat(8, 1)
            pixels = (labels[..., None] * 20).repeat(3, 2) // number
            Image.fromarray(labels).save(tmp_path / "CamVid" / light / "labels" / name)
            Image.fromarray(pixels).save(tmp_path / "CamVid" / light / "images" / name)
    out = tmp_path / "out"
    argv = ["camvid", "--data", str(tmp_path / "CamVid"), "--out", str(out), "--threads", "1"]
    argv += ["--targets", "day", "dusk", "--methods", "rtn", "--bits", "w8a8", "--seeds", "0"]
    argv += ["--rounding-seeds", "1", "--draw", "w8a8"]
    assert reproduce.main(argv) == 0, capsys.readouterr().err
    assert sorted(files_of(out / "checkpoints")) == [
        "pixels/day-supervised/dusk.safetensors",
        "pixels/day.safetensors",
    ]
    row = json.loads((out / "rows" / "ours-rtn-w8a8-s0-dusk.json").read_text())
    assert row["metric"] == "miou" and row["images"] == {"dusk": 5}
    assert len(row["per_class"]["dusk"]) == 11
    assert sorted(f.name for f in (out / "pictures").iterdir()) == [
        "day-0.png",
        "day-1.png",
        "dusk-0.png",
        "dusk-1.png",
    ]
    with Image.open(out / "pictures" / "day-0.png") as picture:
        # Image, labels, float of both folds, and rtn; titles above.
        assert picture.size == (5 * 68 - 4, 48 + 14)
    # Without labels: from the same source model.
    before = files_of(out / "checkpoints")
    choice = Choice(tmp_path / "CamVid", out, targets=["day", "dusk"], adaptation="unlabelled")
    made = prepare("camvid", choice)
    made.make("cpu", 1)
    with safe_open(made.checkpoints[1].file, "pt") as file:
        notes = json.loads(file.metadata()["adapted"])
    assert notes["method"] == "class-balanced self-training"
    after = files_of(out / "checkpoints")
    assert set(after) - set(before) == {"pixels/day-unlabelled/dusk.safetensors"}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["pacs"], "pacs needs --data"),
        (["camvid", "--data", "{}"], "images: not there; needed day/images, day/labels, dusk/im"),
        (["pacs", "--data", "{}", "--draw", "w8a8"], "it is of segmentation and camvid"),
        (["pacs", "--data", "{}/nowhere"], "photo: not there; needed PACS as it is distributed"),
        (["pacs", "--data", "{}", "--made"], "found --made with pacs"),
        (["pacs", "--data", "{}", "--source", "film"], "found the domain film; there are photo"),
        (["pacs", "--data", "{}", "--model", "hrda_mit_b5"], "choose one of tiny"),
        (["pacs", "--data", "{}", "--weights", "x"], "that no training starts from; leave it out"),
        (["pacs", "--data", "{}", "--checkpoints", "{}"], "photo: found no checkpoint"),
        (["office-home", "--made", "--weights", "x"], "found --weights with office-home"),
        (["segmentation", "--made", "--adaptation", "unlabelled"], "found --adaptation with segm"),
        (
            ["segmentation", "--data", "{}", "--checkpoints", "{}", "--model", "tiny"],
            "one of hrda",
        ),
    ],
)
def test_commands_that_make_no_sense(
    flags: list[str],
    message: str,
    tmp_path: Path,
    tiny: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [flag.format(empty_pacs(tmp_path)) for flag in flags]
    assert reproduce.main([*given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_lite0_asks_for_its_imagenet_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["pacs", "--data", str(empty_pacs(tmp_path)), "--out", str(tmp_path / "out")]
    assert reproduce.main(argv) == 2
    assert "found no --weights for lite0, whose training starts from" in capsys.readouterr().err
    assert reproduce.main([*argv, "--weights", str(tmp_path / "none.pth")]) == 2
    assert "none.pth: found no file; needed ImageNet weights" in capsys.readouterr().err
