"""What an export does for one engine; :mod:`~hdrq_deploy.exporters.engines` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..comparison.taps import Shows
from ..formats.bundle_manifest import Layer
from ..formats.engine_folder import KINDS, PrecisionReport
from ..typing import Array, Progress
from . import precision
from .lint import lint
from .lowering_portable import lower_portable
from .options import BuildOptions, GraphOptions

__all__ = ["Target"]


class Target:
    """An engine that bundles are exported for. The base class is the portable graph.

    A new engine is a module with a subclass, a row in :mod:`~hdrq_deploy.exporters.engines`,
    and a kind of engine in ``formats/engine_folder.py``.

    Args:
        name: Name of the engine, as users and manifests write it.

    Attributes:
        builds: An export builds the engine and knows what it executes.
        libraries: Packages whose versions the engine depends on.
    """

    libraries: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.builds = KINDS[name].built

    def lower(self, model: ir.Model, options: GraphOptions) -> ir.Model:
        """Edit a bundle's graph in place to what the engine takes, and return it.

        Raises:
            ExportError: The engine cannot run this bundle.
        """
        return lower_portable(model)

    def check_graph(self, path: Path) -> None:
        """Look at the file of a lowered graph that nothing is built from.

        Raises:
            ExportError: The engine would misread the graph.
        """
        lint(path, tensorrt=False)

    def ingredients(self, build: BuildOptions, only_graph: bool) -> dict[str, Any]:
        """Versions, device and options that this engine depends on beside bundle and graph.

        Raises:
            ExportError: A library that the engine needs is not installed.
        """
        return {}

    def realize(
        self,
        folder: Path,
        model: ir.Model,
        layers: Sequence[Layer],
        build: BuildOptions,
        progress: Progress | None,
    ) -> tuple[PrecisionReport, dict[str, Any]]:
        """Build the engine in its folder, and read back what it executes.

        Args:
            folder: The engine folder, which holds the lowered ``model.onnx``.
            model: The same graph in memory.
            layers: What is asked of each layer.
            build: Options of the builder.
            progress: Called with (steps done, steps in all, what).

        Returns:
            The precision of each layer, and what the build took, for the manifest.

        Raises:
            ExportError: The engine refuses the graph.
            CheckFailed: The engine does not tell what it executes.
        """
        return precision.requested_only(self.name, layers), {}

    def exact(self, options: GraphOptions) -> bool:
        """Whether the engine's codes end where the bundle's do."""
        return True

    def remark(self, options: GraphOptions) -> str:
        """What the precision report says of the graph beside where it was read; or ""."""
        return ""

    def batches(self, model: ir.Model, build: BuildOptions) -> tuple[int, int] | None:
        """Smallest and largest batch that the built engine takes; None where it takes all."""
        return None

    def unchecked(self, build: BuildOptions, why: str) -> None:
        """Told that the built engine cannot be run here, and why.

        Raises:
            ExportError: An engine of these options is not taken without that check.
        """

    def run(self, folder: Path, batches: Sequence[Array]) -> tuple[Shows | None, str]:
        """The engine, ready to be compared on these inputs; or None and why it cannot be run."""
        return None, "the graph is portable"
