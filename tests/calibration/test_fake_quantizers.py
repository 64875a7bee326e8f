"""Fake quantization and its noise, beside autograd over the formulas as the paper writes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hdrq_deploy.calibration.fake_quantizers import fake_quantize
from hdrq_deploy.calibration.noise import Draws
from hdrq_deploy.numerics.spec import QuantSpec

RELU = QuantSpec(3, 0, 7)
SIGNED = QuantSpec.weight(3)


def by_the_formula(
    x: Tensor, scale: Tensor, spec: QuantSpec, noise: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Element by element: limits where saturated, else s * (x / s + n) with n held fixed."""
    if noise is None:
        noise = (torch.round(x / scale) - x / scale).detach()
    real = x + scale * noise
    real = torch.where(x.detach() >= scale.detach() * spec.hi, scale * spec.hi, real)
    real = torch.where(x.detach() <= scale.detach() * spec.lo, scale * spec.lo, real)
    return real if keep is None else torch.where(keep == 1, x, real)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("spec", [RELU, SIGNED], ids=["relu", "signed"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    spec: QuantSpec, noisy: bool, dropped: bool, per_channel: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(4, 50, generator=generator)
    x = torch.relu(x) if spec.lo == 0 else x
    # A scale of 0.5 divides exactly: some elements lie at the limits themselves.
    x[:, :3] = torch.tensor([0.5 * spec.hi, 0.5 * spec.lo, 0.0])
    scale = torch.tensor([[0.5], [0.25], [0.9], [0.5]]) if per_channel else torch.tensor(0.5)
    noise = torch.rand(x.shape, generator=generator) - 0.5 if noisy else None
    keep = (torch.rand(x.shape, generator=generator) < 0.5).float() if dropped else None
    grad = torch.randn(x.shape, generator=generator)
    found = []
    for function in (fake_quantize, by_the_formula):
        own_x, own_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y = function(own_x, own_scale, spec, noise, keep)
        y.backward(grad)  # type: ignore[no-untyped-call]
        found.append((y.detach(), own_x.grad, own_scale.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_gradients_are_those_of_the_paper() -> None:
    x = torch.tensor([0.6, 9.0, -9.0, 1.5, -2.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, scale, SIGNED, None, None, 0.25).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and scale.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))
    # Inside: round(1.2) - 1.2 = -0.2; at the limits 3 and -4 and beyond: the limits.
    torch.testing.assert_close(scale.grad, torch.tensor((-0.2 + 3 - 4 + 3 - 4) / 4))


def test_saturated_elements_take_the_limit_and_the_others_are_not_clamped() -> None:
    x = torch.tensor([0.0, 0.1, 1.9, 3.4, 3.5, 8.0])
    noise = torch.full_like(x, 0.4)
    got = fake_quantize(x, torch.tensor(0.5), RELU, noise).numpy()
    np.testing.assert_allclose(got, [0, 0.3, 2.1, 3.6, 3.5, 3.5], rtol=1e-6)
    # Clamped noise, which this test tells apart, would stop at 7 codes of 0.5.
    assert got.max() > 3.5
    low = fake_quantize(torch.tensor([0.1]), torch.tensor(0.5), RELU, torch.tensor([-0.4]))
    np.testing.assert_allclose(low.numpy(), [-0.1], rtol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
def test_noise_has_the_distribution_of_the_errors_of_what_is_not_saturated(
    per_channel: bool,
) -> None:
    u = np.random.default_rng(0).normal(0, 3, 60000).astype(np.float32)
    u[::3] = 0.3  # a distribution that is not uniform
    u = np.maximum(u, 0)  # two in five are zeros of a ReLU
    inside = u[(u > RELU.lo) & (u < RELU.hi)]
    errors = np.round(inside) - inside
    scale = torch.tensor([[0.5], [2.0]]) if per_channel else torch.tensor(0.5)
    x = torch.from_numpy(u.reshape(2, -1)) * scale
    noise = Draws(0, torch.device("cpu")).resample(x, scale, RELU).numpy()
    quantiles = np.linspace(0.05, 0.95, 10)
    expected = np.quantile(errors, quantiles)
    # A pool of some 10,000 errors: where 0.4 of them fill a unit interval, quantiles are known to
    # about 0.013.
    np.testing.assert_allclose(np.quantile(noise, quantiles), expected, atol=0.04)
    # What the zeros would do to it: their errors are 0.
    mixed = np.round(np.clip(u, 0, RELU.hi)) - np.clip(u, 0, RELU.hi)
    assert np.abs(np.quantile(mixed, quantiles) - expected).max() > 0.1
    assert (noise == 0).mean() < 0.01


def test_a_tensor_of_saturated_elements_has_no_noise() -> None:
    x = torch.zeros(5, 7)
    noise = Draws(0, torch.device("cpu")).resample(x, torch.tensor(0.1), RELU)
    torch.testing.assert_close(noise, torch.zeros(5, 7))
