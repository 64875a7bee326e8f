"""A merge fitted to what its parents put out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hdrq_deploy import merge
from hdrq_deploy.cli import merge as merge_command
from hdrq_deploy.errors import DataError, HdrqError, MergeError
from hdrq_deploy.formats.bundle import GRAPH, Bundle
from hdrq_deploy.graph.reference_session import session_threads, unfused_session
from hdrq_deploy.graph.stepwise import Steps, Walk
from hdrq_deploy.merging import check_guides, fit
from hdrq_deploy.merging.fitting import ANCHOR
from hdrq_deploy.numerics.error_compensation import compensated, with_damping
from hdrq_deploy.numerics.guided_layer import (
    ANCHORS,
    GuidedLayer,
    RowSums,
    SplitMoments,
    convolution_rows,
    some_rows,
)
from hdrq_deploy.numerics.spec import QuantSpec

DOMAINS = ("night", "day")
KINDS = [
    ("Tiny", "rtn", {"fold": "steps", "wbits": 8}),
    ("Tiny", "rtn", {"fold": "steps", "wbits": 4, "abits": 4, "per_channel": True}),
    ("Tiny", "rtn", {"fold": "weights", "wbits": 4}),
    ("Tiny", "float", {}),
    ("Wide", "rtn", {"fold": "steps", "wbits": 4}),
    ("Net", "rtn", {"fold": "weights", "wbits": 8, "per_channel": True}),
    ("Attention", "rtn", {"wbits": 8}),
    ("Tiny", "rtn", {"fold": "weights", "wbits": 8, "grid": "e4m3"}),
]


def ids(kind: Any) -> str:
    name, method, options = kind
    return "-".join([name, method, *map(str, options.values())])


def images_of(inputs: Any) -> dict[str, Any]:
    """Two domains that look different."""
    rng = np.random.default_rng(1)
    night = (inputs**3).astype(np.float32)
    return {"night": night, "day": 1 - rng.permutation(night)}


def float_merge(make: Any, folder: Path, name: str) -> tuple[list[Bundle], Bundle]:
    """Float bundles of both domains, and their mean."""
    parents = [make(name, d, "float") for d in DOMAINS]
    return parents, merge(parents, folder / "m.hdrq", method="mean")


def outputs(bundle: Bundle, x: Any) -> Any:
    session = unfused_session(bundle.path / GRAPH)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def away(bundle: Bundle, parents: Any, images: Any) -> float:
    """Mean square distance of a merge's outputs from each domain's own parent's."""
    pairs = zip(parents, images.values(), strict=True)
    return float(np.mean([((outputs(bundle, x) - outputs(p, x)) ** 2).mean() for p, x in pairs]))


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_a_fitted_merge_is_nearer_to_its_parents(
    make: Any, inputs: Any, tmp_path: Path, kind: Any
) -> None:
    """On images that it was not fitted on, as ONNX Runtime computes the bundle's own graph."""
    name, method, options = kind
    parents = [make(name, d, method, **options) for d in DOMAINS]
    merged = merge(parents, tmp_path / "m.hdrq", rounding="nearest", method="mean")
    images = images_of(inputs)
    found = fit(merged, parents, {n: x[:40] for n, x in images.items()}, tmp_path / "f.hdrq")
    found.validate()
    held = {n: x[40:] for n, x in images.items()}
    assert away(found, parents, held) < 0.9 * away(merged, parents, held)
    said = found.manifest.options["fit"]
    assert said["images"] == {"night": 40, "day": 40} and said["anchor"] is None
    weights = {n for n, entry in found.manifest.tensors.items() if len(entry.shape) > 1}
    assert set(said["anchors"]) | set(said.get("left", {})) == weights
    assert set(said["anchors"].values()) <= {*ANCHORS, None}


