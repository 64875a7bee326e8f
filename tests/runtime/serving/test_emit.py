"""Configuration for servers, and the ROS node without ROS."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from google.protobuf import text_format
from PIL import Image

from hdrq_deploy import Bundle
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration_data.readers import Wanted
from hdrq_deploy.cli import emit as command
from hdrq_deploy.errors import DataError, EngineError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.formats.engine_folder import read_manifest
from hdrq_deploy.runtime import load_engine, ros2
from hdrq_deploy.runtime.predictions import network_input
from hdrq_deploy.runtime.ros2 import Perception, frame_of
from hdrq_deploy.runtime.serving.emit import emit
from hdrq_deploy.runtime.serving.ros2_files import ros2_files


def calibrated(work: Path, target: Path, std: tuple[float, ...], model: str = "Tiny") -> Bundle:
    return calibrate(
        f"tiny_models:{model}",
        work / "images",
        "night",
        target,
        method="rtn",
        wanted=Wanted(mean=(0.4, 0.5, 0.6), std=std),
    )


@pytest.fixture(scope="module")
def bundle(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return calibrated(work, tmp_path_factory.mktemp("b") / "b.hdrq", (0.25, 0.25, 0.25))


@pytest.mark.parametrize("batch", [None, 4])
def test_a_triton_repository(bundle: Bundle, tmp_path: Path, batch: int | None) -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    engine = export(bundle, tmp_path / "my engine", options=GraphOptions(batch=batch))
    assert command.main(["triton", str(engine), "-o", str(tmp_path / "repository")]) == 0
    made = tmp_path / "repository" / "my_engine"
    config = text_format.Parse((made / "config.pbtxt").read_text(), schema.ModelConfig())
    assert config.name == "my_engine" and config.backend == "onnxruntime"
    (source,), (target,) = config.input, config.output
    # With max_batch_size the batch is not part of the dims.
    assert config.max_batch_size == (0 if batch else 8)
    assert list(source.dims) == ([4] if batch else []) + [3, 16, 16]
    assert list(target.dims) == ([4] if batch else []) + [4]
    assert source.data_type == schema.TYPE_FP32 and target.label_filename == "labels.txt"
    assert (made / "labels.txt").read_text().split() == ["a", "b", "c", "d"]
    session = onnxruntime.InferenceSession(str(made / "1" / config.default_model_filename))
    x = np.zeros((batch or 2, 3, 16, 16), np.float32)
    assert session.run([target.name], {source.name: x})[0].shape == (batch or 2, 4)


def test_an_engine_is_never_replaced(bundle: Bundle, tmp_path: Path) -> None:
    engine = export(bundle, tmp_path / "engine")
    before = sorted(f.name for f in engine.iterdir())
    assert command.main(["ros2", str(engine), "-o", str(engine)]) == 2
    assert sorted(f.name for f in engine.iterdir()) == before
    out = str(tmp_path / "out")
    for _ in range(2):  # its own earlier output it replaces
        assert command.main(["triton", str(engine), "-o", out, "--name", "../../night"]) == 0
    assert (tmp_path / "out" / "night" / "config.pbtxt").is_file()
    assert command.main(["triton", str(engine), "-o", out, "--max-batch", "-3"]) == 2


def test_triton_loads_the_plan_of_its_gpu(bundle: Bundle, tmp_path: Path) -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    engine = export(bundle, tmp_path / "engine", "trt", only_graph=True)
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["options"]["device"] = "Orin, compute capability 8.7"
    manifest["options"]["build"] = {"batches": [1, 4, 16]}
    (engine / "manifest.json").write_text(json.dumps(manifest))
    (engine / "model.plan").write_bytes(b"plan")
    emit("triton", engine, tmp_path / "repository", name="night", max_batch=None)
    made = tmp_path / "repository" / "night"
    config = text_format.Parse((made / "config.pbtxt").read_text(), schema.ModelConfig())
    assert config.platform == "tensorrt_plan" and config.max_batch_size == 16
    assert dict(config.cc_model_filenames) == {"8.7": "model.plan"}
    assert (made / "1" / "model.plan").read_bytes() == b"plan"
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


def test_deepstream_normalises_as_we_do(bundle: Bundle, tmp_path: Path) -> None:
    engine = export(bundle, tmp_path / "engine", "trt", only_graph=True)
    assert command.main(["deepstream", str(engine), "-o", str(tmp_path / "ds")]) == 0
    parsed = configparser.ConfigParser()
    parsed.read(tmp_path / "ds" / "config_infer_primary.txt")
    found = parsed["property"]
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    offsets = np.array([float(v) for v in found["offsets"].split(";")])
    theirs = (float(found["net-scale-factor"]) * (frame - offsets)).transpose(2, 0, 1)
    ours = network_input([frame], bundle.manifest.preprocessing, "here")[0]
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert found["infer-dims"] == "3;16;16" and found["network-type"] == "1"
    assert found["model-color-format"] == "0" and Path(found["onnx-file"]).is_file()
    assert (tmp_path / "ds" / "labels.txt").read_text() == "a;b;c;d\n"


def test_what_a_server_cannot_run(
    bundle: Bundle, work: Path, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uneven = calibrated(work, tmp_path / "u.hdrq", (0.2, 0.25, 0.3))
    engines = {
        "ort": export(bundle, tmp_path / "ort"),
        "uneven": export(uneven, tmp_path / "uneven", "trt", only_graph=True),
        "labels": export(
            bundle,
            tmp_path / "labels",
            "trt",
            only_graph=True,
            options=GraphOptions(postprocess="argmax"),
        ),
        "arrays": export(make(domain="night"), tmp_path / "arrays", "trt", only_graph=True),
    }
    for target, engine, text in (
        ("deepstream", "ort", "nvinfer runs TensorRT"),
        ("deepstream", "uneven", "one factor for all channels.*--approximate"),
        ("deepstream", "arrays", "no preprocessing to map"),
        ("deepstream", "labels", "nvinfer reads scores"),
        ("ros2", "arrays", "no preprocessing"),
    ):
        flags = [target, str(engines[engine]), "-o", str(tmp_path / "none")]
        assert command.main(flags) == 2
        assert re.search(text, capsys.readouterr().err), text
    assert command.main(["triton", str(tmp_path), "-o", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
    flags = ["deepstream", str(engines["uneven"]), "-o", str(tmp_path / "near"), "--approximate"]
    assert command.main(flags) == 0
    with pytest.raises(SystemExit) as stopped:
        command.main(["ros2", str(engines["ort"]), "-o", str(tmp_path / "x"), "--max-batch", "4"])
    assert stopped.value.code == 2


def test_ros2_files(bundle: Bundle, tmp_path: Path) -> None:
    engine = export(bundle, tmp_path / "night")
    out = tmp_path / "ros"
    assert command.main(["ros2", str(engine), "-o", str(out), "--topic", "/front/image"]) == 0
    parameters = yaml.safe_load((out / "night.params.yaml").read_text())["night"]["ros__parameters"]
    assert parameters["engine"] == str(engine) and parameters["image_topic"] == "/front/image"
    # Every parameter is one that the node declares.
    source = Path(ros2.__file__).read_text()
    assert all(f'"{name}"' in source for name in parameters)
    launch = ast.parse((out / "night.launch.py").read_text())
    assert "generate_launch_description" in {getattr(n, "name", "") for n in launch.body}
    assert "hdrq_deploy.runtime.ros2" in ast.unparse(launch)


def message(pixels: Any, encoding: str, padding: int = 0) -> Any:
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    padded = np.pad(rows, ((0, 0), (0, padding)))
    return SimpleNamespace(
        height=height,
        width=width,
        encoding=encoding,
        step=padded.shape[1],
        data=padded.tobytes(),
        header=SimpleNamespace(frame_id="front", stamp=SimpleNamespace(sec=7, nanosec=500_000_000)),
    )


def test_images_of_every_encoding_become_frames() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    alpha = np.full((5, 7, 1), 255, np.uint8)
    for pixels, encoding in (
        (rgb, "rgb8"),
        (rgb[:, :, ::-1], "bgr8"),
        (np.concatenate([rgb, alpha], 2), "rgba8"),
        (np.concatenate([rgb[:, :, ::-1], alpha], 2), "bgra8"),
    ):
        for padding in (0, 5):
            np.testing.assert_array_equal(frame_of(message(pixels, encoding, padding), 3), rgb)
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    found = frame_of(message(rgb, "rgb8"), 1)
    assert np.abs(found.astype(int) - grey).max() <= 1
    np.testing.assert_array_equal(frame_of(message(grey, "mono8"), 1), grey)
    np.testing.assert_array_equal(frame_of(message(grey, "mono8"), 3)[:, :, 2], grey)
    with pytest.raises(DataError, match="encoding 'yuv422'; needed one of rgb8"):
        frame_of(message(rgb, "yuv422"), 3)
    short = message(rgb, "rgb8")
    short.step = 20
    with pytest.raises(DataError, match="needed 21 or more a row"):
        frame_of(short, 3)


def test_the_node_answers_an_image(bundle: Bundle, work: Path, make: Any, tmp_path: Path) -> None:
    with load_engine(export(bundle, tmp_path / "engine")) as engine:
        perceive = Perception(engine)
        frame = np.asarray(Image.open(next((work / "images").rglob("*.png"))))
        text, mask = perceive(message(frame, "rgb8"))
        found = json.loads(text)
        expected = engine.predict(frame)
        assert not isinstance(expected, list) and mask is None
        assert (found["index"], found["label"]) == (expected.index, expected.label)
        assert (found["stamp"], found["frame_id"]) == (7.5, "front")
    segments = calibrated(work, tmp_path / "n.hdrq", (0.25,), "Net")
    with load_engine(export(segments, tmp_path / "net")) as engine:
        text, mask = Perception(engine)(message(frame, "rgb8"))
        assert mask is not None and mask.shape == (16, 16)
    with (
        load_engine(export(make(domain="night"), tmp_path / "arrays")) as engine,
        pytest.raises(EngineError, match="no preprocessing"),
    ):
        Perception(engine)


def test_without_ros_the_node_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("rclpy") is not None:
        pytest.skip("ROS 2 is here")
    assert ros2.main() == 2
    assert "found no rclpy; needed a sourced ROS 2" in capsys.readouterr().err


def test_the_example_is_what_is_emitted(bundle: Bundle, tmp_path: Path) -> None:
    manifest = read_manifest(export(bundle, tmp_path / "engine"))
    texts, copies = ros2_files(Path("/opt/engines/camera"), manifest, "perception")
    folder = Path(__file__).resolve().parents[3] / "examples" / "ros2"
    assert copies == {} and {f.name: f.read_text() for f in folder.iterdir()} == texts
