"""Networks that nobody wrote: every form of the model agrees with PyTorch, or is refused in a line.

``HDRQ_NETWORKS=500 pytest tests/calibration/test_properties.py -s`` draws more of them and prints
the counts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.errors import HdrqError
from hdrq_deploy.exporters import export
from hdrq_deploy.graph import reference_session
from hdrq_deploy.runtime import load_engine

COUNT = int(os.environ.get("HDRQ_NETWORKS", "16"))
OUTCOMES: Counter[str] = Counter()
OPERATIONS = ("conv", "conv", "conv", "norm", "activate", "activate", "join", "pool", "move",
              "scale", "linear", "left", "twice", "gate", "attend")  # fmt: skip
SHAPES = ((3, 8, 8), (1, 9, 7), (4, 12, 12), (2, 10), (12,), (2, 3, 6, 6))
VARIANTS: dict[str, dict[str, Any]] = {
    "float": {"method": "float"},
    "tensor": {"method": "rtn"},
    "channel": {"method": "rtn", "per_channel": True},
    "scales": {"method": "rtn", "fold": "steps"},
    "w4": {"method": "rtn", "per_channel": True, "wbits": 4},
}
# dB that the bundle must keep of the module's output; networks that cancel what they
# compute lose more than others, a wrong sign or channel leaves 0 to 6.
KEPT = {"float": 80.0, "tensor": 9.0, "channel": 9.0, "scales": 9.0, "w4": 3.0}


def _generated() -> Any:
    """``generated_networks`` under the name that --model imports."""
    if "generated_networks" not in sys.modules:
        path = Path(__file__).with_name("generated_networks.py")
        spec = importlib.util.spec_from_file_location("generated_networks", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["generated_networks"] = module
        spec.loader.exec_module(module)
    return sys.modules["generated_networks"]


instructions = st.tuples(
    st.sampled_from(OPERATIONS),
    st.integers(0, 15),
    st.integers(0, 15),
    st.integers(0, 7),
)
programs = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(SHAPES),
        "body": st.lists(instructions, min_size=2, max_size=10),
        "head": st.integers(0, 7),
        "seed": st.integers(0, 99),
    }
)


def decibels(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    assert expected.shape == got.shape, (expected.shape, got.shape)
    noise = float(((got.astype(np.float64) - expected) ** 2).sum())
    return 10 * float(np.log10(float((expected.astype(np.float64) ** 2).sum()) / max(noise, 1e-30)))


def forms(folder: Path, program: dict[str, Any], variant: str) -> str:
    """Calibrate, export and compare one network; what became of it."""
    module = _generated()
    module.PROGRAM.__dict__.update(program)
    model = module.make().eval()
    rng = np.random.default_rng(0)
    x = rng.random((24, *program["shape"]), dtype=np.float32)
    np.savez(folder / "data.npz", x=x, y=np.zeros(len(x), int))
    test = rng.random((7, *program["shape"]), dtype=np.float32)
    with torch.no_grad():
        expected = {n: model(torch.from_numpy(test[:n].copy())).numpy() for n in (7, 3, 1)}
    try:
        bundle = calibrate(
            "generated_networks:make", folder / "data.npz", "x", folder / "b.hdrq",
            **VARIANTS[variant],
        )  # fmt: skip
    except HdrqError as error:
        assert len(str(error).splitlines()) == 1
        assert "please report" not in str(error), error
        return "calibration refused"
    session = reference_session.unfused_session(bundle.path / "model.onnx", threads=1)
    graph = {n: session.run(None, {"input": test[:n]})[0] for n in expected}
    for n, want in expected.items():
        if float(np.abs(want).max()) > 1e-3:
            assert decibels(want, graph[n]) > KEPT[variant], (variant, n)
    try:
        export(bundle, folder / "engine", "ort")
    except HdrqError as error:
        assert len(str(error).splitlines()) == 1
        assert "please report" not in str(error), error
        return "export refused"
    with load_engine(folder / "engine", threads=1) as engine:
        for n, want in graph.items():
            if float(np.abs(want).max()) > 1e-3:
                # The kernels' own rounding: a few codes of every tensor by one.
                assert decibels(want, np.asarray(engine(test[:n]))) > 17, (variant, n)
    return "right"


@pytest.mark.slow
@seed(20260)
@settings(
    max_examples=COUNT,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(program=programs, variant=st.sampled_from(sorted(VARIANTS)))
def test_generated_networks_agree_in_all_forms_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, program: dict[str, Any], variant: str
) -> None:
    folder = tmp_path_factory.mktemp("network")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            OUTCOMES[forms(folder, program, variant)] += 1
    finally:
        shutil.rmtree(folder)


def test_the_networks_are_of_many_kinds_and_some_are_right() -> None:
    """Counts of the test above, where it ran; a grammar that is only refused tests nothing."""
    print(dict(OUTCOMES))
    total = sum(OUTCOMES.values())
    assert total == 0 or OUTCOMES["right"] > total / 2
