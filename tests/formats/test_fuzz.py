"""Damaged and hostile files get one line and exit code 2 or 3; nothing hangs, runs or is left.

``HDRQ_FUZZ_COUNT`` and ``HDRQ_FUZZ_SEED`` change how many mutations are tried, and which.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hdrq_deploy.cli import bench
from hdrq_deploy.exporters import export

FUZZ = Path(__file__).with_name("fuzz.py")
COUNT = int(os.environ.get("HDRQ_FUZZ_COUNT", "300"))
SEED = os.environ.get("HDRQ_FUZZ_SEED", "0")
# Of one mutation; the worker itself gives up earlier unless native code holds it.
STALLED = 200


@pytest.fixture(scope="module")
def valid(make: Any, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid file or folder of every kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name, domain in (("a", "night"), ("b", "day")):
        made = make(domain=domain, statistics="auto")
        shutil.copytree(made.path, folder / f"{name}.hdrq")
        state = load_file(work / f"Tiny-{domain}.safetensors")
        shutil.copy(work / f"Tiny-{domain}.safetensors", folder / f"{name}.safetensors")
        torch.save({"state_dict": state, "epoch": 3}, folder / f"{name}.pt")
    shutil.copytree(make("Attention").path, folder / "c.hdrq")
    for name, source in (("ort", "a.hdrq"), ("onnx", "c.hdrq")):
        export(folder / source, folder / name, name)
    for name, version in (("trt", (10, 3, 0, 0)), ("trt-rtx", (1, 7, 1, 0))):
        shutil.copytree(folder / "onnx", folder / name)
        (folder / name / "model.plan").write_bytes(
            b"ftrt" + b"\1" * 20 + bytes(version) + b"\0" * 500
        )
        manifest = json.loads((folder / name / "manifest.json").read_text())
        (folder / name / "manifest.json").write_text(json.dumps({**manifest, "engine": name}))
    shutil.copy(work / "data.npz", folder)
    shutil.copy(work / "tiny_models.py", folder)
    for i, (shade, suffix) in enumerate(
        (s, x) for s in (40, 90, 200) for x in ("png", "jpg", "bmp")
    ):
        target = folder / "images" / str(i % 4)
        target.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (shade, 255 - shade, i)).save(target / f"{i}.{suffix}")
    values = {"method": "hdrq", "wbits": 4, "abits": 8, "iters": 50, "lr": 1e-3, "keep_best": True}
    (folder / "recipe.json").write_text(json.dumps(values))
    (folder / "recipe.yaml").write_text(
        "".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items())
    )
    flags = ["--iterations", "30", "--warmup", "0", "--threads", "1", "--json"]
    data = ["--data", f"night={folder / 'data.npz'}"]
    assert bench.main([str(folder / "ort"), *data, *flags, str(folder / "bench.json")]) == 0
    (folder / "secret.txt").write_text("secret" * 100)
    return folder


def results(folder: Path, seed: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """What came of every mutation, those included that end the worker."""
    found: list[dict[str, Any]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    number, end = first, first + count
    while number < end:
        command = [sys.executable, str(FUZZ), str(folder), seed, str(number), str(end - number)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env=environment, cwd=folder
        ) as process:
            assert process.stdout
            for record in _lines(process):
                if isinstance(record, int):
                    number = record
                else:
                    found.append(record)
                    number = record["number"] + 1
            process.kill()
            code = process.wait()
        if number < end:
            found.append({"number": number, "reader": "?", "outcome": f"CRASH {code}", "label": ""})
            number += 1
    return found


def _lines(process: subprocess.Popen[bytes]) -> Any:
    """Numbers that begin and records that end, until the worker ends or stalls."""
    assert process.stdout
    text, deadline = b"", time.monotonic() + STALLED
    while time.monotonic() < deadline:
        if not select.select([process.stdout], [], [], 1.0)[0]:
            continue
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return
        deadline = time.monotonic() + STALLED
        *lines, text = (text + piece).split(b"\n")
        for line in lines:
            yield int(line[6:]) if line.startswith(b"begin ") else json.loads(line)


def test_damaged_and_hostile_files_are_refused_in_a_line(valid: Path) -> None:
    found = results(valid, SEED, COUNT)
    assert len(found) == COUNT
    wrong = [row for row in found if row["outcome"] not in {"accepted", "refused"}]
    assert wrong == [], "\n".join(map(json.dumps, wrong[:20]))
    outcomes = Counter((row["reader"], row["outcome"]) for row in found)
    for reader in {row["reader"] for row in found}:
        assert outcomes[reader, "refused"] > 0, outcomes
