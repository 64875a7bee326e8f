"""Nothing deprecated outlives the version that was to remove it, and none is missing a row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hdrq_deploy
from hdrq_deploy.deprecations import DEPRECATIONS, Deprecation, due, warn_deprecated
from hdrq_deploy.formats import bench_result, bundle_manifest, engine_folder

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "project" / "compatibility.md"


def check(version: str) -> None:
    late = [f"{row.what} (removed in {row.remove_in})" for row in due(version)]
    assert not late, f"version {version} still has {', '.join(late)}: remove rows and code"


def test_nothing_is_due() -> None:
    check(hdrq_deploy.__version__)


def test_the_check_fails_with_the_version_that_removes() -> None:
    check("0.2.9")
    with pytest.raises(AssertionError, match=r"version 0\.3\.0 still has .*Plan \(removed in 0\.3"):
        check("0.3.0")
    row = Deprecation("f", "g", "0.9", "0.10")
    assert due("0.9.1", [row]) == [] and due("0.10.0", [row]) == due("1.0", [row]) == [row]


def test_a_warning_names_the_way_out_and_the_line_of_the_caller() -> None:
    with pytest.warns(DeprecationWarning, match="Plan is now BenchPlan; .* until version 0.3") as w:
        from hdrq_deploy.runtime.bench import Plan

        assert Plan is hdrq_deploy.runtime.bench.BenchPlan
    assert {Path(warning.filename).name for warning in w} >= {Path(__file__).name}
    with pytest.raises(KeyError):
        warn_deprecated("a thing without a row")


def test_every_warning_comes_from_a_row() -> None:
    """A warning of its own would have no date that anybody checks."""
    for room in ("hdrq_deploy", "exporters", "runtime", "calibration_data"):
        for file in (ROOT / room).rglob("*.py"):
            names = {n.id for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Name)}
            if "DeprecationWarning" in names:
                assert file.name in {"deprecations.py", "_moved.py"}, file


def test_the_page_lists_all_rows_and_schemas() -> None:
    text = PAGE.read_text()
    section = text.split("## Deprecation\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    rows = [tuple(cell.strip("`") for cell in row) for row in listed[1:]]
    assert rows == [(r.what, r.instead, r.since, r.remove_in) for r in DEPRECATIONS.values()]
    for what, schema in (
        (r"kind `hdrq-bundle`\)", bundle_manifest.SCHEMA),
        (r"kind `hdrq-engine`\)", engine_folder.SCHEMA),
        (r"`hdrq-bench --json`\)", bench_result.SCHEMA),
    ):
        assert re.search(rf"{what} \| {schema} \|", text), what
