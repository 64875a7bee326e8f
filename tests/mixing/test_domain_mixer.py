"""Domains mixed while frames keep coming."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle, merge
from hdrq_deploy.errors import DataError, EngineError, MergeError
from hdrq_deploy.exporters import export
from hdrq_deploy.merging import Merger, choose_weights
from hdrq_deploy.mixing import DomainMixer
from hdrq_deploy.runtime import load_engine
from tests.merging.seen import with_statistics

NAMES = ("night", "day", "snow")


@pytest.fixture
def parents(make: Any) -> list[Bundle]:
    return [make(domain=name, fold="steps") for name in NAMES]


@pytest.mark.parametrize("rounding", ["nearest", "advanced"])
def test_a_mix_computes_what_the_exported_merge_does(
    parents: list[Bundle], inputs: Any, tmp_path: Path, rounding: str
) -> None:
    with DomainMixer(parents, rounding=rounding, candidates=10) as mixer:
        for weights in ((0.7, 0.3, 0.0), (0.2, 0.3, 0.5)):
            mixer.set(dict(zip(NAMES, weights, strict=True))).result(60)
            merged = merge(parents, tmp_path / "m.hdrq", weights, rounding, 10, method="mean")
            with load_engine(export(merged, tmp_path / "e", force=True)) as engine:
                np.testing.assert_array_equal(mixer(inputs), engine(inputs))
            assert mixer.mix == dict(zip(NAMES, weights, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_regression_mixes_compute_what_the_exported_merge_does(
    make: Any, inputs: Any, tmp_path: Path, rounding: str
) -> None:
    parents = [
        with_statistics(make(domain=name, per_channel=True), tmp_path / f"{name}.hdrq", seed)
        for seed, name in enumerate(NAMES[:2])
    ]
    outputs = []
    with DomainMixer(parents, rounding=rounding, method="regression") as mixer:
        for weights in ((0.5, 0.5), (0.2, 0.8)):
            mixer.set(dict(zip(NAMES, weights, strict=False))).result(60)
            outputs.append(mixer(inputs))
            merged = merge(parents, tmp_path / "m.hdrq", weights, rounding, method="regression")
            with load_engine(export(merged, tmp_path / "e", force=True)) as engine:
                expected = engine(inputs)
            # Systems are kept in single precision, so a code may be the neighbouring one.
            apart = np.sqrt(((outputs[-1] - expected) ** 2).mean() / (expected**2).mean())
            assert apart < 0.01
            # The corrected bias of one merge, and scales of its own.
            mean = merge(parents, tmp_path / "n.hdrq", weights, "nearest", method="mean")
            assert any(
                not np.array_equal(mean.tensor(name), merged.tensor(name))
                for name, entry in merged.manifest.tensors.items()
                if entry.role == "scale"
            )
        adapted = mixer.adapt(inputs, margin=0.0)
        assert mixer.mix == adapted.mix if adapted.changed else mixer.mix["night"] == 0.2
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-4


def test_a_mixer_refuses_regression_without_statistics_and_noise_with_it(make: Any) -> None:
    plain = [make(domain=name, statistics="off") for name in NAMES[:2]]
    with pytest.raises(MergeError, match="found no statistics"):
        DomainMixer(plain, method="regression")
    with pytest.raises(MergeError, match="choose nearest or compensated"):
        DomainMixer(plain, method="regression", rounding="advanced")


def test_every_output_comes_from_one_mix_while_mixes_are_swapped(
    parents: list[Bundle], inputs: Any
) -> None:
    grid = [{"night": i / 10, "day": 1 - i / 10} for i in range(11)]
    x = inputs[:4]
    with DomainMixer(parents, threads=1, cached=3) as mixer:
        expected = {}
        for mix in grid:
            mixer.set(mix).result(60)
            expected[tuple(mixer.mix.values())] = mixer(x)
        stop, seen, wrong = threading.Event(), [0], []

        def frames() -> None:
            while not stop.is_set():
                output = mixer.run(x)
                seen[0] += 1
                if not np.array_equal(output.values, expected[tuple(output.mix.values())]):
                    wrong.append(output.mix)

        camera = [threading.Thread(target=frames) for _ in range(2)]
        for thread in camera:
            thread.start()
        for i in range(100):
            mixer.set(grid[(7 * i) % 11]).result(60)
            assert mixer.mix["night"] == grid[(7 * i) % 11]["night"]
        stop.set()
        for thread in camera:
            thread.join()
        assert wrong == [] and seen[0] > 100
        assert len(mixer._recent) <= 3


def test_the_last_of_many_requests_wins(parents: list[Bundle], inputs: Any) -> None:
    with DomainMixer(parents) as mixer:
        futures = [mixer.set({"night": i / 20, "snow": 1 - i / 20}) for i in range(20)]
        assert futures[-1].result(60) == {"night": 0.95, "day": 0.0, "snow": 1 - 0.95}
        assert mixer.mix["night"] == 0.95
        # All are answered, each with a mix that ran after it was asked for.
        assert all(f.result(60)["night"] >= i / 20 for i, f in enumerate(futures))


def test_what_does_not_fit_leaves_the_running_engine_alone(
    parents: list[Bundle], inputs: Any, tmp_path: Path
) -> None:
    copies = []
    for bundle in parents[:2]:
        copies.append(tmp_path / bundle.path.name)
        shutil.copytree(bundle.path, copies[-1])
    with DomainMixer(copies) as mixer:
        before = mixer(inputs)
        with pytest.raises(MergeError, match="found the domain 'rain'; the mixer has night, day"):
            mixer.set({"rain": 1.0})
        with pytest.raises(MergeError, match="sum 0.5"):
            mixer.set({"night": 0.5})
        with pytest.raises(EngineError, match="found NaN"):
            mixer(inputs * np.nan)
        with pytest.raises(EngineError, match=r"needed \('batch', 3, 16, 16\)"):
            mixer(inputs[:, :1])
        shutil.rmtree(copies[0])
        with pytest.raises(MergeError, match="cannot be read any more .*keeps running"):
            mixer.set({"night": 0.9, "day": 0.1}).result(60)
        np.testing.assert_array_equal(mixer(inputs), before)
    with pytest.raises(EngineError, match="closed"):
        mixer(inputs)
    with pytest.raises(EngineError, match="closed"):
        mixer.set({"night": 1.0})
    with pytest.raises(EngineError, match="a mixer runs ort, openvino, trt, trt-rtx"):
        DomainMixer(parents, engine="onnx")
    with pytest.raises(MergeError, match="needed one bundle for each"):
        DomainMixer([parents[0], parents[0]])
    both = merge(parents[:2], tmp_path / "both.hdrq")
    with pytest.raises(MergeError, match="a mixer needs the bundles of single domains"):
        DomainMixer([both, parents[2]])


def test_adapting_takes_the_best_mix_and_does_not_flap(parents: list[Bundle], inputs: Any) -> None:
    merger = Merger(parents)
    whole = choose_weights(merger, {"stream": inputs}, "confidence", exhaustive=True)
    tried = dict(whole.tried)
    best, worst = min(tried, key=tried.__getitem__), max(tried, key=tried.__getitem__)
    gap = tried[worst] - tried[best]
    assert gap > 1e-4
    mixes = {point: dict(zip(NAMES, point, strict=True)) for point in (best, worst)}
    with DomainMixer(parents, mix=mixes[worst]) as mixer:
        # The best mix is better than the running one, but not by this margin.
        kept = mixer.adapt(inputs, margin=1.01 * gap)
        assert not kept.changed and mixer.mix == mixes[worst]
        assert (kept.mix, kept.score, kept.present) == (mixes[best], tried[best], tried[worst])
        worse = mixer(inputs)
        taken = mixer.adapt(inputs, margin=0.99 * gap)
        assert taken.changed and taken.mix == mixes[best] and mixer.mix == mixes[best]
        assert not np.array_equal(mixer(inputs), worse)
        # The same frames again: nothing is clearly better than the best.
        again = mixer.adapt(inputs, margin=0.0)
        assert not again.changed and mixer.mix == again.mix == mixes[best]
        assert again.present == again.score == tried[best]
        with pytest.raises(DataError, match="do not fit the model"):
            mixer.adapt(inputs[:, :1])
