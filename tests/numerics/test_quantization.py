from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from hdrq_deploy.errors import SpecError
from hdrq_deploy.numerics import quantization
from hdrq_deploy.numerics.int4 import pack_int4, unpack_int4
from hdrq_deploy.numerics.spec import QuantSpec


def test_quantize_agrees_with_the_onnx_reference() -> None:
    x = np.random.default_rng(0).normal(0, 40, (64, 5)).astype(np.float32)
    scale = np.array(0.5, np.float32)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "s")]
    zero = helper.make_tensor_value_info("z", TensorProto.INT8, None)
    out = helper.make_tensor_value_info("q", TensorProto.INT8, None)
    graph = helper.make_graph([node], "g", [*values, zero], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    feed = {"x": x, "s": scale, "z": np.array(0, np.int8)}
    (expected,) = ReferenceEvaluator(model).run(None, feed)
    np.testing.assert_array_equal(quantization.quantize(x, scale, QuantSpec.weight(8)), expected)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 3)])
def test_int4_packing_is_that_of_onnx(shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(1).integers(-8, 8, shape).astype(np.int8)
    tensor = helper.make_tensor("w", TensorProto.INT4, shape, codes.reshape(-1).tolist())
    packed = pack_int4(codes)
    stored = onnx.numpy_helper.to_array(tensor)
    np.testing.assert_array_equal(stored.astype(np.int8), codes)
    assert packed.tobytes() == bytes(tensor.int32_data)  # ONNX's own packing, one byte an entry
    if codes.size % 2 == 0 or stored.dtype.name == "int4":  # onnx 1.17 writes even sizes only
        assert packed.tobytes() == onnx.numpy_helper.from_array(stored).raw_data
    np.testing.assert_array_equal(unpack_int4(packed, shape), codes)


def test_bits_and_scales_out_of_range_are_refused() -> None:
    with pytest.raises(SpecError, match="found wbits=9"):
        QuantSpec.weight(9)
    with pytest.raises(SpecError, match="found abits=1"):
        QuantSpec.activation(1, nonnegative=True)
    with pytest.raises(SpecError, match="all > 0"):
        quantization.quantize(np.ones(3), np.array(0.0), QuantSpec.weight(8))
    with pytest.raises(SpecError, match="4 bits hold"):
        pack_int4(np.array([8], np.int8))
