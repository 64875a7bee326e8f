"""Weights from data, re-estimated moments, float merging, analysis, recipes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hdrq_deploy import Bundle, merge
from hdrq_deploy.analysis import Settings, analyze
from hdrq_deploy.analysis.landscape import top_eigenvalue, trace
from hdrq_deploy.calibration.fake_quantizers import search_scale as torch_search_scale
from hdrq_deploy.calibration.recipe import METHODS, Options, Recipe
from hdrq_deploy.cli import analyze as analyze_command
from hdrq_deploy.cli import calibrate as calibrate_command
from hdrq_deploy.cli import merge as merge_command
from hdrq_deploy.errors import HdrqError, MergeError
from hdrq_deploy.formats.bundle import WEIGHTS
from hdrq_deploy.formats.safetensors_layout import serialize
from hdrq_deploy.graph import reference_session
from hdrq_deploy.merging import Merger, choose_weights, merge_checkpoints, re_estimate
from hdrq_deploy.merging.weight_search import score
from hdrq_deploy.numerics.quantization import search_scale
from hdrq_deploy.numerics.spec import QuantSpec


def logits(bundle: Bundle, tensors: Any, x: Any) -> Any:
    weights = serialize(tensors, bundle.manifest.tensors)
    graph = (bundle.path / "model.onnx").read_bytes()
    return reference_session.unfused_session(graph, {WEIGHTS: weights}).run(None, {"input": x})[0]


@pytest.mark.parametrize("criterion", ["entropy", "information", "agreement"])
def test_the_chosen_weights_have_the_lowest_score_of_the_grid(
    make: Any, inputs: Any, criterion: str
) -> None:
    parents = [make(domain=d, fold="steps", wbits=8) for d in ("night", "day")]
    images = {"night": inputs[:24], "day": inputs[24:]}
    merger = Merger(parents)
    found = choose_weights(merger, images, criterion)
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


def test_without_the_bundles_own_domains_information_decides(make: Any, inputs: Any) -> None:
    merger = Merger([make(domain=d) for d in ("night", "day")])
    assert choose_weights(merger, {"stream": inputs}).criterion == "information"
    assert choose_weights(merger, {"night": inputs}).criterion == "agreement"
    with pytest.raises(HdrqError, match="agreement needs the names"):
        choose_weights(merger, {"stream": inputs}, "agreement")
    with pytest.raises(HdrqError, match="do not fit the model"):
        choose_weights(merger, {"night": inputs[:, :1]})


def test_scores_know_a_sure_model_from_a_collapsed_one() -> None:
    sure = 20.0 * np.eye(4)
    collapsed = np.tile(sure[:1], (4, 1))
    assert score("entropy", collapsed) == pytest.approx(score("entropy", sure), abs=1e-6)
    assert score("information", sure) < score("information", collapsed) - 1


@pytest.mark.parametrize(("method", "options"), [("rtn", {"fold": "steps"}), ("float", {})])
def test_moments_are_those_of_the_images(
    make: Any, inputs: Any, tmp_path: Path, method: str, options: Any
) -> None:
    """Against torch's own BatchNorm in training mode, on the dequantized raw weights."""
    import tiny_models

    parents = [make(domain=d, method=method, wbits=8, **options) for d in ("night", "day")]
    merged = merge(parents, tmp_path / "m.hdrq", rounding="nearest")
    found = re_estimate(merged, {"all": inputs}, tmp_path / "r.hdrq")
    model = tiny_models.Tiny()
    floats = merge([make(domain=d, method="float") for d in ("night", "day")], tmp_path / "f.hdrq")
    tensors = {n: torch.from_numpy(np.array(t)) for n, t in floats.tensors().items()}
    model.load_state_dict(tensors, strict=False)
    if method == "rtn":  # the weights that the bundle really has
        for layer in ("stem", "conv1"):
            fold = merged.manifest.folds[f"{layer}.weight_codes"]
            step = merged.tensor(fold.raw_scale)[:, None, None, None]
            norm = model.bn if layer == "stem" else model.bn1
            sign = np.sign(norm.weight.detach().numpy())[:, None, None, None]
            real = merged.tensor(f"{layer}.weight_codes") * step * sign
            getattr(model, layer).weight.data = torch.from_numpy(real.astype(np.float32))
    for norm in (model.bn, model.bn1):
        norm.momentum = None
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(torch.from_numpy(inputs))
    for layer, norm in (("stem", model.bn), ("conv1", model.bn1)):
        if method == "rtn":
            fold = merged.manifest.folds[f"{layer}.weight_codes"]
            names = fold.mean, fold.variance
            sign = np.sign(norm.weight.detach().numpy())
        else:
            prefix = "bn" if layer == "stem" else "bn1"
            names, sign = (f"{prefix}.running_mean", f"{prefix}.running_var"), 1.0
        mean, variance = norm.running_mean.numpy() * sign, norm.running_var.numpy()
        np.testing.assert_allclose(found.tensor(names[0]), mean, rtol=2e-3, atol=2e-4)
        # torch divides by n - 1, n is thousands of positions.
        np.testing.assert_allclose(found.tensor(names[1]), variance, rtol=3e-3)
    for name in merged.manifest.tensors:
        if merged.manifest.tensors[name].role == "codes":
            np.testing.assert_array_equal(found.tensor(name), merged.tensor(name))


