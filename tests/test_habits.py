"""What the project says of itself is true; the release checks find what they look for."""

from __future__ import annotations

import importlib.util
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import hdrq_deploy

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

yaml = pytest.importorskip("yaml")
pytest.importorskip("packaging")
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


minimum, release = load("minimum_versions"), load("release_check")


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hdrq_deploy.__version__ == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "project" / "adr"
    index = (folder / "index.md").read_text()
    pages = sorted(page.name for page in folder.glob("0*.md"))
    assert re.findall(r"\((.*?\.md)\)", index) == pages and len(pages) >= 7
    for number, name in enumerate(pages, 1):
        text = (folder / name).read_text()
        title = re.match(rf"# {number}\. (.*)\n", text)
        assert title and f"[{title[1]}]" in index
        assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == ["Decision", "Why", "Cost"]


def test_hooks_and_sessions_run_what_is_there() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}  # nothing is downloaded
    text = (ROOT / "noxfile.py").read_text() + " ".join(hook["entry"] for hook in hooks)
    files = set(re.findall(r"tests/[\w/]+\.py", text))
    assert {f"tests/{n}.py" for n in ("minimum_versions", "release_check", "typecheck")} <= files
    assert all((ROOT / file).is_file() for file in files)
    for file, function in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert f"def {function}(" in (ROOT / file).read_text()
    (versions,) = re.findall(r"PYTHONS = \[(.*)\]", text)
    lowest = versions.split(", ")[0].strip('"')
    assert PROJECT["requires-python"] == f">={lowest}"


def test_lower_bounds_become_pins() -> None:
    table = {
        "name": "own",
        "dependencies": ["numpy>=1.24", 'tool>=2; python_version < "3.11"'],
        "optional-dependencies": {"a": ["own[b]", "x[grpc]>=1.5,<3"], "b": ["y>=0.3"]},
    }
    assert minimum.lowest((), "3.10", table) == ["numpy==1.24", "tool==2"]
    assert minimum.lowest((), "3.11", table) == ["numpy==1.24"]
    assert minimum.lowest(["a"], "3.10", table) == ["y==0.3", "x[grpc]==1.5"]


@pytest.mark.parametrize("wrong", [["numpy"], ["numpy<2"], ["numpy>=1", "numpy>=2"]])
def test_a_requirement_without_one_lower_bound_is_refused(wrong: list[str]) -> None:
    with pytest.raises(ValueError, match="needed one"):
        minimum.lowest((), "3.10", {"name": "own", "dependencies": wrong})


def test_every_requirement_of_the_project_has_a_lower_bound() -> None:
    minimum.lowest((), "3.10", PROJECT)
    for extra in PROJECT["optional-dependencies"]:
        minimum.lowest([extra], "3.10", PROJECT)


def archives(folder: Path, in_wheel: list[str], in_source: list[str]) -> tuple[Path, Path]:
    wheel, source = folder / "own.whl", folder / "own.tar.gz"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in in_wheel:
            made.writestr(name, "")
    with tarfile.open(source, "w:gz") as packed:
        for name in in_source:
            packed.addfile(tarfile.TarInfo(f"own-1/{name}"))
    return wheel, source


def test_a_wheel_without_its_data_is_no_release(tmp_path: Path) -> None:
    wheel, source = list(release.IN_WHEEL), list(release.IN_SOURCE)
    release.check_contents(*archives(tmp_path, wheel, source))
    schema = "hdrq_deploy/runfile/hdrq.schema.json"
    for inside, packed, said in (
        ([name for name in wheel if name != schema], source, "lacks .*hdrq.schema.json"),
        (wheel, [name for name in source if name != "LICENSE"], "own.tar.gz: lacks .*LICENSE"),
        ([*wheel, "exporters/__init__.py"], source, r"should not hold \['exporters/__init__.py"),
        ([*wheel, "hdrq_deploy/a.safetensors"], source, "should not hold .*a.safetensors"),
    ):
        with pytest.raises(SystemExit, match=said):
            release.check_contents(*archives(tmp_path, inside, packed))


def test_large_files_are_found(tmp_path: Path) -> None:
    module = load("large_files")
    for name, size in (("small", module.LARGEST), ("large", module.LARGEST + 1)):
        (tmp_path / name).write_bytes(b"x" * size)
    files = [str(tmp_path / name) for name in ("small", "large", "absent")]
    assert module.large(files) == [str(tmp_path / "large")]
