"""Configuration for servers that run an engine, made from its manifest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ExportError
from ...formats.atomic_files import check_output, new_directory, write_record
from ...formats.engine_folder import GRAPH, PLAN, EngineManifest, Port, read_manifest
from ...formats.file_kinds import EMITTED
from ...formats.preprocessing import as_factor_and_offsets

__all__ = ["TARGETS", "deepstream_files", "emit", "ros2_files", "triton_files"]

# docs.nvidia.com/deeplearning/triton-inference-server, model_config.proto: DataType
_TRITON_TYPES = {
    "float": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
Files = dict[str, str]


def emit(target: str, engine: str | Path, output: str | Path, **options: Any) -> Path:
    """Write the configuration of one server.

    Args:
        target: One of ``TARGETS``.
        engine: Engine folder.
        output: Folder to make. For ``triton`` it is a model repository, the engine inside.
        options: See ``triton_files``, ``deepstream_files`` and ``ros2_files``.

    Raises:
        EngineError: Not an engine folder.
        ExportError: The server cannot run this engine as it is.
    """
    if target not in TARGETS:
        raise ExportError(f"found target {target!r}; choose one of {', '.join(TARGETS)}")
    folder = Path(engine).absolute()
    goal = check_output(output, EMITTED[target], [folder])
    manifest = read_manifest(folder)
    texts, copies = TARGETS[target](folder, manifest, **options)
    with new_directory(goal, EMITTED[target]) as made:
        record = {"target": target, "engine": str(folder), "bundle": manifest.bundle_sha256}
        for name, text in texts.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(text, encoding="utf-8")
        for name, source in copies.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, made / name)
        write_record(made, EMITTED[target], record)
    return goal


def triton_files(
    folder: Path, manifest: EngineManifest, name: str | None = None, max_batch: int | None = None
) -> tuple[Files, dict[str, Path]]:
    """A Triton model repository with one model.

    Args:
        folder: Engine folder.
        manifest: Its manifest.
        name: Of the model; the folder's by default.
        max_batch: Largest batch the server may form; by default what the engine was built
            for, 8 for ONNX Runtime. A fixed batch is part of the shapes instead.

    Source:
        docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/
        model_configuration.html
    """
    name = _identifier(name or folder.name)
    if max_batch is not None and max_batch < 1:
        raise ExportError(f"found --max-batch {max_batch}; needed 1 or more")
    plan = manifest.engine == "trt"
    if manifest.engine == "trt-rtx":
        raise ExportError(
            f"{folder}: Triton has no backend for TensorRT-RTX; export with --engine trt or ort"
        )
    fixed = isinstance(manifest.inputs[0].shape[0], int)
    largest = 0 if fixed else max_batch or _largest_batch(manifest)
    file = PLAN if plan else GRAPH
    lines = [f'name: "{name}"']
    lines += ['platform: "tensorrt_plan"'] if plan else ['backend: "onnxruntime"']
    lines += [f"max_batch_size: {largest}", f'default_model_filename: "{file}"']
    capability = re.search(
        r"compute capability (\d+\.\d+)", str(manifest.options.get("device", ""))
    )
    if plan and capability:
        # Another GPU in the same server needs a plan of its own under its own capability.
        lines += [
            "cc_model_filenames {",
            f'  key: "{capability[1]}"',
            f'  value: "{file}"',
            "}",
        ]
    labels = len(manifest.classes or ()) > 0
    lines += [_triton_port("input", port, fixed, "") for port in manifest.inputs]
    lines += [
        _triton_port("output", port, fixed, "labels.txt" if labels else "")
        for port in manifest.outputs
    ]
    kind = "KIND_GPU" if plan else "KIND_CPU"
    lines += ["instance_group [", f"  {{ count: 1, kind: {kind} }}", "]"]
    if largest:
        lines += ["dynamic_batching { }"]
    texts = {f"{name}/config.pbtxt": "\n".join(lines) + "\n"}
    if labels:
        texts[f"{name}/labels.txt"] = "\n".join(manifest.classes or ()) + "\n"
    parts = [file] if plan else [n for n in manifest.files if n.startswith(GRAPH)]
    return texts, {f"{name}/1/{part}": folder / part for part in parts}


def _triton_port(kind: str, port: Port, fixed: bool, labels: str) -> str:
    sides = port.shape if fixed else port.shape[1:]
    dims = ", ".join("-1" if isinstance(d, str) else str(d) for d in sides) or "1"
    reshape = "" if sides else ", reshape: { shape: [ ] }"
    label = f', label_filename: "{labels}"' if labels else ""
    return (
        f"{kind} [\n  {{ "
        f'name: "{port.name}", data_type: {_TRITON_TYPES[port.dtype]}, dims: [ {dims} ]'
        f"{reshape}{label} }}\n]"
    )


def _largest_batch(manifest: EngineManifest) -> int:
    fixed = manifest.inputs[0].shape[0]
    if isinstance(fixed, int):
        return fixed
    build: Mapping[str, Any] = manifest.options.get("build") or {}
    batches = build.get("batches") or (1, 1, 8)
    return int(batches[2])


def deepstream_files(
    folder: Path,
    manifest: EngineManifest,
    interval: int = 0,
    approximate: bool = False,
) -> tuple[Files, dict[str, Path]]:
    """An nvinfer configuration for DeepStream's primary inference.

    nvinfer computes ``net-scale-factor * (pixel - offset)`` with one factor for all channels,
    so the standard deviations must be equal.

    Args:
        folder: Engine folder; the configuration names its files.
        manifest: Its manifest.
        interval: Batches that are skipped between two that are inferred.
        approximate: Take the geometric mean of unequal standard deviations.

    Source:
        docs.nvidia.com/metropolis/deepstream/dev-guide/text/DS_plugin_gst-nvinfer.html
    """
    if manifest.engine != "trt":
        raise ExportError(
            f"{folder}: found a {manifest.engine} engine; nvinfer runs TensorRT: export with "
            "--engine trt on the device (with --no-build elsewhere: nvinfer builds it then)"
        )
    p = manifest.preprocessing
    if p is None:
        raise ExportError(
            f"{folder}: the manifest has no preprocessing to map; calibrate from an image folder"
        )
    if p.resize is not None:
        raise ExportError(
            f"{folder}: found images cut out of {p.resize[0]}x{p.resize[1]}; nvinfer cannot crop: "
            "calibrate without --resize"
        )
    if manifest.inputs[0].dtype == "uint8":
        raise ExportError(
            f"{folder}: found an engine of uint8 frames; nvinfer feeds float planes: export "
            "without --fold-preprocess"
        )
    if manifest.postprocess == "argmax":
        raise ExportError(
            f"{folder}: found an engine of labels; nvinfer reads scores: export without "
            "--postprocess argmax"
        )
    std = np.array(p.std, np.float64)
    if std.max() > 1.001 * std.min() and not approximate:
        raise ExportError(
            f"{folder}: found std {' '.join(f'{s:g}' for s in p.std)}; nvinfer has one factor for "
            "all channels: calibrate with one --std, or pass --approximate"
        )
    factor, offsets = as_factor_and_offsets(p)
    segments = len(manifest.outputs[0].shape) == 4
    plan = folder / PLAN
    settings: dict[str, Any] = {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,
        "network-type": 2 if segments else 1,
        "network-mode": 1,
        "batch-size": _largest_batch(manifest),
        "interval": interval,
        "onnx-file": folder / GRAPH,
        **({"model-engine-file": plan} if plan.is_file() else {}),
        "net-scale-factor": f"{factor:.10g}",
        "offsets": ";".join(f"{offset:.8g}" for offset in offsets),
        "model-color-format": 2 if p.colour == "L" else 0,
        "infer-dims": f"{p.channels};{p.height};{p.width}",
        "maintain-aspect-ratio": 0,
        "output-blob-names": ";".join(port.name for port in manifest.outputs),
    }
    if manifest.classes:
        settings["num-detected-classes" if segments else "labelfile-path"] = (
            len(manifest.classes) if segments else "labels.txt"
        )
    if segments:
        settings["segmentation-threshold"] = 0.0
    elif manifest.postprocess == "none":
        # nvinfer takes a label whose score is above: scores here are no probabilities.
        settings["classifier-threshold"] = -1e30
    lines = ["[property]", *(f"{key}={value}" for key, value in settings.items())]
    texts = {"config_infer_primary.txt": "\n".join(lines) + "\n"}
    if manifest.classes:
        texts["labels.txt"] = ("\n" if segments else ";").join(manifest.classes) + "\n"
    return texts, {}


def ros2_files(
    folder: Path,
    manifest: EngineManifest,
    name: str | None = None,
    topic: str = "/camera/image_raw",
) -> tuple[Files, dict[str, Path]]:
    """A launch file and parameters for ``hdrq_deploy.runtime.ros2``.

    Args:
        folder: Engine folder.
        manifest: Its manifest.
        name: Of the node; the folder's by default.
        topic: Images that it subscribes to.
    """
    if manifest.preprocessing is None:
        raise ExportError(
            f"{folder}: the manifest has no preprocessing; a node needs it to prepare frames: "
            "calibrate from an image folder"
        )
    name = _identifier(name or folder.name)
    parameters = (
        f"{name}:\n  ros__parameters:\n"
        f"    engine: {json.dumps(str(folder))}\n"
        "    device: auto\n"
        "    threads: 0\n"
        f"    image_topic: {json.dumps(topic)}\n"
        "    result_topic: ~/result\n"
        "    mask_topic: ~/mask\n"
        "    queue: 1\n"
    )
    return {f"{name}.params.yaml": parameters, f"{name}.launch.py": _LAUNCH.format(name=name)}, {}


_LAUNCH = '''"""ros2 launch {name}.launch.py"""

import sys
from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess
from launch.substitutions import LaunchConfiguration

PARAMETERS = str(Path(__file__).with_name("{name}.params.yaml"))


def generate_launch_description():
    """The node, with parameters from beside this file unless told otherwise."""
    node = ExecuteProcess(
        cmd=[
            sys.executable,
            "-m",
            "hdrq_deploy.runtime.ros2",
            "--ros-args",
            "-r",
            "__node:={name}",
            "--params-file",
            LaunchConfiguration("parameters"),
        ],
        output="screen",
    )
    return LaunchDescription([DeclareLaunchArgument("parameters", default_value=PARAMETERS), node])
'''


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")[:64] or "model"


TARGETS: dict[str, Callable[..., tuple[Files, dict[str, Path]]]] = {
    "triton": triton_files,
    "deepstream": deepstream_files,
    "ros2": ros2_files,
}
