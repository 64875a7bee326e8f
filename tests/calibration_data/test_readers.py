"""Images into network inputs: crops, order, bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration_data.readers import Wanted, folder, read
from hdrq_deploy.cli import calibrate as calibrate_command
from hdrq_deploy.cli import emit
from hdrq_deploy.errors import DataError
from hdrq_deploy.exporters import export
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.runtime import load_engine
from hdrq_deploy.runtime.predictions import predictions


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        size = (24 + i % 5, 30, 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i:03}.png")
    return tmp_path / "pictures"


def test_a_crop_is_cut_from_the_middle_of_the_resized_image(pictures: Path) -> None:
    wanted = Wanted((16, 16), (0.5,), (0.25,), resize=(20, 24))
    found = read(pictures, wanted)
    files = sorted((pictures / "a").iterdir()) + sorted((pictures / "b").iterdir())
    for row, file in zip(found.x, files, strict=True):
        whole = np.asarray(Image.open(file).resize((24, 20), Image.Resampling.BILINEAR))
        expected = (whole[2:18, 4:20].astype(np.float32) / 255 - 0.5) / 0.25
        assert np.array_equal(row, expected.transpose(2, 0, 1))
    assert found.preprocessing and found.preprocessing.resize == (20, 24)
    with pytest.raises(DataError, match="found a crop of 32x16 from images of 20x24"):
        read(pictures, Wanted((32, 16), resize=(20, 24)))


def test_reading_is_the_same_in_memory_and_in_a_mapped_file(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Wanted((16, 16))
    before = read(pictures, wanted)
    monkeypatch.setattr(folder, "_IN_MEMORY", 0)
    monkeypatch.setattr(folder, "_AHEAD", 3)
    after = read(pictures, wanted)
    assert np.array_equal(before.x, after.x) and np.array_equal(before.y, after.y)
    assert before.sha256 == after.sha256
    (pictures / "a" / "999.png").write_bytes(b"no picture")
    skipped = read(pictures, wanted, skip_corrupt=True)
    assert np.array_equal(skipped.x, before.x) and len(skipped.skipped) == 1


_COUNT = """
import json, resource, sys
from pathlib import Path
from hdrq_deploy.calibration_data.readers import Wanted, folder, read
folder._IN_MEMORY = 64 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = read(sys.argv[1], Wanted((224, 224)))
sha = found.sha256
names = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"images": len(found.x), "mb": found.x.nbytes / 1e6, "sha": sha,
                  "anonymous_mb": int(names["RssAnon"].split()[0]) / 1e3}))
"""


def test_many_images_do_not_have_to_fit_into_memory(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((32, 32, 3), 7, np.uint8))
    image.save(tmp_path / "0.png")
    for i in range(1, 1000):
        (tmp_path / f"{i}.png").hardlink_to(tmp_path / "0.png")
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    # 602 MB of inputs, of which none is this process's own memory.
    assert found["images"] == 1000 and found["mb"] > 600
    assert found["anonymous_mb"] < 200, found


def cropped(work: Path, pictures: Path, tmp_path: Path, name: str) -> Path:
    base = work / f"{name}-base.safetensors"
    bundle = calibrate(
        f"tiny_models:{name}",
        pictures,
        "night",
        tmp_path / "night.hdrq",
        base,
        method="rtn",
        wanted=Wanted((16, 16), resize=(20, 24)),
    )
    return export(bundle, tmp_path / "engine", "ort")


def test_frames_are_cut_as_calibration_images_were(
    work: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = cropped(work, pictures, tmp_path, "Tiny")
    files = sorted((pictures / "a").iterdir())
    x = read(pictures, Wanted((16, 16), resize=(20, 24))).x[: len(files)]
    with load_engine(folder) as engine:
        answers = engine.predict([np.asarray(Image.open(file)) for file in files])
        # Two folders do not name four classes.
        assert answers[0].label is None
        assert [a.index for a in answers] == engine(x).argmax(1).tolist()


def test_a_mask_says_nothing_of_what_was_cut_off(
    work: Path, pictures: Path, tmp_path: Path
) -> None:
    with load_engine(cropped(work, pictures, tmp_path, "Net")) as engine:
        p = engine.manifest.preprocessing
        frame = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        (answer,) = engine.predict([frame])
        mask = answer.mask
        assert mask is not None and mask.shape == (40, 48)
        (part,) = predictions(engine(engine.prepare([frame])), [(32, 32)])
    assert p and np.array_equal(mask[4:36, 8:40], part.mask)
    outside = mask.copy()
    outside[4:36, 8:40] = 255
    assert (outside == 255).all()


def test_deepstream_cannot_crop(
    work: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cropped(work, pictures, tmp_path, "Tiny")
    # The same manifest as a TensorRT engine would have.
    graph = export(tmp_path / "night.hdrq", tmp_path / "trt", "trt", only_graph=True)
    assert emit.main(["deepstream", str(graph), "-o", str(tmp_path / "config")]) == 2
    assert "nvinfer cannot crop" in capsys.readouterr().err
    assert folder.is_dir()


def test_the_command_takes_resize(work: Path, pictures: Path, tmp_path: Path) -> None:
    argv: list[Any] = ["--model", "tiny_models:Tiny", "--weights", work / "Tiny-night.safetensors"]
    argv += ["--data", pictures, "--domain", "night", "--method", "rtn", "--size", 16, 16]
    argv += ["--resize", 20, 24, "-o", tmp_path / "night.hdrq"]
    assert calibrate_command.main([str(word) for word in argv]) == 0
    p = Bundle.open(tmp_path / "night.hdrq").manifest.preprocessing
    assert p and p.resize == (20, 24) and (p.height, p.width) == (16, 16)
