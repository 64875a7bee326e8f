"""Export for ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..comparison import golden
from ..comparison.taps import Shows
from ..formats.bundle_manifest import Layer
from ..formats.engine_folder import GRAPH, PrecisionReport
from ..graph.processors import products_wrap, saturates
from ..typing import Array, Progress
from . import precision
from .lowering_ort import lower_ort
from .lowering_shared import refuse_e4m3
from .options import BuildOptions, GraphOptions
from .target import Target

__all__ = ["OrtTarget"]


class OrtTarget(Target):
    """ONNX Runtime, which runs the lowered graph as it is."""

    libraries = ("onnxruntime",)

    def lower(self, model: ir.Model, options: GraphOptions) -> ir.Model:
        """See :meth:`Target.lower`."""
        refuse_e4m3(model, "ONNX Runtime")
        return lower_ort(model, options.exact, products_wrap(), saturates())

    def ingredients(self, build: BuildOptions, only_graph: bool) -> dict[str, Any]:
        """See :meth:`Target.ingredients`."""
        parts = {"onnxruntime": version("onnxruntime")}
        if products_wrap():
            parts["weights"] = "uint8 for those of -128"
        if saturates():
            parts["weights"] = "uint8 where products of int8 saturate"
        return parts

    def realize(
        self,
        folder: Path,
        model: ir.Model,
        layers: Sequence[Layer],
        build: BuildOptions,
        progress: Progress | None,
    ) -> tuple[PrecisionReport, dict[str, Any]]:
        """See :meth:`Target.realize`. ONNX Runtime builds nothing beside the graph."""
        return precision.from_ort(folder / GRAPH, layers), {}

    def exact(self, options: GraphOptions) -> bool:
        """See :meth:`Target.exact`."""
        return options.exact

    def remark(self, options: GraphOptions) -> str:
        """See :meth:`Target.remark`."""
        return "codes as calibrated" if options.exact else "non-negative codes to 255"

    def run(self, folder: Path, batches: Sequence[Array]) -> tuple[Shows | None, str]:
        """See :meth:`Target.run`."""
        return golden.ort_engine(folder / GRAPH), ""
