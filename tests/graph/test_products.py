"""Processors whose kernels add products in int16, and engines that are right on them.

What such processors do is emulated in NumPy. Where the tests run on one of them, all tests of
engines run on it, too.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hdrq_deploy.errors import EngineError
from hdrq_deploy.exporters import export
from hdrq_deploy.exporters.lowering_openvino import lower_openvino
from hdrq_deploy.exporters.lowering_ort import lower_ort
from hdrq_deploy.graph import model_files, products, reference_session
from hdrq_deploy.graph.operators import QUANTIZABLE
from hdrq_deploy.graph.processors import products_wrap, saturates
from hdrq_deploy.graph.products import (
    Reach,
    codes_of,
    holds_saturating_products,
    largest_weight,
    may_saturate,
    reach,
    weight_behind,
)
from hdrq_deploy.graph.qdq import array, producer, quantizer_behind, weight_dequantizer
from hdrq_deploy.graph.reference_session import session_options, unfused_session
from hdrq_deploy.runtime import load_engine
from hdrq_deploy.runtime import openvino as runtime_openvino

ARM = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes crc32 cpuid"
X86 = "processor\t: 0\nflags\t\t: fpu avx2"
# What /proc/cpuinfo says; whether -128 x -128 wraps; whether uint8 x int8 saturates.
CPUS = {
    "a72": (ARM, True, False),
    "a76": (f"{ARM} atomics asimdrdm asimddp", False, False),
    "big-little": (f"{ARM} asimddp\n\n{ARM}", True, False),
    "vnni": (f"{X86} avx512f avx512_vnni", False, False),
    "vnni without avx512": (f"{X86} avx_vnni", False, False),
    "avx2": (X86, False, True),
    "avx512": (f"{X86} avx512f", False, True),
    "sse": ("flags\t: fpu ssse3 sse4_1", False, True),
    "empty": ("", False, False),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_processors(tree: Callable[..., Path], tmp_path: Path, cpu: str) -> None:
    text, wraps, narrow = CPUS[cpu]
    file = tree(tmp_path, {"cpuinfo": text}) / "cpuinfo"
    assert (products_wrap(file), saturates(file)) == (wraps, narrow)
    assert not products_wrap(tmp_path / "none") and not saturates(tmp_path / "none")


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_where_no_product_is_wrong_an_engine_loads_without_onnx_ir(runtime: str) -> None:
    """That takes half a second, as long as all else that a runtime imports."""
    code = f"import hdrq_deploy.runtime.{runtime}, sys; sys.exit('onnx_ir' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def saturated(operand: Any, weight: Any) -> Any:
    """A product of matrices of uint8 and int8 codes as x86 without VNNI computes it."""
    products = operand[:, :, None].astype(np.int64) * weight[None]
    pairs = products.reshape(len(operand), -1, 2, weight.shape[1]).sum(2)
    return np.clip(pairs, -32768, 32767).sum(1)


@pytest.mark.parametrize("high", [255, 254, 200, 135, 128, 127, 15, 1])
def test_the_largest_weight_stays_in_int16_and_the_next_does_not(high: int) -> None:
    rng = np.random.default_rng(high)
    limit = largest_weight(Reach(0, high, signed=False))
    operand = rng.choice([0, high], (20, 16))
    weight = np.array([[-limit, limit]]).repeat(16, 0)
    np.testing.assert_array_equal(saturated(operand, weight), operand @ weight)
    if limit < 128:
        weight = np.array([[-limit - 1, limit + 1]]).repeat(16, 0)
        assert (saturated(operand, weight) != operand @ weight).any()
    signed = Reach(-128, high - 128, signed=True)
    assert largest_weight(signed) == limit and largest_weight(None) == 128


LOWERED: dict[str, Callable[..., ir.Model]] = {
    "ort": lambda model, narrow: lower_ort(model, saturates=narrow),
    "openvino": lambda model, narrow: lower_openvino(model, saturates=narrow),
}


@pytest.mark.parametrize("engine", LOWERED)
@pytest.mark.parametrize(
    ("name", "wbits", "abits"),
    [
        ("Tiny", 8, 8),
        ("Tiny", 4, 8),
        ("Tiny", 3, 3),
        ("Net", 8, 8),
        ("Bottleneck", 4, 8),
        ("Bottleneck", 4, 4),
        ("Attention", 8, 8),
    ],
)
def test_no_two_products_leave_int16_and_the_numbers_stay(
    make: Any, inputs: Any, tmp_path: Path, engine: str, name: str, wbits: int, abits: int
) -> None:
    bundle = make(name, wbits=wbits, abits=abits, per_channel=True)
    outputs = []
    for narrow in (False, True):
        path = tmp_path / str(narrow) / "model.onnx"
        path.parent.mkdir()
        model_files.save(LOWERED[engine](model_files.load(bundle), narrow), path)
        onnx.checker.check_model(str(path), full_check=True)
        # The first layer has 8 bits and a signed input.
        assert holds_saturating_products(path) is not narrow
        outputs.append(unfused_session(path, threads=1).run(None, {"input": inputs[:8]})[0])
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("wbits", "abits"), [(8, 8), (4, 8), (4, 4), (3, 3)])
def test_the_bias_of_a_convolution_is_whole(
    make: Any, wbits: int, abits: int, narrow: bool
) -> None:
    """Otherwise a kernel rounds it, and sums that were kept away from borders meet them."""
    bundle = make("Bottleneck", wbits=wbits, abits=abits, per_channel=True)
    lowered = lower_ort(model_files.load(bundle), saturates=narrow)
    seen = 0
    for node in lowered.graph:
        if node.op_type != "Conv" or quantizer_behind(node) is None:
            continue
        operand, (weight, _) = producer(node.inputs[0]), weight_dequantizer(node.inputs[1])
        assert operand is not None and weight is not None
        unit = array(operand.inputs[1]).astype(np.float64) * array(weight.inputs[1])
        multiples = array(node.inputs[2]) / unit
        np.testing.assert_allclose(multiples, np.rint(multiples), rtol=1e-6, atol=1e-3)
        seen += 1
    assert seen == 4


@pytest.mark.parametrize("engine", LOWERED)
def test_a_saturating_processor_gets_the_sums_right(make: Any, engine: str) -> None:
    """Every layer of both lowerings on the worst codes that it can be given."""
    rng = np.random.default_rng(0)
    wrong = {False: 0, True: 0}
    for narrow in wrong:
        model = LOWERED[engine](model_files.load(make("Tiny", wbits=8)), narrow)
        for node in model.graph:
            weight, operand = weight_behind(node), reach(node.inputs[0])
            if weight is None or operand is None:
                continue
            codes = codes_of(weight.inputs[0])
            assert codes is not None
            matrix = codes.reshape(len(codes), -1).T
            matrix = np.pad(matrix, ((0, len(matrix) % 2), (0, 0)))
            x = rng.integers(0, operand.unsigned + 1, (200, len(matrix)))
            x[:100] = operand.unsigned * (x[:100] > operand.unsigned // 2)
            off = bool((saturated(x, matrix) != x @ matrix).any())
            assert may_saturate(node) or not off
            wrong[narrow] += off
    assert wrong[False] > 0 and wrong[True] == 0


@pytest.mark.parametrize(
    ("shape", "groups", "pairs"),
    [
        ((8, 8, 3, 3), 1, True),
        ((8, 2, 3, 3), 4, True),
        ((8, 1, 3, 3), 8, False),
        ((16, 1, 3, 3), 8, True),  # two outputs a channel: another kernel
        ((8, 1, 3, 3), 1, True),
    ],
)
def test_a_depthwise_convolution_is_exact_and_others_are_not(
    tmp_path: Path, shape: tuple[int, ...], groups: int, pairs: bool
) -> None:
    """As the kernels of this processor compute it, where it saturates."""
    rng = np.random.default_rng(0)
    weight = rng.integers(90, 128, shape).astype(np.int8)
    channels = shape[1] * groups
    constants = {"s": np.float32(1), "z": np.uint8(0), "o": np.float32(1 << 14), "wz": np.int8(0)}
    q = [("QuantizeLinear", ["x", "s", "z"], "q"), ("DequantizeLinear", ["q", "s", "z"], "d")]
    q += [("DequantizeLinear", ["w", "s", "wz"], "v")]
    nodes = [onnx.helper.make_node(op, ins, [out]) for op, ins, out in q]
    nodes.append(onnx.helper.make_node("Conv", ["d", "v"], ["c"], group=groups))
    nodes.append(onnx.helper.make_node("QuantizeLinear", ["c", "o", "z"], ["r"]))
    nodes.append(onnx.helper.make_node("DequantizeLinear", ["r", "o", "z"], ["y"]))
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", c, 9, 9])
        for name, c in (("x", channels), ("y", shape[0]))
    ]
    ports[1].type.tensor_type.shape.ClearField("dim")
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    tensors.append(onnx.numpy_helper.from_array(weight, "w"))
    graph = onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:], tensors)
    path = tmp_path / "model.onnx"
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    (layer,) = (node for node in ir.load(path).graph if node.op_type == "Conv")
    assert may_saturate(layer) is pairs
    x = rng.integers(200, 256, (1, channels, 9, 9)).astype(np.float32)
    engine = reference_session.open_session(path, session_options(1))
    off = np.abs(engine.run(None, {"x": x})[0] - unfused_session(path).run(None, {"x": x})[0])
    if saturates():
        assert (off.max() > 1 << 14) == pairs
    else:
        assert off.max() <= 1 << 14  # a tie


def test_a_depthwise_convolution_adds_no_pairs(make: Any) -> None:
    model = lower_ort(model_files.load(make("Tiny", wbits=8)))
    layers = {n.name: weight_behind(n) for n in model.graph if n.op_type in QUANTIZABLE}
    assert [name for name, weight in layers.items() if weight is None] == ["conv2/Conv"]


def test_codes_end_where_a_clamp_ends_them(make: Any) -> None:
    model = lower_ort(model_files.load(make("Tiny", wbits=8)))
    found = {n.name: reach(n.inputs[0]) for n in model.graph if n.op_type in QUANTIZABLE}
    assert found["stem/Conv"] == Reach(0, 255, signed=False)  # c + 128 of a signed input
    assert found["conv1/Conv"] == Reach(0, 127, signed=False)  # behind ReLU and pooling
    signed = lower_openvino(model_files.load(make("Attention", wbits=8, abits=4)))
    (product,) = (n for n in signed.graph if n.name == "matmul_default/MatMul")
    assert reach(product.inputs[1]) == Reach(-8, 7, signed=True)
    assert not may_saturate(product)


def test_an_engine_of_another_processor_on_onnx_runtime(
    make: Any, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session holds the weights as uint8; one that was made here stays as it is."""
    key = "session.x64quantprecision"
    monkeypatch.setattr(reference_session, "saturates", lambda: True)
    bundle = make("Tiny", wbits=8)
    for narrow in (False, True):
        path = tmp_path / f"{narrow}.onnx"
        model_files.save(lower_ort(model_files.load(bundle), saturates=narrow), path)
        options = session_options(1, graph=path)
        if narrow:
            with pytest.raises(RuntimeError):
                options.get_session_config_entry(key)
        else:
            assert options.get_session_config_entry(key) == "1"
        got = reference_session.open_session(path, options).run(None, {"input": inputs[:8]})[0]
        expected = unfused_session(path).run(None, {"input": inputs[:8]})[0]
        assert reference_session.compare(expected, got)["relative_rms"] < 1e-2


def test_an_engine_of_another_processor_on_openvino_is_refused(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    engine = export(make("Tiny", wbits=8), tmp_path / "engine", "openvino")
    load_engine(engine).close()
    monkeypatch.setattr(runtime_openvino, "saturates", lambda: True)
    monkeypatch.setattr(products, "holds_saturating_products", lambda path: True)
    with pytest.raises(EngineError, match="adds wrongly on this x86 .*export the bundle again"):
        load_engine(engine)
