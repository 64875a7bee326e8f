"""Package list, folders, import direction and README in step."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LAYERS = [  # low to high; the members of one layer are siblings and do not import each other
    {"errors", "typing"},
    {"numerics", "recipe"},
    {"formats"},
    {"reference", "surgery", "graph"},
    {"biases", "taps"},
    {"calibration_data", "verification", "comparison"},
    {"golden"},
    {"merge", "calibrate", "merging", "calibration", "exporters", "runtime"},
    {"adapt", "sensitivity", "mixer", "stages", "checks", "mixing", "adaptation"},
    {"analysis"},
    {"reports"},
    {"protocol", "jobs"},
    {"experiments"},
    {"cli"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in SETUPTOOLS["package-dir"].items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def imported(name: str, path: Path) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def part(module: str) -> str | None:
    root, _, rest = module.partition(".")
    name = rest.split(".")[0]
    return name if root == "hdrq_deploy" and name in RANK else None


def test_every_package_on_disk_is_listed_for_the_wheel() -> None:
    on_disk = {name for name, path in modules() if path.name == "__init__.py"}
    assert on_disk == set(SETUPTOOLS["packages"])


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_imports_point_to_lower_layers(name: str, path: Path) -> None:
    here = part(name)
    for target in imported(name, path):
        there = part(target)
        if here and there and here != there:
            assert RANK[there] < RANK[here], f"{name} imports {target}, which is not below it"


def test_only_calibration_imports_torch() -> None:
    allowed = {
        "adapt",
        "calibration",
        "analysis",
        "models",
        "make_checkpoints",
        "training",
    }
    for name, path in modules():
        if not allowed & set(name.split(".")) or name.startswith("hdrq_deploy.cli"):
            assert not any(t.split(".")[0] == "torch" for t in imported(name, path)), name


@pytest.mark.parametrize("name", [name for name, _ in modules()])
def test_docstring_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_readme_and_ci_run_the_same_tests() -> None:
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"<!-- tests -->\n```sh\n(.*)\n```", readme)
    for tool in ("ruff check", "ruff format --check", "typecheck.py", "pytest"):
        assert tool in command
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


def test_the_evidence_page_is_that_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert (ROOT / "docs" / "evidence.md").read_text() == tables.page()


def readme_commands() -> Iterator[list[str]]:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].startswith("hdrq"):
                yield words


@pytest.mark.parametrize("words", list(readme_commands()), ids=" ".join)
def test_the_readmes_commands_have_the_flags_they_show(words: list[str]) -> None:
    name = words[1] if words[0] == "hdrq" else words[0].removeprefix("hdrq-")
    given = words[2:] if words[0] == "hdrq" else words[1:]
    module = importlib.import_module(f"hdrq_deploy.cli.{name}")
    module.arguments().parse_args(given)  # a wrong flag raises SystemExit
