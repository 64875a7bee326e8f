"""Weights of -128 on ARM processors without dot product, where ONNX Runtime adds them wrongly.

What the processor does is in ``benchmarks/results/arm_emulated.json``; here the remedy is held
against the graph that it replaces, on whatever processor the tests run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hdrq_deploy.errors import EngineError
from hdrq_deploy.exporters import export, precision
from hdrq_deploy.exporters.lowering_ort import lower_ort
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.graph import model_files
from hdrq_deploy.graph.products import holds_wrapping_weights
from hdrq_deploy.graph.reference_session import open_session, session_options
from hdrq_deploy.runtime import load_engine
from hdrq_deploy.runtime import ort as runtime_ort


def with_the_lowest_code(bundle: Bundle) -> dict[str, Any]:
    """The bundle's tensors; every 8-bit weight has a code of -128."""
    tensors = bundle.tensors()
    for name, entry in bundle.manifest.tensors.items():
        if entry.role == "codes" and entry.bits == 8:
            tensors[name] = tensors[name].copy()
            tensors[name].reshape(-1)[:2] = -128
    return tensors


@pytest.mark.parametrize("name", ["Tiny", "Net", "Attention"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_held_as_uint8_give_the_same_numbers(
    make: Any, inputs: Any, tmp_path: Path, name: str, per_channel: bool
) -> None:
    bundle = make(name, per_channel=per_channel)  # first and last layers of 8 bits, others of 4
    tensors = with_the_lowest_code(bundle)
    outputs, kernels = [], []
    for wraps in (False, True):
        folder = tmp_path / str(wraps)
        folder.mkdir()
        path = folder / "model.onnx"
        model_files.save(lower_ort(model_files.load(bundle, tensors), wraps=wraps), path)
        onnx.checker.check_model(str(path), full_check=True)
        assert holds_wrapping_weights(path) is not wraps
        session = open_session(path, session_options(1, graph=path))
        outputs.append(session.run(None, {"input": inputs[:4]})[0])
        report = precision.from_ort(path, bundle.manifest.layers)
        kernels.append([(row.node, row.executed, row.evidence.split()[0]) for row in report.layers])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert kernels[0] == kernels[1]


def test_an_engine_of_another_processor_is_refused(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = export(make("Tiny"), tmp_path / "e", "ort")
    load_engine(engine).close()
    monkeypatch.setattr(runtime_ort, "products_wrap", lambda: True)
    with pytest.raises(EngineError, match="weights of -128.*export the bundle again on this"):
        load_engine(engine)
