"""Class folders are matched by name, or by their number, or refused: never by chance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy import Bundle, calibrate
from hdrq_deploy.calibration_data.readers import ImageSet, numbered, read
from hdrq_deploy.cli import analyze, bench, sensitivity
from hdrq_deploy.errors import DataError, EngineError
from hdrq_deploy.experiments.tasks import office_home
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.runtime import benchmark, load_engine
from hdrq_deploy.runtime.bench.accuracy import accuracy
from hdrq_deploy.runtime.predictions import predictions

# Each class is a colour, and the classifier below says which; "d" is never in a test.
COLOURS = {"a": (250, 10, 10), "b": (10, 250, 10), "c": (10, 10, 250), "d": (240, 240, 240)}
PER_CLASS = 6

MODEL = '''
import torch
from torch import nn


class Colours(nn.Module):
    """The mean colour, and the class whose colour it is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(3, 4)
        colours = torch.tensor(%s) / 255
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])
            self.conv.bias.zero_()
            self.fc.weight.copy_(20 * colours)
            self.fc.bias.copy_(-10 * (colours ** 2).sum(1))

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))
'''


def paint(folder: Path, name: str, seed: int, count: int = PER_CLASS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        noise = rng.integers(-5, 6, (8, 8, 3))
        pixels = (np.array(COLOURS[name]) + noise).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def made(work: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Bundles and engines with and without names of their classes, with scores and labels."""
    root = tmp_path_factory.mktemp("classes")
    (work / "colour_models.py").write_text(MODEL % str(list(map(list, COLOURS.values()))))
    for name in COLOURS:
        paint(root / "named" / name, name, 1)
        for file in (root / "named" / name).iterdir():
            (root / "flat").mkdir(exist_ok=True)
            shutil.copy(file, root / "flat" / f"{name}{file.name}")
    result: dict[str, Any] = {"root": root}
    for data in ("named", "flat"):
        bundle = calibrate(
            "colour_models:Colours", root / data, "x", root / f"{data}.hdrq", method="rtn"
        )
        result[data] = bundle
        for what in ("none", "argmax"):
            options = GraphOptions(postprocess=what)
            result[f"{data} {what}"] = export(bundle, root / f"{data}-{what}", options=options)
    assert result["named"].manifest.classes == tuple(COLOURS)
    assert result["flat"].manifest.classes is None
    return result


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in COLOURS:
        paint(tmp_path / "test" / name, name, 2)
    return tmp_path / "test"


def share(engine: Path, tree: Path) -> float:
    found = benchmark(engine, {"d": tree}, warmup=1, iterations=2, threads=1).accuracy
    assert found is not None
    return found.domains["d"]


ENGINES = [f"{data} {what}" for data in ("named", "flat") for what in ("none", "argmax")]


def empty(tree: Path) -> None:
    for file in (tree / "b").iterdir():
        file.unlink()


def other_format(tree: Path) -> None:
    for file in (tree / "b").iterdir():
        file.rename(file.with_suffix(".heic"))


def hidden(tree: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX", ".b"):
        paint(tree / name, "d", 3)
    (tree / "a" / ".0.png").write_bytes(b"resource fork")
    (tree / "Thumbs.db").write_bytes(b"x")


def fewer(tree: Path) -> None:
    shutil.rmtree(tree / "a")


def extra_empty(tree: Path) -> None:
    (tree / "aa_notes").mkdir()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [None, empty, other_format, hidden])
def test_trees_that_can_be_matched(
    made: dict[str, Any], photos: Path, engine: str, change: Any
) -> None:
    if change is not None:
        change(photos)
    assert share(made[engine], photos) == 1.0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [fewer, extra_empty])
def test_a_tree_of_more_or_fewer_folders_is_matched_by_name_or_refused(
    made: dict[str, Any], photos: Path, engine: str, change: Any
) -> None:
    change(photos)
    if engine.startswith("named"):
        assert share(made[engine], photos) == 1.0
        return
    count = len(list(photos.iterdir()))
    with pytest.raises(DataError, match=f"found {count} class folders .*for 4 scores, and the"):
        share(made[engine], photos)


def test_folders_that_no_name_or_number_matches(
    made: dict[str, Any], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Four folders hold images, as many as there are classes; but one of them is another.
    paint(photos / "aa", "d", 3)
    empty(photos)
    for engine in ENGINES:
        argv = [str(made[engine]), "--data", f"d={photos}", "--iterations", "2"]
        assert bench.main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        if engine.startswith("named"):
            assert "found class folder 'aa'; the model's classes are a, b, c, d" in error
        else:
            assert "found 5 class folders (1 without images, such as 'b') for 4 scores" in error


def test_folders_for_an_unknown_number_of_classes(photos: Path) -> None:
    images = read(photos)
    with pytest.raises(DataError, match="4 class folders for a model that names no classes and"):
        numbered(images, None, None, photos)
    shutil.rmtree(photos / "b")
    with pytest.raises(DataError, match="found 3 class folders for 4 scores"):
        numbered(read(photos), None, 4, photos)
    flat = ImageSet(images.x, None, None, None)
    assert numbered(flat, None, None, photos) is flat


def test_an_engine_of_labels_without_golden_outputs(
    made: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    """Nothing says how many classes there are: refused, however complete the tree."""
    folder = tmp_path / "engine"
    shutil.copytree(made["flat argmax"], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["golden.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="names no classes and does not say how many"):
        share(folder, photos)


def test_bundles_are_matched_as_engines_are(
    made: dict[str, Any],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty(photos)
    hidden(photos)
    for data in ("named", "flat"):
        out = tmp_path / f"{data}-out"
        argv = [str(made[data].path), "--data", f"d={photos}", "-o", str(out)]
        assert sensitivity.main(argv) == 0
        record = json.loads((out / "sensitivity.json").read_text())
        assert record["full_accuracy"] == 1.0
    capsys.readouterr()
    shutil.rmtree(photos / "b")
    for command in (sensitivity, analyze):
        other = [] if command is sensitivity else [str(made["flat"].path)]
        out = tmp_path / command.__name__.rpartition(".")[2]
        argv = [str(made["flat"].path), *other, "--data", f"d={photos}", "-o", str(out)]
        assert command.main(argv) == 2
        error = capsys.readouterr().err
        assert "found 3 class folders for 4 scores" in error and error.count("\n") == 1


def test_class_folders_are_no_labels_of_maps(work: Path, tmp_path: Path) -> None:
    net = calibrate("tiny_models:Net", work / "images", "x", tmp_path / "net.hdrq", method="rtn")
    argv = [str(net.path), "--data", f"d={work / 'images'}", "-o", str(tmp_path / "out")]
    assert sensitivity.main(argv) == 0
    assert '"full_accuracy": null' in (tmp_path / "out" / "sensitivity.json").read_text()


def test_calibration_names_the_classes_of_a_tree_with_an_empty_folder(
    made: dict[str, Any], work: Path, tmp_path: Path
) -> None:
    def names(tree: Path) -> Any:
        target = tmp_path / "n.hdrq"
        calibrate("colour_models:Colours", tree, "x", target, method="rtn")
        return Bundle.open(target).manifest.classes

    tree = tmp_path / "tree"
    shutil.copytree(made["root"] / "named", tree)
    empty(tree)
    assert names(tree) == ("a", "b", "c", "d")
    hidden(tree)
    assert names(tree) == ("a", "b", "c", "d")
    (tree / "0_notes").mkdir()
    assert names(tree) is None


def test_reading_counts_empty_folders_and_skips_hidden_ones(photos: Path) -> None:
    before = read(photos)
    hidden(photos)
    empty(photos)
    found = read(photos)
    assert found.classes == ("a", "b", "c", "d") and found.empty == ("b",)
    assert found.y is not None and sorted(set(found.y.tolist())) == [0, 2, 3]
    assert before.y is not None
    np.testing.assert_array_equal(found.x, before.x[before.y != 1])


def test_a_hidden_folder_is_no_domain(tmp_path: Path) -> None:
    for name in ("Clipart", "Product", "Real World"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / ".Art").mkdir()
    with pytest.raises(DataError, match="Art: not there"):
        office_home(tmp_path / "data", tmp_path)


class Numbers:
    """Stands for an engine whose outputs are numbers, not scores."""

    def __init__(self, engine: Any, output: Any) -> None:
        self.engine, self.output = engine, output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def all_rows(self, x: Any) -> Any:
        return self.output[: len(x)]


@pytest.mark.parametrize("shape", [(9,), (9, 1), (9, 1, 8, 8), (9, 3, 4)])
def test_one_number_an_image_is_no_decision(
    made: dict[str, Any], photos: Path, shape: tuple[int, ...]
) -> None:
    output = np.random.default_rng(0).random(shape, dtype=np.float32)
    images = read(photos, limit=9)
    assert images.y is not None
    with load_engine(made["flat none"]) as engine:
        fake: Any = Numbers(engine, output)
        with pytest.raises(DataError, match="needed one row of two class scores or more"):
            accuracy(fake, {"d": images})
    with pytest.raises(EngineError, match="found an output of shape .* call the engine itself"):
        predictions(output, [(8, 8)] * 9)
