"""Records of two versions side by side: only of the same bundles."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def rows_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    found: Callable[..., Any] = importlib.import_module("regression_batchnorm").rows_of
    return found


def record(checkpoints: str = "one", **means: float) -> dict[str, Any]:
    def row(way: str, mean: float) -> dict[str, Any]:
        same = {"setting": "ours", "method": "hdrq", "bits": "w4a8", "members": ["a", "b"]}
        return {**same, "way": way, "merged": {"harmonic mean": {"mean": mean}}}

    return {"checkpoints_sha256": checkpoints, "rows": [row(*pair) for pair in means.items()]}


def test_rows_hold_both_figures_and_averages_are_not_among_them(rows_of: Any) -> None:
    before = record(nearest=50.0, regression=60.0, renewed=70.0)
    after = record(nearest=50.0, regression=62.5)
    (row,) = rows_of(before, after, "PACS")
    assert (row["way"], row["before"], row["after"]) == ("regression", 60.0, 62.5)


def test_records_of_other_bundles_are_refused(rows_of: Any) -> None:
    before = record(nearest=50.0, regression=60.0)
    with pytest.raises(SystemExit, match="other checkpoints"):
        list(rows_of(before, record("two", regression=60.0), "PACS"))
    with pytest.raises(SystemExit, match=r"averages .* differ, 50.0 and 51.0"):
        list(rows_of(before, record(nearest=51.0, regression=60.0), "PACS"))
