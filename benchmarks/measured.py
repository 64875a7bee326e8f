"""What kept figures were measured with: said of each row, and refused where it is outdated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hdrq_deploy import Bundle
from hdrq_deploy.errors import SpecError
from hdrq_deploy.runtime.bench.environment import environment

__all__ = ["beside", "here", "refuse_other_rate"]

# Facts that differ from call to call on one machine.
_PASSING = ("load_1min",)


def here(packages: Sequence[str] = ()) -> dict[str, Any]:
    """This machine and its software, with the versions of more ``packages``."""
    return {**environment(), **{name: version(name) for name in packages}}


def beside(
    record: Mapping[str, Any], row: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What a record says of its environment, and a new row of its own, once the row is in it.

    Rows without an ``environment`` of their own are of the record's.

    Args:
        record: The record so far; one without an environment takes that of the row.
        row: What was measured.
        found: What it was measured with, by :func:`here`.

    Returns:
        ``environment`` of the record and ``row``, which holds its own where the two differ.
    """
    of_record = dict(record.get("environment") or found)
    same = all(
        found.get(name) == of_record.get(name) for name in {*found, *of_record}.difference(_PASSING)
    )
    return {"environment": of_record, "row": {**row, **({} if same else {"environment": found})}}


def refuse_other_rate(bundle: Path, wanted: float | None) -> None:
    """Refuse a bundle that learned at another rate than its figures are to be of.

    Args:
        bundle: Its folder.
        wanted: The rate; None for methods that do not learn.

    Raises:
        SpecError: It learned at another one.
    """
    found = Bundle.open(bundle).manifest.options.get("lr")
    if wanted is not None and found != wanted:
        raise SpecError(
            f"{bundle}: found the learning rate {found}; needed {wanted:g}: remove it and its row"
        )
