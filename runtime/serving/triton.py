"""A model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import ExportError
from ...formats.engine_folder import GRAPH, PLAN, EngineManifest, Port
from .shared import Files, identifier, largest_batch

__all__ = ["triton_files"]

# docs.nvidia.com/deeplearning/triton-inference-server, model_config.proto: DataType
_TRITON_TYPES = {
    "float": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}


def triton_files(
    folder: Path, manifest: EngineManifest, name: str | None = None, max_batch: int | None = None
) -> Files:
    """A Triton model repository with one model.

    Args:
        folder: Engine folder.
        manifest: Manifest of the engine.
        name: Name of the model; the folder's by default.
        max_batch: Largest batch the server may form; by default what the engine was built
            for, 8 for ONNX Runtime. A fixed batch is part of the shapes instead.

    Returns:
        Texts by file name, and files to copy by their new name.

    Raises:
        ExportError: ``max_batch`` is below 1, or Triton cannot run this kind of engine.

    Source:
        docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/
        model_configuration.html
    """
    name = identifier(name or folder.name)
    if max_batch is not None and max_batch < 1:
        raise ExportError(f"found `max_batch` {max_batch}; needed 1 or more")
    plan = manifest.engine == "trt"
    if manifest.engine == "trt-rtx":
        raise ExportError(
            f"{folder}: Triton has no backend for TensorRT-RTX; export with `engine` trt or ort"
        )
    if manifest.engine == "openvino":
        raise ExportError(
            f"{folder}: found an openvino engine; needed one that Triton's own backends run: "
            "export with `engine` ort"
        )
    fixed = isinstance(manifest.inputs[0].shape[0], int)
    largest = 0 if fixed else max_batch or largest_batch(manifest)
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
    lines += [_port("input", port, fixed, "") for port in manifest.inputs]
    lines += [
        _port("output", port, fixed, "labels.txt" if labels else "") for port in manifest.outputs
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


def _port(kind: str, port: Port, fixed: bool, labels: str) -> str:
    sides = port.shape if fixed else port.shape[1:]
    dims = ", ".join("-1" if isinstance(d, str) else str(d) for d in sides) or "1"
    reshape = "" if sides else ", reshape: { shape: [ ] }"
    label = f', label_filename: "{labels}"' if labels else ""
    return (
        f"{kind} [\n  {{ "
        f'name: "{port.name}", data_type: {_TRITON_TYPES[port.dtype]}, dims: [ {dims} ]'
        f"{reshape}{label} }}\n]"
    )
