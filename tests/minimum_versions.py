"""Install the lower bounds of pyproject.toml, and nothing newer, and run the tests on them.

``python tests/minimum_versions.py --python python3.10 --into build/minimum`` makes two fresh
environments: the base install, as a device has it, and the extras named by ``--extras``. Every
``>=`` becomes ``==``. A bound that names no release, or that tests fail on, is a false one.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
# What the environments need to run tests; their own bounds are those of the extra `dev`.
TOOLS = ("pytest", "pytest-timeout", "hypothesis")
# A device merges, exports, runs and mixes, from Python and by commands; no torch.
BASE_TESTS = ("tests/device_walk.py",)


def project() -> dict[str, Any]:
    """The ``[project]`` table."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def requirements(extras: Sequence[str], table: dict[str, Any]) -> Iterator[Requirement]:
    """Requirements of the base install and of these extras, extras of extras included."""
    texts = list(table["dependencies"]) if not extras else []
    for extra in extras:
        texts += table["optional-dependencies"][extra]
    for text in texts:
        requirement = Requirement(text)
        if requirement.name == table["name"]:
            yield from requirements(sorted(requirement.extras), table)
        else:
            yield requirement


def lowest(extras: Sequence[str], python: str, table: dict[str, Any] | None = None) -> list[str]:
    """The lower bounds as pins, for a version of Python.

    Raises:
        ValueError: A requirement without a lower bound, or two bounds of one package.
    """
    table = project() if table is None else table
    pins: dict[str, str] = {}
    for requirement in requirements(extras, table):
        if requirement.marker is not None and not requirement.marker.evaluate(
            {"python_version": python, "python_full_version": f"{python}.0"}
        ):
            continue
        bounds = [part.version for part in requirement.specifier if part.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"found {requirement}; needed one lower bound (>=)")
        inner = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        pin = f"{requirement.name}{inner}=={bounds[0]}"
        if pins.setdefault(requirement.name, pin) != pin:
            raise ValueError(f"found {pins[requirement.name]} and {pin}; needed one bound")
    return list(pins.values())


def tools(table: dict[str, Any]) -> list[str]:
    """The pins of what runs the tests."""
    pins = [Requirement(text) for text in table["optional-dependencies"]["dev"]]
    return [str(pin) for pin in pins if pin.name in TOOLS]


def _call(*command: object, cwd: Path = ROOT) -> None:
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    subprocess.run(words, check=True, cwd=cwd)


def install(python: str, folder: Path, pins: Sequence[str]) -> Path:
    """A fresh environment with these pins and the package; returns its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    _call(python, "-m", "venv", folder)
    ours = folder / "bin" / "python"
    pip = (ours, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _call(*pip, "setuptools>=77", *pins)
    _call(*pip, "--no-deps", "--no-build-isolation", "-e", ROOT)
    _call(ours, "-m", "pip", "check")
    listed = subprocess.run(
        [str(ours), "-m", "pip", "list", "--format", "freeze"], capture_output=True, text=True
    )
    print(listed.stdout, flush=True)
    return ours


def main() -> int:
    """Install and test; the exit code is that of the first step that failed."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--python", default="python3.10", help="interpreter (default: python3.10)")
    p.add_argument("--into", type=Path, default=ROOT / "build" / "minimum", help="environments")
    p.add_argument("--extras", nargs="*", default=["calibrate", "report", "models", "openvino"])
    p.add_argument("--only", choices=("base", "extras"), help="one of the two environments")
    p.add_argument("tests", nargs="*", help="arguments of pytest (default: all fast tests)")
    args = p.parse_args()
    version = re.findall(r"3\.\d+", subprocess.check_output([args.python, "--version"], text=True))[
        0
    ]
    table = project()
    base = lowest((), version, table)
    try:
        if args.only != "extras":
            python = install(args.python, args.into / "base", base)
            _call(python, *BASE_TESTS)
        if args.only != "base":
            pins = [*base, *lowest(args.extras, version, table), *tools(table)]
            python = install(args.python, args.into / "extras", pins)
            _call(python, "-m", "pytest", "-q", *(args.tests or ("-m", "not slow")))
    except subprocess.CalledProcessError as error:
        print(f"failed with code {error.returncode}", flush=True)
        return error.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
