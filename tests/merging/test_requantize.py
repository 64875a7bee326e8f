"""Merges with other weight bits than their parents, beside calibrations at these bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hdrq_deploy import Bundle, export, merge, verify
from hdrq_deploy.errors import MergeError, SpecError
from hdrq_deploy.merging.requantize import graph_with, requantized_entries
from hdrq_deploy.numerics.quantization import search_scale
from hdrq_deploy.numerics.spec import QuantSpec


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


@pytest.mark.parametrize(("bits", "engine"), [(4, "ort"), (3, "trt-rtx")])
def test_a_merge_with_other_bits_is_verified_like_a_calibrated_bundle(
    make: Any, inputs: Any, tmp_path: Path, bits: int, engine: str
) -> None:
    if engine == "trt-rtx":
        pytest.importorskip("tensorrt_rtx")
    parents = [make(domain=d, wbits=8, statistics="full") for d in ("night", "day")]
    like = make(wbits=bits)
    merged = Bundle.open(merge(parents, tmp_path / "m.hdrq", wbits=bits).path)
    told = merged.manifest.options["merge"]
    assert (told["method"], told["rounding"]) == ("regression", "compensated")
    assert told["wbits"] == bits
    mine, calibrated = merged.manifest, like.manifest
    assert merged.graph_sha256 == like.graph_sha256
    assert (mine.tensors, mine.layers) == (calibrated.tensors, calibrated.layers)
    assert mine.scheme == calibrated.scheme
    widths = {name: e.bits for name, e in mine.tensors.items() if e.role == "codes"}
    assert {name for name, width in widths.items() if width == 8} == {
        "stem.weight_codes",
        "fc.weight_codes",
    }
    for name, entry in mine.tensors.items():
        if entry.role == "codes":
            codes = merged.tensor(name)
            assert entry.lo <= codes.min() < 0 < codes.max() <= entry.hi
    assert "output" not in merged.golden() and len(merged.golden()["input"]) == 2
    folder = export(merged, tmp_path / "engine", engine)
    if engine == "ort":
        checked = verify(merged.path, folder, inputs, torch=False)
        checked.check()


def test_what_other_bits_do_not_go_with(make: Any, tmp_path: Path) -> None:
    parents = [make(domain=d, wbits=8, statistics="full") for d in ("night", "day")]
    with pytest.raises(MergeError, match="choose nearest or compensated"):
        merge(parents, tmp_path / "m.hdrq", rounding="noise", wbits=4)
    with pytest.raises(SpecError, match="wbits=9"):
        merge(parents, tmp_path / "m.hdrq", wbits=9)
    floats = [make(domain=d, method="float") for d in ("night", "day")]
    with pytest.raises(MergeError, match="bundle of float weights"):
        merge(floats, tmp_path / "m.hdrq", wbits=4)
    assert not (tmp_path / "m.hdrq").exists()


def test_scales_of_activations(make: Any, tmp_path: Path) -> None:
    parents = [make(domain=d, wbits=8, statistics="full") for d in ("night", "day")]
    found = {
        way: merge(parents, tmp_path / f"{way}.hdrq", [0.25, 0.75], activation_scales=way)
        for way in ("mean", "max", "statistics")
    }
    for activation in parents[0].manifest.activations:
        own = [float(p.tensor(activation.scale)) for p in parents]
        got = {way: float(b.tensor(activation.scale)) for way, b in found.items()}
        assert got["mean"] == pytest.approx(0.25 * own[0] + 0.75 * own[1])
        assert got["max"] == pytest.approx(max(own))
        # Values of both, drawn from their histograms, and the search that calibration makes.
        values = np.concatenate(
            [_values(p, activation.scale, n) for p, n in zip(parents, (5000, 15000), strict=True)]
        )
        spec = QuantSpec(activation.bits, activation.lo, activation.hi)
        searched = float(search_scale(values, spec))
        assert got["statistics"] == pytest.approx(searched, rel=0.05)
    assert found["max"].manifest.options["merge"]["activation_scales"] == "max"


def _values(bundle: Bundle, scale: str, count: int) -> Any:
    """Quantiles of a histogram."""
    histogram = bundle.statistics().histogram(scale)
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    below = np.concatenate([[0.0], np.cumsum(histogram.counts, dtype=np.float64)])
    return np.interp((np.arange(count) + 0.5) / count * below[-1], below, edges)
