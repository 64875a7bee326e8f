"""The engines that bundles are exported for: one row each."""

from __future__ import annotations

from ..errors import ExportError
from .target import Target
from .target_openvino import OpenVinoTarget
from .target_ort import OrtTarget
from .target_tensorrt import TensorRtTarget

__all__ = ["ENGINES", "TARGETS", "target_of"]

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        OrtTarget("ort"),
        Target("onnx"),
        TensorRtTarget("trt"),
        TensorRtTarget("trt-rtx"),
        OpenVinoTarget("openvino"),
    )
}
ENGINES = tuple(TARGETS)


def target_of(engine: str) -> Target:
    """The row of an engine.

    Raises:
        ExportError: There is no such engine.
    """
    if engine not in TARGETS:
        raise ExportError(f"found engine {engine!r}; choose one of {', '.join(TARGETS)}")
    return TARGETS[engine]
