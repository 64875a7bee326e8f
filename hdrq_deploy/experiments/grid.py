"""The cells of a protocol: which settings, methods and bit-widths, single and merged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

from ..calibration.methods import METHODS
from ..calibration.settings import SETTINGS
from ..errors import SpecError
from ..formats.atomic_files import read_json
from ..formats.file_kinds import CELL_ROW
from ..numerics.spec import check_bits, check_seed
from .decisions import agrees
from .tasks import Task
from .ways import WAYS

__all__ = [
    "BITS",
    "Grid",
    "Merge",
    "Run",
    "bundle_path",
    "parse_bits",
    "read_row",
    "row_path",
    "search_name",
]

# Images that a calibration needs of a domain, whatever it does.
_FEWEST = 2
# Weights and activations, as the paper has them; first and last layers keep 8 bits.
BITS = ("w8a8", "w8a4", "w6a6", "w4a8", "w4a4", "w3a3")


def parse_bits(words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Bits of weights and activations: ``w4a8`` as (4, 8).

    Raises:
        SpecError: Another form, or bits out of range.
    """
    pairs = []
    for word in words:
        match = re.fullmatch(r"w(\d)a(\d)", word.lower())
        if not match:
            raise SpecError(f"found bits {word!r}; needed such as w4a4 ({', '.join(BITS)})")
        wbits, abits = int(match[1]), int(match[2])
        check_bits(wbits, "wbits")
        check_bits(abits, "abits")
        pairs.append((wbits, abits))
    return tuple(dict.fromkeys(pairs))


def search_name(task: str, model: str = "") -> str:
    """How a search of rates is called: by its task, and its network where that is known."""
    return f"{task}, {model}" if model else task


@dataclass(frozen=True)
class Run:
    """One way to calibrate all domains.

    Attributes:
        setting: Name of one of ``SETTINGS``, or ``float``: models in float whose BatchNorm is
            folded into the weights.
        method: Name of a calibration method; ``float`` quantizes nothing.
        wbits: Bits of weights.
        abits: Bits of activations.
        seed: Calibration seed.
    """

    setting: str
    method: str
    wbits: int
    abits: int
    seed: int

    @property
    def name(self) -> str:
        """The start of its cells' names: ``paper-hdrq-w4a4-s0``, ``float``, ``ours-float``."""
        if self.method == "float":
            return "float" if self.setting == "float" else f"{self.setting}-float"
        return f"{self.setting}-{self.method}-{self.bits}-s{self.seed}"

    @property
    def bits(self) -> str:
        """``w4a4``; empty for float."""
        return "" if self.method == "float" else f"w{self.wbits}a{self.abits}"

    def single(self, domain: str) -> str:
        """Name of the cell of one domain."""
        return f"{self.name}-{domain}"


@dataclass(frozen=True)
class Merge:
    """One way to merge the bundles of a run."""

    run: Run
    members: tuple[str, ...]
    way: str
    draws: int

    @property
    def name(self) -> str:
        """The start of its cells' names."""
        return f"{self.run.name}-{'+'.join(self.members)}-{self.way}"

    @property
    def float_run(self) -> Run:
        """The float models of this run's setting; the folded ones where it has none of its own."""
        apart = SETTINGS[self.run.setting].codes["fold"] != "weights"
        return Run(self.run.setting if apart else "float", "float", 8, 8, 0)

    def cell(self, draw: int) -> str:
        """Name of the cell of one rounding seed."""
        return f"{self.name}-r{draw}"


