"""The search of a scale, in NumPy and in PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from hdrq_deploy.calibration.fake_quantizers import search_scale as torch_search_scale
from hdrq_deploy.numerics.quantization import search_scale
from hdrq_deploy.numerics.spec import QuantSpec


def test_both_scale_searches_agree() -> None:
    x = np.random.default_rng(0).normal(0, 1, 5000).astype(np.float32)
    for spec, values in ((QuantSpec.weight(4), x), (QuantSpec(4, 0, 15), np.abs(x))):
        found = torch_search_scale(torch.from_numpy(values), spec)
        np.testing.assert_allclose(search_scale(values, spec), found.numpy(), rtol=1e-5)


def test_a_large_tensor_finds_the_scale_that_all_candidates_find() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_t(4, 200_000).astype(np.float32))
    spec = QuantSpec.weight(3)
    np.testing.assert_allclose(
        torch_search_scale(x, spec).numpy(), search_scale(x.numpy(), spec), rtol=1e-5
    )
