"""All who turn images into network inputs compute the same, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from PIL import Image

from hdrq_deploy.calibration_data.readers import Wanted, read
from hdrq_deploy.calibration_data.readers.decoding import decode
from hdrq_deploy.calibration_data.readers.street_scenes import Scenes, find_scenes
from hdrq_deploy.comparison import golden
from hdrq_deploy.exporters import GraphOptions
from hdrq_deploy.exporters.io_signature import shape_ports
from hdrq_deploy.formats.preprocessing import (
    as_constants,
    as_factor_and_offsets,
    to_frames,
    to_input,
)
from hdrq_deploy.formats.records import Preprocessing
from hdrq_deploy.graph.model_files import serialized
from hdrq_deploy.graph.reference_session import unfused_session
from hdrq_deploy.runtime.predictions import network_input

SIDES = (11, 14)
NORMALISATIONS = {
    "plain": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "one channel is centred": ((0.0, 0.3, 0.0), (1.0, 1.0, 0.7)),
    "grey": ((0.1307,), (0.3081,)),
}


def preprocessing(name: str, resize: tuple[int, int] | None = None) -> Preprocessing:
    mean, std = NORMALISATIONS[name]
    return Preprocessing(
        height=SIDES[0],
        width=SIDES[1],
        channels=len(mean),
        mean=mean,
        std=std,
        colour="RGB" if len(mean) == 3 else "L",
        resize=resize,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of all 256 values, one already at the network's size, and their labels."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "scenes" / kind).mkdir(parents=True)
    for i, size in enumerate((SIDES, (17, 23), (32, 9))):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "scenes" / "images" / f"{i}.png")
        label = np.zeros(size, np.uint8)
        Image.fromarray(label).save(tmp_path / "scenes" / "labels" / f"{i}.png")
    return tmp_path / "scenes"


def resized(folder: Path, channels: int) -> npt.NDArray[np.uint8]:
    """The images (N, H, W, C) as Pillow brings them to the network's size."""
    images = [Image.open(file) for file in sorted((folder / "images").iterdir())]
    mode = "RGB" if channels == 3 else "L"
    fitted = [
        image.convert(mode).resize(SIDES[::-1], Image.Resampling.BILINEAR) for image in images
    ]
    return np.stack([np.asarray(image).reshape(*SIDES, channels) for image in fitted])


def reference(frames: npt.NDArray[np.uint8], p: Preprocessing) -> npt.NDArray[np.float32]:
    """The arithmetic of calibration, channel by channel and written down independently."""
    x = np.empty((len(frames), p.channels, *SIDES), np.float32)
    for c in range(p.channels):
        unit = frames[..., c].astype(np.float32) / np.float32(255)
        x[:, c] = (unit - np.float32(p.mean[c])) / np.float32(p.std[c])
    return x


def in_the_graph(frames: npt.NDArray[np.uint8], p: Preprocessing) -> Any:
    """What an exported graph computes that takes frames: its network is the identity."""
    shape, real = ir.Shape(["N", p.channels, *SIDES]), ir.TensorType(ir.DataType.FLOAT)
    image = ir.Value(name="input", shape=shape, type=real)
    node = ir.node("Identity", [image], name="network")
    (output,) = node.outputs
    output.name, output.type, output.shape = "output", real, shape
    graph = ir.Graph([image], [output], nodes=[node], opset_imports={"": 21}, name="identity")
    model = ir.Model(graph, ir_version=10)
    shape_ports(model, GraphOptions(fold_preprocess=True), p)
    return unfused_session(serialized(model)).run(None, {"input": frames})[0]


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_every_consumer_computes_the_reference(folder: Path, name: str) -> None:
    p = preprocessing(name)
    frames = resized(folder, p.channels)
    expected = reference(frames, p)
    files = sorted((folder / "images").iterdir())
    pixels = [np.asarray(decode(file, p.channels).image) for file in files]
    found = find_scenes(folder)
    scenes = Scenes("folder", found.pairs, found.table, None, SIDES, p.mean, p.std, p.channels)
    consumers = {
        "calibration": read(folder / "images", Wanted.like(p)).x,
        "street scenes": np.stack([scenes.read(*pair)[0] for pair in scenes.pairs]),
        "engine, files": network_input(files, p, "engine"),
        "engine, camera": network_input(pixels, p, "engine"),
        "graph that takes frames": in_the_graph(network_input(files, p, "engine", raw=True), p),
        "verification": golden.from_pixels(expected, p),
        "to_input": to_input(frames, p),
    }
    for consumer, x in consumers.items():
        assert x.dtype == np.float32, consumer
        np.testing.assert_array_equal(x, expected, err_msg=consumer)
    np.testing.assert_array_equal(to_frames(expected, p), frames)


def test_images_are_cut_out_of_the_middle_alike(folder: Path) -> None:
    p = preprocessing("imagenet", resize=(20, 22))
    files = sorted((folder / "images").iterdir())
    np.testing.assert_array_equal(
        read(folder / "images", Wanted.like(p)).x, network_input(files, p, "engine")
    )


def test_the_factor_of_a_server_is_the_same_arithmetic(folder: Path) -> None:
    std = {"std": (0.226, 0.226, 0.226)}
    p = preprocessing("imagenet").model_copy(update=std)
    frames = resized(folder, 3)
    factor, offsets = as_factor_and_offsets(p)
    x = factor * (frames.transpose(0, 3, 1, 2) - np.reshape(offsets, (1, 3, 1, 1)))
    np.testing.assert_allclose(x, reference(frames, p), rtol=1e-5, atol=1e-6)


def test_one_frame_is_like_several_and_stays_as_it_was() -> None:
    p = preprocessing("grey")
    frame = np.arange(256, dtype=np.float32).reshape(16, 16, 1)
    x = to_input(frame, p)
    np.testing.assert_array_equal(x, to_input(frame[None], p)[0])
    assert frame[0, 1, 0] == 1 and x.flags.c_contiguous


def test_without_normalisation_values_are_scaled_to_one() -> None:
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    expected = frames[0, :, :, 0].astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(to_input(frames, None)[0, 0], expected)
    assert [label for _, label, _ in as_constants(None)] == ["unit"]
    np.testing.assert_array_equal(to_frames(to_input(frames, None), None), frames)
