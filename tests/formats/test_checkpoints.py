"""Checkpoints as training codes write them, for calibration and for merges alike."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hdrq_deploy.calibration.loading import load_checkpoint
from hdrq_deploy.cli import calibrate as calibrate_command
from hdrq_deploy.cli import merge as merge_command
from hdrq_deploy.errors import HdrqError, MergeError, ModelError
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.formats.checkpoints import bare_names, from_float32, open_checkpoint
from hdrq_deploy.merging import merge, merge_checkpoints

State = dict[str, torch.Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    torch.manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3).to(dtype),
        "bn.running_mean": torch.randn(4).to(dtype),
        "bn.running_var": (torch.rand(4) + 0.5).to(dtype),
        "bn.num_batches_tracked": torch.tensor(7),
        "gain": torch.tensor(0.5 + seed).to(dtype),
        "none": torch.zeros(0, 4).to(dtype),
    }


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def same(found: Any, expected: State) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def prefixed(start: str, values: State) -> State:
    return {start + name: value for name, value in values.items()}


WRAPPINGS = {
    "bare": lambda s: s,
    "ordered": OrderedDict,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "nested": lambda s: {"model": {"state_dict": prefixed("module.", s)}},
    "deepspeed": lambda s: {"module": s, "lr_scheduler": {"last": torch.zeros(1)}},
    "parallel": lambda s: {"state_dict": prefixed("module.", s)},
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "both": lambda s: prefixed("module._orig_mod.", s),
    "both, other way": lambda s: prefixed("_orig_mod.module.", s),
    "averaged model": lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.", s)},
    "a name of its own": lambda s: {"backbone": s, "epoch": 1, "note": {"a": 1}},
    "namespace": lambda s: {"args": argparse.Namespace(lr=0.1, data="x"), "model": s},
    "a config of that name": lambda s: {"model": {"name": "resnet"}, "state_dict": s},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_state_dict_is_found_wherever_it_lies(wrapping: str, tmp_path: Path) -> None:
    expected = state(0)
    path = saved(tmp_path / "c.pt", WRAPPINGS[wrapping](expected))
    same(load_checkpoint(path), expected)
    opened = open_checkpoint(path)
    same({n: torch.from_numpy(opened.read(n).copy()) for n in opened.tensors}, expected)


def test_parallel_and_compiled_models_are_named_as_torch_names_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    wrapped = nn.DataParallel(torch.compile(model))
    same(load_checkpoint(saved(tmp_path / "p.pt", wrapped.state_dict())), model.state_dict())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    same(load_checkpoint(saved(tmp_path / "a.pt", averaged.state_dict())), model.state_dict())
    # A part that is called module is the model's own.
    own = {"module.weight": "module.weight", "head.weight": "head.weight"}
    assert bare_names(own) == own
    two = ["_orig_mod.a", "a"]
    assert bare_names(two) == {name: name for name in two}


@pytest.mark.parametrize(
    "key", ["state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema"]
)
def test_averaged_weights_are_taken_and_the_command_says_so(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, averaged = state(0), state(1)
    path = saved(tmp_path / "c.pt", {"state_dict": plain, key: prefixed("module.", averaged)})
    same(load_checkpoint(path), averaged)
    part = {name: value for name, value in averaged.items() if not name.startswith("bn.")}
    lacking = saved(tmp_path / "d.pt", {"state_dict": plain, key: part})
    same(load_checkpoint(lacking), plain)
    assert capsys.readouterr().err == ""
    out = tmp_path / "m.safetensors"
    assert merge_command.main([str(path), str(lacking), "-o", str(out)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"hdrq-merge: {path}: found state_dict, {key}; took {key}, the averaged weights",
        f"hdrq-merge: {lacking}: found state_dict, {key}; took state_dict, because {key} lacks "
        "3 of its tensors (bn.num_batches_tracked)",
    ]
    expected = (plain["conv.weight"].double() + averaged["conv.weight"].double()) / 2
    torch.testing.assert_close(load_file(out)["conv.weight"], expected.float(), rtol=1e-6, atol=0)


def test_a_calibration_says_which_weights_it_took(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night, day = (load_file(work / f"Tiny-{d}.safetensors") for d in ("night", "day"))
    both = saved(tmp_path / "both.pt", {"model": night, "model_ema": day, "args": {"lr": 0.1}})
    argv = ["--model", "tiny_models:Tiny", "--data", f"{work}/data.npz", "--domain", "day"]
    argv += ["--method", "rtn", "--weights"]
    for weights, out in ((both, "a"), (work / "Tiny-day.safetensors", "b")):
        assert calibrate_command.main([*argv, str(weights), "-o", f"{tmp_path}/{out}.hdrq"]) == 0
    told = f"hdrq-calibrate: {both}: found model, model_ema; took model_ema, the averaged weights"
    assert capsys.readouterr().err.splitlines() == [told]
    a, b = (Bundle.open(tmp_path / f"{name}.hdrq") for name in "ab")
    assert a.manifest.files == b.manifest.files


class _Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


FOREIGN: dict[str, Any] = {
    "numpy scalar": {"model": state(0), "best": np.float64(0.9)},
    "path": {"model": state(0), "args": argparse.Namespace(data=PurePosixPath("/data"))},
    "whole module": nn.Conv2d(3, 4, 3),
    "code": {"model": state(0), "hook": _Evil()},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_objects_beside_the_tensors_are_refused_with_a_safe_recipe(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "c.pt", FOREIGN[kind])
    with pytest.raises(ModelError) as error:
        load_checkpoint(path)
    text = str(error.value)
    assert "\n" not in text and "torch.save(model.state_dict(), PATH)" in text
    assert "beside the tensors" in text and str(path) in text
    for advice in ("weights_only", "safe_globals", "arbitrary"):
        assert advice not in text
    assert not (tmp_path / "touched").exists()


def test_files_that_are_no_checkpoints_are_refused_in_a_line(tmp_path: Path) -> None:
    sparse = torch.eye(4).to_sparse()
    huge = torch.zeros(1).expand(1 << 40)
    files = {
        "found a list": saved(tmp_path / "list.pt", [1, 2]),
        "found no tensors under a known key": saved(tmp_path / "empty.pt", {"a": 1}),
        "found no tensors under a known key (there is net_a, net_b)": saved(
            tmp_path / "two.pt", {"net_a": state(0), "net_b": state(1)}
        ),
        "layout": saved(tmp_path / "sparse.pt", {"a": sparse}),
        "needed a value for every element": saved(tmp_path / "huge.pt", {"a": huge}),
        "on meta": saved(tmp_path / "meta.pt", {"a": torch.zeros(3, device="meta")}),
        "cannot be read as a checkpoint": tmp_path / "junk.pt",
        "which float32 cannot hold": saved(
            tmp_path / "wide.pt", {"a": torch.tensor([1.0, 1e300], dtype=torch.float64)}
        ),
        "found no file": tmp_path / "absent.pt",
        "found a TorchScript archive": tmp_path / "script.pt",
    }
    (tmp_path / "junk.pt").write_bytes(b"\x80\x02}q\x00.")
    torch.jit.script(nn.ReLU()).save(str(tmp_path / "script.pt"))
    save_file({"a": torch.tensor([-1e300], dtype=torch.float64)}, tmp_path / "wide.safetensors")
    for message, path in files.items():
        with pytest.raises(ModelError) as error:
            load_checkpoint(path)
        text = str(error.value)
        assert message in text.replace("quantized", "layout").replace("torch.sparse_coo", "layout")
        assert "\n" not in text and "weights_only" not in text, text
    with pytest.raises(ModelError, match=r"found 1e\+300 in a, which float32 cannot hold"):
        load_checkpoint(tmp_path / "wide.safetensors")


def torch_mean(a: State, b: State, name: str) -> torch.Tensor:
    """The merge of equal shares in float64 by torch, moments of variances matched."""
    x, y = a[name].double(), b[name].double()
    if name == "bn.running_var":
        gap = a["bn.running_mean"].double() - b["bn.running_mean"].double()
        return (x + y) / 2 + gap**2 / 4
    return (x + y) / 2


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("float32", "float32", "float32"),
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float64", "float64", "float64"),
        ("bfloat16", "float16", "float32"),
        ("float16", "float32", "float32"),
        ("float64", "bfloat16", "float64"),
    ],
)
def test_a_merge_has_the_parents_dtype_and_torchs_values(
    first: str, second: str, expected: str, suffix: str, tmp_path: Path
) -> None:
    states = [state(i, getattr(torch, kind)) for i, kind in enumerate((first, second))]
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for path, values in zip(paths, states, strict=True):
        torch.save(values, path) if suffix == "pt" else save_file(values, path)
    got = load_file(merge_checkpoints(paths, tmp_path / "m.safetensors"))
    assert set(got) == set(states[0])
    for name, value in got.items():
        if name == "bn.num_batches_tracked":
            assert value == 7 and value.dtype == torch.int64
            continue
        assert str(value.dtype) == f"torch.{expected}", name
        right = torch_mean(*states, name)
        assert value.shape == right.shape
        if expected == "float64":
            torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-15)
        else:  # the sum of two in float64, rounded once or, by way of float32, twice
            torch.testing.assert_close(value, right.to(value.dtype), rtol=2**-7, atol=1e-7)
            assert (value == right.float().to(value.dtype)).float().mean() > 0.99 or not len(value)


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    ties = (np.arange(1 << 10, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(
        np.float32
    )
    for some in (values, ties):
        expected = torch.from_numpy(some.copy()).to(torch.bfloat16).view(torch.int16).numpy()
        np.testing.assert_array_equal(from_float32(some).view(np.int16), expected)


def test_merges_that_would_be_wrong_are_refused(tmp_path: Path) -> None:
    a, b, base = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "base"))
    for i, path in enumerate((a, b, base)):
        save_file(state(i), path)
    out = tmp_path / "m.safetensors"
    bad = {**state(3), "gain": torch.tensor(float("nan"))}
    save_file(bad, tmp_path / "nan.safetensors")
    alone = {name: value for name, value in state(4).items() if name != "bn.running_mean"}
    for i in range(2):
        save_file(alone, tmp_path / f"alone{i}.safetensors")
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "f8.safetensors")
    wide = [tmp_path / f"wide{i}.safetensors" for i in range(3)]
    for i, path in enumerate(wide):
        save_file({"a": torch.tensor([6e4 - 1000 * i], dtype=torch.float16)}, path)
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([a, tmp_path / "nan.safetensors"], {}, "found NaN or infinity in gain"),
        ([a, a], {}, "a.safetensors twice"),
        ([a, tmp_path / "." / "a.safetensors"], {}, "twice"),
        ([a, b], {"weights": [float("nan"), 1.0]}, "needed weights >= 0"),
        ([a, b], {"weights": [float("inf"), 0.0]}, "needed weights >= 0"),
        ([a, b], {"weights": [-0.5, 1.5]}, "needed weights >= 0"),
        ([a], {}, "two or more"),
        ([tmp_path / f"alone{i}.safetensors" for i in range(2)], {}, "without bn.running_mean"),
        ([tmp_path / "f8.safetensors", a], {}, "of dtype F8_E4M3"),
        (
            wide[:2],
            {"method": "task-arithmetic", "base": wide[2], "scaling": 1e5},
            "beyond what F1",
        ),
    ]
    for paths, options, message in cases:
        with pytest.raises(HdrqError) as error:
            merge_checkpoints(paths, out, **options)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(MergeError, match="needed a .safetensors file"):
        merge_checkpoints([a, b], tmp_path / "m.pt")
    assert not out.exists() and not (tmp_path / "m.pt").exists()


def test_flags_that_a_merge_would_ignore_are_refused(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [str(make(domain=d).path) for d in ("night", "day")]
    for i in range(2):
        save_file(state(i), tmp_path / f"{i}.safetensors")
    floats = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    cases = [
        (bundles, ["--method", "ties"], "--method ties with bundles"),
        (bundles, ["--method", "task-arithmetic"], "--method task-arithmetic with bundles"),
        (bundles, ["--base", floats[0]], "--base with bundles"),
        (bundles, ["--density", "0.5"], "--density with --method mean"),
        (bundles, ["--criterion", "entropy"], "--criterion without --weights auto"),
        (bundles, ["--data", "night=x.npz"], "--data without --weights auto"),
        (bundles, ["--rounding", "nearest", "--candidates", "5"], "--candidates with --rounding"),
        ([bundles[0], bundles[0]], [], "twice"),
        ([bundles[0]], [], "two or more"),
        (bundles, ["--weights", "nan", "1"], "needed weights >= 0"),
        ([bundles[0], floats[0]], [], f"found the checkpoint {floats[0]} beside {bundles[0]}"),
        (floats, ["--rounding", "nearest"], "--rounding with float checkpoints"),
        (floats, ["--scaling", "2"], "--scaling with --method mean"),
        (floats, ["--method", "task-arithmetic", "--density", "0.5"], "--density with --method"),
    ]
    for paths, flags, message in cases:
        out = tmp_path / "out.safetensors"
        assert merge_command.main([*paths, *flags, "-o", str(out)]) == 2, (paths, flags)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not out.exists()
    assert merge_command.main([*bundles, "--method", "mean", "-o", str(tmp_path / "m.hdrq")]) == 0
    with pytest.raises(MergeError, match="twice"):
        merge([bundles[0], bundles[0]], tmp_path / "no.hdrq")


def test_safetensors_merge_without_torch_and_torch_files_say_what_they_need(tmp_path: Path) -> None:
    for i in range(2):
        save_file(state(i, torch.bfloat16), tmp_path / f"{i}.safetensors")
        torch.save(state(i), tmp_path / f"{i}.pt")
    code = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, NoTorch())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
from hdrq_deploy.cli.merge import main
print(main(["0.safetensors", "1.safetensors", "-o", "m.safetensors"]))
print(main(["0.pt", "1.pt", "-o", "n.safetensors"]))
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert [line for line in done.stdout.split() if line.isdecimal()] == ["0", "2"]
    assert "0.pt: a torch file, and torch is not installed: pip install" in done.stderr
    assert done.stderr.count("\n") == 1
    got, states = load_file(tmp_path / "m.safetensors"), [state(i, torch.bfloat16) for i in (0, 1)]
    right = torch_mean(*states, "conv.weight").float().to(torch.bfloat16)
    assert torch.equal(got["conv.weight"], right)


def test_shots_three_files_are_one_checkpoint(tmp_path: Path) -> None:
    parts = {}
    for i, folder in enumerate(("r", "a")):
        (tmp_path / folder).mkdir()
        for letter in "FBC":
            values = {"layer.weight": torch.randn(2, 2) + i}
            torch.save(values, tmp_path / folder / f"target_{letter}_par_0.3.pt")
            parts[folder, letter] = values["layer.weight"]
    folders = [tmp_path / "r", tmp_path / "a"]
    assert set(load_checkpoint(folders[0])) == {f"net{letter}.layer.weight" for letter in "FBC"}
    out = tmp_path / "m.safetensors"
    assert merge_command.main([*map(str, folders), "-o", str(out)]) == 0
    got = load_file(out)
    for letter in "FBC":
        right = (parts["r", letter].double() + parts["a", letter].double()) / 2
        torch.testing.assert_close(got[f"net{letter}.layer.weight"], right.float())