@dataclass(frozen=True)
class Grid:
    """Everything that a protocol runs.

    Attributes:
        task: Data, checkpoints and how methods learn.
        methods: Rows of the table of methods.
        bits: Bits of weights and activations.
        seeds: Calibration seeds.
        settings: Rows of the table of settings.
        rounding_seeds: Draws of every merge that draws.
        pairs: Whether all pairs of domains are merged in settings that do not say it themselves.
        only_ways: Names of ``WAYS``; merges in other ways are left out. Empty: all of the settings.
        rates: Searched learning rates, by ``SETTING-METHOD-BITS`` (:mod:`.tuning`).
        searched_on: Task and network of that search (:func:`search_name`).
    """

    task: Task
    methods: tuple[str, ...] = ("brecq", "qdrop", "hdrq")
    bits: tuple[tuple[int, int], ...] = parse_bits(BITS)
    seeds: tuple[int, ...] = (0, 1)
    settings: tuple[str, ...] = ("paper",)
    rounding_seeds: int = 4
    pairs: bool = False
    only_ways: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    searched_on: str = ""

    def __post_init__(self) -> None:
        for setting in self.settings:
            if setting not in SETTINGS:
                raise SpecError(f"found setting {setting!r}; choose among {', '.join(SETTINGS)}")
        for method in self.methods:
            if method not in METHODS or not METHODS[method].quantizes:
                known = ", ".join(name for name, row in METHODS.items() if row.quantizes)
                raise SpecError(
                    f"found method {method!r}; choose among {known} (float always runs)"
                )
        ways = dict.fromkeys(
            way
            for setting in self.settings
            for way in (*SETTINGS[setting].pair_ways, *SETTINGS[setting].ways)
        )
        for way in self.only_ways:
            if way not in ways:
                raise SpecError(
                    f"found way {way!r}; choose among those of {' and '.join(self.settings)}: "
                    f"{', '.join(ways)}"
                )
        if self.rounding_seeds < 1:
            raise SpecError(f"found {self.rounding_seeds} rounding seeds; needed 1 or more")
        if len(set(self.domains)) < len(self.domains):
            raise SpecError(f"found a domain twice: {' '.join(self.domains)}")
        for seed in self.seeds:
            check_seed(seed)
        if len(self.task.domains) < 2:
            raise SpecError(f"found {len(self.task.domains)} domain; a merge needs two or more")
        if self.task.images < self.batch:
            learns = self.batch > _FEWEST
            raise SpecError(
                f"found {self.task.images} calibration images of a domain; needed {self.batch} or "
                f"more{' (one batch)' if learns else ''}: give more `images`"
                + (", or a smaller `batch`" if learns else "")
            )
        for run in self.runs():
            groups = list(self._groups())
            if run.method != "float" and not any(self.ways(run, g) for g in groups):
                possible = dict.fromkeys(way for g in groups for way in self.every_way(run, g))
                raise SpecError(
                    f"found no way to merge bundles of {run.method} at {run.bits} ({run.setting}) "
                    f"among {', '.join(self.only_ways)}; choose one of {', '.join(possible)}, or "
                    "leave the bits or the setting out"
                )

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the target domains."""
        return tuple(domain.name for domain in self.task.domains)

    @property
    def batch(self) -> int:
        """Images that every calibration needs: two, or the largest batch of a method that learns.

        Raises:
            SpecError: An option of a method is out of range.
        """
        pairs = product(self.methods, self.settings)
        options = [self.task.options(method, setting) for method, setting in pairs]
        return max([_FEWEST, *(own.batch for own in options if own.iterates)])

    def runs(self) -> Iterator[Run]:
        """The float models, once more where a setting keeps BatchNorm apart; then the rest."""
        yield Run("float", "float", 8, 8, 0)
        for setting in self.settings:
            if SETTINGS[setting].codes["fold"] != "weights":
                yield Run(setting, "float", 8, 8, 0)
        for seed in self.seeds:
            for wbits, abits in self.bits:
                for setting in self.settings:
                    for method in self.methods:
                        yield Run(setting, method, wbits, abits, seed)

    def rate(self, run: Run) -> float | None:
        """The searched rate of a run; at bits that were not searched that of the nearest ones.

        The distance of two bit-widths is the sum of the differences of their weight and activation
        bits; of equally near ones the narrower is taken. None where the method was not searched.
        """
        near = []
        for name, rate in self.rates.items():
            start, _, bits = name.rpartition("-")
            if start == f"{run.setting}-{run.method}":
                ((wbits, abits),) = parse_bits([bits])
                far = abs(wbits - run.wbits) + abs(abits - run.abits)
                near.append((far, wbits + abits, wbits, rate))
        return min(near)[-1] if near else None

    def merges(self, run: Run) -> Iterator[Merge]:
        """All merges of one run."""
        for members in self._groups():
            for way in self.ways(run, members):
                tosses = WAYS[way].tosses and run.method != "float"
                yield Merge(run, members, way, self.rounding_seeds if tosses else 1)

    def needs_statistics(self, run: Run) -> bool:
        """Whether a merge of this run reads statistics of its bundles, in any way of its setting.

        Bundles are the same whatever ``only_ways`` leaves out, and folded float models whatever the
        settings are: another run may merge the rest.
        """
        if run.setting == "float":
            return True
        groups = self._groups()
        return any(WAYS[way].needs_statistics for g in groups for way in self.every_way(run, g))

    def cells(self) -> Iterator[str]:
        """Names of all cells, single and merged."""
        for run in self.runs():
            yield from (run.single(domain) for domain in self.domains)
            for merge in self.merges(run):
                yield from (merge.cell(draw) for draw in range(merge.draws))

    def ways(self, run: Run, members: Sequence[str]) -> Sequence[str]:
        """Those of :meth:`every_way` that ``only_ways`` leaves.

        Float models with folded BatchNorm are merged whatever it says: all rows are compared with
        them.
        """
        every = self.every_way(run, members)
        if run.setting == "float" or not self.only_ways:
            return every
        return [way for way in every if way in self.only_ways]

    def every_way(self, run: Run, members: Sequence[str]) -> Sequence[str]:
        """Names of the ways in which bundles of a run are merged in its setting, of ``WAYS``.

        Float models with folded BatchNorm are averaged, where any setting merges these members, and
        merged by regression where one does so.
        """
        if run.setting != "float":
            is_wide = run.method != "float" and run.wbits == 8
            return [
                way
                for way in self._ways_in(run.setting, members)
                if (is_wide or WAYS[way].wbits is None)
                # Float models are fitted to themselves.
                and not (run.method == "float" and WAYS[way].reads_floats)
            ]
        merged = [way for setting in self.settings for way in self._ways_in(setting, members)]
        return ["nearest"] * bool(merged) + ["regression"] * ("regression" in merged)

    def _groups(self) -> Iterator[tuple[str, ...]]:
        """All pairs of domains, and all domains."""
        yield from dict.fromkeys([*combinations(self.domains, 2), self.domains])

    def _ways_in(self, setting: str, members: Sequence[str]) -> Sequence[str]:
        row = SETTINGS[setting]
        if tuple(members) != self.domains and not (self.pairs or row.pairs):
            return ()
        return row.pair_ways if len(members) == 2 else row.ways


def bundle_path(out: Path, cell: str) -> Path:
    """The folder of a cell's bundle."""
    return out / "cells" / f"{cell}.hdrq"


