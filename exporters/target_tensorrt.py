"""Export for TensorRT and TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..comparison import golden
from ..comparison.taps import Shows
from ..errors import CheckFailed, ExportError
from ..formats.bundle_manifest import Layer
from ..formats.engine_folder import GRAPH, PLAN, PrecisionReport
from ..typing import Array, Progress
from . import precision, tensorrt_build
from .first_run import has_driver, run_apart
from .half_precision import to_fp16
from .io_signature import port_of
from .lint import lint
from .lowering_portable import lower_portable
from .options import BuildOptions, GraphOptions, profile
from .target import Target

__all__ = ["TensorRtTarget"]


def _lost_biases(version: str, why: str) -> str:
    """Why such an engine is refused.

    Source: docs.nvidia.com/deeplearning/tensorrt/11.3.0/inference-library/refitting-engines.html
    """
    return (
        f"found `refit` and TensorRT {version}, which may take the bias of a matrix product for "
        f"zero in such an engine; needed a check with the golden inputs, and there is none "
        f"({why}): build on the device, take TensorRT 11.4, or leave `refit` out"
    )


class TensorRtTarget(Target):
    """One of the two libraries, which build a plan from the lowered graph."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.libraries = (tensorrt_build.MODULES[name],)

    def lower(self, model: ir.Model, options: GraphOptions) -> ir.Model:
        """See :meth:`Target.lower`."""
        lower_portable(model, options.pack_int4)
        return to_fp16(model) if options.compute == "fp16" else model

    def check_graph(self, path: Path) -> None:
        """See :meth:`Target.check_graph`."""
        lint(path)

    def ingredients(self, build: BuildOptions, only_graph: bool) -> dict[str, Any]:
        """See :meth:`Target.ingredients`."""
        if self.name == "trt-rtx" and build.timing_cache is not None:
            raise ExportError(
                "found `timing_cache`; TensorRT-RTX times nothing when it builds, and would ask "
                "for a GPU: leave it out, and keep what it compiles at run time (`runtime_cache` "
                "of hdrq-bench, cache of load_engine)"
            )
        if only_graph:
            return {}
        version = tensorrt_build.library_version(self.name)
        if self._loses_biases(build, version) and not has_driver():
            raise ExportError(_lost_biases(version, "this machine has no NVIDIA driver"))
        return {
            "build": build.model_dump(mode="json"),
            self.libraries[0]: version,
            "device": tensorrt_build.device(self.name),
        }

    def realize(
        self,
        folder: Path,
        model: ir.Model,
        layers: Sequence[Layer],
        build: BuildOptions,
        progress: Progress | None,
    ) -> tuple[PrecisionReport, dict[str, Any]]:
        """See :meth:`Target.realize`."""
        shapes = {port.name: port.shape for port in map(port_of, model.graph.inputs)}
        plan = tensorrt_build.build(
            self.name, folder / GRAPH, folder / PLAN, build, shapes, progress
        )
        if plan.dump:
            report = precision.from_trt_log(self.name, plan.dump, layers)
        elif plan.inspector:
            report = precision.from_trt_inspector(self.name, plan.inspector, layers)
        else:
            raise CheckFailed(
                f"{self.name} {plan.version} built an engine but reports no layers, so its "
                "precision cannot be shown; build with `profiling` detailed, or `allow_float` '*'"
            )
        return report, {"seconds": round(plan.seconds, 2), "peak_bytes": plan.peak_bytes}

    def unchecked(self, build: BuildOptions, why: str) -> None:
        """See :meth:`Target.unchecked`."""
        if build.refit:
            version = tensorrt_build.library_version(self.name)
            if self._loses_biases(build, version):
                raise ExportError(_lost_biases(version, why))

    def _loses_biases(self, build: BuildOptions, version: str) -> bool:
        """Whether an engine that can be refitted may lack the biases of its matrix products."""
        return build.refit and self.name == "trt" and version.startswith("11.3.")

    def batches(self, model: ir.Model, build: BuildOptions) -> tuple[int, int] | None:
        """See :meth:`Target.batches`."""
        (port,) = map(port_of, model.graph.inputs)
        shapes = profile(port.name, port.shape, build)
        return None if shapes is None else (shapes.smallest[0], shapes.largest[0])

    def run(self, folder: Path, batches: Sequence[Array]) -> tuple[Shows | None, str]:
        """See :meth:`Target.run`. The engine runs in a process of its own, before it is taken."""
        outputs, why = run_apart(folder, batches)
        return (None if outputs is None else golden.recorded_tap("engine", batches, outputs)), why
