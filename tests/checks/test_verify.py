"""``hdrq-verify``: stages that agree, and the first layer of those that do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from hdrq_deploy import Bundle, merge
from hdrq_deploy import verify as public_verify
from hdrq_deploy.checks.stages import compare_stages
from hdrq_deploy.cli import verify
from hdrq_deploy.errors import CheckFailed, DataError
from hdrq_deploy.exporters import GraphOptions, export
from hdrq_deploy.formats.atomic_files import sha256_file
from hdrq_deploy.graph import reference_session

MODELS = ("Tiny", "Net", "Attention")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("abits", [8, 4])
def test_the_exact_graph_has_the_codes_of_the_bundle(
    make: Any, inputs: Any, tmp_path: Path, name: str, abits: int
) -> None:
    bundle = make(name, wbits=4, abits=abits)
    path = export(bundle, tmp_path / "e", options=GraphOptions(exact=True))
    found = {stage.name: stage for stage in compare_stages(bundle, path, inputs, torch=True)}
    assert list(found) == [
        "PyTorch to bundle",
        "bundle to lowered graph",
        "lowered graph to engine",
    ]
    lowered = found["bundle to lowered graph"]
    assert len(lowered.tensors) == len(bundle.manifest.activations)
    assert lowered.max_steps == 0 and lowered.first_difference is None
    assert lowered.decision_flips == 0
    # Fused kernels round once where the graph rounds twice.
    assert max(t.share_off for t in found["lowered graph to engine"].tensors) < 0.02


def test_verification_from_python_is_that_of_the_command(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    bundle = make()
    path = export(bundle, tmp_path / "engine")
    record = tmp_path / "record.json"
    assert verify.main([str(bundle.path), str(path), "--no-torch", "--json", str(record)]) == 0
    verification = public_verify(bundle.path, path, torch=False)
    assert verification.passed and verification.record() == json.loads(record.read_text())
    assert public_verify(path).stages[0].name.startswith("record")
    assert public_verify(bundle.path, path, inputs, torch=True).stages[0].images == len(inputs)
    with pytest.raises(DataError, match="an engine alone"):
        public_verify(path, data=inputs)


def test_verification_from_python_fails_where_an_engine_is_another_model(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    bundle = make()
    path = export(bundle, tmp_path / "engine")
    strict = public_verify(bundle.path, path, inputs, torch=False, max_rms=-1.0)
    assert not strict.passed
    with pytest.raises(CheckFailed, match="needed at most -1"):
        strict.check()


def test_golden_images_travel_through_merge_and_export(make: Any, tmp_path: Path) -> None:
    night, day = make(), make(domain="day")
    both = merge([night, day], tmp_path / "both.hdrq")
    golden = both.golden()
    assert set(night.golden()) == {"input", "output"} and set(golden) == {"input"}
    np.testing.assert_array_equal(golden["input"][0], night.golden()["input"][0])
    session = reference_session.unfused_session(night.path / "model.onnx")
    expected = session.run(None, {"input": night.golden()["input"]})[0]
    np.testing.assert_allclose(night.golden()["output"], expected, rtol=1e-5, atol=1e-6)
    for options in (GraphOptions(), GraphOptions(batch=1), GraphOptions(batch=3)):
        path = export(both, tmp_path / "e", options=options)
        assert set(load_file(path / "golden.safetensors")) == {"input", "output"}
        assert verify.main([str(path)]) == 0
        assert verify.main([str(both.path), str(path), "--no-torch"]) == 0


def altered(path: Path, name: str) -> None:
    """The engine's manifest takes a changed file for its own."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = sha256_file(path / name)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_an_engine_that_computes_something_else_is_found(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export(make(), tmp_path / "e")
    golden = load_file(path / "golden.safetensors")
    save_file({**golden, "output": golden["output"] * 2}, path / "golden.safetensors")
    altered(path, "golden.safetensors")
    assert verify.main([str(path)]) == 3
    assert "record to engine" in capsys.readouterr().err


def test_the_first_layer_where_stages_part_is_named(
    make: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make()
    path = export(bundle, tmp_path / "e", options=GraphOptions(exact=True))
    model = onnx.load(str(path / "model.onnx"))
    for initializer in model.graph.initializer:
        if initializer.name == "stem.bias":
            value = onnx.numpy_helper.to_array(initializer) + 5
            initializer.CopyFrom(onnx.numpy_helper.from_array(value, "stem.bias"))
    onnx.save(model, str(path / "model.onnx"))
    altered(path, "model.onnx")
    out = tmp_path / "found.json"
    data = f"night={work / 'data.npz'}"
    words = [str(bundle.path), str(path), "--data", data, "--no-torch", "--json", str(out)]
    assert verify.main(words) == 3
    assert "they differ first at relu;" in capsys.readouterr().err
    record = json.loads(out.read_text())
    stage = record["stages"][0]
    steps = {tensor["module"]: tensor["steps"] for tensor in stage["tensors"]}
    assert steps["input"] == 0 and steps["relu"] > 0
    assert stage["first_difference"] == "relu"
    assert record["stages"][1]["max_steps"] <= 1  # the engine does what its graph says


def test_what_cannot_be_compared_is_said(
    make: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make()
    path = export(make(domain="day"), tmp_path / "e")
    assert verify.main([str(bundle.path), str(path), "--no-torch"]) == 2
    assert "made of another bundle" in capsys.readouterr().err
    assert verify.main([str(path), "--data", str(work / "data.npz")]) == 2
    assert "found an engine alone" in capsys.readouterr().err
    old = tmp_path / "old.hdrq"
    shutil.copytree(bundle.path, old)
    (old / "golden.safetensors").unlink()
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["files"]["golden.safetensors"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert Bundle.open(old).golden() == {}
    assert verify.main([str(old), "--no-torch"]) == 2
    assert "holds no golden inputs" in capsys.readouterr().err
