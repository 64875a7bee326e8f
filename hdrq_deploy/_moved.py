"""Import paths of version 0.1 that still work for one release, with a DeprecationWarning.

``MOVED`` is read by a test, which imports every old path. An entry is removed with the release
that ``REMOVED_IN`` names.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from .deprecations import DEPRECATIONS

__all__ = ["MOVED", "NAMES", "REMOVED_IN", "RENAMED", "install", "moved_names", "targets"]

REMOVED_IN = DEPRECATIONS["moved modules"].remove_in
# Old path to new path, or to several where a module was split; all below ``hdrq_deploy``.
MOVED: dict[str, str | tuple[str, ...]] = {
    "adapt": "adaptation.adapt",
    "affine": ("numerics.quantization", "numerics.int4"),
    "analysis.report": "reports.analysis_page",
    "biases": "graph.biases",
    "bundle": ("formats.bundle", "formats.safetensors_layout", "formats.golden_inputs"),
    "calibrate": "calibration",
    "calibrate.blocks": "calibration.blocks",
    "calibrate.caches": "calibration.activation_cache",
    "calibrate.capture": ("calibration.capture", "calibration.fold_batch_norm"),
    "calibrate.draws": "calibration.noise",
    "calibrate.emit": ("calibration.to_onnx", "calibration.bundle_model"),
    "calibrate.fakequant": "calibration.fake_quantizers",
    "calibrate.fidelity": "calibration.module_check",
    "calibrate.parity": "calibration.parity_check",
    "calibrate.pipeline": "calibration.pipeline",
    "calibrate.placement": "calibration.placement",
    "calibrate.progress": "calibration.resume",
    "calibrate.reconstruct": ("calibration.reconstruction", "calibration.block_module"),
    "calibrate.rewrites": ("calibration.rewrites", "calibration.nodes"),
    "calibrate.source": "calibration.loading",
    "calibrate.tap": "calibration.module_tap",
    "calibrate.tensors": "calibration.tensors",
    "calibration_data.arrays": "calibration_data.readers.arrays",
    "calibration_data.decoding": "calibration_data.readers.decoding",
    "calibration_data.make_checkpoints": (
        "calibration_data.digits.make_checkpoints",
        "calibration_data.training",
    ),
    "calibration_data.make_street_checkpoints": "calibration_data.streets.make_checkpoints",
    "calibration_data.street": (
        "calibration_data.readers.street_scenes",
        "calibration_data.readers.run_ahead",
    ),
    "calibration_data.streetscape": "calibration_data.streets.drawing",
    "checkpoints": "formats.checkpoints",
    "exporters.apart": "exporters.first_run",
    "exporters.compute": "exporters.half_precision",
    "exporters.graph": ("graph.qdq", "graph.model_files"),
    "exporters.lowering": ("exporters.lowering_ort", "exporters.lowering_portable"),
    "exporters.patterns": "graph.patterns",
    "exporters.ports": "exporters.io_signature",
    "exporters.reasons": "exporters.precision_reasons",
    "exporters.trt": "exporters.tensorrt_build",
    "exporters.weights_only": "exporters.mixed_precision",
    "files": "formats.atomic_files",
    "fold": "numerics.batchnorm_fold",
    "frames": ("formats.preprocessing", "numerics.batches"),
    "golden": "comparison.golden",
    "kinds": ("formats.file_kinds", "formats.safetensors_layout"),
    "manifest": ("formats.bundle_manifest", "formats.engine_folder", "formats.records"),
    "merge": "merging",
    "merge.bundles": ("merging.bundles", "merging.merge_weights", "merging.methods.mean"),
    "merge.checkpoints": "merging.float_checkpoints",
    "merge.mixing": "merging.weight_search",
    "merge.reestimate": "merging.re_estimate",
    "merge.rounding": "merging.rounding",
    "mixer": "mixing.domain_mixer",
    "notes": "formats.notes",
    "onnxfile": "formats.onnx_file",
    "protocol": "experiments",
    "protocol.cells": "experiments.cells",
    "protocol.fresh": "experiments.bundles",
    "protocol.grid": "experiments.grid",
    "protocol.jobs": ("jobs.pool", "jobs.job", "jobs.ray_cluster"),
    "protocol.pictures": "experiments.comparison_sheets",
    "protocol.table": "experiments.table",
    "protocol.tasks": "experiments.tasks",
    "recipe": ("calibration.recipe", "calibration.methods"),
    "reference": "graph.reference_session",
    "runtime.accuracy": "runtime.bench.accuracy",
    "runtime.compare": "runtime.bench.compare",
    "runtime.emit": "runtime.serving.emit",
    "runtime.environment": "runtime.bench.environment",
    "runtime.images": "runtime.predictions",
    "runtime.pictures": "runtime.bench.segmentation_images",
    "runtime.power": "runtime.bench.energy",
    "runtime.report": ("reports.bench_page", "reports.html"),
    "runtime.results": "formats.bench_result",
    "runtime.timing": "runtime.bench.timing",
    "sensitivity": "checks.sensitivity",
    "spec": "numerics.spec",
    "stages": "checks.stages",
    "surgery": ("graph.qdq", "graph.edits", "graph.model_files"),
    "taps": "comparison.taps",
    "verification": "comparison.differences",
    "waiting": "jobs.waiting",
}
# Old path and name of what is called otherwise now, to its name in the new module.
RENAMED: dict[str, str] = {
    "adapt.Recipe": "AdaptationOptions",
    "calibrate.emit.Emitted": "BundleModel",
    "calibrate.progress.Stored": "FinishedBlock",
    "calibrate.reconstruct.Quantized": "Quantizers",
    "exporters.compute.SMALLEST_STEP": "SMALLEST_SCALE",
    "exporters.trt.Built": "BuildResult",
    "frames.pixels": "to_frames",
    "merge.bundles.check_mix": "check_merge_weights",
    "merge.mixing.Mix": "ChosenWeights",
    "merge.rounding.Merged": "MergedCodes",
    "runtime.timing.Plan": "BenchPlan",
    "sensitivity.Scheme": "FloatLayers",
}


# Names that moved out of a module that still exists, to where they are now.
NAMES: dict[str, str] = {
    "cli.verify.stages": "checks.stages.compare_stages",
    "exporters.options.trtexec": "exporters.trtexec.trtexec",
    "runtime.engine.load_engine": "runtime.loading.load_engine",
    "runtime.engine.open_engine": "runtime.loading.open_engine",
    "runtime.engine.read_manifest": "formats.engine_folder.read_manifest",
}


def moved_names(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that names of ``NAMES`` moved out of."""
    package, _, path = module.partition(".")

    def find(name: str) -> Any:
        new = NAMES.get(f"{path}.{name}")
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is now {package}.{new}; the old path works until version "
            f"{REMOVED_IN}",
            DeprecationWarning,
            stacklevel=2,
        )
        place, _, today = new.rpartition(".")
        return getattr(importlib.import_module(f"{package}.{place}"), today)

    return find


