"""Engines on OpenVINO: their numbers, what they execute, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from hdrq_deploy import calibrate
from hdrq_deploy.checks import verify
from hdrq_deploy.cli import export as export_command
from hdrq_deploy.comparison import golden, openvino_tap
from hdrq_deploy.comparison.taps import GraphTap
from hdrq_deploy.errors import CheckFailed, EngineError
from hdrq_deploy.exporters import GraphOptions, export, lowering_openvino, precision
from hdrq_deploy.formats.bundle_manifest import Layer
from hdrq_deploy.graph import openvino_session, reference_session
from hdrq_deploy.graph.openvino_session import Executed, OpenVinoSession
from hdrq_deploy.runtime import load_engine

pytest.importorskip("openvino")


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((folder / "precision.json").read_text())
    return {row["module"]: row for row in report["layers"]}


# Each bundle is a calibration by PyTorch, which takes longer than all of OpenVINO.
@pytest.mark.parametrize(
    ("name", "wbits", "abits"),
    [("Tiny", 4, 8), ("Tiny", 3, 3), ("Net", 8, 8), ("Attention", 8, 8), ("Attention", 3, 3)],
)
def test_every_layer_runs_in_int8_and_gives_the_bundles_codes(
    make: Any, inputs: Any, tmp_path: Path, name: str, wbits: int, abits: int
) -> None:
    bundle = make(name, wbits=wbits, abits=abits)
    path = export(bundle, tmp_path / "engine", "openvino")
    asked = [row for row in rows_of(path).values() if row["requested"] == "int8"]
    assert asked and all(row["executed"] == "int8" for row in asked)
    lowered, engine = verify(bundle.path, path, inputs[:8], torch=False).stages
    assert lowered.failure is None and lowered.output_rms < 1e-6
    # What is hidden lies inside a kernel: at most the residual sum's operand, or the softmax.
    assert engine.failure is None and engine.stepwise and engine.hidden <= 1
    assert engine.layer_rms is not None and engine.layer_rms < 1e-5
    graph = reference_session.unfused_session(bundle.path / "model.onnx")
    with load_engine(path, threads=1) as loaded:
        got = loaded(inputs[:8])
    expected = graph.run(None, {"input": inputs[:8]})[0]
    assert reference_session.compare(expected, got)["relative_rms"] < 1e-2


@pytest.mark.parametrize(
    "options",
    [
        GraphOptions(keep_float=("conv1",)),
        GraphOptions(batch=2),
        GraphOptions(dynamic_size=True),
        GraphOptions(postprocess="argmax"),
        GraphOptions(postprocess="softmax", input_name="image", output_name="scores"),
    ],
    ids=["keep_float", "batch", "dynamic_size", "argmax", "softmax"],
)
def test_options_of_the_graph(
    make: Any, inputs: Any, tmp_path: Path, options: GraphOptions
) -> None:
    bundle = make("Tiny", wbits=8)
    path = export(bundle, tmp_path / "engine", "openvino", options=options)
    verify(bundle.path, path, inputs[:4], torch=False).check()
    floats = [module for module, row in rows_of(path).items() if row["executed"] == "float32"]
    assert floats == list(options.keep_float)


def test_the_grid_of_the_paper_and_four_bit_weights_beside_real_activations(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    paper = make(grid="paper")
    path = export(paper, tmp_path / "paper", "openvino")
    assert {row["executed"] for row in rows_of(path).values()} == {"int8"}
    options = GraphOptions(weights_only=("*",))
    path = export(make("Attention", wbits=4), tmp_path / "four", "openvino", options=options)
    found = {module: row["executed"] for module, row in rows_of(path).items()}
    assert (found["qkv"], found["proj"], found["patch"]) == ("int4", "int4", "int8")


RESIDUAL = """
import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16, 16))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.relu(x + self.c(torch.relu(self.b(x))))
        return self.fc(torch.relu(self.d(x)).mean((2, 3)))
