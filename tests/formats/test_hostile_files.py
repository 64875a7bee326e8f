"""Files that contradict themselves or point at what is not theirs, one by one, hashes right."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.cli import calibrate as calibrate_command
from hdrq_deploy.cli import compare as compare_command
from hdrq_deploy.cli import export as export_command
from hdrq_deploy.cli import strip as strip_command
from hdrq_deploy.errors import BundleError, EngineError, HdrqError, SpecError, one_line
from hdrq_deploy.exporters import export
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.formats.golden_inputs import read_golden
from hdrq_deploy.formats.onnx_file import check_graph, tensors_of
from hdrq_deploy.formats.safetensors_layout import read_header
from hdrq_deploy.formats.statistics import read_statistics
from hdrq_deploy.graph.reference_session import unfused_session
from hdrq_deploy.runtime import load_engine
from hdrq_deploy.runtime.bench.compare import _Blocks, read_result


def rehash(folder: Path, name: str, data: bytes) -> None:
    """Write a file of a bundle or engine, and its hash."""
    (folder / name).write_bytes(data)
    record = json.loads((folder / "manifest.json").read_text())
    record["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(record))


def external(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.external_data)


def place(key: str, value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = external(model)
        found = [entry for entry in tensor.external_data if entry.key == key]
        (found[0] if found else tensor.external_data.add(key=key)).value = value

    return change


def twice(model: Any) -> None:
    external(model).external_data.add(key="location", value="../secret.bin")


def hidden(model: Any) -> None:
    tensor = onnx.TensorProto(data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret.bin")
    attribute = onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)
    model.graph.node.add(op_type="Constant", name="extra", output=["extra"]).attribute.append(
        attribute
    )


def cycle(model: Any) -> None:
    first = next(n for n in model.graph.node if n.op_type == "Conv")
    first.input[0] = model.graph.node[-1].output[0]


def written_twice(model: Any) -> None:
    model.graph.node.add(op_type="Relu", name="again", input=["input"]).output.append(
        model.graph.node[0].output[0]
    )


def same_name(model: Any) -> None:
    model.graph.initializer.add().CopyFrom(external(model))


def second_input(model: Any) -> None:
    model.graph.input.add().CopyFrom(model.graph.input[0])


def no_text(model: Any) -> None:
    node = model.graph.node[0]
    data = node.SerializeToString()
    place = data.index(node.name.encode())
    node.ParseFromString(data[:place] + b"\xb2" + data[place + 1 :])


GRAPHS: dict[str, tuple[Callable[[Any], None], str]] = {
    "outside": (place("location", "../secret.bin"), "has its data in '../secret.bin'"),
    "absolute": (place("location", "/etc/passwd"), "has its data in '/etc/passwd'"),
    "device": (place("location", "/dev/zero"), "has its data in '/dev/zero'"),
    "nowhere": (place("location", ""), "has its data in ''"),
    "negative": (place("offset", "-8"), "'-8' is no offset or length"),
    "no number": (place("offset", "0x10"), "'0x10' is no offset or length"),
    "huge": (place("length", str(10**18)), "end beyond"),
    "twice": (twice, "is written in location"),
    "hidden in an attribute": (hidden, "has its data in '../secret.bin'"),
    "cycle": (cycle, "before it is there"),
    "written twice": (written_twice, "a second time"),
    "one name": (same_name, "is the name of two initializers"),
    "a name that is no text": (no_text, "is no text"),
    "two inputs": (second_input, "one input and one output"),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs_that_reach_outside_or_run_in_circles(kind: str, make: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"secret" * 1000)
    change, message = GRAPHS[kind]
    bundle, engine = tmp_path / "a.hdrq", tmp_path / "engine"
    shutil.copytree(make("Attention").path, bundle)
    export(make("Attention").path, engine, "onnx")
    for folder in (bundle, engine):
        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        change(model)
        rehash(folder, "model.onnx", model.SerializeToString())
    with pytest.raises(BundleError) as found:
        Bundle.open(bundle)
    assert message in str(found.value) and "\n" not in str(found.value)
    with pytest.raises(EngineError) as refused:
        load_engine(engine)
    assert message in str(refused.value)


def test_tensors_are_found_wherever_they_are() -> None:
    def tensor(name: str) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(np.zeros(1, np.float32), name)

    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor("attribute"))
    body = onnx.helper.make_graph([constant], "body", [], [], [tensor("inner")])
    branch = onnx.helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)
    graph = onnx.helper.make_graph([branch], "g", [], [], [tensor("outer")])
    function = onnx.helper.make_function("d", "f", [], ["c"], [constant], [])
    model = onnx.helper.make_model(graph, functions=[function])
    found = [t.name for t in tensors_of(model)]
    assert sorted(found) == ["attribute"] * 3 + ["inner"] * 2 + ["outer"]
    with pytest.raises(ValueError, match="If reads 'x' before it is there"):
        check_graph(model)


def header(entries: Any, body: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "length": header({"a": entry()}, length=2**63),
    "beyond": header({"a": entry()}, length=10**6),
    "list": header([]),
    "text": header("x"),
    "deep": header(b"[" * 200_000 + b"]" * 200_000),
    "no entry": header({"a": 1}),
    "extra field": header({"a": {**entry(), "x": 1}}),
    "two names": header(b'{"a":' + json.dumps(entry()).encode() + b',"a":{}}'),
    "surrogate": header(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}"),
    "metadata": header({"__metadata__": {"a": 1}, "a": entry()}),
    "dtype": header({"a": entry("F31")}),
    "dtype no text": header({"a": entry([1])}),
    "shape": header({"a": entry(shape=(5,))}),
    "negative": header({"a": entry(shape=(-2, -2))}),
    "fraction": header({"a": entry(shape=(4.0,))}),
    "truth": header({"a": entry(shape=(4, True))}),
    "overflow": header({"a": entry(shape=(2**62, 4))}),
    "huge": header({"a": entry(shape=(10**30,))}),
    "outside": header({"a": entry(offsets=(16, 32))}),
    "before": header({"a": entry(offsets=(-16, 0))}),
    "backwards": header({"a": entry(offsets=(16, 0))}),
    "overlap": header({"a": entry(), "b": entry()}),
    "hole": header({"a": entry(), "b": entry(offsets=(20, 36))}, b"\0" * 36),
    "rest": header({"a": entry()}, b"\0" * 20),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_safetensors_headers_that_contradict_themselves(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[kind])
    with pytest.raises(BundleError) as found:
        read_header(path)
    assert "\n" not in str(found.value) and "cannot be read as safetensors" in str(found.value)


def test_what_the_header_says_of_a_right_file(tmp_path: Path) -> None:
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((0, 4), np.int8), "c": np.ones(())}
    save_file(arrays, tmp_path / "x.safetensors", {"note": "x"})
    spans = read_header(tmp_path / "x.safetensors")
    assert {n: s.shape for n, s in spans.items()} == {n: a.shape for n, a in arrays.items()}
    data = (tmp_path / "x.safetensors").read_bytes()
    for name, span in spans.items():
        assert data[span.offset : span.offset + span.length] == arrays[name].tobytes()


def tensors(record: Any, role: str) -> Any:
    return next(e for e in record["tensors"].values() if e["role"] == role)


MANIFESTS: dict[str, Callable[[Any], Any]] = {
    "file outside": lambda r: r["files"].update({"../x": r["files"]["model.onnx"]}),
    "absolute file": lambda r: r["files"].update({"/dev/zero": r["files"]["model.onnx"]}),
    "no number": lambda r: r["tolerances"].update(output_rms=float("nan")),
    "negative share": lambda r: r["domains"].update(night=-1.0),
    "no domain": lambda r: r["domains"].clear(),
    "axis": lambda r: tensors(r, "codes").update(axis=7),
    "bits": lambda r: tensors(r, "codes").update(bits=99),
    "range": lambda r: tensors(r, "codes").update(lo=-1000),
    "range of int4": lambda r: tensors(r, "codes").update(dtype="int4", bits=8, lo=-128, hi=127),
    "no step": lambda r: tensors(r, "codes").update(scale=None),
    "step of another": lambda r: tensors(r, "codes").update(scale="fc.bias"),
    "shape": lambda r: tensors(r, "codes").update(shape=[-1, -8]),
    "elements": lambda r: tensors(r, "codes").update(shape=[2**30, 2**30]),
    "activation": lambda r: r["activations"][0].update(scale="absent"),
    "weight": lambda r: r["layers"][0].update(weight="absent"),
    "node": lambda r: r["layers"][0].update(node="absent"),
    "input": lambda r: r["input_shape"].append(2**60),
    "no input": lambda r: r.update(input_shape=[3, 0, 16]),
    "golden": lambda r: r.update(input_shape=[3, 8, 8]),
    "fold": lambda r: r["folds"].update(
        {name: dict.fromkeys(_FOLD, "absent") | {"eps": 1e-5} for name in list(r["tensors"])[:1]}
    ),
    "deep": lambda r: r.update(options=json.loads("[" * 900 + "]" * 900)),
}
_FOLD = ("scale", "bias", "raw_scale", "gamma", "beta", "mean", "variance")


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_that_contradict_themselves(kind: str, make: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "copy.hdrq"
    shutil.copytree(make().path, bundle)
    record = json.loads((bundle / "manifest.json").read_text())
    MANIFESTS[kind](record)
    (bundle / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(BundleError) as found:
        Bundle.open(bundle).golden()
    assert "\n" not in one_line(found.value) and len(one_line(found.value)) < 1100


@pytest.mark.parametrize(
    "values",
    [
        {"output": np.zeros((2, 4), np.float32)},
        {"input": np.zeros((0, 3, 16, 16), np.float32)},
        {"input": np.full((2, 3, 16, 16), np.nan, np.float32)},
        {"input": np.zeros((2, 3, 16, 16), np.float64)},
        {"input": np.zeros((2, 3), np.float32), "output": np.zeros((3, 4), np.float32)},
    ],
)
def test_golden_inputs_that_are_none(values: dict[str, Any], tmp_path: Path) -> None:
    save_file(values, tmp_path / "golden.safetensors")
    with pytest.raises(BundleError):
        read_golden(tmp_path / "golden.safetensors")


def layer_of(record: Any) -> Any:
    return record["layers"][0]


# What a record says of itself, in a manifest or in the metadata of a file of its own.
RECORDS: dict[str, Callable[[Any], Any]] = {
    "twice": lambda r: r["layers"].append(layer_of(r)),
    "rank": lambda r: layer_of(r).update(rank=layer_of(r)["features"] + 1),
    "negative rank": lambda r: layer_of(r).update(rank=-1),
    "no groups": lambda r: layer_of(r).update(groups=0),
    "elements": lambda r: layer_of(r).update(features=2**40),
    "rows": lambda r: layer_of(r).update(rows=float("nan")),
    "layout": lambda r: layer_of(r).update(layout="dense"),
    "word": lambda r: r.update(rank="most"),
    "version": lambda r: r.update(schema_version=2),
    "other layer": lambda r: layer_of(r).update(weight="../x"),
    "shape": lambda r: layer_of(r).update(rank=layer_of(r)["rank"] - 1),
    "histogram": lambda r: r.update(histograms=["absent"]),
    "thousands": lambda r: r.update(
        layers=[{**layer_of(r), "weight": str(i)} for i in range(9999)]
    ),
    "deep": lambda r: r.update(rank=json.loads("[" * 300 + "]" * 300)),
}
IN_MANIFESTS: dict[str, Callable[[Any], Any]] = {
    "features": lambda r: layer_of(r).update(features=3, rank=1),
    "groups": lambda r: layer_of(r).update(groups=3),
    "bias": lambda r: layer_of(r).update(bias="absent"),
    "scale": lambda r: r.update(histograms=["fc.bias"]),
}


def seen_bundle(make: Any, tmp_path: Path) -> Path:
    bundle = tmp_path / "seen.hdrq"
    shutil.copytree(make(statistics="auto").path, bundle)
    return bundle


@pytest.mark.parametrize("kind", {**RECORDS, **IN_MANIFESTS})
def test_records_of_statistics_that_contradict_themselves(
    kind: str, make: Any, tmp_path: Path
) -> None:
    bundle = seen_bundle(make, tmp_path)
    record = json.loads((bundle / "manifest.json").read_text())
    own = copy.deepcopy(record["statistics"])
    {**RECORDS, **IN_MANIFESTS}[kind](record["statistics"])
    (bundle / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(BundleError) as found:
        Bundle.open(bundle)
    assert "\n" not in one_line(found.value) and len(one_line(found.value)) < 1100
    if kind not in RECORDS:
        return
    values = load_file(bundle / "statistics.safetensors")
    own.pop("file")
    own |= {"kind": "hdrq-statistics", "model": "m", "checkpoint_sha256": "", "data_sha256": ""}
    path = tmp_path / "a.safetensors"
    for change, right in ((lambda r: None, True), (RECORDS[kind], False)):
        text = copy.deepcopy(own)
        change(text)
        save_file(values, path, {"statistics": json.dumps(text)})
        if right:
            assert read_statistics(path).weights
            continue
        with pytest.raises(BundleError) as found:
            read_statistics(path)
        assert "\n" not in one_line(found.value) and len(one_line(found.value)) < 1100


def nan(values: Any, name: str) -> None:
    values[name].reshape(-1)[-1] = np.nan


CONTENTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "moments": (lambda v: nan(v, "conv1.weight_codes/moments"), "NaN or infinity"),
    "scales": (lambda v: nan(v, "conv1.weight_codes/scales"), "NaN or infinity"),
    "beyond": (lambda v: v["conv1.weight_codes/scales"].fill(3e38), "beyond float32"),
    "counts": (lambda v: v["input.act_scale/histogram"].fill(-1), "counts below 0"),
    "range": (lambda v: v["input.act_scale/range"].fill(1), "from 1 to 1"),
    "dtype": (lambda v: v.update({"input.act_scale/range": np.zeros(3)}), "the record says"),
    "missing": (lambda v: v.pop("conv1.weight_codes/factor"), "the record says"),
    "more": (lambda v: v.update(x=np.zeros(3)), "the record says"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_statistics_whose_values_are_none(kind: str, make: Any, tmp_path: Path) -> None:
    bundle = seen_bundle(make, tmp_path)
    file = bundle / "statistics.safetensors"
    values = {name: value.copy() for name, value in load_file(file).items()}
    change, message = CONTENTS[kind]
    change(values)
    save_file(values, file)
    data, record = file.read_bytes(), json.loads((bundle / "manifest.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    record["statistics"]["file"] = {"bytes": len(data), "sha256": digest}
    (bundle / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(BundleError, match=message) as found:
        statistics = Bundle.open(bundle).statistics()
        assert statistics is not None
        statistics.layer("conv1.weight_codes")
        statistics.histogram("input.act_scale")
    assert "hdrq strip" in str(found.value)
    assert strip_command.main([str(bundle)]) == 0
    assert Bundle.open(bundle).statistics() is None


def test_engines_of_other_kinds_and_ports(make: Any, tmp_path: Path) -> None:
    whole = export(make("Attention").path, tmp_path / "whole")
    changes: list[Callable[[Any], Any]] = [
        lambda r: r.update(engine="evil"),
        lambda r: r.update(inputs=[]),
        lambda r: r["inputs"][0].update(name="another"),
        lambda r: r["inputs"][0].update(dtype="floa"),
        lambda r: r["outputs"][0]["shape"].append(1),
        lambda r: r["inputs"][0]["shape"].__setitem__(1, 2**62),
        lambda r: r["inputs"][0]["shape"].__setitem__(2, 17),
        lambda r: r["files"].pop("model.onnx"),
        lambda r: r["files"].pop("model.onnx.data"),
        lambda r: r["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
        lambda r: r["preprocessing"].update(height=10**9) if r["preprocessing"] else r.clear(),
    ]
    for i, change in enumerate(changes):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        record = json.loads((folder / "manifest.json").read_text())
        change(record)
        (folder / "manifest.json").write_text(json.dumps(record))
        with pytest.raises(EngineError) as found:
            load_engine(folder)
        assert "\n" not in str(found.value)


def test_what_onnx_runtime_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\x08\x07nothing")
    with pytest.raises(EngineError, match="ONNX Runtime cannot load it") as found:
        unfused_session(tmp_path / "x.onnx")
    assert "\n" not in str(found.value)
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in "xy"
    ]
    graph = onnx.helper.make_graph([node], "g", ports[:1], ports[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    model.ir_version = 10
    session = unfused_session(model.SerializeToString())
    with pytest.raises(EngineError, match="the graph: ONNX Runtime cannot run it"):
        session.run(None, {"x": np.zeros((1, 3), np.float32)})


def test_precision_that_was_altered_is_named(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(make().path), "-o", str(tmp_path / "engine")]
    assert export_command.main(flags) == 0
    rehash(tmp_path / "engine", "precision.json", b'{"layers": 1}')
    capsys.readouterr()
    assert export_command.main(flags) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("hdrq-export: ") and "precision.json" in last and "with --force" in last
    assert export_command.main([*flags, "--force"]) == 0


RESULT = {
    "created": "now", "engine": "ort", "path": "x", "model": "m", "method": "rtn", "domains": {},
    "wbits": 4, "abits": 8, "size_bytes": 10, "precision": "", "throughput_images_per_s": 1.0,
    "latency_ms": {"p50": 1, "p90": 1, "p99": 1, "mean": 1, "batch": 1, "warmup": 0,
                   "iterations": 3, "samples": [1.0, 2.0, 3.0]},
    "accuracy": {"domains": {"night": 0.5}, "harmonic_mean": 0.5, "images": {"night": 10}},
    "threads": 1, "cpu_per_wall": 1.0, "environment": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["latency_ms"].update(samples=[]), "found 0 latencies"),
        (lambda r: r["latency_ms"].update(samples=[1.0, -1.0]), "not all of them above 0"),
        (lambda r: r["latency_ms"].update(samples=[1.0, float("inf")]), "not all of them above 0"),
        (lambda r: r.update(size_bytes=0), "a size of 0 bytes"),
        (lambda r: r["accuracy"]["domains"].update(night=7.0), "an accuracy of 7.0"),
        (lambda r: r["accuracy"]["images"].clear(), "on 0 images of night"),
        (lambda r: r.update(environment=json.loads("[" * 900 + "]" * 900)), "not the JSON"),
    ],
)
def test_benchmarks_that_nobody_can_have_measured(
    change: Callable[[Any], Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, other = tmp_path / "a.json", tmp_path / "b.json"
    whole.write_text(json.dumps(RESULT))
    assert compare_command.main([str(whole), str(whole)]) == 0
    record = json.loads(whole.read_text())
    change(record)
    other.write_text(json.dumps(record))
    for pair in ((whole, other), (other, whole)):
        capsys.readouterr()
        assert compare_command.main([*map(str, pair), "--json", str(tmp_path / "c.json")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "c.json").exists()
    assert read_result(whole).size_bytes == 10


def test_long_series_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from hdrq_deploy.runtime.bench import compare

    values = np.random.default_rng(0).random(1003)
    length = len(values) // 10
    starts = np.random.default_rng(5).integers(0, len(values), (300, -(-len(values) // length)))
    places = (starts[:, :, None] + np.arange(length)) % len(values)
    whole = values[places.reshape(300, -1)[:, : len(values)]]
    for at_once in (1, 5000, 1 << 20):
        monkeypatch.setattr(compare, "_AT_ONCE", at_once)
        drawn = _Blocks(values, 300, np.random.default_rng(5))
        found = drawn.measured(lambda rows: np.percentile(rows, 90, axis=-1))
        np.testing.assert_array_equal(found, np.percentile(whole, 90, axis=-1))


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 80))
RECIPES = {
    "bomb.yaml": BOMB + "iters: *a79\n",
    "value.yaml": "x: &x [1, 2]\niters: [" + ", ".join(["*x"] * 1000) + "]\n",
    "circle.yaml": "iters: &a [*a]\n",
    "code.yaml": "lr: !!python/object/apply:os.mkdir [executed]\n",
    "deep.yaml": "a: " + "[" * 3000,
    "deep.json": "[" * 100_000,
    "huge.json": '{"iters": 1' + "0" * 400 + "}",
    "digits.json": '{"iters": 1' + "0" * 9000 + "}",
    "long.json": json.dumps({"iters": "x" * 500_000}),
    "large.json": " " * (2 << 20) + "{}",
    "binary.yaml": "\x00\x01",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_would_take_for_ever_or_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(RECIPES[name])
    argv = ["--recipe", name, "--model", "m:N", "--base", "x", "--data", "x.npz"]
    assert calibrate_command.main([*argv, "--domain", "night", "-o", "out.hdrq"]) == 2
    error = capsys.readouterr().err
    assert name in error or "digits" in error
    assert error.count("\n") == 1 and len(error) < 1200
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_numbers_that_no_counter_holds_are_refused() -> None:
    with pytest.raises(SpecError, match="found iters of 401 digits"):
        Options.of("hdrq", iters=10**400)


def test_a_message_stays_one_line_of_bounded_length() -> None:
    assert one_line("a\n b\tc\x1b[2Jd\u202ee é") == "a b c\\x1b[2Jd\\u202ee é"
    long = one_line("x" * 10_000 + "end")
    assert len(long) < 1100 and long.endswith("end")


@pytest.mark.parametrize("op_type", ["QuantizeLinear", "DequantizeLinear"])
@pytest.mark.parametrize("last", [None, ""])
def test_quantizers_without_a_zero_point(
    op_type: str, last: str | None, make: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.hdrq"
    shutil.copytree(make().path, copy)
    model = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    codes = {n.output[0] for n in model.graph.node if n.op_type in {"QuantizeLinear", "Clip"}}
    node = next(
        n
        for n in model.graph.node
        if n.op_type == op_type and (op_type == "QuantizeLinear" or n.input[0] in codes)
    )
    del node.input[2:]
    node.input.extend([] if last is None else [last])
    rehash(copy, "model.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match="has no scale and zero point"):
        Bundle.open(copy)


def test_a_range_without_its_end(make: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy.hdrq"
    shutil.copytree(make(abits=4).path, copy)
    model = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    codes = {n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    clip = next(n for n in model.graph.node if n.op_type == "Clip" and n.input[0] in codes)
    del clip.input[2:]
    rehash(copy, "model.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match="has no bounds"):
        Bundle.open(copy)


@pytest.mark.parametrize("bounds", [(-1000, 7), (3, 7), (-8, 0)])
def test_codes_beyond_their_type(bounds: tuple[int, int], make: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy.hdrq"
    shutil.copytree(make(abits=4).path, copy)
    model = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    codes = {n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    clip = next(n for n in model.graph.node if n.op_type == "Clip" and n.input[0] in codes)
    for place, value in zip((1, 2), bounds, strict=True):
        name = f"bound_{place}"
        clip.input[place] = name
        kind = np.int8 if value >= -128 else np.int64
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, kind), name))
    rehash(copy, "model.onnx", model.SerializeToString())
    with pytest.raises(HdrqError, match="found codes|breaks a rule") as found:
        export(copy, tmp_path / "engine")
    assert "\n" not in str(found.value) and not (tmp_path / "engine").exists()
