"""The same integers in several runtimes, and what is said where they part."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from hdrq_deploy.checks.same_codes import RUNTIMES, Recorded, compare, record
from hdrq_deploy.comparison import golden
from hdrq_deploy.comparison.differences import KERNEL, Fidelity, Stage, Stepwise, check, difference
from hdrq_deploy.comparison.taps import GraphTap, Ran, outside
from hdrq_deploy.errors import CheckFailed, DataError
from hdrq_deploy.exporters import export
from hdrq_deploy.exporters.target_ort import OrtTarget
from hdrq_deploy.formats.engine_folder import KINDS, read_manifest


def by_onnx(bundle: Any, x: Any) -> dict[str, Any]:
    """Codes of a bundle's graph by the reference evaluator of ONNX, by the name of their scale."""
    model = onnx.load(str(bundle.path / "model.onnx"))
    readers = {name: node for node in model.graph.node for name in node.input}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {
        n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"
    }
    codes = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            behind = readers[node.output[0]]
            name = behind.output[0] if behind.op_type == "Clip" else node.output[0]
            point = int(onnx.numpy_helper.to_array(constants[node.input[2]]))
            codes[node.input[1]] = (name, point)
    for name, _ in codes.values():
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    names = [name for name, _ in codes.values()]
    values = ReferenceEvaluator(model).run(names, {model.graph.input[0].name: x})
    points = [point for _, point in codes.values()]
    return {
        scale: value.astype(np.int16) - point
        for scale, value, point in zip(codes, values, points, strict=True)
    }


def test_the_reference_gives_the_codes_of_onnx(make: Any, inputs: Any) -> None:
    bundle = make("Tiny", wbits=8)
    mine, theirs = golden.bundle_tap(bundle).run(inputs[:2]).codes, by_onnx(bundle, inputs[:2])
    assert set(mine) == set(theirs) and len(mine) == len(bundle.manifest.activations)
    for scale, codes in mine.items():
        away = np.abs(codes - theirs[scale])
        assert away.max() <= 1 and (away > 0).mean() < 1e-3  # sums in another order


