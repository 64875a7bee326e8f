"""Merges with other weight bits than their parents, beside calibrations at these bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from hdrq_deploy.merging.requantize import graph_with, requantized_entries


@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [
        ("Tiny", 6, {}),
        ("Net", 4, {}),
        ("Attention", 2, {"per_channel": True}),
        ("Tiny", 3, {"fold": "steps"}),
    ],
)
def test_graph_and_entries_are_those_of_a_calibration(
    make: Any, name: str, bits: int, options: Any
) -> None:
    wide = make(name, wbits=8, **options)
    narrow = make(name, wbits=bits, **options)
    entries = requantized_entries(wide, bits)
    assert entries == narrow.manifest.tensors
    tensors = {n: np.zeros(entry.shape, np.int8) for n, entry in entries.items()}
    graph = graph_with(wide, tensors, entries)
    expected = narrow.graph()
    assert onnx.load_model_from_string(graph) == expected
    assert graph == expected.SerializeToString(deterministic=True)
    assert (wide.graph() != expected) == (bits <= 4)  # wider codes are stored alike
