"""mypy over the package as it looks once installed, and over what makes the evidence.

``exporters/``, ``runtime/`` and ``calibration_data/`` are mapped into the package by the build
backend, which no type checker reads; a tree of links in ``build/typing`` shows them the result.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("exporters", "runtime", "calibration_data")


def link_tree(into: Path) -> None:
    """Make ``into/hdrq_deploy`` look as it does once installed, with links to the sources."""
    package = into / "hdrq_deploy"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / "hdrq_deploy").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in MAPPED:
        (package / name).symlink_to(ROOT / name)


def main() -> int:
    """Run mypy --strict."""
    tree = ROOT / "build" / "typing"
    link_tree(tree)
    config = str(ROOT / "pyproject.toml")
    command = [sys.executable, "-m", "mypy", "--config-file", config, "-p", "hdrq_deploy"]
    for entry in sorted((ROOT / "benchmarks").iterdir()):  # scripts, and packages of theirs
        if entry.suffix == ".py":
            command += ["-m", entry.stem]
        elif (entry / "__init__.py").is_file():
            command += ["-p", entry.name]
    return subprocess.run(command, cwd=tree, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
