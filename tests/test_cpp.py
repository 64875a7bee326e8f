"""The C++ library and its camera loop: built here, and held against Python image for image."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration_data.readers import Wanted
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.runtime import load_engine

openvino = pytest.importorskip("openvino")
SOURCE = Path(__file__).resolve().parents[1] / "examples" / "cpp"
CMAKE = Path(openvino.__file__).parent / "cmake"
TOOLS = [tool for tool in ("cmake", "g++", "make") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(bool(TOOLS), reason=f"found no {', '.join(TOOLS)}"),
    pytest.mark.skipif(not CMAKE.is_dir(), reason="this OpenVINO has no CMake files"),
]


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled camera loop."""
    folder = tmp_path_factory.mktemp("cpp")
    commands = (
        ["cmake", "-S", str(SOURCE), "-B", str(folder), f"-DOpenVINO_DIR={CMAKE}"],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    return folder / "camera"


def run(camera: Path, *words: object, stdin: bytes = b"") -> list[dict[str, Any]]:
    """Answers, one for each frame."""
    command = [str(camera), "--json", "--threads", "1", *map(str, words)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes: larger, smaller, of the network's size, and of one pixel."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate(((48, 64), (9, 7), (16, 16), (1, 1), (33, 16))):
        pixels = rng.integers(0, 256, (h, w, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.ppm")
    return folder


@pytest.fixture(scope="module")
def tiny(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(work, "Tiny", tmp_path_factory.mktemp("tiny"))


def bundle_of(work: Path, name: str, folder: Path, **options: Any) -> Bundle:
    return calibrate(
        f"tiny_models:{name}",
        work / "images",
        "night",
        folder / "night.hdrq",
        work / f"{name}-night.safetensors",
        work / f"{name}-base.safetensors",
        method="rtn",
        wbits=8,
        statistics="off",
        **options,
    )


def same(camera: Path, engine: Path, pictures: Path) -> list[dict[str, Any]]:
    """C++'s answers, after they were held against Python's."""
    answers = run(camera, engine, pictures)
    files = sorted(pictures.iterdir())
    assert [row["name"] for row in answers] == [file.name for file in files]
    with load_engine(engine, threads=1) as loaded:
        for row, file in zip(answers, files, strict=True):
            expected = loaded.predict(np.asarray(Image.open(file)))
            assert row["label"] == (expected.label or "")
            assert row["index"] == (-1 if expected.index is None else expected.index)
            scores = [] if expected.scores is None else expected.scores
            np.testing.assert_allclose(row["scores"], scores, rtol=1e-6, atol=1e-7)
            if expected.mask is not None:
                assert np.array_equal(np.reshape(row["mask"], expected.mask.shape), expected.mask)
    return answers


@pytest.mark.parametrize(
    "options",
    [
        GraphOptions(),
        GraphOptions(fold_preprocess=True, postprocess="argmax"),
        GraphOptions(batch=3, postprocess="softmax"),
    ],
    ids=["float", "frames to labels", "fixed batch"],
)
def test_labels_and_scores(
    camera: Path, tiny: Bundle, pictures: Path, tmp_path: Path, options: GraphOptions
) -> None:
    engine = export(tiny, tmp_path / "engine", "openvino", options=options)
    answers = same(camera, engine, pictures)
    assert len(answers) == 5 and {row["label"] for row in answers} <= set("abcd")


def test_masks_also_where_the_image_is_cut(
    camera: Path, work: Path, pictures: Path, tmp_path: Path
) -> None:
    for i, wanted in enumerate((None, Wanted(size=(16, 16), resize=(20, 24)))):
        bundle = bundle_of(work, "Net", tmp_path / str(i), wanted=wanted)
        engine = export(bundle, tmp_path / f"engine{i}", "openvino")
        assert all(row["mask"] for row in same(camera, engine, pictures))
    options = GraphOptions(postprocess="argmax")
    same(camera, export(bundle, tmp_path / "labels", "openvino", options=options), pictures)


def test_raw_frames(camera: Path, tiny: Bundle, tmp_path: Path) -> None:
    engine = export(tiny, tmp_path / "engine", "openvino")
    frames = np.random.default_rng(1).integers(0, 256, (3, 20, 30, 3), np.uint8)
    answers = run(camera, engine, "-", "30x20", stdin=frames.tobytes())
    with load_engine(engine, threads=1) as loaded:
        expected = loaded.predict(list(frames))
    assert [row["index"] for row in answers] == [found.index for found in expected]


def test_errors_are_one_line(camera: Path, tiny: Bundle, pictures: Path, tmp_path: Path) -> None:
    engine = export(tiny, tmp_path / "engine", "openvino")
    text = (engine / "manifest.json").read_text()

    def refused(message: str, *words: object) -> None:
        done = subprocess.run(
            [str(camera), *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1

    refused("usage: camera", engine)
    refused("found no manifest.json", tmp_path, pictures)
    refused("found no .ppm or .pgm images", engine, tmp_path)
    refused("needed WIDTHxHEIGHT", engine, "-", "30x")
    refused("found --fast; needed --threads", "--fast", "1", engine, pictures)
    grey = tmp_path / "grey.pgm"
    Image.new("L", (4, 4)).save(grey)
    refused("found an image of 1 channels; needed 3", engine, grey)
    grey.write_bytes(b"P5 4 4 255\n12")
    refused("found fewer pixels than its header says", engine, grey)
    for new, message in (
        (
            text.replace('"openvino"', '"trt"', 1),
            "found an engine of the kind trt; this build runs",
        ),
        (text.replace("{", "{,", 1), "JSON: needed a name at byte"),
        (text.rstrip() + "}", "JSON: needed nothing more"),
        (text.replace('"schema_version": 1', '"schema_version": 01'), "no zero in front"),
        (text.replace('"schema_version": 1', '"schema_version": 2'), "another kind or version"),
        (text.replace('"kind":', '"engine":', 1), "needed another name than engine"),
    ):
        (engine / "manifest.json").write_text(new)
        refused(message, engine, pictures)
    (engine / "manifest.json").write_text(text)
    (engine / "model.onnx").write_bytes(b"short")
    refused("model.onnx is missing or of another size", engine, pictures)
