"""The grid e4m3 from calibration to engines: FP8 weights and activations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from hdrq_deploy.cli import calibrate as calibrate_command
from hdrq_deploy.cli import export as export_command
from hdrq_deploy.cli import merge as merge_command
from hdrq_deploy.cli import verify as verify_command
from hdrq_deploy.errors import CheckFailed, EngineError, ExportError, MergeError, SpecError
from hdrq_deploy.exporters import GraphOptions, export, precision
from hdrq_deploy.formats.bundle import WEIGHTS, Bundle
from hdrq_deploy.formats.bundle_manifest import Layer
from hdrq_deploy.merging import merge
from hdrq_deploy.numerics import e4m3
from hdrq_deploy.numerics.quantization import along
from hdrq_deploy.runtime import load_engine

FP8: dict[str, Any] = {"wbits": 8, "grid": "e4m3"}


def reference(path: Path, x: Any) -> Any:
    return ReferenceEvaluator(onnx.load(str(path))).run(None, {"input": x})[0]


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_merge_of_fp8_bundles_is_the_nearest_of_the_mean(
    make: Any, tmp_path: Path, per_channel: bool
) -> None:
    parents = [make("Tiny", d, per_channel=per_channel, **FP8) for d in ("night", "day")]
    merged = merge(parents, tmp_path / "m.hdrq", [0.25, 0.75], "nearest", method="mean")
    codes = [n for n, entry in merged.manifest.tensors.items() if entry.role == "codes"]
    assert len(codes) == 4
    for name in codes:
        entry = merged.manifest.tensors[name]
        assert (entry.dtype, entry.lo, entry.hi) == (e4m3.NAME, -448, 448)
        scale = merged.tensor(str(entry.scale))
        rank = len(entry.shape)
        mean = sum(
            w * (p.tensor(name).astype(float) * along(p.tensor(str(entry.scale)), rank, entry.axis))
            for p, w in zip(parents, (0.25, 0.75), strict=True)
        )
        wide = along(scale.astype(np.float64), rank, entry.axis)
        expected = np.clip(mean / wide, -448, 448).astype(e4m3.DTYPE)
        np.testing.assert_array_equal(e4m3.places(merged.tensor(name)), e4m3.places(expected))


@pytest.mark.parametrize("name", ["Tiny", "Net"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_portable_graph_computes_what_onnx_says(
    make: Any, inputs: Any, tmp_path: Path, name: str, per_channel: bool
) -> None:
    bundle = make(name, per_channel=per_channel, **FP8)
    folder = export(bundle, tmp_path / "e", "onnx")
    report = json.loads((folder / "precision.json").read_text())
    asked = {row["module"]: row["requested"] for row in report["layers"]}
    floats = {"up"} & set(asked)  # transposed
    assert {module for module, kind in asked.items() if kind == "fp8"} == set(asked) - floats
    model = onnx.load(str(folder / "model.onnx"))
    assert model.opset_import[0].version >= 19
    held = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    assert len([t for t in held if t.dims]) == len(asked) - len(floats)
    x = inputs[:3]
    computed = reference(folder / "model.onnx", x)
    recorded = bundle.golden()
    np.testing.assert_allclose(
        reference(folder / "model.onnx", recorded["input"]), recorded["output"], atol=1e-4
    )
    real = make(name, method="float")
    plain = reference(real.path / "model.onnx", x)
    off = float(np.square(computed - plain).mean() / np.square(plain - plain.mean()).mean())
    assert 0 < off < 0.05  # it is quantized, and still the network
    assert verify_command.main([str(bundle.path), str(folder)]) == 0


def test_a_changed_code_fails_the_check(make: Any, tmp_path: Path) -> None:
    """Verification sees one number of E4M3 that is another."""
    bundle = make("Tiny", **FP8)
    copy = Bundle.write(
        tmp_path / "copy.hdrq",
        bundle.manifest,
        bundle.tensors(),
        (bundle.path / "model.onnx").read_bytes(),
        bundle.golden(),
    )
    assert (copy.path / WEIGHTS).read_bytes() == (bundle.path / WEIGHTS).read_bytes()
    tensors = bundle.tensors()
    codes = tensors["conv1.weight_codes"].copy()
    place = int(e4m3.places(codes).reshape(-1)[0])
    codes.reshape(-1)[0] = e4m3.numbers(np.array(place - 20 if place > 0 else place + 20))
    tensors["conv1.weight_codes"] = codes
    wrong = Bundle.write(
        tmp_path / "wrong.hdrq",
        bundle.manifest,
        tensors,
        (bundle.path / "model.onnx").read_bytes(),
        bundle.golden(),
    )
    folder = export(bundle, tmp_path / "e", "onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["bundle_sha256"] = wrong.manifest_sha256
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert (
        verify_command.main([str(wrong.path), str(folder), "--no-torch"]) == CheckFailed.exit_code
    )


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
def test_tensorrt_rtx_builds_fp8_kernels(make: Any, tmp_path: Path, compute: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = make("Tiny", per_channel=compute == "fp16", **FP8)
    options = GraphOptions(compute=compute)  # type: ignore[arg-type]
    folder = export(bundle, tmp_path / "rtx", "trt-rtx", options=options, allow_float=["conv2"])
    rows = json.loads((folder / "precision.json").read_text())["layers"]
    executed = {row["module"]: row["executed"] for row in rows}
    assert {executed[m] for m in ("stem", "conv1", "fc")} == {"fp8"}
    assert all("FP8 x FP8" in r["evidence"] for r in rows if r["executed"] == "fp8")


def test_the_report_tells_fp8_from_int8_and_float() -> None:
    layer = Layer(
        node="c",
        op="Conv",
        module="c",
        weight=None,
        weight_bits=8,
        activation_bits=(8,),
        requested="fp8",
    )
    line = (
        "Name: c, LayerType: correlation, Inputs: [ { Name: x, Datatype: {0}, Format: y }], "
        "Constants: [ { Name: w, Datatype: {1} }], Outputs: [], Metadata: [ONNX Layer: c]"
    )
    for kinds, executed in (
        (("FP8", "FP8"), "fp8"),
        (("Int8", "FP8"), "float32"),
        (("Int8", "Int8"), "int8"),
        (("Half", "FP8"), "float16"),
    ):
        dump = line.replace("{0}", kinds[0]).replace("{1}", kinds[1])
        report = precision.from_trt_log("trt-rtx", dump, [layer])
        assert report.layers[0].executed == executed
        assert bool(report.lost) == (executed != "fp8")


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_runtimes_on_the_cpu_refuse_fp8_in_one_line(
    make: Any, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    bundle = make("Tiny", **FP8)
    arguments = [str(bundle.path), "--engine", engine, "-o", str(tmp_path / "e")]
    assert export_command.main(arguments) == ExportError.exit_code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "(FP8)" in line and "no kernel on a CPU" in line and "--engine trt-rtx" in line
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rounding", "advanced"], "choose nearest"),
        (["--rounding", "noise"], "choose nearest"),
        (["--rounding", "compensated"], "choose nearest"),
        (["--wbits", "4"], "FP8 has 8 bits"),
    ],
)
def test_a_merge_refuses_what_is_of_integers(
    make: Any,
    tmp_path: Path,
    given: Sequence[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parents = [str(make("Tiny", d, **FP8).path) for d in ("night", "day")]
    code = merge_command.main([*parents, "-o", str(tmp_path / "m"), "--method", "mean", *given])
    assert code == MergeError.exit_code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--method", "rtn", "--wbits", "4"], "FP8 has 8 bits"),
        (["--method", "rtn", "--abits", "6"], "FP8 has 8 bits"),
        (["--method", "qdrop"], "choose a method of rtn, rtn-corrected, latent"),
        (["--method", "gptq"], "rounded to nearest"),
    ],
)
def test_a_calibration_refuses_what_is_of_integers(
    work: Path,
    tmp_path: Path,
    given: Sequence[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--model", "tiny_models:Tiny", "--data", str(work / "data.npz"), "--domain", "night"]
    target = ["-o", str(tmp_path / "b.hdrq"), "--grid", "e4m3"]
    assert calibrate_command.main([*common, *target, *given]) == SpecError.exit_code == 2
    assert says in capsys.readouterr().err


def test_bundles_of_two_grids_are_not_merged(make: Any, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="scheme grid"):
        merge([make("Tiny", **FP8), make("Tiny", "day", wbits=8)], tmp_path / "m.hdrq")


def test_regression_and_histograms_work_on_fp8(make: Any, tmp_path: Path) -> None:
    parents = [make("Tiny", d, statistics="auto", **FP8) for d in ("night", "day")]
    merged = merge(parents, tmp_path / "m.hdrq", activation_scales="statistics")
    record = merged.manifest.options["merge"]
    assert (record["method"], record["rounding"]) == ("regression", "nearest")
    assert all(np.isfinite(merged.tensor("conv1.weight_codes").astype(np.float32)).ravel())
    engine = export(merged, tmp_path / "e", "onnx")
    with pytest.raises(EngineError, match="no kernel on a CPU that multiplies FP8"):
        load_engine(engine)


def test_learning_on_the_grid_lowers_the_error(make: Any, inputs: Any) -> None:
    plain = make("Tiny", method="rtn", **FP8)
    learned = make("Tiny", method="hdrq", **FP8)
    real = reference(make("Tiny", method="float").path / "model.onnx", inputs)
    off = [
        float(np.square(reference(b.path / "model.onnx", inputs) - real).mean())
        for b in (plain, learned)
    ]
    assert off[1] < off[0]
    codes = [n for n, entry in plain.manifest.tensors.items() if entry.role == "codes"]
    changed = [e4m3.places(plain.tensor(n)) != e4m3.places(learned.tensor(n)) for n in codes]
    assert any(where.mean() > 0 for where in changed)
