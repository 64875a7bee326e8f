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
from .loading import Loaded, meant
from .measuring import AccuracyStage, ExportStage
from .results import BenchStage, Row
from .schema import Domain, Merge, named_engines
from .stage import Stage, change_of
from .verifying import VerifyStage

__all__ = ["KINDS", "Planned", "outputs_of", "plan", "stages_of"]

# In the order in which they run.
_STAGES: tuple[type[Stage], ...] = (
    AdaptStage,
    CalibrateStage,
    MergeStage,
    ExportStage,
    AccuracyStage,
    VerifyStage,
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
        HdrqError: What a stage reads cannot be looked at; file and line are named.
    """
    wanted = _wanted(stages, only)
    why: dict[str, str] = {}
    for stage in stages:
        first = next((key for key in stage.after if why.get(key)), None)
        why[stage.key] = f"{first} is made first" if first else change_of(stage)
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


def stages_of(loaded: Loaded, threads: int = 1, title: str = "") -> list[Stage]:
    """The stages of a run file, each after those whose outputs it reads.

    Args:
        loaded: The run file.
        threads: Threads of each stage.
        title: Title of the report; by default the name of the file.

    Raises:
        HdrqError: Options of a stage do not fit each other; file and line are named.
    """
    return sorted(_Stages(loaded, threads, title).all(), key=lambda stage: KINDS.index(stage.kind))


@dataclass(frozen=True)
class _Cell:
    """A way to calibrate all domains; its name is the first part of all names."""

    method: str
    wbits: int
    abits: int

    @property
    def quantizes(self) -> bool:
        return METHODS[self.method].quantizes

    @property
    def name(self) -> str:
        return f"{self.method}-{self.scheme.lower()}" if self.quantizes else self.method

    @property
    def scheme(self) -> str:
        return f"W{self.wbits}A{self.abits}"

    def bundle(self, member: str) -> str:
        """Name of the bundle of a domain or a merge."""
        return f"{self.name}-{member}"

    def label(self, member: str) -> str:
        """What its line in the table of results is called."""
        if not self.quantizes:
            return f"{self.method} {member}"
        return f"{self.method.upper()} {member} {self.scheme}"

    @property
    def label_of_singles(self) -> str:
        start = f"{self.method.upper()} {self.scheme}" if self.quantizes else self.method
        return f"{start}, a model per domain"


class _Stages:
    """Makes the stages of one run file."""

    def __init__(self, loaded: Loaded, threads: int, title: str) -> None:
        self._title = title or f"hdrq run: {loaded.document.path.name}"
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
        self._check_names()
        for cell in self._cells():
            yield from (self._calibrate(cell, name) for name in self._file.domains)
            merges = self._file.merges or {}
            yield from (self._merge(cell, name, merge) for name, merge in merges.items())
            for stages, row in self._measured(cell):
                measures += stages
                rows.append(row)
        yield from measures
        if self._file.bench is not None and rows:
            yield self._bench(rows, measures)

    def _cells(self) -> list[_Cell]:
        """The grid of bits and methods; those that stay float come first and have no bits."""
        bits, methods = parse_bits(self._file.bits), self._file.methods
        cells = [_Cell(m, *bits[0]) for m in methods if not METHODS[m].quantizes]
        cells += [_Cell(m, *pair) for pair in bits for m in methods if METHODS[m].quantizes]
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
        return self._out / "bundles" / f"{cell.bundle(member)}.hdrq"

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
            is_folded = fold != "steps" if cell.quantizes else METHODS[cell.method].folds
            if merge.re_estimate and is_folded:
                raise SpecError(
                    f"merges.{name}: found re_estimate with BatchNorm folded into the weights; "
                    "needed calibrate: {fold: steps}, or settings: ours; or the method float"
                )
        with self._loaded.at("merges", name, "weights"):
            if (
                merge.weights == "statistics"
                and self._settings(cell.method).get("statistics") == "off"
            ):
                raise SpecError(
                    f"merges.{name}: found weights: statistics with calibrate: {{statistics: "
                    "off}; leave one of them out"
                )
        domains = self._file.domains
        label = f"{cell.name}-{name}"
        guides: dict[str, Path] = {}
        if merge.fit_to is not None and merge.fit_to != cell.method:
            real = next(c for c in self._cells() if c.method == merge.fit_to)
            guides = {real.bundle(member): self._bundle(real, member) for member in members}
        sources = [*(cell.bundle(member) for member in members), *guides]
        after = [f"{CalibrateStage.kind} {source}" for source in sources]
        return MergeStage(
            **self._common(label, f"bundles/{label}.hdrq", after, "merges", name),
            parents={member: self._bundle(cell, member) for member in members},
            images={m: domains[m].unlabelled or domains[m].calibration for m in members},
            merge=merge,
            seed=self._file.seed,
            guides=list(guides.values()),
        )

    def _check_names(self) -> None:
        """Whether the bundles exist that ``engines`` and ``verify`` name."""
        members = [*self._file.domains, *(self._file.merges or {})]
        known = [cell.bundle(member) for cell in self._cells() for member in members]
        asked: list[tuple[tuple[str | int, ...], list[str] | None]] = [
            (("engines", i), bundles) for i, (_, bundles) in enumerate(named_engines(self._file))
        ]
        verify = self._file.verify
        asked.append((("verify",), verify if isinstance(verify, list) else None))
        for loc, names in asked:
            for name in names or ():
                if name not in known:
                    raise self._loaded.document.error(
                        loc,
                        f"{loc[0]}: found the bundle {name!r}; {meant(name, known)}bundles are "
                        f"{', '.join(known)}",
                    )

    def _measured(self, cell: _Cell) -> Iterator[tuple[list[Stage], Row]]:
        """Engines and accuracies behind each line of the table."""
        merges = self._file.merges or {}
        whole = [engine for engine, bundles in named_engines(self._file) if bundles is None]
        for engine, bundles in named_engines(self._file):
            suffix = "" if [engine] == whole else f" {engine}"
            if bundles is None:
                if self._measures_singles(cell, engine == whole[0]):
                    members = {name: [name] for name in self._file.domains}
                    label = f"{cell.label_of_singles}{suffix}"
                    yield self._row(cell, engine, members, label, CalibrateStage.kind)
            else:
                for name in self._file.domains:
                    if cell.bundle(name) in bundles:
                        label = f"{cell.label(name)}{suffix}"
                        yield self._row(cell, engine, {name: [name]}, label, CalibrateStage.kind)
            for name, merge in merges.items():
                if bundles is None or cell.bundle(name) in bundles:
                    own = {name: list(merge.domains or [])}
                    label = f"{cell.label(name)}{suffix}"
                    yield self._row(cell, engine, own, label, MergeStage.kind)

    def _measures_singles(self, cell: _Cell, first: bool) -> bool:
        """Whether the models of the domains are measured; without a merge they are wanted."""
        bench = self._file.bench
        if not self._file.merges:
            return True
        singles = bench is not None and bench.singles
        return first and bool(singles and (singles != "float" or not cell.quantizes))

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
                engine_threads=self._file.bench.threads if self._file.bench else 1,
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
            if self._verifies(cell, member, maker):
                stages.append(self._verify(cell, member, domains, exported, loc))
        return stages, Row(label, tuple(engines), tuple(accuracies))

    def _verifies(self, cell: _Cell, member: str, maker: str) -> bool:
        verify = self._file.verify
        if isinstance(verify, list):
            return cell.bundle(member) in verify
        return bool(verify and (maker == MergeStage.kind or not self._file.merges))

    def _verify(
        self,
        cell: _Cell,
        member: str,
        domains: Sequence[str],
        exported: ExportStage,
        loc: tuple[str, ...],
    ) -> Stage:
        given = {d: self._file.domains[d] for d in domains}
        name = exported.name
        return VerifyStage(
            **self._common(name, f"verify/{name}.json", [exported.key], *loc),
            bundle=self._bundle(cell, member),
            engine=exported.output,
            data={d: domain.test or domain.calibration for d, domain in given.items()},
        )

    def _bench(self, rows: list[Row], measures: Sequence[Stage]) -> Stage:
        bench = self._file.bench
        assert bench is not None
        first = next(iter(self._file.domains.values()))
        after = [stage.key for stage in measures]
        return BenchStage(
            **self._common("results", "results.json", after, "bench"),
            rows=tuple(rows),
            images=first.test or first.calibration,
            bench=bench,
            resolved=self._loaded.resolved(),
            title=self._title,
            verified=tuple(
                (stage.name, stage.output) for stage in measures if isinstance(stage, VerifyStage)
            ),
        )
