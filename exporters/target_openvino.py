"""Export for OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..comparison import openvino_tap
from ..comparison.taps import Shows
from ..errors import EngineError, ExportError
from ..formats.bundle_manifest import Layer
from ..formats.engine_folder import GRAPH, PrecisionReport
from ..graph.openvino_session import OpenVinoSession, library_version
from ..graph.processors import saturates
from ..typing import Array, Progress
from . import precision
from .io_signature import port_of
from .lowering_openvino import lower_openvino
from .lowering_shared import refuse_e4m3
from .options import BuildOptions, GraphOptions
from .target import Target

__all__ = ["OpenVinoTarget"]


class OpenVinoTarget(Target):
    """OpenVINO's CPU plugin, which compiles the lowered graph when it is loaded."""

    libraries = ("openvino",)

    def lower(self, model: ir.Model, options: GraphOptions) -> ir.Model:
        """See :meth:`Target.lower`."""
        if not options.exact:
            raise ExportError(
                "OpenVINO ends codes at 127 at no cost; leave `exact` on, or export with "
                "`engine` ort"
            )
        if options.pack_int4:
            raise ExportError(
                "found `pack_int4`; OpenVINO would multiply such weights in float: leave it out, "
                "or export with `engine` trt"
            )
        refuse_e4m3(model, "OpenVINO")
        return lower_openvino(model, saturates())

    def ingredients(self, build: BuildOptions, only_graph: bool) -> dict[str, Any]:
        """See :meth:`Target.ingredients`."""
        plain = BuildOptions(batches=build.batches)
        given, default = build.model_dump(), plain.model_dump()
        other = [name for name, value in given.items() if value != default[name]]
        if other:
            raise ExportError(
                f"found `{other[0]}`; it is for TensorRT's builder, and OpenVINO has none: leave "
                "it out"
            )
        parts = {"products": "saturate"} if saturates() else {}
        if only_graph:
            return parts
        try:
            return {"openvino": library_version(), **parts}
        except EngineError as error:
            raise ExportError(str(error)) from error

    def realize(
        self,
        folder: Path,
        model: ir.Model,
        layers: Sequence[Layer],
        build: BuildOptions,
        progress: Progress | None,
    ) -> tuple[PrecisionReport, dict[str, Any]]:
        """See :meth:`Target.realize`. OpenVINO builds nothing beside the graph."""
        try:
            session = OpenVinoSession(folder / GRAPH, "the lowered graph", threads=1)
            session.prepare(_one(model))
            report = precision.from_openvino(session.executed(), layers, model, library_version())
        except EngineError as error:
            raise ExportError(str(error)) from error
        return report, {}

    def run(self, folder: Path, batches: Sequence[Array]) -> tuple[Shows | None, str]:
        """See :meth:`Target.run`."""
        return openvino_tap.of_file(folder / GRAPH), ""


def _one(model: ir.Model) -> list[list[int]] | None:
    """Shapes of the inputs with a batch of one; None where another side is free."""
    shapes = [list(port.shape) for port in map(port_of, model.graph.inputs)]
    if any(isinstance(side, str) for shape in shapes for side in shape[1:]):
        return None
    return [[first if isinstance(first, int) else 1, *sides] for first, *sides in shapes]  # type: ignore[list-item]