def test_bundles_without_a_batch_norm_of_their_own_are_not_re_estimated(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    with pytest.raises(MergeError, match="folded into the steps"):
        re_estimate(make(), {"night": inputs}, tmp_path / "r.hdrq")
    with pytest.raises(HdrqError, match="2 or more"):
        re_estimate(make(fold="steps"), {"night": inputs[:1]}, tmp_path / "r.hdrq")
    assert not (tmp_path / "r.hdrq").exists()


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


def checkpoints(folder: Path, count: int = 2) -> tuple[list[Path], list[dict[str, Any]], Any]:
    rng = np.random.default_rng(0)

    def state() -> dict[str, Any]:
        return {
            "conv.weight": rng.normal(0, 1, (4, 3, 3, 3)).astype(np.float32),
            "bn.running_mean": rng.normal(0, 1, 4).astype(np.float32),
            "bn.running_var": rng.uniform(0.5, 2, 4).astype(np.float32),
            "bn.num_batches_tracked": np.array(7, np.int64),
        }

    base, states = state(), [state() for _ in range(count)]
    paths = []
    for i, tensors in enumerate((*states, base)):
        paths.append(folder / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    return paths[:-1], states, (paths[-1], base)


def test_checkpoints_merge_as_numpy_says(tmp_path: Path) -> None:
    paths, states, (base_path, base) = checkpoints(tmp_path)
    mix = [0.25, 0.75]
    out = tmp_path / "m.safetensors"
    got = load_file(merge_checkpoints(paths, out, mix))
    stacked = {k: np.stack([s[k] for s in states]) for k in states[0]}
    w = np.array(mix)
    np.testing.assert_allclose(
        got["conv.weight"], np.tensordot(w, stacked["conv.weight"], 1), rtol=1e-6
    )
    means, variances = stacked["bn.running_mean"], stacked["bn.running_var"]
    mixture = w @ (variances + means**2) - (w @ means) ** 2  # E[x^2] - E[x]^2
    np.testing.assert_allclose(got["bn.running_var"], mixture, rtol=1e-5)
    assert got["bn.num_batches_tracked"] == 7
    task = load_file(merge_checkpoints(paths, out, mix, "task-arithmetic", base_path, 1.5))
    change = np.tensordot(w, stacked["conv.weight"] - base["conv.weight"], 1)
    np.testing.assert_allclose(
        task["conv.weight"], base["conv.weight"] + 1.5 * change, rtol=1e-4, atol=1e-6
    )
    ties = load_file(merge_checkpoints(paths, out, mix, "ties", base_path, density=0.3))
    vectors = [(s["conv.weight"] - base["conv.weight"]).ravel() for s in states]
    expected = []
    kept = [set(np.argsort(-np.abs(v))[: round(0.3 * v.size)]) for v in vectors]
    for j in range(vectors[0].size):  # one element at a time
        parts = [
            m * float(v[j]) if j in k else 0.0 for m, v, k in zip(mix, vectors, kept, strict=True)
        ]
        sign = np.sign(sum(parts))
        agreeing = [i for i, part in enumerate(parts) if part and np.sign(part) == sign]
        total = sum(mix[i] for i in agreeing)
        expected.append(sum(parts[i] for i in agreeing) / total if agreeing else 0.0)
    moved = (ties["conv.weight"] - base["conv.weight"]).ravel()
    np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_checkpoints_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, states, _ = checkpoints(tmp_path)
    odd = {**states[0], "conv.weight": np.zeros((4, 3, 1, 1), np.float32)}
    save_file(odd, tmp_path / "odd.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\x05" * 30)
    out = str(tmp_path / "m.safetensors")
    first = str(paths[0])
    cases = [
        ([first, str(tmp_path / "odd.safetensors")], "conv.weight"),
        ([first, str(tmp_path / "junk.safetensors")], "cannot be read as safetensors"),
        ([first], "two or more"),
        ([first, str(paths[1]), "--method", "ties"], "give it as base"),
        ([first, str(paths[1]), "--weights", "0.5", "0.6"], "sum 1.1"),
        ([first, str(paths[1]), "--weights", "auto"], "works on bundles"),
        ([first, str(paths[1]), "--weights", "half", "half"], "one number per bundle"),
    ]
    for argv, message in cases:
        capsys.readouterr()
        assert merge_command.main([*argv, "-o", out]) == 2, argv
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not Path(out).exists()


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
    assert len(options["merge"]["auto"]["tried"]) == 21
    assert options["re_estimate"]["images"] == {"night": 12, "day": 12}
    assert [p.name for p in tmp_path.iterdir()] == ["m.hdrq"]
    assert merge_command.main([*bundles, "--weights", "auto", "-o", str(out)]) == 2
    assert "--data NAME=PATH" in capsys.readouterr().err
    for flags, message in (
        (["--candidates", "0"], "candidates=0"),
        (["--weights", "-0.5", "1.5"], "weights >= 0"),
    ):
        assert merge_command.main([*bundles, *flags, "-o", str(tmp_path / "no.hdrq")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.hdrq").exists()


def test_the_hessian_of_a_quadratic_is_found() -> None:
    rng = np.random.default_rng(0)
    root = torch.from_numpy(rng.normal(0, 1, (12, 12)).astype(np.float32))
    matrix = root @ root.T

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        w = torch.cat([weights["a"], weights["b"]])
        return 0.5 * w @ matrix @ w + w.sum()

    at = {"a": torch.ones(5), "b": torch.zeros(7)}
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert top_eigenvalue(loss, at, ["a", "b"], 12) == pytest.approx(largest, rel=1e-3)
    # 400 draws of random signs: the off-diagonal part averages out to a few percent.
    exact = float(matrix.trace())
    assert trace(loss, at, ["a", "b"], 400) == pytest.approx(exact, rel=0.1)


def test_the_analysis_agrees_with_the_graph(make: Any, inputs: Any) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, len(inputs))
    bundles = [make(domain=d, fold="steps") for d in ("night", "day")]
    data = dict.fromkeys(("night", "day"), (inputs, labels))
    settings = Settings(points=3, noises=1, grid=3, seeds=2, candidates=5, products=3)
    result = analyze(bundles, data, None, settings)
    z = logits(bundles[0], bundles[0].tensors(), inputs).astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    expected = -np.log(p[np.arange(len(p)), labels]).mean()
    assert result["models"]["night"]["loss"]["day"] == pytest.approx(expected, rel=1e-3)
    (barrier,) = result["barriers"]
    for curve in barrier["loss"]:
        ends = barrier["loss"][curve][0], barrier["loss"][curve][-1]
        height = max(barrier["loss"][curve]) - sum(ends) / 2
        assert barrier["barrier"][curve] == pytest.approx(height)
    points = result["surface"]["points"]
    np.testing.assert_allclose(points["night"], [-1, 0], atol=1e-3)
    np.testing.assert_allclose(points["day"], [1, 0], atol=1e-3)
    shares = {row["layer"]: row["ambiguous"] for row in result["layers"]}
    a, b = (bundle.tensor("conv1.weight_codes").astype(int) for bundle in bundles)
    assert shares["conv1.weight"] == pytest.approx(np.mean((a + b) % 2))


def test_the_analysis_command_writes_one_page_and_its_numbers(
    make: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [str(make(domain=d).path) for d in ("night", "day")]
    data = [f"night={work}/data.npz", f"day={work}/data.npz"]
    few = {"points": 3, "grid": 3, "seeds": 2, "candidates": 5, "products": 2, "images": 20}
    fast = [word for name, value in few.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "report"
    argv = [*bundles, "--data", *data, *fast, "--base", str(work / "Tiny-base.safetensors")]
    assert analyze_command.main([*argv, "-o", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5 and "src=" not in page
    record = json.loads((out / "report.json").read_text())
    assert "to_source" in record["distances"][0]
    capsys.readouterr()
    np.savez(tmp_path / "bare.npz", x=np.zeros((4, 3, 16, 16), np.float32))
    np.savez(tmp_path / "small.npz", x=np.zeros((4, 3, 8, 8), np.float32), y=np.zeros(4, np.int64))
    cases = [
        ([bundles[0], "--data", *data], "two or more"),
        ([*bundles, "--data", f"night={tmp_path}/bare.npz"], "without labels"),
        ([*bundles, "--data", f"night={tmp_path}/small.npz"], "the model reads"),
        ([*bundles, "--data", *data, "--grid", "2"], "grid=2"),
        ([bundles[0], bundles[0], "--data", *data], "two bundles of night"),
    ]
    for argv, message in cases:
        assert analyze_command.main([*argv, "-o", str(tmp_path / "no")]) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_recipes_are_files_and_flags_win(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(
        "method: qdrop\nwbits: 4\niters: 4\nbatch: 8\nlr: 1e-3\ndrop_prob: 0.25\nseed: 3\n"
    )
    common = [
        "--model", "tiny_models:Tiny", "--weights", str(work / "Tiny-night.safetensors"),
        "--data", str(work / "data.npz"), "--domain", "night",
    ]  # fmt: skip
    out = tmp_path / "a.hdrq"
    argv = [*common, "--recipe", str(tmp_path / "r.yaml"), "--iters", "3", "-o", str(out)]
    assert calibrate_command.main(argv) == 0
    manifest = Bundle.open(out).manifest
    assert (manifest.method, manifest.seed, manifest.scheme.wbits) == ("qdrop", 3, 4)
    resolved = manifest.options
    assert (resolved["iters"], resolved["drop_prob"], resolved["lr"]) == (3, 0.25, 1e-3)
    assert resolved["learner"] == "adaround" and resolved["noise"] == "off"
    # The resolved options of a manifest are a recipe again.
    again = {k: v for k, v in resolved.items() if k not in {"device", "threads"}}
    (tmp_path / "again.json").write_text(json.dumps({**again, "method": "qdrop"}))
    assert (
        Recipe.read(tmp_path / "again.json").options()
        == Recipe(method="qdrop", **{k: v for k, v in again.items() if k != "images"}).options()
    )
    cases = {
        "unknown.yaml": ("itres: 3", "unknown key 'itres'"),
        "type.json": ('{"iters": "many"}', "found iters: 'many'"),
        "range.yaml": ("drop_prob: 1.5", "found drop_prob=1.5; needed 0 to 1"),
        "method.yaml": ("method: magic", "choose one of"),
        "noise.yaml": ("method: qdrop\nnoise: uniform", "act on latent weights"),
        "list.yaml": ("- 1", "no mapping"),
        "broken.json": ("{", "cannot be read"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        argv = [*common, "--recipe", str(tmp_path / name), "-o", str(tmp_path / "no.hdrq")]
        capsys.readouterr()
        assert calibrate_command.main(argv) == 2, name
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "no.hdrq").exists()


def test_each_part_of_hdrq_can_be_switched(make: Any) -> None:
    assert Options.of("hdrq", noise="uniform").noise == "uniform"
    assert set(METHODS) == {"float", "rtn", "adaround", "brecq", "qdrop", "hdrq"}
    with pytest.raises(HdrqError, match="noise='loud'"):
        Options.of("hdrq", noise="loud")
    for a, b in itertools.combinations(("adaround", "brecq", "qdrop"), 2):
        assert Options.of(a) != Options.of(b)


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop", "hdrq"])
def test_every_method_lowers_the_error_of_rounding(make: Any, method: str) -> None:
    blocks = make("Net", method=method, wbits=3, abits=4).manifest.metrics["blocks"]
    learned = [b for b in blocks if b["learned"]]
    assert learned
    for block in learned:
        assert block["loss_after"] < block["loss_before"]