def test_a_merge_with_fewer_bits_than_its_parents_is_fitted_too(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    parents = [make("Tiny", d, fold="steps", wbits=8) for d in DOMAINS]
    merged = merge(parents, tmp_path / "m.hdrq", rounding="nearest", method="mean", wbits=3)
    images = images_of(inputs)
    found = fit(merged, parents, {n: x[:40] for n, x in images.items()}, tmp_path / "f.hdrq")
    found.validate()
    held = {n: x[40:] for n, x in images.items()}
    assert away(found, parents, held) < 0.9 * away(merged, parents, held)
    narrow = {n for n, entry in merged.manifest.tensors.items() if (entry.lo, entry.hi) == (-4, 3)}
    assert narrow
    for name in narrow:
        codes = found.tensors()[name]
        assert found.manifest.tensors[name].hi == 3 and codes.min() >= -4 and codes.max() <= 3


def test_a_merge_of_float_models_may_give_the_targets_of_all_domains(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    _, mean = float_merge(make, tmp_path, "Tiny")
    parents = [make("Tiny", d, fold="steps", wbits=8) for d in DOMAINS]
    merged = merge(parents, tmp_path / "w3.hdrq", rounding="nearest", method="mean", wbits=3)
    images = images_of(inputs)
    seen = {n: x[:40] for n, x in images.items()}
    found = fit(merged, parents, seen, tmp_path / "f.hdrq", guides=[mean])
    assert found.manifest.options["fit"]["guides"] == [mean.manifest_sha256]
    held = {n: x[40:] for n, x in images.items()}
    assert away(found, [mean, mean], held) < 0.9 * away(merged, [mean, mean], held)


def test_a_merge_of_what_differs_in_one_domain_only_stays_with_it(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    """A parent of weight 0 needs no images, and the other one alone gives the targets."""
    parents = [make("Tiny", d, "float") for d in DOMAINS]
    merged = merge(parents, tmp_path / "m.hdrq", [1.0, 0.0], method="mean")
    x = images_of(inputs)["night"]
    found = fit(merged, parents, {"night": x}, tmp_path / "f.hdrq")
    np.testing.assert_allclose(outputs(found, x), outputs(parents[0], x), atol=2e-3)


def test_the_first_layer_is_that_of_least_squares(make: Any, inputs: Any, tmp_path: Path) -> None:
    """Against torch: unfolded images, BatchNorm of each parent, and one augmented system."""
    import tiny_models

    anchor, images = 0.1, images_of(inputs)
    parents, merged = float_merge(make, tmp_path, "Tiny")
    found = fit(merged, parents, images, tmp_path / "f.hdrq", anchor)

    def model_of(bundle: Bundle) -> Any:
        model = tiny_models.Tiny()
        tensors = {n: torch.from_numpy(np.array(t)) for n, t in bundle.tensors().items()}
        model.load_state_dict(tensors, strict=False)
        return model.eval().double()

    def behind_norm(model: Any) -> Any:
        factor = model.bn.weight / torch.sqrt(model.bn.running_var + model.bn.eps)
        return (model.stem.weight * factor[:, None, None, None]).flatten(1).detach().numpy()

    stem = model_of(merged).stem
    rows, targets = [], []
    for parent, x in zip(parents, images.values(), strict=True):
        x = torch.from_numpy(x).double()
        seen = F.unfold(x, stem.kernel_size, stem.dilation, stem.padding, stem.stride)
        rows.append(seen.movedim(1, 2).flatten(0, 1).numpy())
        model = model_of(parent)
        with torch.no_grad():
            targets.append(model.bn(model.stem(x)).movedim(1, 3).flatten(0, 2).numpy())
    x, y = np.concatenate(rows), np.concatenate(targets)
    x, y = x - x.mean(0), y - y.mean(0)
    start = behind_norm(model_of(merged))
    held = np.sqrt(anchor * x.var(0).mean() * len(x)) * np.eye(x.shape[1])
    system, wanted = np.concatenate([x, held]), np.concatenate([y, held @ start.T])
    solution = np.linalg.lstsq(system, wanted, rcond=None)[0].T
    assert np.abs(solution - start).max() > 0.01
    np.testing.assert_allclose(behind_norm(model_of(found)), solution, rtol=1e-3, atol=1e-4)


def test_batch_norm_has_the_moments_of_the_new_weights(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    images = images_of(inputs)
    parents, merged = float_merge(make, tmp_path, "Tiny")
    found = fit(merged, parents, images, tmp_path / "f.hdrq")
    import tiny_models

    model = tiny_models.Tiny()
    tensors = {n: torch.from_numpy(np.array(t)) for n, t in found.tensors().items()}
    model.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        raw = model.stem(torch.from_numpy(np.concatenate(list(images.values())))).numpy()
    np.testing.assert_allclose(raw.mean((0, 2, 3)), model.bn.running_mean, atol=1e-3)
    np.testing.assert_allclose(raw.var((0, 2, 3)), model.bn.running_var, rtol=5e-3)


def test_the_bytes_do_not_depend_on_threads(make: Any, inputs: Any, tmp_path: Path) -> None:
    parents = [make("Tiny", d, fold="steps") for d in DOMAINS]
    merged = merge(parents, tmp_path / "m.hdrq", method="mean")
    found = []
    for threads in (1, 3):
        with session_threads(threads):
            found.append(fit(merged, parents, images_of(inputs), tmp_path / f"{threads}.hdrq"))
    assert found[0].manifest_sha256 == found[1].manifest_sha256


@pytest.mark.parametrize("name", ["Tiny", "Net", "Attention"])
def test_a_walk_in_steps_gives_what_the_graph_gives(make: Any, inputs: Any, name: str) -> None:
    bundle = make(name, "night", wbits=8)
    model = bundle.graph_ir()
    tensors = {n: t for n, t in bundle.tensors().items() if n in model.graph.initializers}
    steps = Steps(model, tensors)
    walk = Walk(steps, tensors, [inputs[:5], inputs[5:9]])
    for place in range(1, len(steps.nodes) + 1):
        walk.to(place)
    found = np.concatenate(walk.values(str(model.graph.outputs[0].name)))
    np.testing.assert_array_equal(found, outputs(bundle, inputs[:9]))


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "pads"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (1, 2), (0, 1)),
        ((1, 1), (2, 2), (1, 1), (0, 0)),
    ],
)
def test_rows_of_a_convolution_are_torchs(
    kernel: Any, stride: Any, dilation: Any, pads: Any
) -> None:
    x = np.random.default_rng(0).random((2, 4, 9, 8), dtype=np.float32)
    seen = F.unfold(torch.from_numpy(x), kernel, dilation, pads, stride)
    wanted = seen.movedim(1, 2).flatten(0, 1).numpy()
    view = convolution_rows(x, kernel, stride, dilation, [*pads, *pads])
    rows = some_rows(view, 3, 2, 1 << 20, np.random.default_rng(0))
    assert rows.shape == (2, len(wanted), wanted.shape[1] // 2)
    np.testing.assert_array_equal(np.concatenate(list(rows), 1), wanted)


def test_a_layer_that_can_give_its_targets_gives_them() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((1, 500, 6), dtype=np.float32)
    real, bias = rng.random((1, 6, 3)), rng.random(3)
    sums = RowSums(1, 6, 3)
    sums.add(x, (x @ real + bias).astype(np.float32))
    seen = sums.layer()
    rows = seen.solved(np.zeros((1, 6, 3)), 0.0, centred=True)
    np.testing.assert_allclose(rows, real, atol=1e-3)
    np.testing.assert_allclose(seen.bias(rows)[0], bias, atol=1e-3)
    np.testing.assert_allclose(seen.output_moments(rows)[1], (x @ rows)[0].var(0), rtol=1e-3)
    np.testing.assert_array_equal(seen.solved(real, 1e9, True).round(6), real.round(6))


def hardly_varying(rows: int, seed: int = 0) -> Any:
    """Rows of 8 inputs, (1, rows, 8): four are saturated, as by ReLU6; two of these always are."""
    rng = np.random.default_rng(seed)
    x = (0.1 * rng.random((1, rows, 8))).astype(np.float32)
    x[..., :4] = 3.528
    x[:, rng.random(rows) < 1e-3, 2:4] = 0
    return x


def test_moments_of_inputs_that_hardly_vary_are_those_of_all_rows() -> None:
    x, rng = [hardly_varying(rows, rows) for rows in (9000, 5001)], np.random.default_rng(0)
    y = [part[..., 2:5] @ rng.random((3, 3)).astype(np.float32) for part in x]
    sums = [RowSums(1, 8, 3) for _ in x]
    for own, part, wanted in zip(sums, x, y, strict=True):
        for batch in np.array_split(np.arange(part.shape[1]), 7):
            own.add(part[:, batch], wanted[:, batch])

    def by_hand(shares: Any) -> GuidedLayer:
        """From all rows in double precision, each domain's with its share."""
        a, b = (np.concatenate(parts, 1)[0].astype(np.float64) for parts in (x, y))
        weights = np.concatenate([np.full(p.shape[1], s) for p, s in zip(x, shares, strict=True)])
        mean, target = weights @ a, weights @ b
        near, off = a - mean, b - target
        return GuidedLayer(
            ((near.T * weights) @ near)[None],
            ((near.T * weights) @ off)[None],
            mean[None],
            target[None],
        )

    pooled, shares = [1 / 14001] * 2, [0.7 / 9000, 0.3 / 5001]
    for found, wanted in (
        (sums[0].with_rows_of(sums[1]).layer(), by_hand(pooled)),
        (GuidedLayer.mixed([own.layer() for own in sums], [0.7, 0.3]), by_hand(shares)),
    ):
        for name in ("covariance", "products", "mean", "target", "inputs"):
            got, real = getattr(found, name), getattr(wanted, name)
            np.testing.assert_allclose(got, real, rtol=1e-5, atol=1e-9, err_msg=name)
        assert np.linalg.eigvalsh(found.covariance).min() > -1e-12
        assert np.abs(found.covariance[0, :2]).max() < 1e-20, "what never changes does not vary"


def test_inputs_that_hardly_vary_can_be_rounded_for() -> None:
    """Sums in single precision told a negative variance of them, and no triangle was found."""
    sums = RowSums(1, 8, 2)
    x = hardly_varying(20000)
    sums.add(x, x[..., :2])
    rows = np.random.default_rng(0).normal(size=(1, 8, 2))
    codes = compensated(
        rows, with_damping(sums.layer().covariance), np.ones(1), QuantSpec.weight(4)
    )
    assert codes.shape == rows.shape and np.abs(codes - rows).max() < 2


@pytest.mark.parametrize("centred", [True, False])
def test_the_error_on_images_held_out_is_that_of_every_row(centred: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 300, 5), dtype=np.float32), rng.random((2, 300, 3), dtype=np.float32)
    sums = [RowSums(2, 5, 3) for _ in range(2)]
    sums[0].add(x[:, :100], y[:, :100])
    sums[1].add(x[:, 100:], y[:, 100:])
    seen = sums[0].with_rows_of(sums[1]).layer()

    def by_hand(rows: Any) -> float:
        off = y - x @ rows
        return float(((off - off.mean(1, keepdims=True) * centred) ** 2).mean(1).sum())

    first, second = rng.random((2, 2, 5, 3))
    found = seen.error(first, centred) - seen.error(second, centred)
    assert found == pytest.approx(by_hand(first) - by_hand(second), rel=1e-4)


def test_the_anchor_of_a_layer_is_the_best_on_images_held_out(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    """By hand for the first layer, from the rows of every fourth batch and of the others."""
    images = images_of(inputs)
    parents, merged = float_merge(make, tmp_path, "Net")
    chosen = fit(merged, parents, images, tmp_path / "f.hdrq").manifest.options["fit"]["anchors"]

    def weights(bundle: Bundle) -> tuple[Any, Any]:
        tensors = bundle.tensors()
        return tensors["down.weight"].reshape(8, -1).T.astype(np.float64), tensors["down.bias"]

    learned, held = [], []
    for parent, x in zip(parents, images.values(), strict=True):
        rows = F.unfold(torch.from_numpy(x), 3, 1, 1, 2).movedim(1, 2).double().numpy()
        weight, bias = weights(parent)
        for batch in range(0, len(x), 8):
            part = rows[batch : batch + 8].reshape(-1, rows.shape[2])
            (held if batch // 8 % 4 == 3 else learned).append((part, part @ weight + bias))

    def centred(parts: Any) -> Any:
        return [np.concatenate(p) - np.concatenate(p).mean(0) for p in zip(*parts, strict=True)]

    (x, y), (x_held, y_held) = centred(learned), centred(held)
    start = weights(merged)[0]
    errors: dict[float | None, float] = {None: float(((y_held - x_held @ start) ** 2).sum())}
    for anchor in ANCHORS:
        hold = anchor * x.var(0).mean() * len(x) * np.eye(x.shape[1])
        solved = np.linalg.solve(x.T @ x + hold, x.T @ y + hold @ start)
        errors[anchor] = float(((y_held - x_held @ solved) ** 2).sum())
    assert chosen["down.weight"] == min(errors, key=lambda anchor: errors[anchor])
    assert len(set(chosen.values())) > 1


def test_too_few_images_to_hold_some_out_leave_the_anchor_as_it_is(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    parents, merged = float_merge(make, tmp_path, "Tiny")
    for count, anchor in ((3, ANCHOR), (4, None)):
        images = {n: x[:count] for n, x in images_of(inputs).items()}
        said = fit(merged, parents, images, tmp_path / f"{count}.hdrq").manifest.options["fit"]
        assert said["anchor"] == anchor and ("anchors" in said) == (anchor is None)


def test_targets_that_are_noise_leave_a_layer_where_it_is() -> None:
    """What is learned of few rows does not hold on others, and no anchor is taken."""
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(2):
        sums = RowSums(1, 20, 4)
        x = rng.normal(size=(1, 25, 20)).astype(np.float32)
        sums.add(x, rng.normal(size=(1, 25, 4)).astype(np.float32))
        parts.append(sums.layer())
    start = np.zeros((1, 20, 4))
    errors = [parts[1].error(parts[0].solved(start, a, True), True) for a in ANCHORS]
    assert min(errors) > parts[1].error(start, True)
    assert np.isinf(SplitMoments(parts[0], *parts).best_anchor(start, True))


def test_images_that_do_not_belong_to_the_merge_are_refused(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    parents = [make("Tiny", d, fold="steps") for d in DOMAINS]
    merged = merge(parents, tmp_path / "m.hdrq", method="mean")
    images = images_of(inputs)
    cases: list[tuple[Any, Any, float, type[HdrqError], str]] = [
        (parents, {"night": inputs}, 0.01, MergeError, "found no images of day"),
        (parents, {**images, "fog": inputs}, 0.01, MergeError, "found images of fog"),
        (parents, images, -1.0, MergeError, "found anchor -1.0"),
        (parents[:1], {"night": inputs}, 0.01, MergeError, "needed all of its parents"),
        ([parents[0], make("Tiny", "snow", fold="steps")], images, 0.01, MergeError, "not merged"),
        (parents, {**images, "day": inputs[:1]}, 0.01, DataError, "found 1 image of day"),
        (parents, {**images, "day": inputs[:, :1]}, 0.01, DataError, "do not fit"),
    ]
    for given, shown, anchor, kind, message in cases:
        with pytest.raises(kind, match=message):
            fit(merged, given, shown, tmp_path / "f.hdrq", anchor)
    assert not (tmp_path / "f.hdrq").exists()


def test_better_guides_give_a_better_merge(make: Any, inputs: Any, tmp_path: Path) -> None:
    """Parents of few bits are poor targets; float models of the same domains are good ones."""
    coarse = {"fold": "steps", "wbits": 3, "abits": 4}
    parents = [make("Tiny", d, **coarse) for d in DOMAINS]
    floats = [make("Tiny", d, "float") for d in DOMAINS]
    merged = merge(parents, tmp_path / "m.hdrq", method="mean")
    images = images_of(inputs)
    held = {n: x[40:] for n, x in images.items()}
    found = [
        fit(
            merged, parents, {n: x[:40] for n, x in images.items()},
            tmp_path / f"{len(guides)}.hdrq", guides=guides,
        )
        for guides in ([], floats)
    ]  # fmt: skip
    found[1].validate()
    own, guided = (away(bundle, floats, held) for bundle in found)
    assert guided < 0.9 * own
    said = [bundle.manifest.options["fit"] for bundle in found]
    assert "guides" not in said[0]
    assert said[1]["guides"] == [bundle.manifest_sha256 for bundle in floats]


def test_guides_count_by_their_domain_and_parents_guide_by_default(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    parents = [make("Tiny", d, fold="steps") for d in DOMAINS]
    merged = merge(parents, tmp_path / "m.hdrq", method="mean")
    images = {n: x[:16] for n, x in images_of(inputs).items()}
    own = fit(merged, parents, images, tmp_path / "own.hdrq").tensors()
    turned = fit(merged, parents, images, tmp_path / "g.hdrq", guides=parents[::-1]).tensors()
    for name, tensor in own.items():
        np.testing.assert_array_equal(tensor, turned[name])


def test_a_second_sweep_starts_where_the_first_ended(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    parents = [make("Tiny", d, fold="steps", wbits=4) for d in DOMAINS]
    merged = merge(parents, tmp_path / "m.hdrq", method="mean")
    images = {n: x[:16] for n, x in images_of(inputs).items()}
    seen: list[tuple[int, int]] = []
    twice = fit(
        merged, parents, images, tmp_path / "2.hdrq", sweeps=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    again = merged
    for sweep in range(2):
        again = fit(again, parents, images, tmp_path / f"again{sweep}.hdrq")
    for name, tensor in again.tensors().items():
        np.testing.assert_array_equal(tensor, twice.tensors()[name])
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert twice.manifest.options["fit"]["sweeps"] == 2


def test_guides_that_cannot_guide_are_refused(make: Any, inputs: Any, tmp_path: Path) -> None:
    parents = [make("Tiny", d, fold="steps") for d in DOMAINS]
    merged = merge(parents, tmp_path / "m.hdrq", method="mean")
    night, day = (make("Tiny", d, "float") for d in DOMAINS)
    cases: list[tuple[list[Bundle], int, str]] = [
        ([make("Wide", d, "float") for d in DOMAINS], 1, "found different model: tiny_models:Wide"),
        ([night], 1, "found 0 bundles of day to fit to"),
        ([night, day, night], 1, "found 2 bundles of night to fit to"),
        ([night, day, make("Tiny", "snow", "float")], 1, "found no images of snow"),
        ([night, day], 0, "found 0 sweeps"),
    ]
    for guides, sweeps, message in cases:
        with pytest.raises(MergeError, match=message):
            fit(
                merged, parents, images_of(inputs), tmp_path / "f.hdrq",
                guides=guides, sweeps=sweeps,
            )  # fmt: skip
    assert not (tmp_path / "f.hdrq").exists()


def test_guides_of_changed_model_code_are_refused(make: Any, tmp_path: Path) -> None:
    """The model has the same name and other layers, classes or images."""
    parent = make("Tiny", "night", fold="steps")
    guide = make("Tiny", "night", "float")
    check_guides([guide], parent, ["night"])
    others: list[tuple[str, Any, str]] = [
        ("Wide", {}, "different layer .*: matrix product of 8 features to 5 outputs"),
        ("Tiny", {"classes": ("a", "b")}, "different classes"),
        ("Tiny", {"preprocessing": "other"}, "different preprocessing"),
    ]
    for name, changes, message in others:
        shown = Bundle.open(make(name, "night", "float").path)
        update = {"model": "tiny_models:Tiny", **changes}
        shown.manifest = shown.manifest.model_copy(update=update)
        named = Bundle.open(parent.path)
        named.manifest = named.manifest.model_copy(update={"classes": ("b", "a")})
        with pytest.raises(MergeError, match=message):
            check_guides([shown], named, ["night"])


def test_the_merge_command_fits(
    make: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [str(make("Tiny", d, fold="steps").path) for d in DOMAINS]
    data = [f"night={work}/data.npz", f"day={work}/data.npz"]
    out = tmp_path / "m.hdrq"
    argv = [*bundles, "-o", str(out), "--re-estimate", *data, "--fit"]
    assert merge_command.main([*argv, *data, "--fit-images", "12"]) == 0
    options = Bundle.open(out).manifest.options
    assert options["fit"]["images"] == {"night": 12, "day": 12}
    assert options["re_estimate"]["images"] == {"night": 48, "day": 48}
    assert [p.name for p in tmp_path.iterdir()] == ["m.hdrq"]
    capsys.readouterr()
    assert merge_command.main([*argv, data[0]]) == 2
    assert "found no images of day" in capsys.readouterr().err
    floats = [str(make("Tiny", d, "float").path) for d in DOMAINS]
    guided = [*bundles, "-o", str(tmp_path / "g.hdrq"), "--fit-images", "8", "--fit-to", *floats]
    assert merge_command.main([*guided, "--fit", *data, "--fit-sweeps", "2"]) == 0
    options = Bundle.open(tmp_path / "g.hdrq").manifest.options
    assert options["fit"]["sweeps"] == len(options["fit"]["guides"]) == 2
    capsys.readouterr()
    for argv, message in (
        (guided, "found --fit-to without --fit"),
        ([*guided[:-1], "--fit", *data], "found 0 bundles of day to fit to"),
        ([*guided, "--fit", *data, "--fit-sweeps", "0"], "found 0 sweeps"),
        ([*bundles, "-o", str(out), "--fit-sweeps", "2"], "found --fit-sweeps without --fit"),
    ):
        assert merge_command.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
