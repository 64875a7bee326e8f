"""Domains of one model share graphs where the caller says so, and nothing else is shared."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hdrq_deploy.calibration import preparation, to_onnx
from hdrq_deploy.calibration.graph_cache import GraphCache
from hdrq_deploy.calibration.pipeline import run_calibration
from hdrq_deploy.calibration.request import CalibrationRequest, Quantization
from hdrq_deploy.errors import HdrqError, SpecError
from hdrq_deploy.experiments.bundles import make_bundle
from hdrq_deploy.formats.bundle import Bundle


def request(work: Path, output: Path, domain: str = "night") -> CalibrationRequest:
    return CalibrationRequest(
        "tiny_models:Tiny",
        work / "data.npz",
        domain,
        output / f"{domain}.hdrq",
        work / f"Tiny-{domain}.safetensors",
        method="rtn",
        wbits=4,
    )


@pytest.fixture(scope="module", autouse=True)
def shared_graphs() -> None:
    """No graphs here but those that a test shares."""


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was captured and written as ONNX, one entry each time."""
    seen: list[str] = []

    def counting(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any) -> Any:
            seen.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, counted)

    counting(preparation, "capture")
    counting(to_onnx, "_write_graph")
    return seen


def digests(bundle: Bundle) -> list[str]:
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(bundle.path.iterdir())]


def test_the_second_domain_is_not_captured_again(
    work: Path, tmp_path: Path, traced: list[str]
) -> None:
    alone = [run_calibration(request(work, tmp_path / "a", d)) for d in ("night", "day")]
    assert traced == ["capture", "_write_graph"] * 2
    traced.clear()
    graphs = GraphCache()
    shared = [run_calibration(request(work, tmp_path / "b", d), graphs) for d in ("night", "day")]
    assert traced == ["capture", "_write_graph"]
    assert [digests(b) for b in shared] == [digests(b) for b in alone]


def test_a_cache_in_another_process_begins_empty(work: Path, tmp_path: Path) -> None:
    graphs = GraphCache()
    run_calibration(request(work, tmp_path), graphs)
    sent = copy.copy(graphs)  # by __reduce__, as a job is sent to a worker
    assert isinstance(sent, GraphCache) and sent is not graphs
    assert sent._captured is None and not sent._written
    assert graphs._captured is not None and graphs._written


def test_graphs_that_were_asked_for_last_are_kept() -> None:
    graphs, made = GraphCache(), []

    def graph(key: str) -> bytes:
        return graphs.written(key, lambda: (made.append(key), (key.encode(), []))[1])[0]

    keys = [f"{i}" for i in range(8)]
    assert [graph(key) for key in [*keys, *keys]] == [key.encode() for key in [*keys, *keys]]
    assert made == keys
    graph("0"), graph("new"), graph("0"), graph("1")  # 1 had been asked for longest ago
    assert made == [*keys, "new", "1"]


def test_a_bundle_is_made_again_only_where_its_inputs_changed(
    work: Path, tmp_path: Path, traced: list[str]
) -> None:
    first = request(work, tmp_path)
    make_bundle(first)
    make_bundle(first)
    assert traced.count("capture") == 1
    make_bundle(replace(first, wbits=8))
    assert traced.count("capture") == 2


def test_a_worker_keeps_its_copy_from_job_to_job() -> None:
    cache, other = GraphCache(), GraphCache()
    first, second = (copy.copy(cache) for _ in range(2))
    assert first is second and first is not cache
    assert copy.copy(other) is not first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wbits": 1}, "wbits"),
        ({"abits": 9}, "abits"),
        ({"grid": "odd"}, "found grid 'odd'; choose one of"),
        ({"fold": "bias"}, "found fold 'bias'; choose one of"),
        ({"method": "magic"}, "found method 'magic'; choose one of"),
        ({"method": "hdrq"}, "found no source checkpoint.*give `base`"),
        ({"seed": -1}, "seed"),
        ({"domain": "a/b"}, "a/b"),
    ],
)
def test_a_request_is_checked_when_it_is_made(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = CalibrationRequest("m:F", "x.npz", "night", tmp_path / "b.hdrq", method="rtn")
    with pytest.raises(HdrqError, match=message):
        replace(good, **change)


def test_scales_that_carry_batch_norm_are_one_per_channel() -> None:
    assert Quantization.of(4, 8, False, "int8", "steps").per_channel
    with pytest.raises(SpecError, match="need one per channel"):
        Quantization(scales_carry_batch_norm=True)
