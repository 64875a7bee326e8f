"""From a run file to its stages, and which of them are stale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..adaptation.options import AdaptationOptions
from ..calibration.graph_cache import GraphCache
from ..calibration.methods import METHODS, Options
from ..calibration.recipe import Recipe
from ..calibration.request import CalibrationRequest
from ..calibration_data.readers import Wanted
from ..errors import SpecError
from ..experiments.grid import parse_bits
from ..formats.atomic_files import Kind
from .bundles import AdaptStage, CalibrateStage, MergeStage
from .loading import Loaded
from .measuring import AccuracyStage, BenchStage, ExportStage, Row
from .schema import Domain, Merge
from .stage import Stage

__all__ = ["KINDS", "Planned", "outputs_of", "plan", "stages_of"]

# In the order in which they run.
_STAGES: tuple[type[Stage], ...] = (
    AdaptStage,
    CalibrateStage,
    MergeStage,
    ExportStage,
    AccuracyStage,
    BenchStage,
)
KINDS = tuple(stage.kind for stage in _STAGES)
# Options of a calibration that are not learning, as arguments of a request.
_CODES = ("per_channel", "fold", "grid", "placement", "blocks", "images", "statistics")


@dataclass(frozen=True)
class Planned:
    """A stage, and why it is made.

    Attributes:
        stage: The stage.
        why: In words; "" where its output is up to date.
    """

    stage: Stage
    why: str


def plan(stages: Sequence[Stage], only: Sequence[str] = ()) -> list[Planned]:
    """Which stages are stale, in the order in which they run.

    A stage that reads what is made first counts as stale; when its turn comes it is left alone if
    that turned out as it was.

    Args:
        stages: All stages of a run.
        only: Kinds (or keys) of the stages that are asked for, and with them what they read;
            all by default.

    Raises:
        SpecError: Nothing is of a kind of this name.
    """
    wanted = _wanted(stages, only)
    why: dict[str, str] = {}
    for stage in stages:
        first = next((key for key in stage.after if why.get(key)), None)
        why[stage.key] = f"{first} is made first" if first else stage.change()
    return [Planned(stage, why[stage.key]) for stage in stages if stage.key in wanted]


def _wanted(stages: Sequence[Stage], only: Sequence[str]) -> set[str]:
    """Keys of the stages that are asked for, and of all that those read."""
    for name in only:
        if not any(name in {stage.kind, stage.key, stage.name} for stage in stages):
            if name in KINDS:
                continue
            raise SpecError(f"found `only` {name!r}; choose among {', '.join(KINDS)}")
    wanted: set[str] = set()
    for stage in reversed(stages):
        asked = not only or bool({stage.kind, stage.key, stage.name} & set(only))
        if asked or stage.key in wanted:
            wanted |= {stage.key, *stage.after}
    return wanted


def outputs_of(stages: Sequence[Stage]) -> list[tuple[Path, Kind]]:
    """All that stages may write."""
    return [output for stage in stages for output in stage.outputs()]


def stages_of(loaded: Loaded, threads: int = 1) -> list[Stage]:
    """The stages of a run file, each after those whose outputs it reads.

    Args:
        loaded: The run file.
        threads: Threads of each stage.

    Raises:
        HdrqError: Options of a stage do not fit each other; file and line are named.
    """
    return sorted(_Stages(loaded, threads).all(), key=lambda stage: KINDS.index(stage.kind))


@dataclass(frozen=True)
class _Cell:
    """A way to calibrate all domains; its name is the first part of all names."""

    method: str
    wbits: int
    abits: int

    @property
    def name(self) -> str:
        return self.method if self.method == "float" else f"{self.method}-{self.scheme.lower()}"

    @property
    def scheme(self) -> str:
        return f"W{self.wbits}A{self.abits}"

    @property
    def label(self) -> str:
        if self.method == "float":
            return "float"
        return f"{self.method.upper()} {self.scheme}"


class _Stages:
    """Makes the stages of one run file."""

    def __init__(self, loaded: Loaded, threads: int) -> None:
        self._loaded, self._file, self._threads = loaded, loaded.file, threads
        self._out = loaded.out
        p = self._file.preprocess
        pairs = {name: getattr(p, name) for name in ("size", "resize", "mean", "std")}
        given: dict[str, Any] = {name: tuple(v) for name, v in pairs.items() if v is not None}
        self._wanted = Wanted(**given)
        self._graphs = GraphCache()

    def all(self) -> Iterator[Stage]:
        """All stages, in no order."""
        for name, domain in self._file.domains.items():
            if domain.adapt is not None:
                yield self._adapt(name, domain)
        rows: list[Row] = []
        measures: list[Stage] = []
        for cell in self._cells():
            yield from (self._calibrate(cell, name) for name in self._file.domains)
            merges = self._file.merges or {}
            yield from (self._merge(cell, name, merge) for name, merge in merges.items())
            for stages, row in self._measured(cell):
                measures += stages
                rows.append(row)
        yield from measures
        if self._file.bench is not None and rows:
            yield self._bench(rows, [stage.key for stage in measures])

    def _cells(self) -> list[_Cell]:
        """The grid of methods and bits; ``float`` has no bits."""
        bits = parse_bits(self._file.bits)
        cells = []
        for method in self._file.methods:
            schemes = bits if METHODS[method].quantizes else bits[:1]
            cells += [_Cell(method, wbits, abits) for wbits, abits in schemes]
        return list(dict.fromkeys(cells))

    def _common(self, name: str, output: str, after: Sequence[str], *loc: str) -> dict[str, Any]:
        document = self._loaded.document
        # A merge of all domains that the file leaves out is asked for by its domains.
        named = loc if loc in document.lines else ("domains",)
        return {
            "name": name,
            "output": self._out / output,
            "after": tuple(after),
            "place": document.place(named),
            "threads": self._threads,
        }

    def _adapt(self, name: str, domain: Domain) -> Stage:
        section = domain.adapt
        assert section is not None
        with self._loaded.at("domains", name, "adapt"):
            options = AdaptationOptions(
                epochs=section.epochs,
                batch=section.batch,
                lr=section.lr,
                pseudo=section.pseudo,
                flip=section.flip,
                pull=section.pull,
            )
        return AdaptStage(
            **self._common(name, f"checkpoints/{name}.safetensors", (), "domains", name, "adapt"),
            model=self._file.model,
            source=self._file.source,
            data=domain.unlabelled or domain.calibration,
            options=options,
            images=section.images,
            wanted=self._wanted,
            skip_corrupt=self._file.preprocess.skip_corrupt,
            seed=self._file.seed,
            device=self._file.device,
        )

    def _bundle(self, cell: _Cell, member: str) -> Path:
        return self._out / "bundles" / f"{cell.name}-{member}.hdrq"

    def _calibrate(self, cell: _Cell, name: str) -> Stage:
        domain = self._file.domains[name]
        adapted = domain.checkpoint or str(self._out / "checkpoints" / f"{name}.safetensors")
        with self._loaded.at("calibrate"):
            request = CalibrationRequest(
                model=self._file.model,
                data=domain.calibration,
                domain=name,
                output=self._bundle(cell, name),
                weights=adapted,
                base=self._file.source,
                method=cell.method,
                wbits=cell.wbits,
                abits=cell.abits,
                wanted=self._wanted,
                skip_corrupt=self._file.preprocess.skip_corrupt,
                seed=self._file.seed,
                device=self._file.device,
                **self._settings(cell.method),
            )
        member = f"{cell.name}-{name}"
        after = (f"{AdaptStage.kind} {name}",) if domain.adapt is not None else ()
        output = f"bundles/{member}.hdrq"
        common = self._common(member, output, after, "domains", name)
        return CalibrateStage(**common, request=request, graphs=self._graphs)

    def _settings(self, method: str) -> dict[str, Any]:
        """Codes and options of a method; those that it does not have are left out."""
        section: BaseModel = self._file.calibrate
        given = section.model_dump(exclude_none=True)
        row = METHODS[method]
        if not row.quantizes:
            given = {k: v for k, v in given.items() if k not in {"grid", "per_channel"}}
        if not row.options.iterates:
            names = set(Options.__dataclass_fields__)
            given = {key: value for key, value in given.items() if key not in names}
        recipe = Recipe(method=method, **given).resolved()
        codes = _CODES if row.quantizes else ("fold", "images", "statistics")
        values = {name: getattr(recipe, name) for name in codes}
        chosen = {name: value for name, value in values.items() if value is not None}
        return {**chosen, "options": recipe.options()}

    def _merge(self, cell: _Cell, name: str, merge: Merge) -> Stage:
        members = merge.domains or []
        with self._loaded.at("merges", name, "re_estimate"):
            fold = self._settings(cell.method).get("fold", "weights")
            if merge.re_estimate and fold != "steps" and METHODS[cell.method].quantizes:
                raise SpecError(
                    f"merges.{name}: found re_estimate with BatchNorm folded into the weights; "
                    "needed calibrate: {fold: steps}, or settings: ours"
                )
        domains = self._file.domains
        label = f"{cell.name}-{name}"
        after = [f"{CalibrateStage.kind} {cell.name}-{member}" for member in members]
        return MergeStage(
            **self._common(label, f"bundles/{label}.hdrq", after, "merges", name),
            parents={member: self._bundle(cell, member) for member in members},
            images={m: domains[m].unlabelled or domains[m].calibration for m in members},
            merge=merge,
            seed=self._file.seed,
        )

    def _measured(self, cell: _Cell) -> Iterator[tuple[list[Stage], Row]]:
        """Engines and accuracies behind each line of the table."""
        several = len(self._file.engines) > 1
        bench, merges = self._file.bench, self._file.merges or {}
        for engine in self._file.engines:
            suffix = f" {engine}" if several else ""
            # Without a merge the models of the domains are what is wanted.
            first = engine == self._file.engines[0]
            if not merges or (bench is not None and bench.singles and first):
                members = {name: [name] for name in self._file.domains}
                label = f"{cell.label} per domain{suffix}"
                yield self._row(cell, engine, members, label, CalibrateStage.kind)
            for name, merge in merges.items():
                label = f"{cell.label} {name}{suffix}"
                own = {name: list(merge.domains or [])}
                yield self._row(cell, engine, own, label, MergeStage.kind)

    def _row(
        self, cell: _Cell, engine: str, members: dict[str, list[str]], label: str, maker: str
    ) -> tuple[list[Stage], Row]:
        stages: list[Stage] = []
        engines, accuracies = [], []
        for member, domains in members.items():
            name = f"{cell.name}-{member}-{engine}"
            loc = ("merges", member) if maker == MergeStage.kind else ("domains", member)
            after = [f"{maker} {cell.name}-{member}"]
            exported = ExportStage(
                **self._common(name, f"engines/{name}", after, *loc),
                bundle=self._bundle(cell, member),
                engine=engine,
            )
            stages.append(exported)
            engines.append(exported.output)
            given = {d: self._file.domains[d].test for d in domains}
            tests = {d: test for d, test in given.items() if test is not None}
            if self._file.bench is not None and tests:
                measured = AccuracyStage(
                    **self._common(name, f"accuracy/{name}.json", [exported.key], *loc),
                    engine=exported.output,
                    tests=tests,
                    bench=self._file.bench,
                )
                stages.append(measured)
                accuracies.append(measured.output)
        return stages, Row(label, tuple(engines), tuple(accuracies))

    def _bench(self, rows: list[Row], after: Sequence[str]) -> Stage:
        bench = self._file.bench
        assert bench is not None
        first = next(iter(self._file.domains.values()))
        return BenchStage(
            **self._common("results", "results.json", after, "bench"),
            rows=tuple(rows),
            images=first.test or first.calibration,
            bench=bench,
            resolved=self._loaded.resolved(),
            title=f"hdrq run: {self._loaded.document.path.name}",
        )
