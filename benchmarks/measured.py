"""What kept figures were measured with: said of a row where it differs, and refused if outdated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hdrq_deploy import Bundle
from hdrq_deploy.errors import SpecError
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.runtime.bench.environment import environment

__all__ = [
    "current_environment",
    "gathered",
    "keep_row",
    "measured_here",
    "put_part",
    "refuse_other_options",
    "row_with_environment",
]

# Facts that differ from call to call on one machine.
_PASSING = ("load_1min",)


def current_environment(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Describe this machine and its software, with the versions of more ``packages``."""
    return {**environment(), **{name: version(name) for name in packages}}


def row_with_environment(
    record: Mapping[str, Any], row: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Say what a new row was measured with, and leave that of the rows that are there.

    Rows without an ``environment`` of their own are of the record's.

    Args:
        record: The record so far; one without an environment takes that of the row.
        row: What was measured.
        found: What it was measured with, by :func:`current_environment`.

    Returns:
        The environment of the record, and the row, which holds its own where the two differ.
    """
    of_record = dict(record.get("environment") or found)
    same = all(
        found.get(name) == of_record.get(name) for name in {*found, *of_record}.difference(_PASSING)
    )
    return of_record, {**row, **({} if same else {"environment": dict(found)})}


def measured_here(row: Mapping[str, Any], packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """A row with what it was measured with, to be kept until :func:`gathered` collects it."""
    return {**row, "environment": current_environment(packages)}


def keep_row(row: Mapping[str, Any], target: Path) -> dict[str, Any]:
    """Write what :func:`measured_here` says of a row, as JSON, and return it."""
    kept = measured_here(row)
    write_bytes(target, json.dumps(kept).encode())
    return kept


def gathered(
    rows: Iterable[Mapping[str, Any]], packages: Sequence[str] = ("torch",)
) -> dict[str, Any]:
    """The ``environment`` and the ``rows`` of a record whose rows were kept one by one.

    Args:
        rows: Each with what :func:`measured_here` added. Rows without it (kept before that was
            recorded) are of the record's environment.
        packages: Those whose versions are told where no row says what it was measured with.

    Returns:
        The environment of the first row that names one; rows that differ from it name their own.
    """
    kept = [dict(row) for row in rows]
    known = [row["environment"] for row in kept if "environment" in row]
    of_record = known[0] if known else current_environment(packages)
    told = []
    for row in kept:
        own = row.pop("environment", of_record)
        told.append(row_with_environment({"environment": of_record}, row, own)[1])
    return {"environment": of_record, "rows": told}


def put_part(
    record: dict[str, Any],
    parts: Iterable[str],
    name: str,
    found: Any,
    made_with: Mapping[str, Any],
) -> None:
    """Put a part into a record that is measured part by part, and what it was measured with.

    Args:
        record: Changed in place. Its ``environment`` is that of parts that name none, and goes
            with the last of them.
        parts: The names of all parts.
        name: The part that was measured.
        found: Its figures.
        made_with: What it was measured with, by :func:`current_environment`.
    """
    own = {**record.get("environment_of", {}), name: dict(made_with)}
    record |= {name: found, "environment_of": own}
    if all(part in own for part in parts if part in record):
        record.pop("environment", None)


def refuse_other_options(bundle: Path, **wanted: float) -> None:
    """Refuse a bundle that learned with other options than its figures are to be of.

    Args:
        bundle: Its folder.
        wanted: Options by name, as ``lr`` and ``iters``; none for a method that does not learn.

    Raises:
        SpecError: It learned with other ones, or is gone, so that nothing says them.
    """
    options: Mapping[str, Any] = {}
    if wanted and bundle.exists():
        options = Bundle.open(bundle, check=False).manifest.options
    for name, value in wanted.items():
        found = options.get(name)
        if found != value:
            raise SpecError(
                f"{bundle}: found {'no bundle' if found is None else f'{name} {found:g}'}; needed "
                f"one that learned with {name} {value:g}: remove it, and its row where there is one"
            )