def test_runtimes_part_at_ties_only(make: Any, inputs: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle, x = make("Tiny", wbits=8), inputs[:4]
    runtimes = {name: opens(bundle, tmp_path) for name, opens in RUNTIMES.items()}
    record(bundle, "ort", x, tmp_path / "codes.npz")
    runtimes["elsewhere"] = Recorded.of_file(tmp_path / "codes.npz", "elsewhere", bundle, x)
    ort, openvino, unfused, elsewhere = compare(bundle, runtimes, x)
    assert [p.failure for p in (ort, openvino, unfused, elsewhere)] == [None] * 4
    quantizers = len(bundle.manifest.activations)
    assert len(ort.tensors) == quantizers == len(openvino.tensors) + openvino.hidden
    assert unfused.most_off == 0 and unfused.output_rms == 0
    for parted in (ort, openvino):
        limit = KINDS[parted.name].code_ties
        assert limit is not None and parted.most_off <= limit
    assert elsewhere == replace(ort, name="elsewhere")


def test_a_runtime_that_is_off_by_one_code_is_found(make: Any, inputs: Any) -> None:
    bundle, x = make("Tiny", wbits=8), inputs[:4]
    ran = golden.bundle_tap(bundle).run(x)
    first = next(iter(ran.codes))
    codes = {**ran.codes, first: ran.codes[first] + np.int16(1)}
    (found,) = compare(bundle, {"off": Recorded("off", replace(ran, codes=codes))}, x)
    assert found.failure is not None and "differ, by 1 at most, where no tie" in found.failure
    wrong = [codes for codes in found.tensors if codes.wrong]
    # Seen from the same codes, those behind it are off too: they were not computed from these.
    assert wrong[0] is found.tensors[0] and found.tensors[0].off == found.tensors[0].free_off == 1
    assert found.tensors[0].free_steps == 1


def flipped(tap: GraphTap, x: Any, share: float) -> Ran:
    """A run in which a share of the first activation's codes fell to the other side of a tie."""
    scale = next(iter(tap.sites))
    ran = tap.replay(x, {}, [scale])
    before, codes = ran.before[scale], ran.codes[scale].copy()
    inside = np.flatnonzero(np.abs(before - codes) < 0.5)
    chosen = np.random.default_rng(0).permutation(inside)[: int(share * codes.size)]
    up = before.flat[chosen] > codes.flat[chosen]
    codes.flat[chosen] += np.where(up, 1, -1).astype(np.int16)
    behind = tap.replay(x, {scale: codes})  # all others are computed from these
    return replace(behind, codes={**behind.codes, scale: codes})


@pytest.mark.parametrize(("share", "fails"), [(0.004, False), (0.02, True)])
def test_more_codes_at_ties_than_an_engine_of_its_kind_has(
    make: Any, inputs: Any, share: float, fails: bool
) -> None:
    bundle, x = make("Tiny", wbits=8), inputs
    tap = golden.bundle_tap(bundle)
    # Every place between two codes counts as a tie here.
    how = Stepwise.of_bundle(bundle, Fidelity(tie=0.51, most_ties=0.01))
    runs = Recorded("engine", flipped(tap, x, share))
    stage = difference(tap, runs, lambda: iter([(x, x)]), how)
    assert bool(stage.failure) == fails and stage.tensors[0].wrong == 0
    assert stage.tensors[0].share_off == pytest.approx(share, rel=0.01)
    if stage.failure:
        assert re.search(r"at ties of their own \(\d\.\d+%\); needed at most 1\.00%", stage.failure)
    # The same share of an even image is a few ties, however many codes have their values.
    even = np.ascontiguousarray(np.broadcast_to(x[:1, :, :1, :1], x.shape))
    runs = Recorded("engine", flipped(tap, even, share))
    stage = difference(tap, runs, lambda: iter([(even, even)]), how)
    assert stage.failure is None and stage.tensors[0].ties > 100


def test_an_engine_beyond_the_tolerance_of_its_kind_is_not_written(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, out = make("Tiny", wbits=8), tmp_path / "engine"
    assert read_manifest(export(bundle, out)).code_ties == KINDS["ort"].code_ties
    real = OrtTarget.run

    class OffByOne:
        name = "engine"

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def run(self, x: Any) -> Ran:
            ran = self._inner.run(x)
            first = next(iter(ran.codes))
            return replace(ran, codes={**ran.codes, first: ran.codes[first] + np.int16(1)})

    monkeypatch.setattr(OrtTarget, "run", lambda *a: (OffByOne(real(*a)[0]), ""))
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(CheckFailed, match="differ, by 1 at most, where no tie explains it"):
        export(bundle, out, force=True)
    assert (out / "manifest.json").read_bytes() == before


def test_manifests_without_the_tolerance_stay_valid(make: Any, tmp_path: Path) -> None:
    out = export(make("Tiny", wbits=8), tmp_path / "engine")
    text = (out / "manifest.json").read_text()
    line = next(line for line in text.splitlines(True) if '"code_ties"' in line)
    (out / "manifest.json").write_text(text.replace(line, ""))
    assert read_manifest(out).code_ties is None


def test_codes_of_another_bundle_or_of_other_inputs_are_refused(
    make: Any, inputs: Any, tmp_path: Path
) -> None:
    bundle, x, path = make("Tiny", wbits=8), inputs[:2], tmp_path / "codes.npz"
    record(bundle, "unfused", x, path)
    with pytest.raises(DataError, match=r"found codes of inputs \w{12}; needed \w{12}"):
        Recorded.of_file(path, "there", bundle, inputs[1:3])
    with pytest.raises(DataError, match="found codes of bundle"):
        Recorded.of_file(path, "there", make("Tiny"), x)
    path.write_bytes(b"no codes")
    with pytest.raises(DataError, match="found no codes of a run"):
        Recorded.of_file(path, "there", bundle, x)
    with pytest.raises(DataError, match="found runtime 'tpu'; choose one of ort, openvino"):
        record(bundle, "tpu", x, path)


def test_the_bundles_graph_is_what_is_compared(make: Any, inputs: Any) -> None:
    bundle = make("Tiny", wbits=8)
    model = bundle.graph()
    tap = GraphTap(model, outside(model, bundle.path), "bundle")
    expected, got = tap.run(inputs[:2]), golden.bundle_tap(bundle).run(inputs[:2])
    assert all(np.array_equal(expected.codes[name], codes) for name, codes in got.codes.items())


def test_tolerances_follow_from_what_was_measured() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "same_codes.json"
    most: dict[str, float] = {}
    for row in json.loads(results.read_text())["rows"]:
        for runtime in row["runtimes"]:
            assert runtime["failure"] is None
            name = runtime["name"]
            most[name] = max(most.get(name, 0.0), runtime["most_off"])
    for name in ("ort", "openvino"):
        limit = KINDS[name].code_ties
        assert limit is not None and 10 * most[name] <= limit <= 11 * most[name]


def test_an_output_behind_codes_that_are_not_shown_is_judged_as_a_whole(
    make: Any, inputs: Any
) -> None:
    """Ties among hidden codes move it, and nothing else may."""
    bundle, x = make("Tiny", wbits=8), inputs[:32]
    reference = golden.bundle_tap(bundle)
    whole = reference.run(x)
    first, last = next(iter(whole.codes)), list(reference.last)
    assert last and first not in last
    # The last codes, before the output, are hidden and some of them are off by one.
    moved = {site: whole.codes[site].copy() for site in last}
    for codes in moved.values():
        codes.reshape(-1)[::11] += 1
    tied = reference.replay(x, moved)
    codes = {name: codes for name, codes in whole.codes.items() if name not in last}
    ran = replace(whole, output=tied.output, scores=tied.output, codes=codes, layers={},
                  hidden=frozenset(last))  # fmt: skip

    def stage_of(ran: Ran) -> Stage:
        how = Stepwise.of_bundle(bundle, KERNEL)
        return difference(reference, Recorded("engine", ran), lambda: iter([(x, x)]), how)

    stage = stage_of(ran)
    assert stage.failure is None and stage.layer_rms is None and not stage.stepwise
    assert stage.output_rms > 1e-3
    check([stage], bundle.manifest.tolerances)
    # Shown, the same output is one that no code explains.
    shown = stage_of(replace(ran, codes=whole.codes, hidden=frozenset()))
    assert shown.failure is not None and "computed from the same codes" in shown.failure
    wrong = np.roll(tied.output, 1, axis=1)
    with pytest.raises(CheckFailed, match="apart"):
        check([stage_of(replace(ran, output=wrong, scores=wrong))], bundle.manifest.tolerances)
