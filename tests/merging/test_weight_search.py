"""Merge weights chosen on images without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle
from hdrq_deploy.cli import merge as merge_command
from hdrq_deploy.errors import DataError, HdrqError, MergeError
from hdrq_deploy.formats.bundle import WEIGHTS
from hdrq_deploy.formats.safetensors_layout import serialize
from hdrq_deploy.graph import reference_session
from hdrq_deploy.merging import Merger, choose_weights, weight_race, weight_search
from hdrq_deploy.merging.re_estimate import NewMoments
from hdrq_deploy.merging.unrounded_network import UnroundedNetwork
from hdrq_deploy.merging.weight_search import score


def logits(bundle: Bundle, tensors: Any, x: Any) -> Any:
    weights = serialize(tensors, bundle.manifest.tensors)
    graph = (bundle.path / "model.onnx").read_bytes()
    return reference_session.unfused_session(graph, {WEIGHTS: weights}).run(None, {"input": x})[0]


@pytest.mark.parametrize(
    ("criterion", "parents", "method"),
    [
        ("entropy", {"fold": "steps", "wbits": 8}, "mean"),
        ("information", {"fold": "steps", "wbits": 8}, "mean"),
        ("agreement", {"fold": "steps", "wbits": 8}, "mean"),
        ("agreement", {"fold": "steps", "wbits": 8, "statistics": "auto"}, "regression"),
        ("agreement", {"method": "float", "statistics": "auto"}, "regression"),
    ],
)
def test_the_chosen_weights_have_the_lowest_score_of_the_grid(
    make: Any,
    inputs: Any,
    criterion: str,
    parents: Any,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parents = [make(domain=d, **parents) for d in ("night", "day")]
    images = {"night": inputs[:24], "day": inputs[24:]}
    merger = Merger(parents, method=method)
    found = choose_weights(merger, images, criterion, exhaustive=True)
    assert len(found.tried) == 21 and not found.left and found.runs == 21 * len(inputs)
    scores = {}
    for share in (0.0, 0.35, 0.5, 1.0):  # some points of the grid, from scratch
        mix = (share, 1 - share)
        tensors = merger.tensors(mix)
        per_domain = []
        for parent, (_, x) in zip(parents, images.items(), strict=True):
            z = logits(parent, tensors, x).astype(np.float64)
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            own = logits(parent, parent.tensors(), x).astype(np.float64)
            q = np.exp(own) / np.exp(own).sum(1, keepdims=True)
            value = -(p * np.log(p)).sum(1).mean()
            if criterion == "information":
                value += (p.mean(0) * np.log(p.mean(0))).sum()
            if criterion == "agreement":
                value = -(q * np.log(p)).sum(1).mean()
            per_domain.append(value)
        scores[mix] = np.mean(per_domain)
    tried = dict(found.tried)
    for mix, value in scores.items():
        near = min(tried, key=lambda point: abs(point[0] - mix[0]))
        # The weights that are scored are not rounded; a corner's are codes anyway.
        assert tried[near] == pytest.approx(value, rel=1e-5, abs=0 if 1 in mix else 2e-3)
    assert tried[found.weights] == min(tried.values())
    # The search gives the same scores, of fewer points, and the same choice.
    monkeypatch.setattr(weight_race, "FIRST", 6)
    searched = choose_weights(merger, images, criterion, seed=1)
    assert searched.weights == found.weights and searched.runs < found.runs
    for mix, value in searched.tried:
        assert tried[mix] == pytest.approx(value, rel=1e-12)


def test_networks_that_are_not_kept_open_give_the_same_scores(
    make: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = [make(domain=d, fold="steps", wbits=8) for d in ("night", "day")]
    merger = Merger(parents, method="mean", keep=True)
    images = {"night": inputs, "day": inputs[::-1].copy()}
    monkeypatch.setattr(weight_race, "FIRST", 6)
    found = []
    for room in (1 << 30, 0):
        monkeypatch.setattr(weight_search, "_KEPT", room)
        chosen = choose_weights(merger, images, renewed=images)
        found.append((chosen.weights, chosen.tried, chosen.left))
    assert found[0] == found[1] and found[0][2]


def test_an_older_runtime_reads_what_lies_outside(
    make: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime before 1.23 takes no file from memory; the graph then holds what is in it."""
    parents = [make(domain=d, fold="steps", wbits=4) for d in ("night", "day")]
    mixed = Merger(parents).unrounded([0.5, 0.5])

    def answers() -> Any:
        moments = NewMoments(parents[0]).of(mixed, {"all": inputs})
        return UnroundedNetwork(parents[0]).opened({**mixed, **moments})(inputs[:5], "night")

    expected = answers()
    monkeypatch.setattr(reference_session, "_FROM_MEMORY", "no such option")
    np.testing.assert_array_equal(answers(), expected)


