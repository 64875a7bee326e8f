"""The page CONTRIBUTING.md does what it says, in a copy of the package."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hdrq_deploy import Bundle
from hdrq_deploy.numerics.quantization import dequantize, quantize

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("exporters", "runtime", "calibration_data")
_BLOCK = re.compile(
    r"^ *<!-- (write|edit|run) ?(\S*) ?-->\n( *)```\w+\n(.*?)^ *```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A block of the page that a reader follows: what to do, on which file, and the text."""

    action: str
    file: str
    text: str


def blocks() -> Iterator[Block]:
    for action, file, _, text in _BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()):
        yield Block(action, file, textwrap.dedent(text))


class Copy:
    """The package in a folder of its own, where files can be added and edited."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignored = shutil.ignore_patterns("__pycache__", "checkpoints")
        shutil.copytree(ROOT / "hdrq_deploy", root / "hdrq_deploy", ignore=ignored)
        for room in MAPPED:
            shutil.copytree(ROOT / room, root / "hdrq_deploy" / room, ignore=ignored)

    def path(self, file: str) -> Path:
        return self.root / ("hdrq_deploy" if file.split("/")[0] in MAPPED else "") / file

    def follow(self, block: Block) -> None:
        path = self.path(block.file)
        if block.action == "write":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            return
        lines = block.text.splitlines()
        before = "\n".join(line[1:] for line in lines if line[0] in " -")
        after = "\n".join(line[1:] for line in lines if line[0] in " +")
        text = path.read_text()
        assert text.count(before) == 1, f"{block.file} does not hold once:\n{before}"
        path.write_text(text.replace(before, after))

    def python(self, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.root)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    copy = Copy(tmp_path_factory.mktemp("contributing"))
    for block in blocks():
        if block.action != "run":
            copy.follow(block)
    return copy


def test_the_page_has_the_blocks_that_are_followed() -> None:
    assert [(block.action, Path(block.file).name) for block in blocks()] == [
        ("write", "magnitude.py"),
        ("edit", "__init__.py"),
        ("edit", "__init__.py"),
        ("write", "test_magnitude.py"),
        ("run", ""),
        ("write", "single_array.py"),
        ("edit", "__init__.py"),
        ("edit", "__init__.py"),
    ]


def test_the_test_of_the_page_passes(followed: Copy) -> None:
    followed.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")


def test_the_commands_of_the_page_merge_checkpoints_and_bundles(followed: Copy, make: Any) -> None:
    rng = np.random.default_rng(0)
    states = [{"weight": rng.normal(size=(5, 7)).astype(np.float32)} for _ in range(2)]
    for domain, state in zip(("night", "day"), states, strict=True):
        save_file(state, followed.root / f"{domain}.safetensors")
        shutil.copytree(make(domain=domain).path, followed.root / f"{domain}.hdrq")
    script = "import sys; from hdrq_deploy.cli.merge import main; sys.exit(main())"
    (block,) = [block for block in blocks() if block.action == "run"]
    for line in block.text.splitlines():
        command, *arguments = shlex.split(line)
        assert command == "hdrq-merge"
        followed.python("-c", script, *arguments)

    a, b = (state["weight"] for state in states)
    merged = load_file(followed.root / "merged.safetensors")["weight"]
    np.testing.assert_array_equal(merged, np.where(np.abs(a) >= np.abs(b), a, b))

    night, day, bundle = (
        Bundle.open(followed.root / f"{name}.hdrq") for name in ("night", "day", "merged")
    )
    assert bundle.manifest.domains == {"night": 0.4, "day": 0.6}
    codes = {name: e for name, e in bundle.manifest.tensors.items() if e.role == "codes"}
    assert codes
    for name, entry in codes.items():
        p, q = (
            dequantize(parent.tensor(name), parent.tensor(entry.scale), entry.axis).astype(float)
            for parent in (night, day)
        )
        real = np.where(0.4 * np.abs(p) >= 0.6 * np.abs(q), p, q)
        scale = bundle.tensor(entry.scale).astype(float)
        np.testing.assert_array_equal(bundle.tensor(name), quantize(real, scale, entry.spec))


def test_the_reader_of_the_page_reads(followed: Copy) -> None:
    x = np.random.default_rng(0).random((6, 3, 4, 4), dtype=np.float32)
    np.save(followed.root / "x.npy", x)
    code = (
        "import numpy as np; from hdrq_deploy.calibration_data.readers import read; "
        "np.save('read.npy', read('x.npy', limit=4, seed=1).x)"
    )
    followed.python("-c", code)
    rows = np.sort(np.random.default_rng(1).permutation(6)[:4])
    np.testing.assert_array_equal(np.load(followed.root / "read.npy"), x[rows])