def targets(old: str) -> tuple[str, ...]:
    """The new paths of a module: several where it was split."""
    new = MOVED[old]
    return (new,) if isinstance(new, str) else new


def _renamed(old: str) -> set[str]:
    """Old names of what a moved module calls otherwise now."""
    paths = (path.rpartition(".") for path in RENAMED)
    return {name for module, _, name in paths if module == old}


class _OldModule(ModuleType):
    """An old path whose names lie in several new modules, or are called otherwise there."""

    def __getattr__(self, name: str) -> Any:
        package, _, old = self.__name__.partition(".")
        modules = [importlib.import_module(f"{package}.{new}") for new in targets(old)]
        if name == "__all__":
            return sorted({n for module in modules for n in module.__all__} | _renamed(old))
        today = RENAMED.get(f"{old}.{name}", name)
        for module in modules:
            if not name.startswith("__") and hasattr(module, today):
                return getattr(module, today)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _CallablePackage(_OldModule):
    """A moved package whose old name is that of a public function, and may be called as one."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The function of the package's name."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


class _Loader(importlib.abc.Loader):
    """Puts the module of the new path in the old one's place, or a view of several."""

    def exec_module(self, module: ModuleType) -> None:
        """Replace ``module``, which was made empty, by the moved one.

        Python binds a submodule in its package. Of a package that is named like a public function
        that would hide the function, so the module stays and can be called.
        """
        package, _, old = module.__name__.partition(".")
        new = [importlib.import_module(f"{package}.{target}") for target in targets(old)]
        if old in getattr(sys.modules[package], "__all__", ()):
            module.__class__ = _CallablePackage
            module.__path__ = []
        elif len(new) > 1 or _renamed(old):
            module.__class__ = _OldModule
        else:
            sys.modules[module.__name__] = new[0]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules under their old paths."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a moved module; None of any other."""
        package, _, old = fullname.partition(".")
        if package != __package__ or old not in MOVED:
            return None
        new = " and ".join(f"{package}.{target}" for target in targets(old))
        warnings.warn(
            f"{fullname} is now {new}; the old path works until version {REMOVED_IN}",
            DeprecationWarning,
            stacklevel=2,
        )
        return importlib.util.spec_from_loader(fullname, _Loader())


def install() -> None:
    """Let old import paths be found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # First: a moved package has a path on which its modules would be found a second time.
        sys.meta_path.insert(0, _Finder())
