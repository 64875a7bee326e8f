"""Check a release before it is published: build, metadata, contents, clean installs, a walk.

``python tests/release_check.py`` builds the source distribution, and the wheel from it, checks
their metadata with twine, looks for what must be inside, installs each into a fresh environment and
runs ``tests/device_walk.py`` there, away from the sources. It needs ``build`` and ``twine``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folders that a build would copy in vain, or must not read.
LEFT_OUT = ("build", "dist", ".*", "*.egg-info", "__pycache__", "hdrq-demo")
IN_WHEEL = (
    "hdrq_deploy/py.typed",
    "hdrq_deploy/runfile/hdrq.schema.json",
    "hdrq_deploy/exporters/__init__.py",
    "hdrq_deploy/runtime/bench/__init__.py",
    "hdrq_deploy/calibration_data/readers/__init__.py",
)
IN_SOURCE = (
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "CITATION.cff",
    "SECURITY.md",
    "hdrq_deploy/runfile/hdrq.schema.json",
    "exporters/__init__.py",
    "calibration_data/checkpoints/fonts.safetensors",
)


def lacking(names: Iterable[str], needed: Sequence[str]) -> list[str]:
    """What of ``needed`` is not among the names of an archive."""
    held = set(names)
    return [name for name in needed if name not in held]


def check_contents(wheel: Path, source: Path) -> None:
    """Raise SystemExit where an archive lacks a file, or holds what it should not."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = lacking(names, IN_WHEEL)
    foreign = [n for n in names if not n.startswith(("hdrq_deploy/", "hdrq_deploy-"))]
    foreign += [n for n in names if n.endswith((".safetensors", ".pyc"))]
    if missing or foreign:
        raise SystemExit(f"{wheel.name}: lacks {missing}, should not hold {foreign}")
    with tarfile.open(source) as packed:
        names = [name.partition("/")[2] for name in packed.getnames()]
    if missing := lacking(names, IN_SOURCE):
        raise SystemExit(f"{source.name}: lacks {missing}")


def call(*command: object, cwd: Path) -> None:
    """Run, or end with the command's code."""
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    done = subprocess.run(words, cwd=cwd)
    if done.returncode:
        raise SystemExit(done.returncode)


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and source distribution of a copy of the tree; a build leaves files where it works."""
    copy = folder / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    call(sys.executable, "-m", "build", "--outdir", folder / "dist", copy, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    (source,) = (folder / "dist").glob("*.tar.gz")
    return wheel, source


def walk(archive: Path, folder: Path) -> None:
    """Install into a fresh environment and use what is installed."""
    call(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    call(*pip, archive, cwd=folder)
    call(python, "-m", "pip", "check", cwd=folder)
    call(python, "-I", ROOT / "tests" / "device_walk.py", cwd=folder)


def main() -> int:
    """Check everything; the first failure ends it."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dist", type=Path, help="folder to copy the checked archives to")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, source = build(folder)
        call(sys.executable, "-m", "twine", "check", "--strict", wheel, source, cwd=folder)
        check_contents(wheel, source)
        for archive in (wheel, source):
            walk(archive, folder / f"env-{archive.suffix[1:]}")
        if args.dist:
            args.dist.mkdir(parents=True, exist_ok=True)
            for archive in (wheel, source):
                shutil.copy(archive, args.dist)
    print("the release is fit to be published")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
