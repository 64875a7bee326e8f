"""The base install, as a device gets it: every Python at hand, no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import merge
from hdrq_deploy.exporters import export
from hdrq_deploy.runtime import load_engine

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
# The oldest and the newest that are supported; the suite itself runs on one between them.
VERSIONS = ("3.10", "3.13")
WALK = """
import importlib.util, json, pathlib, subprocess, sys
import numpy as np

def seconds():
    code = "from time import time as now; t = now(); import hdrq_deploy.runtime; print(now() - t)"
    return min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))

import_s = seconds()
from hdrq_deploy import merge
from hdrq_deploy.exporters import export
from hdrq_deploy.mixing import DomainMixer
from hdrq_deploy.runtime import benchmark, load_engine

night, day, data, out = map(pathlib.Path, sys.argv[1:])
merged = merge([night, day], out / "merged.hdrq", [0.25, 0.75], "nearest")
engine = export(merged, out / "engine")
result = benchmark(engine, {"d": data}, iterations=5, threads=1)
with np.load(data) as file:
    x = file["x"][:8]
with load_engine(engine) as run, DomainMixer([night, day], threads=1) as mixer:
    mixer.set({"night": 0.25, "day": 0.75}).result()
    same = bool(np.array_equal(run(x), mixer(x)))
files = [f for f in pathlib.Path(sys.prefix).rglob("*") if f.is_file() and not f.is_symlink()]
print(json.dumps({
    "same": same,
    "accuracy": result.accuracy.domains,
    "torch": importlib.util.find_spec("torch") is not None or "torch" in sys.modules,
    "import_s": import_s,
    "megabytes": sum(f.stat().st_size for f in files) / 1e6,
}))
"""

CALIBRATE = ("--model", "tiny_models:Tiny", "--domain", "night", "--method", "rtn", "-o", "n.hdrq")


def interpreter(wanted: str) -> str | None:
    """A Python of this version: the running one, pyenv's, or one on PATH."""
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == wanted:
        return sys.executable
    folders = sorted((Path.home() / ".pyenv" / "versions").glob(f"{wanted}.*/bin/python"))
    found = shutil.which(f"python{wanted}")
    for candidate in [str(f) for f in reversed(folders)] + ([found] if found else []):
        done = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and f" {wanted}." in done.stdout:
            return candidate
    return None


def copy_package(target: Path) -> None:
    """What an install reads: the folders that pyproject maps, and not a virtual environment."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, target)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("hdrq_deploy", "exporters", "runtime", "calibration_data"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)


def test_an_install_copies_the_package_alone(tmp_path: Path) -> None:
    # The whole tree with a virtual environment in it is 13 GB, four times: a disk full of it.
    copy_package(tmp_path / "source")
    size = sum(f.stat().st_size for f in (tmp_path / "source").rglob("*") if f.is_file())
    assert size < 50e6


@pytest.mark.network
def test_a_wheel_is_small_and_a_source_distribution_whole(tmp_path: Path) -> None:
    copy_package(tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 1e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packages = {name.rpartition("/")[0].replace("/", ".") for name in names if name.endswith(".py")}
    assert packages == set(PACKAGES) and "hdrq_deploy/py.typed" in names
    assert not [name for name in names if name.endswith(".safetensors")]
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run(
        [sys.executable, "-c", build], check=True, cwd=tmp_path / "source", capture_output=True
    )
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        held = [name for name in archive.getnames() if name.endswith(".safetensors")]
    assert len(held) == 8


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("wanted", VERSIONS)
def test_a_device_merges_exports_runs_and_mixes(
    wanted: str, make: Any, work: Path, tmp_path: Path
) -> None:
    # Without any of them, the running one shows at least that a base install is enough.
    python = interpreter(wanted) or (sys.executable if wanted == VERSIONS[0] else None)
    if python is None:
        pytest.skip(f"no Python {wanted} at hand")
    night, day = (make(domain=d, fold="steps") for d in ("night", "day"))
    source = tmp_path / "source"  # a build leaves files in the tree
    copy_package(source)
    quiet = {"PATH": os.environ["PATH"], "HOME": str(Path.home())}

    def call(*command: object, code: int = 0) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            env=quiet,
            cwd=tmp_path,
        )
        assert done.returncode == code, done.stderr[-2000:]
        return done.stderr if code else done.stdout

    call(python, "-m", "venv", tmp_path / "venv")
    ours = tmp_path / "venv" / "bin" / "python"
    call(ours, "-m", "pip", "install", "--quiet", source)
    data = work / "data.npz"
    found = json.loads(call(ours, "-c", WALK, night.path, day.path, data, tmp_path))
    assert found["same"] and not found["torch"]
    # The commands too; one that needs torch says how to get it.
    programs, merged_here = ours.parent, tmp_path / "commands.hdrq"
    call(programs / "hdrq-merge", night.path, day.path, "-o", merged_here)
    call(programs / "hdrq-export", merged_here, "--engine", "ort", "-o", tmp_path / "commands")
    figures = tmp_path / "o.json"
    call(programs / "hdrq-bench", tmp_path / "commands", "--data", f"d={data}", "--json", figures)
    assert json.loads(figures.read_text())["accuracy"]["images"] == {"d": 48}
    refused = call(programs / "hdrq-calibrate", *CALIBRATE, "--data", data, code=2)
    assert "hdrq-deploy[calibrate]" in refused and refused.count("\n") == 1
    merged = merge([night, day], tmp_path / "here.hdrq", [0.25, 0.75], "nearest")
    with np.load(data) as file, load_engine(export(merged, tmp_path / "e")) as engine:
        accuracy = float((engine(file["x"]).argmax(1) == file["y"]).mean())
        one = 1.01 / len(file["y"])
    # Another version of ONNX Runtime may decide one image in another way.
    assert found["accuracy"]["d"] == pytest.approx(accuracy, abs=one)
    # Read off: 300 MB, of which onnxruntime, numpy, sympy and onnx are 250; 0.25 s. The bounds
    # catch a dependency or an import that should not be there, not a slow machine.
    assert found["megabytes"] < 400, found
    assert found["import_s"] < 1.5, found
    print(f"Python {wanted}: {found['megabytes']:.0f} MB, import {found['import_s']:.2f} s")
