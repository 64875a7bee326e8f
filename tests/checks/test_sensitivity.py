"""What quantizing one layer costs, and what keeping it in float brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdrq_deploy.calibration import folded_weights
from hdrq_deploy.checks.sensitivity import PartlyQuantized, sensitivity, suggest
from hdrq_deploy.cli import sensitivity as command
from hdrq_deploy.errors import DataError, ExportError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.graph import reference_session

MODELS = ("Tiny", "Net", "Attention")


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, make: Any, work: Path, inputs: Any) -> Any:
    name = request.param
    checkpoint = work / f"{name}-night.safetensors"
    real = folded_weights(f"tiny_models:{name}", checkpoint, inputs[:2])
    return name, make(name, wbits=4, abits=4), real, checkpoint


def test_with_every_layer_it_is_the_bundle_and_with_none_the_float_model(
    case: Any, inputs: Any
) -> None:
    name, bundle, real, checkpoint = case
    network = PartlyQuantized(bundle, real)
    every = [layer.node for layer in network.layers]
    session = reference_session.unfused_session(bundle.path / "model.onnx")
    expected = session.run(None, {"input": inputs})[0]
    np.testing.assert_allclose(network(every, [inputs]), expected, rtol=1e-4, atol=1e-5)
    import tiny_models
    from safetensors.torch import load_file

    model = getattr(tiny_models, name)().eval()
    model.load_state_dict(load_file(checkpoint), strict=False)
    with torch.no_grad():
        plain = model(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(network((), [inputs]), plain, rtol=1e-3, atol=1e-4)


def test_layers_are_ranked_and_the_scheme_meets_its_bound(case: Any, inputs: Any) -> None:
    _, bundle, real, _ = case
    data = {"night": (inputs, None)}
    found = sensitivity(bundle, data, real)
    ratios = [row.sqnr_db for row in found.layers]
    assert ratios == sorted(ratios) and len(ratios) == len(PartlyQuantized(bundle).layers)
    assert found.full_sqnr_db <= ratios[0] + 3
    bound = found.full_sqnr_db + 3
    scheme = suggest(bundle, data, found, real, sqnr_db=bound)
    assert scheme.sqnr_db >= bound
    # One layer fewer in float would not do: brute force over all counts.
    enough = [
        count
        for count in range(len(found.layers) + 1)
        if suggest(bundle, data, found, real, keep=count).sqnr_db >= bound
    ]
    assert len(scheme.keep_float) in enough and len(scheme.keep_float) - 1 not in enough
    with pytest.raises(DataError, match="a bound on accuracy needs them"):
        suggest(bundle, data, found, real, accuracy=0.01)


@pytest.mark.parametrize("engine", ["ort", "onnx"])
def test_an_engine_keeps_the_layer_in_float(
    make: Any, inputs: Any, tmp_path: Path, engine: str
) -> None:
    bundle = make(wbits=4, abits=4)
    path = export(bundle, tmp_path / "e", engine, options=GraphOptions(keep_float=("conv1", "fc")))
    report = json.loads((path / "precision.json").read_text())
    kept = {row["module"]: row for row in report["layers"] if row["requested"] == "float32"}
    assert set(kept) == {"conv1", "fc"} and "--keep-float" in kept["fc"]["reason"]
    if engine == "ort":
        assert {row["executed"] for row in kept.values()} == {"float32"}
        assert report["summary"] == "2/3 Conv, 0/1 Gemm INT8"
    network = PartlyQuantized(bundle)
    others = [row.node for row in network.layers if row.module not in kept]
    got = reference_session.unfused_session(path / "model.onnx").run(None, {"input": inputs})[0]
    expected = network(others, [inputs])
    assert reference_session.compare(expected, got)["relative_rms"] < 2e-3
    with pytest.raises(ExportError, match="no layer that 'nothing' names"):
        export(bundle, tmp_path / "f", engine, options=GraphOptions(keep_float=("nothing",)))


def test_the_command_prints_a_table_a_scheme_and_a_plot(
    make: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, data = str(make().path), ["--data", f"night={work / 'data.npz'}"]
    weights = ["--weights", str(work / "Tiny-night.safetensors"), "--images", "24"]
    out = tmp_path / "s"
    assert command.main([bundle, *data, *weights, "--keep-float", "1", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert "1 of 4 layers in float" in text and "--keep-float" in text
    record = json.loads((out / "sensitivity.json").read_text())
    assert len(record["layers"]) == 4 and record["images"] == {"night": 24}
    assert record["scheme"]["keep_float"] == [record["layers"][0]["module"]]
    assert "<svg" in (out / "sensitivity.svg").read_text()
    other = str(work / "Net-night.safetensors")
    assert command.main([bundle, *data, "--weights", other]) == 2
    assert command.main([bundle, *data, "--images", "0"]) == 2
