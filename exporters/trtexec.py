"""The command of NVIDIA's own builder that builds the same plan as an export."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import BuildOptions, profile

__all__ = ["trtexec"]

_VERBOSITY = {"detailed": "detailed", "layer-names": "layer_names_only", "none": "none"}
_LEVELS = {"ampere+": "ampere+", "same-cc": "sameComputeCapability"}


def trtexec(
    engine: str, onnx: Path, plan: Path, build: BuildOptions, ports: Mapping[str, Sequence[Any]]
) -> str:
    """The trtexec command (tensorrt_rtx for TensorRT-RTX) that builds the same plan.

    Args:
        engine: ``trt`` or ``trt-rtx``.
        onnx: Lowered graph.
        plan: File that the command writes.
        build: Options of the builder.
        ports: Shape of every input by name; a dimension that is no int is free.

    Source:
        trtexec --help of TensorRT 10.13.
    """
    words = ["tensorrt_rtx" if engine == "trt-rtx" else "trtexec", f"--onnx={onnx}"]
    words.append(f"--saveEngine={plan}")
    if engine == "trt":
        words.append("--stronglyTyped")
    words.append(f"--profilingVerbosity={_VERBOSITY[build.profiling]}")
    profiles = {name: profile(name, shape, build) for name, shape in ports.items()}
    for flag, side in (("min", "smallest"), ("opt", "best"), ("max", "largest")):
        texts = [
            f"{name}:{'x'.join(map(str, getattr(shapes, side)))}"
            for name, shapes in profiles.items()
            if shapes is not None
        ]
        if texts:
            words.append(f"--{flag}Shapes={','.join(texts)}")
    if build.workspace is not None:
        words.append(f"--memPoolSize=workspace:{build.workspace}M")
    if build.opt_level is not None:
        words.append(f"--builderOptimizationLevel={build.opt_level}")
    if build.timing_cache is not None:
        words.append(f"--timingCacheFile={build.timing_cache}")
    if build.refit:
        words.append("--refit")
    if build.strip_weights:
        words.append("--stripWeights")
    if build.hardware_compatibility != "none":
        words.append(f"--hardwareCompatibilityLevel={_LEVELS[build.hardware_compatibility]}")
    if build.dla_core is not None:
        words += [f"--useDLACore={build.dla_core}", "--allowGPUFallback"]
    return shlex.join(words)