def read_row(out: Path, cell: str, members: Sequence[str]) -> dict[str, Any] | None:
    """The figures of a cell of these domains; None where there are none, or no whole ones.

    A row is whole where it has an accuracy in 0 to 1 of every member and of no other domain, counts
    of images above 0, and decisions that give these accuracies. Rows of earlier versions have
    neither kind, counts nor decisions.
    """
    row = read_json(row_path(out, cell))
    if not isinstance(row, dict) or row.get("kind", CELL_ROW.kind) != CELL_ROW.kind:
        return None
    domains, images, tests = (row.get(name, {}) for name in ("domains", "images", "tests"))
    if not all(isinstance(part, dict) for part in (domains, images, tests)):
        return None
    whole = (
        row.get("cell", cell) == cell
        and set(domains) == set(members)
        and all(type(v) in (int, float) and 0 <= v <= 1 for v in domains.values())
        and all(type(n) is int and n > 0 for n in images.values())
        and all(_are_hashes(row.get(name, ())) for name in ("parents", "guides"))
        and (not row.get("decisions") or agrees(row["decisions"], domains))
    )
    return row if whole else None


def _are_hashes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)


def row_path(out: Path, cell: str) -> Path:
    """The file of a cell's figures."""
    return out / "rows" / f"{cell}.json"
