"""The house rules: rooms, arrows, owners, lengths, `__all__`; README and CI in step."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LAYERS = [  # low to high; the members of one layer are siblings and do not import each other
    {"deprecations", "errors", "typing"},
    {"numerics"},
    {"formats"},
    {"graph"},
    {"calibration_data", "comparison"},
    {"calibration", "merging", "exporters", "runtime"},
    {"checks", "mixing", "adaptation"},
    {"analysis"},
    {"reports", "jobs"},
    {"experiments"},
    {"runfile"},
    {"cli"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# Modules whose work is done by torch; all others run on a device without it.
WITH_TORCH = {"adaptation", "analysis", "calibration", "make_checkpoints", "models", "training"}


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


structure = _load(ROOT / "tests" / "structure.py")
MODULES = structure.modules()


def part(module: str) -> str | None:
    root, _, rest = module.partition(".")
    name = rest.split(".")[0]
    return name if root == "hdrq_deploy" and name in RANK else None


def test_every_package_on_disk_is_listed_for_the_wheel() -> None:
    on_disk = {name for name, module in MODULES.items() if module.path.name == "__init__.py"}
    assert on_disk == set(SETUPTOOLS["packages"])


def test_every_room_has_a_layer() -> None:
    rooms = {name.split(".")[1] for name in MODULES if "." in name}
    assert rooms - set(RANK) == {"_moved", "models"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_to_lower_layers(name: str) -> None:
    here = part(name)
    for target in MODULES[name].imports():
        there = part(target)
        if here and there and here != there:
            assert RANK[there] < RANK[here], f"{name} imports {target}, which is not below it"


def test_nothing_imports_in_a_circle() -> None:
    assert structure.cycles(structure.module_graph(MODULES)) == []
    assert structure.cycles(structure.room_graph(MODULES)) == []


def test_a_circle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}
    assert structure.cycles(graph) == [["a", "b", "c"]]


def test_only_calibration_imports_torch() -> None:
    for name, module in MODULES.items():
        if not WITH_TORCH & set(name.split(".")) or name.startswith("hdrq_deploy.cli"):
            assert not any(t.split(".")[0] == "torch" for t in module.imports()), name


@pytest.mark.parametrize("name", MODULES)
def test_functions_can_be_read_at_once(name: str) -> None:
    long = {f.name: n for f in MODULES[name].functions() if (n := structure.length(f)) > 90}
    assert not long, long


@pytest.mark.parametrize(
    ("file", "owners"),
    [
        ("manifest.json", {"hdrq_deploy.formats.records"}),
        ("precision.json", {"hdrq_deploy.formats.engine_folder"}),
        ("model.plan", {"hdrq_deploy.formats.engine_folder"}),
        ("model.onnx.data", {"hdrq_deploy.formats.engine_folder"}),
        ("golden.safetensors", {"hdrq_deploy.formats.golden_inputs"}),
        ("weights.safetensors", {"hdrq_deploy.formats.bundle"}),
    ],
)
def test_a_file_has_one_owner(file: str, owners: set[str]) -> None:
    assert set(structure.knows(MODULES, file)) == owners


def test_one_module_makes_network_inputs_of_images() -> None:
    assert structure.normalises(MODULES) == ["hdrq_deploy.formats.preprocessing"]


def test_the_library_does_not_print() -> None:
    """Commands print, and so do the processes that are commands of their own."""
    commands = {"hdrq_deploy.exporters.trt_worker", "hdrq_deploy.runtime.ros2"}
    for name, module in MODULES.items():
        if name.startswith("hdrq_deploy.cli.") or name in commands:
            continue
        if name.endswith((".calibration_data.training", ".runtime.once", ".formats.notes")):
            continue
        calls = [n for n in ast.walk(module.tree) if isinstance(n, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), name


def test_the_library_names_no_flags() -> None:
    """A caller from Python has no ``-o``; only the command line speaks of flags."""
    flag = re.compile(r"(?<![\w-])--?[a-z][a-z-]+(?![\w=-]*/)")
    for name, module in MODULES.items():
        if name.startswith("hdrq_deploy.cli."):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                texts = [
                    n.value
                    for n in ast.walk(node.exc)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                named = [t for t in texts if flag.search(t.replace("`ray start --head`", ""))]
                assert not named, f"{name}:{node.lineno} {named}"


@pytest.mark.parametrize("name", MODULES)
def test_all_is_the_truth(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None)
    assert public is not None or MODULES[name].path.name == "__init__.py", "no __all__"
    for entry in public or ():
        getattr(module, entry)


def test_checkers_of_types_see_which_names_a_module_has() -> None:
    """A bare ``__getattr__`` of a module has every name for mypy, so that a wrong import passes.

    It stands behind ``if not TYPE_CHECKING``.
    """
    for name, module in MODULES.items():
        bare = [node.name for node in module.tree.body if isinstance(node, ast.FunctionDef)]
        assigned = [node for node in module.tree.body if isinstance(node, ast.Assign)]
        bare += [t.id for node in assigned for t in node.targets if isinstance(t, ast.Name)]
        assert "__getattr__" not in bare, name


def test_what_other_modules_import_is_public() -> None:
    for name, module in MODULES.items():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = module.package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(p for p in (base, node.module) if p)
            public = getattr(sys.modules.get(origin), "__all__", None)
            if origin not in MODULES or public is None:
                continue
            private = [
                a.name
                for a in node.names
                if a.name not in public and f"{origin}.{a.name}" not in MODULES
            ]
            assert not private, f"{name} imports {private} from {origin}"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_readme_and_ci_run_the_same_tests() -> None:
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"<!-- tests -->\n```sh\n(.*)\n```", readme)
    for tool in ("ruff check", "ruff format --check", "typecheck.py", "pytest"):
        assert tool in command
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


def test_the_evidence_pages_are_those_of_the_committed_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = _load(ROOT / "benchmarks" / "tables.py")
    folder = ROOT / "docs" / "evidence"
    assert {path.name: path.read_text() for path in folder.glob("*.md")} == tables.pages()
    assert tables.headline() in (ROOT / "README.md").read_text()
