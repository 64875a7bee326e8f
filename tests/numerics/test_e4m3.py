"""E4M3 against its definition: all 256 bit patterns, written out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from hdrq_deploy.calibration.fake_quantizers import fake_quantize
from hdrq_deploy.calibration.noise import Draws, unit_of
from hdrq_deploy.errors import SpecError
from hdrq_deploy.numerics import e4m3
from hdrq_deploy.numerics.quantization import dequantize, quantize, search_scale
from hdrq_deploy.numerics.spec import QuantSpec

SPEC = QuantSpec.weight(8, grid="e4m3")


def grid() -> list[float]:
    """Every finite number, from sign, exponent and mantissa; 1111 111 is NaN."""
    found = set()
    for bits in range(256):
        sign, exponent, mantissa = -1 if bits >> 7 else 1, bits >> 3 & 15, bits & 7
        if (exponent, mantissa) == (15, 7):
            continue
        power = max(exponent, 1) - 7
        found.add(sign * ((exponent > 0) + mantissa / 8) * 2.0**power)
    return sorted(found)


GRID = np.array(grid())


def test_places_are_those_of_the_written_out_grid() -> None:
    zero = int(np.flatnonzero(GRID == 0)[0])
    assert (GRID.max(), len(GRID), zero) == (e4m3.LARGEST, 253, e4m3.MOST)
    places = np.arange(len(GRID)) - zero
    np.testing.assert_array_equal(e4m3.numbers(places), GRID)
    np.testing.assert_array_equal(e4m3.places(GRID), places)
    np.testing.assert_array_equal(e4m3.places(GRID.astype(e4m3.DTYPE)), places)


def test_nearest_is_brute_force_with_ties_to_the_even_mantissa() -> None:
    rng = np.random.default_rng(0)
    middles = (GRID[1:] + GRID[:-1]) / 2
    x = np.concatenate([rng.standard_normal(2000) * 100, rng.standard_normal(500) / 50, middles])
    away = np.abs(x[:, None] - GRID)
    order = np.argsort(away, axis=1, kind="stable")[:, :2]
    first, second = order[:, 0], order[:, 1]
    tied = away[np.arange(len(x)), first] == away[np.arange(len(x)), second]
    even = np.where((first - e4m3.MOST) % 2 == 0, first, second)
    expected = GRID[np.where(tied, even, first)]
    assert tied.sum() == len(middles)
    np.testing.assert_array_equal(e4m3.nearest(x), expected)
    half = torch.from_numpy(x).float()
    ours = fake_quantize(half, torch.tensor(1.0), SPEC).numpy()
    np.testing.assert_array_equal(ours, e4m3.nearest(half.numpy()))


def test_spacing_is_the_distance_of_neighbours() -> None:
    inside = (GRID[1:] + GRID[:-1]) / 2
    np.testing.assert_array_equal(e4m3.spacing(inside), np.diff(GRID))
    np.testing.assert_array_equal(unit_of(torch.from_numpy(inside)).numpy(), np.diff(GRID))


@pytest.mark.skipif(
    tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 19), reason="onnx knows no E4M3 of NumPy"
)
@pytest.mark.parametrize("axis", [None, 0])
def test_codes_are_those_of_the_onnx_reference(axis: int | None) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 300)).astype(np.float32)
    scale = np.array([0.1, 0.01, 1e-3, 2.0] if axis == 0 else 0.003, np.float32)
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=0)
    zero = onnx.numpy_helper.from_array(np.zeros(scale.shape, e4m3.DTYPE), "z")
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT8E4M3FN, x.shape)],
        [onnx.numpy_helper.from_array(scale, "s"), zero],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    spec = QuantSpec.weight(8, axis, "e4m3")
    codes = quantize(x, scale, spec)
    assert codes.dtype == e4m3.DTYPE
    np.testing.assert_array_equal(e4m3.places(codes), e4m3.places(np.asarray(expected)))
    real = dequantize(codes, scale, axis)
    wide = scale.reshape(-1, 1) if axis == 0 else scale
    limit = wide * np.maximum(e4m3.spacing(x / wide) / 2, np.abs(x / wide) - e4m3.LARGEST)
    assert (np.abs(real - x) <= limit * 1.0001).all()


def test_the_searched_scale_beats_the_widest_range() -> None:
    x = np.random.default_rng(0).standard_normal(4000).astype(np.float32)

    def error(scale: float) -> float:
        return float((np.abs(e4m3.nearest(x / scale) * scale - x) ** 2.4).mean())

    found = float(search_scale(x, SPEC))
    assert error(found) <= min(error(float(np.abs(x).max()) / 448), error(found * 1.3))


def test_noise_has_the_size_of_the_rounding_errors_around_each_value() -> None:
    """Uniform noise of one width would drown the small values."""
    x = torch.cat([torch.linspace(0.02, 0.03, 4000), torch.linspace(200, 400, 4000)])
    noise = Draws(0, torch.device("cpu")).resample(x, torch.tensor(1.0), SPEC)
    errors = torch.from_numpy(e4m3.nearest(x.numpy())) - x
    for part in (slice(0, 4000), slice(4000, None)):
        ratio = float(noise[part].std() / errors[part].std())
        assert 0.8 < ratio < 1.25
        assert float(noise[part].abs().max()) <= float(unit_of(x[part]).max()) / 2


def test_the_gradient_passes_straight_through_the_grid() -> None:
    x = torch.tensor([0.3, 17.0, -1000.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale, SPEC).sum().backward()
    assert x.grad is not None and scale.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]
    # LSQ: code - value inside the range, the limit outside.
    assert float(scale.grad) == pytest.approx((0.3125 - 0.3) + (16 - 17) - 448)


def test_e4m3_has_eight_bits() -> None:
    assert QuantSpec(8, -448, 448).floating and not QuantSpec.weight(8).floating
    for bits, lo, hi in ((7, -448, 448), (8, 0, 448), (8, -447, 448), (8, -448, 447)):
        with pytest.raises(SpecError, match="codes"):
            QuantSpec(bits, lo, hi)
