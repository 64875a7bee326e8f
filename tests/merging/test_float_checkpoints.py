"""Float checkpoints merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hdrq_deploy.cli import merge as merge_command
from hdrq_deploy.formats.checkpoints import checkpoint_sha256, open_checkpoint
from hdrq_deploy.formats.statistics import NormRecord, Statistics
from hdrq_deploy.merging import merge_checkpoints
from tests.merging.seen import drawn_rows, statistics_of


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


def seen(
    path: Path, checkpoint: Path, rows: Any, bias: str | None, norm: NormRecord | None = None
) -> Path:
    """A file of statistics of the checkpoint's convolution."""
    layers = {"conv.weight": statistics_of(rows)}
    norms = {} if norm is None else {"conv.weight": norm}
    statistics = Statistics("full", {"conv.weight": (bias, "conv")}, layers, {}, norms)
    digest = checkpoint_sha256(open_checkpoint(checkpoint))
    path.write_bytes(statistics.serialize_for_checkpoint("conv", digest, "images"))
    return path


@pytest.mark.parametrize("affine", [True, False])
def test_checkpoints_are_merged_by_least_squares_behind_batchnorm(
    tmp_path: Path, affine: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, shares = np.random.default_rng(6), [0.3, 0.7]
    # A module of one's own may call its moments as it likes.
    names = ("bn.weight", "bn.bias") if affine else (None, None)
    mean, variance = (f"bn.{'running' if affine else 'moving'}_{name}" for name in ("mean", "var"))
    norm = NormRecord(
        gamma=names[0],
        beta=names[1],
        mean=mean,
        variance=variance,
        eps=1e-3,
        raw_bias="conv.bias",
    )
    rows = [drawn_rows(seed, 1, 27)[0] for seed in range(2)]
    paths, files, states = [], [], []
    for i in range(2):
        state = {"conv.weight": rng.normal(0, 1, (4, 3, 3, 3)), "conv.bias": rng.normal(0, 1, 4)}
        state |= {mean: rng.normal(0, 1, 4), variance: rng.uniform(1, 9, 4)}
        if affine:
            state |= {"bn.weight": rng.uniform(0.2, 2, 4), "bn.bias": rng.normal(0, 1, 4)}
        states.append({name: value.astype(np.float32) for name, value in state.items()})
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(states[-1], paths[-1])
        files.append(
            seen(tmp_path / f"seen{i}.safetensors", paths[i], rows[i][None], "conv.bias", norm)
        )
    exact: dict[str, Any] = {"statistics": files, "alpha": 1.0, "ridge": 0.0}
    got = load_file(
        merge_checkpoints(paths, tmp_path / "m.safetensors", shares, "regression", **exact)
    )

    def behind(state: Any, x: Any) -> Any:
        y = x @ state["conv.weight"].reshape(4, -1).T.astype(np.float64) + state["conv.bias"]
        y = (y - state[mean]) / np.sqrt(state[variance] + 1e-3)
        return y * state["bn.weight"] + state["bn.bias"] if affine else y

    sides: list[Any] = [[], []]
    for x, state, share in zip(rows, states, shares, strict=True):
        root = np.sqrt(share / len(x))
        sides[0].append(root * np.hstack([x, np.ones((len(x), 1))]))
        sides[1].append(root * behind(state, x))
    solution = np.linalg.lstsq(np.vstack(sides[0]), np.vstack(sides[1]))[0]
    for x, state in zip(rows, states, strict=True):
        best = np.hstack([x, np.ones((len(x), 1))]) @ solution
        # The file holds statistics as codes.
        assert np.abs(behind(got, x) - best).max() < 0.05 * behind(state, x).std()
    bias = sum(share * state["conv.bias"] for share, state in zip(shares, states, strict=True))
    np.testing.assert_allclose(got["conv.bias"], bias, rtol=1e-5)
    # A norm of another size is none of this layer: it is merged in front of it, bias and all.
    wrong = norm.model_copy(update={"mean": "conv.weight"})
    exact["statistics"] = [
        seen(tmp_path / f"wrong{i}.safetensors", paths[i], rows[i][None], "conv.bias", wrong)
        for i in range(2)
    ]
    in_front = load_file(
        merge_checkpoints(paths, tmp_path / "m.safetensors", shares, "regression", **exact)
    )
    assert np.abs(in_front["conv.bias"] - bias).max() > 1e-3
    # So it is where one file is of a version that named no norms, and the log says which.
    assert not capsys.readouterr().err
    old = seen(tmp_path / "old.safetensors", paths[1], rows[1][None], "conv.bias")
    exact["statistics"] = [files[0], old]
    mixed = load_file(
        merge_checkpoints(paths, tmp_path / "m.safetensors", shares, "regression", **exact)
    )
    np.testing.assert_array_equal(mixed["conv.bias"], in_front["conv.bias"])
    told = capsys.readouterr().err
    assert "behind 1 layer(s) alike" in told and told.rstrip().endswith(f"for {old}")


def test_checkpoints_are_merged_by_least_squares_on_their_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(5)
    rows = [drawn_rows(seed, 1, 27) for seed in range(2)]
    paths, states = [], []
    for i in range(2):
        weight, bias = rng.normal(0, 1, (4, 3, 3, 3)), rng.normal(0, 1, 4)
        states.append({"conv.weight": weight, "conv.bias": bias, "other": rng.normal(0, 1, 6)})
        states[-1] = {name: value.astype(np.float32) for name, value in states[-1].items()}
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(states[-1], paths[-1])
    files = [
        seen(tmp_path / f"seen{i}.safetensors", paths[i], rows[i], "conv.bias") for i in range(2)
    ]
    out = tmp_path / "m.safetensors"
    exact: dict[str, Any] = {"statistics": files, "alpha": 1.0, "ridge": 0.0}
    got = load_file(merge_checkpoints(paths, out, [0.3, 0.7], "regression", **exact))
    sides: list[Any] = [[], []]
    for x, state, share in zip(rows, states, [0.3, 0.7], strict=True):
        longer = np.hstack([x[0], np.ones((x.shape[1], 1))]) * np.sqrt(share / x.shape[1])
        wide = np.hstack([state["conv.weight"].reshape(4, -1), state["conv.bias"][:, None]])
        sides[0].append(longer)
        sides[1].append(longer @ wide.T)
    expected = np.linalg.lstsq(np.vstack(sides[0]), np.vstack(sides[1]))[0].T
    found = np.hstack([got["conv.weight"].reshape(4, -1), got["conv.bias"][:, None]])
    # The file holds them in half precision.
    np.testing.assert_allclose(found, expected, atol=0.05)
    mean = 0.3 * states[0]["other"] + 0.7 * states[1]["other"]
    np.testing.assert_allclose(got["other"], mean, rtol=1e-6)
    average = 0.3 * states[0]["conv.weight"] + 0.7 * states[1]["conv.weight"]
    assert np.abs(got["conv.weight"] - average).max() > 0.1

    names = [str(path) for path in paths]
    for flags, message in (
        (["--method", "regression"], "found 0 files of statistics for 2"),
        (["--method", "mean", "--statistics", *map(str, files)], "does not read them"),
        (["--method", "regression", "--statistics", *map(str, files[::-1])], "in the order"),
    ):
        assert merge_command.main([*names, *flags, "-o", str(tmp_path / "no.safetensors")]) == 2
        assert message in capsys.readouterr().err
    # Statistics ask for regression; the file says how it was merged.
    command = [*names, "--statistics", *map(str, files)]
    assert merge_command.main([*command, "--alpha", "0.5", "-o", str(out)]) == 0
    with safe_open(out, "np") as file:
        told = json.loads(file.metadata()["merged"])
    assert told == {"method": "regression", "weights": [0.5, 0.5], "alpha": 0.5, "ridge": 1e-4}