"""


def test_without_a_round_of_its_own_a_residual_sum_is_wrong_and_is_caught(
    work: Path, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "residual_model.py").write_text(RESIDUAL)
    torch.manual_seed(0)
    bundle = calibrate(
        "residual_model:Residual", work / "data.npz", "night", tmp_path / "n.hdrq", method="rtn"
    )
    path = export(bundle, tmp_path / "right", "openvino")
    right = verify(bundle.path, path, inputs[:8], torch=False).stages[1]
    assert right.hidden == 1 and right.output_rms < 1e-5
    monkeypatch.setattr(lowering_openvino, "_may_lose_its_rounding", lambda q: False)
    with pytest.raises(CheckFailed, match=r"computed from the same codes|no tie explains it"):
        export(bundle, tmp_path / "wrong", "openvino")
    assert not (tmp_path / "wrong").exists()


def test_values_in_front_of_a_round_of_its_own_are_those_that_ties_are_judged_by(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    """Behind the Round all of them are whole, and a code at a tie would have no tie near it."""
    bundle = make("Tiny", wbits=8)
    path = export(bundle, tmp_path / "graph", "openvino", only_graph=True) / "model.onnx"
    assert "Round" in {node.op_type for node in onnx.load(str(path)).graph.node}
    nodes = [layer.node for layer in bundle.manifest.layers]
    whole, lowered = golden.bundle_tap(bundle), golden.file_tap(path, "lowered graph", nodes)
    codes = whole.run(inputs[:4]).codes
    before = [tap.replay(inputs[:4], codes, tuple(codes)).before for tap in (whole, lowered)]
    for name, code in codes.items():
        # What a quantizer cuts off, a Clip in front of it need not.
        ends = code.min(), code.max()
        wanted, found = (values[name].clip(*ends) for values in before)
        np.testing.assert_allclose(found, wanted, atol=1e-3, err_msg=name)
        # The layer in front may be two halves and their sum.
        least, step = (np.max(tap.sites[name].bias_steps) for tap in (whole, lowered))
        assert step >= least * (1 - 1e-5), name


def test_codes_are_shown_only_where_the_copy_computes_what_the_engine_does(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    path = export(make("Tiny", wbits=8), tmp_path / "engine", "openvino")
    shown = openvino_tap.of_file(path / "model.onnx")
    ran = shown.run(inputs[:2])
    assert ran.codes and not ran.hidden
    # An engine that computes something else shows no codes of a copy that does not.
    other = openvino_tap.of_file(path / "model.onnx", lambda x: ran.output + 1)
    ran = other.run(inputs[:2])
    assert not ran.codes and ran.hidden == shown.run(inputs[:2]).codes.keys()


def test_a_code_that_changes_by_being_shown_hides_no_others(
    make: Any, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of activations is another kernel where its codes are given out."""
    path = export(make("Attention", wbits=8), tmp_path / "engine", "openvino")
    whole = openvino_tap.of_file(path / "model.onnx")
    sites = whole.run(inputs[:2]).codes.keys()
    for hidden in sites:
        tap = openvino_tap.of_file(path / "model.onnx")
        agrees = tap._agrees

        def other(copy: GraphTap, *args: Any, hidden: str = hidden, agrees: Any = agrees) -> bool:
            return hidden not in copy._codes and agrees(copy, *args)

        monkeypatch.setattr(tap, "_agrees", other)
        ran = tap.run(inputs[:2])
        assert ran.codes.keys() == sites - {hidden}
        assert ran.hidden == whole.run(inputs[:2]).hidden | {hidden}


