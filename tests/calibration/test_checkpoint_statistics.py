"""Statistics of float checkpoints, by the names of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.checkpoint_statistics import write_statistics
from hdrq_deploy.cli import statistics as command
from hdrq_deploy.formats.checkpoints import checkpoint_sha256, open_checkpoint
from hdrq_deploy.formats.statistics import CheckpointStatistics, read_statistics
from hdrq_deploy.merging.batchnorm_correction import norms_of


def arguments(work: Path, weights: Path, output: Path) -> list[str]:
    return [
        *("--model", "tiny_models:Tiny", "--weights", str(weights)),
        *("--data", str(work / "data.npz"), "-o", str(output)),
    ]


def test_inputs_are_those_of_the_network_as_it_was_trained(
    work: Path, inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny_models

    # As DataParallel around a module called "net" saves it: names are the checkpoint's.
    weights = tmp_path / "wrapped.safetensors"
    state = load_file(work / "Tiny-night.safetensors")
    save_file({f"net.{name}": value for name, value in state.items()}, weights)
    out = tmp_path / "night.statistics.safetensors"
    assert command.main([*arguments(work, weights, out), "--rank", "full"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    file = read_statistics(out)
    record = file.record
    assert isinstance(record, CheckpointStatistics)
    assert record.checkpoint_sha256 == checkpoint_sha256(open_checkpoint(weights))
    assert {layer.weight: layer.bias for layer in record.layers} == {
        "net.stem.weight": None,
        "net.conv1.weight": "net.conv1.bias",
        "net.conv2.weight": "net.conv2.bias",
        "net.fc.weight": "net.fc.bias",
    }
    names = ("weight", "bias", "running_mean", "running_var")
    assert {name: tuple(norm.model_dump().values()) for name, norm in record.norms.items()} == {
        "net.stem.weight": (*(f"net.bn.{name}" for name in names), 1e-5, None),
        "net.conv1.weight": (*(f"net.bn1.{name}" for name in names), 1e-5, "net.conv1.bias"),
    }
    model = tiny_models.Tiny().eval()
    model.load_state_dict(state)
    seen: dict[str, torch.Tensor] = {}
    for name in ("conv1", "fc"):
        module = getattr(model, name)
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: x[0]}))
    with torch.no_grad():
        model(torch.from_numpy(inputs))
    rows = seen["fc"].double().numpy()
    layer = file.layer("net.fc.weight")
    np.testing.assert_allclose(layer.mean[0], rows.mean(0), rtol=1e-3)
    covariance = np.cov(rows.T, bias=True)
    np.testing.assert_allclose(layer.covariance(0), covariance, atol=0.01 * covariance.max())
    columns = torch.nn.functional.unfold(seen["conv1"], 3, padding=1)
    mean = columns.double().mean((0, 2)).numpy()
    np.testing.assert_allclose(file.layer("net.conv1.weight").mean[0], mean, rtol=1e-3, atol=1e-4)


SHARED = """
import torch


class Shared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1, bias=False)
        self.c = torch.nn.Conv2d(3, 3, 1)
        self.twice = torch.nn.BatchNorm2d(3)
        self.plain = torch.nn.BatchNorm2d(3, affine=False)

    def forward(self, x):
        y = self.twice(self.b(self.twice(self.a(x)).relu()))
        return self.plain(self.c(y)).mean((2, 3))
"""


def test_a_norm_of_two_layers_is_none_and_one_may_train_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared_norms.py").write_text(SHARED)
    monkeypatch.syspath_prepend(tmp_path)
    import shared_norms

    weights, out = tmp_path / "w.safetensors", tmp_path / "w.statistics.safetensors"
    save_file(shared_norms.Shared().state_dict(), weights)
    write_statistics("shared_norms:Shared", weights, work / "data.npz", out)
    record = read_statistics(out).record
    assert isinstance(record, CheckpointStatistics)
    ((weight, norm),) = record.norms.items()
    assert weight == "c.weight"
    assert (norm.gamma, norm.beta, norm.raw_bias) == (None, None, "c.bias")
    bundle = calibrate(
        "shared_norms:Shared",
        data=work / "data.npz",
        domain="night",
        output=tmp_path / "float.hdrq",
        weights=weights,
        method="float",
        statistics="off",
    )
    assert list(norms_of(bundle)) == ["c.weight"]


def test_what_statistics_of_a_checkpoint_refuse(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = work / "Tiny-night.safetensors"
    taken = tmp_path / "taken.safetensors"
    save_file({"a": torch.ones(1)}, taken)
    for argv, text in (
        (arguments(work, weights, taken), "another file"),
        (arguments(work, weights, weights), "equal to the input"),
        (arguments(work, work / "Wide-night.safetensors", tmp_path / "a"), "mis-shaped"),
    ):
        assert command.main(argv) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
    for rank in ("off", "0", "-3", "1.5"):
        with pytest.raises(SystemExit) as ended:
            command.main([*arguments(work, weights, tmp_path / "a"), "--rank", rank])
        assert ended.value.code == 2
        assert f"found '{rank}'; needed a rank of 1 or more, or full;" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
