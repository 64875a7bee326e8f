"""The camera example on a video that is made here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.exporters import export

cv2 = pytest.importorskip("cv2")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def camera() -> Any:
    spec = importlib.util.spec_from_file_location("camera", ROOT / "examples" / "camera.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["camera"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundles(work: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("camera")
    return [
        calibrate(
            "tiny_models:Tiny",
            work / "images",
            domain,
            folder / f"{domain}.hdrq",
            work / f"Tiny-{domain}.safetensors",
            work / "Tiny-base.safetensors",
            method="rtn",
        )
        for domain in ("night", "day")
    ]


def video(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (96, 64))
    rng = np.random.default_rng(0)
    for i in range(frames):
        frame = np.full((64, 96, 3), 8 * i % 256, np.uint8)
        frame[10:40, i % 50 : i % 50 + 30] = rng.integers(0, 256, 3)
        writer.write(frame)
    writer.release()
    return path


def count(path: Path) -> tuple[int, Any]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        ok, frame = capture.read()
        if not ok:
            return len(frames), frames[-1]
        frames.append(frame)


def test_a_video_is_answered_and_drawn(
    camera: Any, bundles: list[Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = export(bundles[0], tmp_path / "engine")
    source, out = video(tmp_path / "in.avi", 12), tmp_path / "out.avi"
    assert camera.main([str(engine), "--source", str(source), "--out", str(out)]) == 0
    assert "12 frames, median" in capsys.readouterr().out
    frames, last = count(out)
    _, plain = count(source)
    # Text was drawn into the upper left; the lower right is the frame itself.
    assert frames == 12 and (np.abs(last[:20].astype(int) - plain[:20]) > 100).any()
    assert np.abs(last[60:, 60:].astype(int) - plain[60:, 60:]).max() < 40


def test_domains_follow_the_video(
    camera: Any, bundles: list[Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = video(tmp_path / "in.avi", 40)
    paths = [str(bundle.path) for bundle in bundles]
    flags = ["--source", str(source), "--adapt-every", "10", "--threads", "1"]
    assert camera.main([*paths, *flags]) == 0
    shown = capsys.readouterr().out
    assert "40 frames" in shown and "night 0." in shown and "day 0." in shown


def test_sources_that_end_badly(
    camera: Any,
    bundles: list[Bundle],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = str(export(bundles[0], tmp_path / "engine"))
    assert camera.main([engine, "--source", str(tmp_path / "none.avi")]) == 2
    assert "needed a video file or a device number" in capsys.readouterr().err
    assert camera.main([str(tmp_path), "--source", "x.avi"]) == 2

    class Stops:
        """A camera whose cable is pulled after three frames."""

        left = 3

        def __init__(self, source: Any) -> None:
            assert source == 0

        def isOpened(self) -> bool:
            return True

        def read(self) -> Any:
            self.left -= 1
            return (True, np.zeros((64, 96, 3), np.uint8)) if self.left >= 0 else (False, None)

        def release(self) -> None:
            self.left = 0

    monkeypatch.setattr(cv2, "VideoCapture", Stops)
    monkeypatch.setattr(camera.time, "sleep", lambda seconds: None)
    assert camera.main([engine, "--source", "0"]) == 2
    assert "camera 0 stopped after 3 frames" in capsys.readouterr().err
