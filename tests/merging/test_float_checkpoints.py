"""Float checkpoints merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hdrq_deploy.cli import merge as merge_command
from hdrq_deploy.merging import merge_checkpoints


def checkpoints(folder: Path, count: int = 2) -> tuple[list[Path], list[dict[str, Any]], Any]:
    rng = np.random.default_rng(0)

    def state() -> dict[str, Any]:
        return {
            "conv.weight": rng.normal(0, 1, (4, 3, 3, 3)).astype(np.float32),
            "bn.running_mean": rng.normal(0, 1, 4).astype(np.float32),
            "bn.running_var": rng.uniform(0.5, 2, 4).astype(np.float32),
            "bn.num_batches_tracked": np.array(7, np.int64),
        }

    base, states = state(), [state() for _ in range(count)]
    paths = []
    for i, tensors in enumerate((*states, base)):
        paths.append(folder / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    return paths[:-1], states, (paths[-1], base)


def test_checkpoints_merge_as_numpy_says(tmp_path: Path) -> None:
    paths, states, (base_path, base) = checkpoints(tmp_path)
    mix = [0.25, 0.75]
    out = tmp_path / "m.safetensors"
    got = load_file(merge_checkpoints(paths, out, mix))
    stacked = {k: np.stack([s[k] for s in states]) for k in states[0]}
    w = np.array(mix)
    np.testing.assert_allclose(
        got["conv.weight"], np.tensordot(w, stacked["conv.weight"], 1), rtol=1e-6
    )
    means, variances = stacked["bn.running_mean"], stacked["bn.running_var"]
    mixture = w @ (variances + means**2) - (w @ means) ** 2  # E[x^2] - E[x]^2
    np.testing.assert_allclose(got["bn.running_var"], mixture, rtol=1e-5)
    assert got["bn.num_batches_tracked"] == 7
    task = load_file(merge_checkpoints(paths, out, mix, "task-arithmetic", base_path, 1.5))
    change = np.tensordot(w, stacked["conv.weight"] - base["conv.weight"], 1)
    np.testing.assert_allclose(
        task["conv.weight"], base["conv.weight"] + 1.5 * change, rtol=1e-4, atol=1e-6
    )
    ties = load_file(merge_checkpoints(paths, out, mix, "ties", base_path, density=0.3))
    vectors = [(s["conv.weight"] - base["conv.weight"]).ravel() for s in states]
    expected = []
    kept = [set(np.argsort(-np.abs(v))[: round(0.3 * v.size)]) for v in vectors]
    for j in range(vectors[0].size):  # one element at a time
        parts = [
            m * float(v[j]) if j in k else 0.0 for m, v, k in zip(mix, vectors, kept, strict=True)
        ]
        sign = np.sign(sum(parts))
        agreeing = [i for i, part in enumerate(parts) if part and np.sign(part) == sign]
        total = sum(mix[i] for i in agreeing)
        expected.append(sum(parts[i] for i in agreeing) / total if agreeing else 0.0)
    moved = (ties["conv.weight"] - base["conv.weight"]).ravel()
    np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_checkpoints_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, states, _ = checkpoints(tmp_path)
    odd = {**states[0], "conv.weight": np.zeros((4, 3, 1, 1), np.float32)}
    save_file(odd, tmp_path / "odd.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\x05" * 30)
    out = str(tmp_path / "m.safetensors")
    first = str(paths[0])
    cases = [
        ([first, str(tmp_path / "odd.safetensors")], "conv.weight"),
        ([first, str(tmp_path / "junk.safetensors")], "cannot be read as safetensors"),
        ([first], "two or more"),
        ([first, str(paths[1]), "--method", "ties"], "give it as --base"),
        ([first, str(paths[1]), "--weights", "0.5", "0.6"], "sum 1.1"),
        ([first, str(paths[1]), "--weights", "auto"], "works on bundles"),
        ([first, str(paths[1]), "--weights", "half", "half"], "one number per bundle"),
    ]
    for argv, message in cases:
        capsys.readouterr()
        assert merge_command.main([*argv, "-o", out]) == 2, argv
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not Path(out).exists()
