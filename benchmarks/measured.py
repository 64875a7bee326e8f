"""What kept figures were measured with: said of a row where it differs, and refused if outdated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hdrq_deploy import Bundle
from hdrq_deploy.errors import SpecError
from hdrq_deploy.runtime.bench.environment import environment

__all__ = ["current_environment", "refuse_other_rate", "row_with_environment"]

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


def refuse_other_rate(bundle: Path, wanted: float | None) -> None:
    """Refuse a bundle that learned at another rate than its figures are to be of.

    Args:
        bundle: Its folder.
        wanted: The rate; None for methods that do not learn.

    Raises:
        SpecError: It learned at another one, or is gone, so that nothing says its rate.
    """
    if wanted is None:
        return
    found = None
    if bundle.exists():
        found = Bundle.open(bundle, check=False).manifest.options.get("lr")
    if found != wanted:
        raise SpecError(
            f"{bundle}: found {'no bundle' if found is None else f'the learning rate {found}'}; "
            f"needed one that learned at {wanted:g}: remove it, and its row where there is one"
        )
