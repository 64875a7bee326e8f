"""What every section of the evidence needs: records, tables and figures as text."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdrq_deploy.formats.atomic_files import write_bytes

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GROUPS = (
    ("handwriting", "photo"),
    ("handwriting", "night"),
    ("photo", "night"),
    ("handwriting", "photo", "night"),
)
# Bits of the grids on drawn images.
WIDTHS = ("w8a8", "w4a8", "w4a4", "w3a3")
METHOD_COLOURS = {
    "float": "#4a5568",
    "rtn": "#9aa5b1",
    "rtn-corrected": "#b7791f",
    "brecq": "#2f855a",
    "qdrop": "#2b6cb0",
    "hdrq": "#b83256",
    "rtn-corrected, 8 bits merged to 4": "#d69e2e",
}
NAMES = {"handwriting": "hw", "photo": "photo", "night": "night"}


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        record: Name of the record that it is made from; without it there is no section.
        text: Makes its text from the record.
    """

    record: str
    text: Callable[[dict[str, Any]], str]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def load(name: str) -> dict[str, Any] | None:
    """A result, where it is there."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    for names in _listening:
        names.setdefault(name)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def environments(record: Any) -> list[dict[str, Any]]:
    """What a record was measured with, and those of its rows and parts that say another."""
    if not isinstance(record, dict):
        return []
    parts = [record.get(key, ()) for key in ("rows", "models", "bundles")]
    rows = [row for part in parts for row in (part.values() if isinstance(part, dict) else part)]
    every = [record, *(row for row in rows if isinstance(row, dict))]
    told = [kept["environment"] for kept in every if "environment" in kept]
    return [*told, *record.get("environment_of", {}).values()]


def environment_of(record: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What a part of a record was measured with."""
    found: dict[str, Any] = record.get("environment_of", {}).get(part) or record["environment"]
    return found


_listening: list[dict[str, None]] = []


@contextmanager
def names_read() -> Iterator[dict[str, None]]:
    """The names of the results that are read inside the block, as keys in the order of reading."""
    names: dict[str, None] = {}
    _listening.append(names)
    try:
        yield names
    finally:
        _listening.remove(names)


def write_record(path: Path, record: Any) -> None:
    """Write a result as all of them are written."""
    write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())


def needed(name: str) -> dict[str, Any]:
    """A result that a page cannot do without."""
    record = load(name)
    assert record is not None, f"{name}.json is missing"
    return record


def not_run(missing: Sequence[str]) -> str:
    """A sentence on the settings of a grid that are missing; names end with their seed."""
    if not missing:
        return "The whole grid was run."
    seeds: dict[str, list[str]] = {}
    for name in missing:
        start, _, seed = name.rpartition("-s")
        seeds.setdefault(start, []).append(seed)
    settings = ", ".join(f"`{start}` (seed {' '.join(own)})" for start, own in seeds.items())
    return f"Not run yet: {settings}."


def with_spread(values: Sequence[float], sign: str = "") -> str:
    """The mean and, of several values, the standard deviation, one digit; ``+`` shows its sign."""
    if len(values) < 2:
        return "".join(f"{value:{sign}.1f}" for value in values)
    return f"{statistics.fmean(values):{sign}.1f} ± {statistics.stdev(values):.1f}"
