"""Engines as an application uses them: calls, futures, frames in and answers out."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from hdrq_deploy import calibrate
from hdrq_deploy.calibration_data.readers import Wanted
from hdrq_deploy.errors import EngineError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.runtime import Engine, load_engine
from hdrq_deploy.runtime.predictions import enlarge


@pytest.fixture
def folder(make: Any, tmp_path: Path) -> Path:
    return export(make(domain="night"), tmp_path / "engine")


def test_calls_by_array_and_by_name(folder: Path, inputs: Any) -> None:
    with load_engine(folder) as engine:
        (source,), (target,) = engine.inputs, engine.outputs
        assert (source.dtype, source.layout, source.shape[1:]) == ("float", "NCHW", (3, 16, 16))
        scores = engine(inputs)
        assert scores.shape == (len(inputs), 4) and engine.device == "cpu"
        np.testing.assert_array_equal(engine({source.name: inputs})[target.name], scores)
        engine.warm_up(batch=2)
        results, phases = engine.timed(inputs)
        np.testing.assert_array_equal(results[target.name], scores)
        assert phases.compute > 0 and phases.host_to_device is None
        with pytest.raises(EngineError, match="found inputs wrong; needed"):
            engine({"wrong": inputs})
        with pytest.raises(EngineError, match="found inputs none; needed"):
            engine({})


def test_calls_that_run_in_the_background(folder: Path, inputs: Any) -> None:
    engine = load_engine(folder)
    pending = [engine.run_async(inputs[i : i + 1]) for i in range(4)]
    for i, one in enumerate(pending):
        np.testing.assert_array_equal(one.wait(60), engine(inputs[i : i + 1]))
        np.testing.assert_array_equal(one.wait(), engine(inputs[i : i + 1]))
    with pytest.raises(EngineError, match="found NaN"):
        engine.run_async(inputs * np.nan)
    last = engine.run_async(inputs)
    engine.close()  # waits for it
    assert last.wait().shape == (len(inputs), 4)
    with pytest.raises(EngineError, match="closed"):
        engine.run_async(inputs)


def test_threads_share_an_engine_while_it_is_closed(folder: Path, inputs: Any) -> None:
    engine = load_engine(folder, threads=1)
    expected = engine(inputs)
    wrong, done = [], [0]

    def work() -> None:
        try:
            while True:
                if not np.array_equal(engine(inputs), expected):
                    wrong.append("another result")
                done[0] += 1
        except EngineError as error:
            if "closed" not in str(error):
                wrong.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while done[0] < 50:
        threading.Event().wait(0.001)
    engine.close()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.fixture
def frames(work: Path) -> list[Any]:
    """The photographs that the bundles below are calibrated with."""
    return [np.asarray(Image.open(f)) for f in sorted((work / "images").rglob("*.png"))][:6]


def test_frames_become_answers(frames: list[Any], work: Path, tmp_path: Path) -> None:
    bundle = calibrate(
        "tiny_models:Tiny",
        work / "images",
        "night",
        tmp_path / "n.hdrq",
        method="rtn",
        wanted=Wanted(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)),
    )
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.25])
    x = np.stack([((f / 255 - mean) / std).transpose(2, 0, 1) for f in frames]).astype(np.float32)
    with load_engine(export(bundle, tmp_path / "plain")) as engine:
        scores = engine(x)
        answers = engine.predict(frames)
        assert isinstance(answers, list)
        powers = np.exp(scores - scores.max(1, keepdims=True))
        for answer, row in zip(answers, powers / powers.sum(1, keepdims=True), strict=True):
            assert answer.scores is not None and answer.index == row.argmax()
            np.testing.assert_allclose(answer.scores, row, atol=2e-3)
            assert bundle.manifest.classes is None or answer.label in bundle.manifest.classes
        one = engine.predict(np.asarray(Image.fromarray(frames[0]).resize((50, 40))))
        assert not isinstance(one, list) and one.scores is not None
        with pytest.raises(EngineError, match=r"found a frame of shape \(16, 16\)"):
            engine.predict(frames[0][:, :, 0])
        with pytest.raises(EngineError, match="found a frame of 4 channels; needed 3"):
            engine.predict(np.zeros((16, 16, 4), np.uint8))
        with pytest.raises(EngineError, match="uint8"):
            engine.predict(frames[0] / 255)
        with pytest.raises(EngineError, match="no frames"):
            engine.predict([])
    # An engine that normalises, decides and takes two frames a call says the same.
    options = GraphOptions(fold_preprocess=True, postprocess="argmax", batch=4)
    with load_engine(export(bundle, tmp_path / "camera", options=options)) as camera:
        again = camera.predict(frames)
        assert isinstance(again, list)
        assert [a.index for a in again] == [a.index for a in answers]
        assert again[0].scores is None


def test_masks_have_the_size_of_the_frame(frames: list[Any], work: Path, tmp_path: Path) -> None:
    bundle = calibrate(
        "tiny_models:Net", work / "images", "night", tmp_path / "n.hdrq", method="rtn"
    )
    frame = np.asarray(Image.fromarray(frames[0]).resize((40, 24)))
    with load_engine(export(bundle, tmp_path / "net")) as engine:
        answer = engine.predict(frame)
        assert not isinstance(answer, list) and answer.mask is not None
        assert answer.mask.shape == (24, 40) and answer.mask.max() < 4 and answer.index is None
        whole = engine.predict(frames[0])
        assert not isinstance(whole, list) and whole.mask is not None
        x = (frames[0] / 255).astype(np.float32).transpose(2, 0, 1)[None]
        np.testing.assert_array_equal(whole.mask, engine(x)[0].argmax(0))


def test_enlarging_is_torchs_bilinear_interpolation() -> None:
    import torch

    rng = np.random.default_rng(0)
    for size in ((12, 20), (7, 9), (5, 6)):
        scores = rng.standard_normal((3, 5, 6)).astype(np.float32)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(scores)[None], size, mode="bilinear", align_corners=False
        )
        np.testing.assert_allclose(enlarge(scores, size), expected[0].numpy(), atol=1e-5)


def test_a_provider_that_is_not_there_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="no CUDAExecutionProvider .*onnxruntime-gpu"):
        load_engine(folder, "cuda")
    with pytest.raises(EngineError, match="no TensorrtExecutionProvider"):
        load_engine(folder, "tensorrt:1")
    # A provider that is listed but cannot start: ONNX Runtime only warns.
    everything = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: everything)
    with pytest.raises(EngineError, match="CUDAExecutionProvider did not start .*fell back"):
        load_engine(folder, "cuda")


def test_engines_without_their_sidecar(folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "manifest.bak")
    with pytest.raises(EngineError, match="no manifest.json; needed an engine folder"):
        load_engine(folder)
    plan = folder / "model.plan"
    plan.write_bytes(b"plan")
    with pytest.raises(EngineError, match="a plan without its manifest.json"):
        load_engine(plan)


def test_the_engine_type_is_public(folder: Path) -> None:
    with load_engine(folder, "cpu", 1) as engine:
        assert isinstance(engine, Engine) and engine.threads == 1 and engine.cuda_graph is None