def test_a_network_with_real_weights_is_that_of_its_codes_whatever_the_threads(
    make: Any, inputs: Any
) -> None:
    bundle = make(fold="steps", wbits=8)
    merger = Merger([bundle, make(domain="day", fold="steps", wbits=8)])
    alone = merger.unrounded([1.0, 0.0])  # the codes themselves
    answers = []
    for threads in (1, 3):
        with reference_session.session_threads(threads):
            answers.append(UnroundedNetwork(bundle).opened(alone)(inputs[:11], "night"))
    assert (answers[0] == answers[1]).all() and answers[0].shape == (11, 4)
    exact = logits(bundle, bundle.tensors(), inputs[:11])
    assert np.abs(answers[0] - exact).max() < 0.02 * np.abs(exact).max()
    with pytest.raises(DataError, match="the images of night do not fit the model"):
        UnroundedNetwork(bundle).opened(alone)(inputs[:2, :1], "night")


def test_without_the_bundles_own_domains_information_decides(make: Any, inputs: Any) -> None:
    merger = Merger([make(domain=d) for d in ("night", "day")])
    assert choose_weights(merger, {"stream": inputs}).criterion == "information"
    assert choose_weights(merger, {"night": inputs}).criterion == "agreement"
    with pytest.raises(HdrqError, match="agreement needs the names"):
        choose_weights(merger, {"stream": inputs}, "agreement")
    with pytest.raises(HdrqError, match="do not fit the model"):
        choose_weights(merger, {"night": inputs[:, :1]})


def test_a_grid_without_a_mix_of_all_parents_has_equal_weights_beside_it(
    make: Any, inputs: Any
) -> None:
    parents = [make(domain=name) for name in ("night", "day", "night", "day", "night")]
    found = choose_weights(Merger(parents), {"stream": inputs[:8]})
    points = [point for point, *_ in (*found.tried, *found.left)]
    assert all(min(point) == 0 for point in weight_search.simplex(5))
    assert (0.2,) * 5 in [point for point, _ in found.tried] and len(set(points)) == 71


@pytest.mark.parametrize("parents", [1, 2, 3, 4, 5, 13, 14, 100])
def test_the_grid_lies_on_the_simplex_for_any_number_of_parents(parents: int) -> None:
    points = list(weight_search.simplex(parents))
    assert len(points) == len(set(points)) <= 100
    np.testing.assert_allclose(np.sum(points, 1), 1)
    assert {point for point in points if max(point) == 1} == {
        tuple(row) for row in np.eye(parents).tolist()
    }


def test_more_parents_than_the_grid_has_points_are_refused() -> None:
    with pytest.raises(MergeError, match="found 101 bundles.*100 at most"):
        list(weight_search.simplex(101))


def test_scores_know_a_sure_model_from_a_collapsed_one() -> None:
    sure = 20.0 * np.eye(4)
    collapsed = np.tile(sure[:1], (4, 1))
    assert score("entropy", collapsed) == pytest.approx(score("entropy", sure), abs=1e-6)
    assert score("information", sure) < score("information", collapsed) - 1


def test_the_merge_command_chooses_and_re_estimates(
    make: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [str(make(domain=d, fold="steps", wbits=8).path) for d in ("night", "day")]
    data = [f"night={work}/data.npz", f"day={work}/data.npz"]
    out = tmp_path / "m.hdrq"
    argv = [*bundles, "--weights", "auto", "--data", *data, "--re-estimate", *data, "-o", str(out)]
    assert merge_command.main([*argv, "--images", "16", "--re-estimate-images", "12"]) == 0
    options = Bundle.open(out).manifest.options
    assert options["merge"]["auto"]["criterion"] == "agreement"
    auto = options["merge"]["auto"]
    assert auto["mixes"] == len(auto["tried"]) + len(auto["left"]) <= 21
    assert len(auto["tried"]) * 32 <= auto["images_run"] <= 21 * 32
    assert f"{auto['mixes']} mixes, {auto['images_run']} images run in " in capsys.readouterr().out
    assert options["re_estimate"]["images"] == {"night": 12, "day": 12}
    assert [p.name for p in tmp_path.iterdir()] == ["m.hdrq"]
    assert merge_command.main([*bundles, "--weights", "auto", "-o", str(out)]) == 2
    assert "--data NAME=PATH" in capsys.readouterr().err
    for flags, message in (
        (["--rounding", "advanced", "--candidates", "0"], "candidates=0"),
        (["--weights", "-0.5", "1.5"], "weights >= 0"),
    ):
        assert merge_command.main([*bundles, *flags, "-o", str(tmp_path / "no.hdrq")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.hdrq").exists()
