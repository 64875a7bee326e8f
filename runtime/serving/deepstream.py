"""A configuration of nvinfer, the inference plugin of NVIDIA's DeepStream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import ExportError
from ...formats.engine_folder import GRAPH, PLAN, EngineManifest
from ...formats.preprocessing import as_factor_and_offsets
from ...formats.records import Preprocessing
from .shared import Files, largest_batch

__all__ = ["deepstream_files"]


def deepstream_files(
    folder: Path,
    manifest: EngineManifest,
    interval: int = 0,
    approximate: bool = False,
) -> Files:
    """An nvinfer configuration for DeepStream's primary inference.

    nvinfer computes ``net-scale-factor * (pixel - offset)`` with one factor for all channels,
    so the standard deviations must be equal.

    Args:
        folder: Engine folder; the configuration names its files.
        manifest: Manifest of the engine.
        interval: Batches that are skipped between two that are inferred.
        approximate: Take the geometric mean of unequal standard deviations.

    Returns:
        Texts by file name, and no files to copy.

    Raises:
        ExportError: nvinfer cannot run this engine, or prepare its inputs.

    Source:
        docs.nvidia.com/metropolis/deepstream/dev-guide/text/DS_plugin_gst-nvinfer.html
    """
    p = _preprocessing(folder, manifest, approximate)
    factor, offsets = as_factor_and_offsets(p)
    segments = len(manifest.outputs[0].shape) == 4
    plan = folder / PLAN
    settings: dict[str, Any] = {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,
        "network-type": 2 if segments else 1,
        "network-mode": 1,
        "batch-size": largest_batch(manifest),
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


def _preprocessing(folder: Path, manifest: EngineManifest, approximate: bool) -> Preprocessing:
    """The preprocessing of an engine, which nvinfer must be able to do."""
    if manifest.engine != "trt":
        raise ExportError(
            f"{folder}: found a {manifest.engine} engine; nvinfer runs TensorRT: export with "
            "`engine` trt on the device (the graph alone elsewhere: nvinfer builds the plan then)"
        )
    p = manifest.preprocessing
    if p is None:
        raise ExportError(
            f"{folder}: the manifest has no preprocessing to map; calibrate from an image folder"
        )
    if p.resize is not None:
        raise ExportError(
            f"{folder}: found images cut out of {p.resize[0]}x{p.resize[1]}; nvinfer cannot crop: "
            "calibrate without `resize`"
        )
    if manifest.inputs[0].dtype == "uint8":
        raise ExportError(
            f"{folder}: found an engine of uint8 frames; nvinfer feeds float planes: export "
            "without `fold_preprocess`"
        )
    if manifest.postprocess == "argmax":
        raise ExportError(
            f"{folder}: found an engine of labels; nvinfer reads scores: export without "
            "`postprocess` argmax"
        )
    if max(p.std) > 1.001 * min(p.std) and not approximate:
        raise ExportError(
            f"{folder}: found std {' '.join(f'{s:g}' for s in p.std)}; nvinfer has one factor for "
            "all channels: calibrate with one `std`, or take the mean (`approximate`)"
        )
    return p
