"""The stages that make bundles: adapt a checkpoint, calibrate it, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..adaptation.options import AdaptationOptions
from ..calibration.graph_cache import GraphCache
from ..calibration.request import CalibrationRequest
from ..calibration_data.readers import Wanted, read
from ..experiments.bundles import (
    bundle_change,
    inputs_of,
    is_merged,
    make_bundle,
    resume_or_restart,
)
from ..formats.atomic_files import Kind, read_json
from ..formats.bundle import Bundle
from ..formats.file_kinds import ADAPTED, ADAPTING, BUNDLE, CELL_INPUTS, PARTIAL, partial_of
from ..formats.staleness import code_of, plain, stamp, versions_of
from ..merging import Merger, choose_weights, weights_from_statistics
from ..merging.statistics_weights import PredictedWeights
from ..merging.ways import way_of
from ..merging.weight_search import ChosenWeights
from ..merging.written import Guidance, write_merge
from ..typing import Array
from .schema import CHOSEN_WEIGHTS, Merge
from .stage import RecordedStage, Stage

__all__ = ["AdaptStage", "CalibrateStage", "MergeStage"]


@dataclass(frozen=True)
class AdaptStage(RecordedStage):
    """A source model learns a domain; see :func:`hdrq_deploy.adaptation.adapt.adapt`."""

    kind: ClassVar[str] = "adapt"
    learns: ClassVar[bool] = True
    model: str
    source: str
    data: str
    options: AdaptationOptions
    images: int | None
    wanted: Wanted
    skip_corrupt: bool
    seed: int
    device: str

    def ingredients(self) -> dict[str, Any]:
        """See :meth:`RecordedStage.ingredients`."""
        return {
            "data": stamp(self.data),
            "base": stamp(self.source),
            "versions": versions_of("torch", "numpy", "pillow"),
            "code": code_of("adaptation"),
            "model": self.model,
            "options": asdict(self.options),
            "images": self.images,
            "wanted": plain(self.wanted),
            "skip_corrupt": self.skip_corrupt,
            "seed": self.seed,
            "device": self.device,
        }

    def is_whole(self, path: Path) -> bool:
        """See :meth:`RecordedStage.is_whole`."""
        return not ADAPTED.stranger(path)

    def write(self) -> None:
        """See :meth:`RecordedStage.write`."""
        resume_or_restart(self._adapt)

    def _adapt(self, resume: bool) -> None:
        from ..adaptation.adapt import adapt

        adapt(
            self.model,
            self.data,
            self.output,
            self.source,
            self.options,
            self.images,
            self.wanted,
            self.seed,
            self.device,
            resume,
            skip_corrupt=self.skip_corrupt,
        )

    def outputs(self) -> list[tuple[Path, Kind]]:
        """See :meth:`Stage.outputs`."""
        return [*self.recorded(ADAPTED), (partial_of(self.output), ADAPTING)]


@dataclass(frozen=True)
class CalibrateStage(Stage):
    """A checkpoint becomes a bundle; see :func:`..experiments.bundles.make_bundle`."""

    kind: ClassVar[str] = "calibrate"
    learns: ClassVar[bool] = True
    request: CalibrationRequest
    graphs: GraphCache

    @property
    def pace(self) -> str:
        """See :meth:`Stage.pace`."""
        return f"{self.kind} {self.request.method}"

    @property
    def iterates(self) -> bool:
        """See :meth:`Stage.iterates`; round-to-nearest takes a small part of what others take."""
        return self.request.learns

    def change(self) -> str:
        """See :meth:`Stage.change`."""
        return bundle_change(self.request)

    def make(self) -> None:
        """See :meth:`Stage.make`."""
        make_bundle(self.request, self.graphs)

    def reached(self) -> str:
        """See :meth:`Stage.reached`."""
        partial = partial_of(self.output)
        record: Any = read_json(partial / PARTIAL.marker)
        if not isinstance(record, dict) or not isinstance(record.get("blocks"), int):
            return ""
        try:
            done = len(list(partial.glob("block-*.safetensors")))
        except FileNotFoundError:  # the run that goes on beside us ended it
            return ""
        return f"{done} of {record['blocks']} blocks"

    def outputs(self) -> list[tuple[Path, Kind]]:
        """See :meth:`Stage.outputs`."""
        return [
            (self.output, BUNDLE),
            (inputs_of(self.output), CELL_INPUTS),
            (partial_of(self.output), PARTIAL),
        ]


@dataclass(frozen=True)
class MergeStage(RecordedStage):
    """Bundles of several domains become one.

    Attributes:
        parents: Bundle of each domain.
        images: Unlabelled images of each domain.
        merge: How they are merged.
        seed: Seed of draws and of chosen images.
        guides: Bundles that the merge is fitted to; its parents where there are none.
    """

    kind: ClassVar[str] = "merge"
    parents: Mapping[str, Path]
    images: Mapping[str, str]
    merge: Merge
    seed: int
    guides: Sequence[Path] = ()

    def ingredients(self) -> dict[str, Any]:
        """See :meth:`RecordedStage.ingredients`."""
        parents = [Bundle.open(path) for path in self.parents.values()]
        seen = [plain(parent.manifest.model_dump(mode="json")["statistics"]) for parent in parents]
        looks = self.merge.weights == "auto" or self.merge.re_estimate or self.merge.fit
        images = {name: stamp(path) for name, path in self.images.items()}
        return {
            "parents": [parent.manifest_sha256 for parent in parents],
            **(
                {"guides": [Bundle.open(p).manifest_sha256 for p in self.guides]}
                if self.guides
                else {}
            ),
            **({"data": images} if looks else {}),
            "versions": versions_of("numpy", "onnx", "onnxruntime"),
            "code": code_of("merging"),
            "merge": self.merge.model_dump(mode="json"),
            "statistics": seen,
            "seed": self.seed,
        }

    def is_whole(self, path: Path) -> bool:
        """See :meth:`RecordedStage.is_whole`."""
        return is_merged(path, [Bundle.open(parent) for parent in self.parents.values()])

    def write(self) -> None:
        """See :meth:`RecordedStage.write`."""
        wanted, parents = self.merge, [Bundle.open(path) for path in self.parents.values()]
        requantizes = wanted.wbits is not None
        method, rounding = way_of(parents, wanted.method, wanted.rounding, requantizes)
        merger = Merger(
            parents,
            rounding,
            100 if wanted.candidates is None else wanted.candidates,
            self.seed,
            method,
            wbits=wanted.wbits,
            activation_scales=wanted.activation_scales,
        )
        renewed = self._read(parents[0], wanted.re_estimate_images) if wanted.re_estimate else None
        guiding = None
        if wanted.fit:
            guides = [Bundle.open(path) for path in self.guides]
            images = self._read(parents[0], wanted.fit_images)
            guiding = Guidance(images, guides, wanted.fit_sweeps)
        record: dict[str, Any] = {}
        if wanted.weights in CHOSEN_WEIGHTS:
            chosen = self._chosen(merger, renewed)
            weights, record[chosen.entry] = list(chosen.weights), chosen.record()
        else:
            weights = merger.check_weights(wanted.weights)
        write_merge(merger, self.output, weights, record, renewed, guiding, self.threads)

    def _chosen(
        self, merger: Merger, renewed: dict[str, Array] | None
    ) -> ChosenWeights | PredictedWeights:
        """The merge weights that images, or the parents' statistics, choose."""
        wanted = self.merge
        if wanted.weights == "statistics":
            return weights_from_statistics(merger, threads=self.threads)
        search = Merger(merger.parents, method=merger.method, keep=True)
        images = self._read(merger.parents[0], wanted.images)
        return choose_weights(search, images, wanted.criterion, renewed, seed=self.seed)

    def _read(self, like: Bundle, limit: int) -> dict[str, Array]:
        wanted = Wanted.like(like.manifest.preprocessing)
        return {name: read(path, wanted, limit, self.seed).x for name, path in self.images.items()}

    def outputs(self) -> list[tuple[Path, Kind]]:
        """See :meth:`Stage.outputs`."""
        return self.recorded(BUNDLE)