def test_a_layer_in_float_or_out_of_sight_fails_the_export(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make("Attention", wbits=8)
    # With a zero point OpenVINO computes the products of attention in float.
    monkeypatch.setattr(lowering_openvino, "_is_multiplied", lambda value: False)
    out = tmp_path / "engine"
    assert export_command.main([str(bundle.path), "--engine", "openvino", "-o", str(out)]) == 3
    error = capsys.readouterr().err
    assert "layers that openvino does not run as requested (first: matmul_default" in error
    assert "--allow-float" in error and not out.exists()
    allowed = ["--allow-float", "matmul*"]
    arguments = [str(bundle.path), "--engine", "openvino", *allowed, "-o", str(out)]
    assert export_command.main(arguments) == 0
    assert rows_of(out)["matmul_default"]["executed"] != "int8"


@pytest.mark.parametrize(
    ("kernel", "precision_of", "inputs_of", "executed"),
    [
        ("Convolution", "u8", ("u8", "i8", "f32"), "int8"),
        ("Convolution", "f32", ("f32", "f32"), "float32"),
        ("Convolution", "u8", ("u8", "f32"), "float32"),
        ("FullyConnected", "bf16", ("bf16", "bf16"), "bfloat16"),
        ("FullyConnected", "f32", ("f32", "u4"), "int4"),
        ("Subgraph", "i8", ("f32", "i8", "i8"), "float32"),
        ("Subgraph", "i8", ("i8", "i8", "i8"), "int8"),
        ("Pooling", "u8", ("u8",), "unknown"),
    ],
)
def test_precision_is_what_the_program_says(
    make: Any, kernel: str, precision_of: str, inputs_of: tuple[str, ...], executed: str
) -> None:
    layer = Layer(
        node="a/Conv",
        op="Conv",
        module="a",
        weight="a.weight_codes",
        weight_bits=8,
        activation_bits=(8,),
        requested="int8",
    )
    node = Executed(kernel, precision_of, inputs_of, (), ("a/Conv/WithoutBiases", "relu"))
    report = precision.from_openvino([node], [layer], make().graph_ir(), "1")
    assert report.layers[0].executed == executed
    if executed != "int8":
        with pytest.raises(CheckFailed, match=rf"first: a, Conv, asked int8, runs {executed}"):
            precision.check(report, ())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-exact"], "OpenVINO ends codes at 127 at no cost; leave --exact on"),
        (["--pack-int4"], "found --pack-int4; OpenVINO would multiply such weights in float"),
        (["--workspace", "64"], "found --workspace; it is for TensorRT's builder"),
        (["--refit"], "found --refit; it is for TensorRT's builder"),
    ],
)
def test_options_of_other_engines_are_refused(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "engine"
    arguments = [str(make().path), "--engine", "openvino", *flags, "-o", str(out)]
    assert export_command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_without_its_library_an_export_says_what_to_install(
    make: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = export(make(), tmp_path / "there", "openvino")
    openvino_session._core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    arguments = [str(make().path), "--engine", "openvino", "-o", str(tmp_path / "engine")]
    assert export_command.main(arguments) == 2
    error = capsys.readouterr().err
    assert "pip install 'hdrq-deploy[openvino]'" in error and error.count("\n") == 1
    assert not (tmp_path / "engine").exists()
    with pytest.raises(EngineError, match=r"pip install 'hdrq-deploy\[openvino\]'"):
        load_engine(path)
    # The graph alone needs no library.
    assert export_command.main([*arguments, "--no-build"]) == 0


def test_a_session_compiles_a_few_shapes_and_then_one_that_is_free(
    make: Any, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(make(), tmp_path / "engine", "openvino", only_graph=True) / "model.onnx"
    monkeypatch.setattr(openvino_session, "SHAPES", 2)
    session = OpenVinoSession(path, "here", threads=1)
    whole = session.run(["output"], {"input": inputs})[0]
    for rows in (1, 2, 3, 4, 1):
        part = session.run(["output"], {"input": inputs[:rows]})[0]
        np.testing.assert_allclose(part, whole[:rows], rtol=1e-4, atol=1e-5)
    assert list(session._programs) == [((48, 3, 16, 16),), ((1, 3, 16, 16),), None]
    with pytest.raises(EngineError, match="here: OpenVINO cannot compile it"):
        OpenVinoSession(path, "here").run(["output"], {"input": inputs[:, :1]})
    with pytest.raises(EngineError, match="here: OpenVINO cannot read it"):
        OpenVinoSession(b"no graph", "here")
