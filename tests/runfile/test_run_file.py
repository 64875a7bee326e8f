"""A run file: what it may say, the lines of its errors, and its published schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hdrq_deploy.calibration.recipe import Recipe
from hdrq_deploy.cli import run as run_command
from hdrq_deploy.errors import HdrqError, SpecError
from hdrq_deploy.runfile import schema as schema_module
from hdrq_deploy.runfile.document import Document, emitted
from hdrq_deploy.runfile.loading import load
from hdrq_deploy.runfile.plan import plan, stages_of
from hdrq_deploy.runfile.schema import SCHEMA_FILE, RunFile, schema

SHORT = """\
model: tiny_models:Tiny
source: Tiny-base.safetensors
domains:
  night:
    checkpoint: Tiny-night.safetensors
    calibration: data.npz
  day:
    checkpoint: Tiny-day.safetensors
    calibration: data.npz
"""


@pytest.fixture
def write(work: Path, tmp_path: Path) -> Any:
    """``write(text)`` gives a file whose folder holds what the texts name."""
    for name in ("Tiny-base", "Tiny-night", "Tiny-day"):
        (tmp_path / f"{name}.safetensors").symlink_to(work / f"{name}.safetensors")
    (tmp_path / "data.npz").symlink_to(work / "data.npz")

    def written(text: str) -> Path:
        path = tmp_path / "hdrq.yaml"
        path.write_text(text)
        return path

    return written


def test_the_shortest_file_asks_for_a_merge_of_all_domains_and_its_engine(write: Any) -> None:
    loaded = load(write(SHORT))
    assert loaded.out == loaded.document.path.parent / "hdrq-run"
    assert [stage.key for stage in stages_of(loaded)] == [
        "calibrate hdrq-w8a8-night",
        "calibrate hdrq-w8a8-day",
        "merge hdrq-w8a8-merged",
        "export hdrq-w8a8-night-ort",
        "export hdrq-w8a8-day-ort",
        "export hdrq-w8a8-merged-ort",
        "bench results",
    ]


def test_lists_make_a_grid_and_float_has_no_bits(write: Any) -> None:
    text = f"{SHORT}methods: [hdrq, float]\nbits: [w8a8, w4a8]\nengines: [ort, onnx]\n"
    stages = stages_of(load(write(text)))
    names = {stage.name for stage in stages if stage.kind == "merge"}
    assert names == {"hdrq-w8a8-merged", "hdrq-w4a8-merged", "float-merged"}
    exported = {stage.name for stage in stages if stage.kind == "export"}
    assert {f"{name}-{engine}" for name in names for engine in ("ort", "onnx")} <= exported


def test_the_resolved_file_asks_for_the_same(write: Any, tmp_path: Path) -> None:
    text = f"{SHORT}calibrate: {{iters: 5, lr: 1e-3, noise: off}}\nbench: false\n"
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere" / "resolved.yaml"
    for given in (f"{SHORT}calibrate: {{settings: null}}\nmerges: {{}}\n", text):
        loaded = load(write(given))
        again.write_text(emitted(loaded.resolved()))
        other = load(again)
        assert other.file == loaded.file and other.out == loaded.out
    assert loaded.resolved()["calibrate"]["lr"] == 1e-3
    assert loaded.resolved()["calibrate"]["noise"] == "off"


def test_variables_and_numbers_of_yaml_mean_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDRQ_TEST_DIR", "/data")
    file = tmp_path / "x.yaml"
    file.write_text("a: ${HDRQ_TEST_DIR}/x\nb: 1e-3\nno: off\nc: [1, 2.5, true]\n")
    document = Document.read(file)
    assert document.values == {"a": "/data/x", "b": 1e-3, "no": "off", "c": [1, 2.5, True]}
    assert document.line(("c", 1)) == 4 and document.line(("no", "deeper")) == 3


# What is wrong, the line that must be named, and words of the message.
WRONG: dict[str, tuple[str, int, str]] = {
    "unknown key": (f"{SHORT}bit: w4a8\n", 10, "unknown key bit; did you mean bits?"),
    "unknown key of a domain": (
        SHORT.replace("checkpoint: Tiny-day", "checkpont: Tiny-day"),
        8,
        "unknown key domains.day.checkpont; did you mean checkpoint?",
    ),
    "wrong type": (f"{SHORT}calibrate:\n  iters: many\n", 11, "calibrate.iters: found 'many'"),
    "missing key": (SHORT.replace("model:", "seed: 0 #"), 1, "found no model"),
    "missing path": (
        SHORT.replace("Tiny-day.safetensors", "absent.pt"),
        8,
        "domains.day.checkpoint: found nothing at",
    ),
    "unknown method": (f"{SHORT}methods:\n- rtn\n- hdrk\n", 12, "'hdrk'; did you mean hdrq?"),
    "bits": (f"{SHORT}bits: [w8a8,\n  w9a8]\n", 11, "found wbits=9"),
    "domain of a merge": (
        f"{SHORT}merges:\n  both:\n    domains:\n    - night\n    - dya\n",
        14,
        "found the domain 'dya'; did you mean day?",
    ),
    "weights": (f"{SHORT}merges:\n  both:\n    weights: [0.5, 0.7]\n", 12, "with sum 1.2"),
    "weights of others": (
        f"{SHORT}merges:\n  both:\n    weights: {{night: 1, snow: 0}}\n",
        12,
        "needed those of night, day",
    ),
    "weights from statistics that are off": (
        f"{SHORT}calibrate: {{statistics: 'off'}}\nmerges:\n  m:\n    weights: statistics\n",
        13,
        "merges.m: found weights: statistics with calibrate: {statistics: off}",
    ),
    "weights from statistics of a mean": (
        f"{SHORT}merges:\n  m:\n    method: mean\n    weights: statistics\n",
        13,
        "merges.m: found weights: statistics with method: mean; they are those of regression",
    ),
    "weights from statistics and draws": (
        f"{SHORT}merges:\n  m:\n    rounding: noise\n    weights: statistics\n",
        13,
        "found weights: statistics with rounding: noise",
    ),
    "rounding": (
        f"{SHORT}merges:\n  both:\n    method: regression\n    rounding: noise\n",
        12,
        "found rounding 'noise' with method 'regression'",
    ),
    "no checkpoint": (
        SHORT.replace("    checkpoint: Tiny-day.safetensors\n", ""),
        7,
        "found neither of checkpoint and adapt",
    ),
    "re_estimate": (
        f"{SHORT}calibrate: {{fold: weights}}\nmerges:\n  m:\n    re_estimate: true\n",
        13,
        "found re_estimate with BatchNorm folded into the weights",
    ),
    "re_estimate of folded floats": (
        f"{SHORT}methods: [float-folded]\nmerges:\n  m:\n    re_estimate: true\n",
        13,
        "found re_estimate with BatchNorm folded into the weights",
    ),
    "fit_to alone": (
        f"{SHORT}methods: [float, rtn]\nmerges:\n  m:\n    fit_to: float\n",
        13,
        "merges.m: found fit_to without fit: true",
    ),
    "fit_sweeps alone": (
        f"{SHORT}merges:\n  m:\n    fit_sweeps: 2\n",
        12,
        "merges.m: found fit_sweeps without fit: true",
    ),
    "fit_to another method": (
        f"{SHORT}methods: [rtn]\nmerges:\n  m:\n    fit: true\n    fit_to: float\n",
        14,
        "merges.m: found fit_to: float, which is not among methods",
    ),
    "option": (f"{SHORT}calibrate:\n  noise: loud\n", 10, "'loud'"),
    "adapt": (
        SHORT.replace("checkpoint: Tiny-day.safetensors", "adapt: {epochs: 0}"),
        8,
        "domains.day.adapt.epochs: found 0; needed greater than or equal to 1",
    ),
    "key twice": (f"{SHORT}seed: 1\nseed: 2\n", 11, "found the key 'seed' twice (first in line 10"),
    "variable": (f"{SHORT}out: ${{HDRQ_UNSET}}/x\n", 10, "no environment variable HDRQ_UNSET"),
    "engine": (f"{SHORT}engines:\n- ort\n- opnvino\n", 12, "did you mean openvino?"),
    "bundles of an engine": (
        f"{SHORT}engines:\n- ort\n- onnx: hdrq-w4a8-merged\n",
        12,
        "engines: found the bundle 'hdrq-w4a8-merged'; did you mean hdrq-w8a8-merged? bundles are",
    ),
    "verify": (f"{SHORT}verify: merged\n", 10, "verify: found the bundle 'merged'; bundles"),
    "singles": (f"{SHORT}bench:\n  singles: rtn\n", 11, "needed true, false or float"),
    "yaml": (f"{SHORT}bits: [w8a8\n", 11, "needed YAML"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_names_the_line_in_one_line(
    what: str, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text, line, words = WRONG[what]
    path = write(text)
    assert run_command.main([str(path), "--dry-run"]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.startswith(f"hdrq run: {path}:{line}: ") and words in said, said


def test_a_file_that_aliases_blow_up_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(SpecError, match=r"bomb.yaml:\d+: found too many values"):
        Document.read(tmp_path / "bomb.yaml")


def test_only_takes_what_it_reads_along(write: Any) -> None:
    stages = stages_of(load(write(SHORT)))
    assert {row.stage.kind for row in plan(stages, ["merge"])} == {"calibrate", "merge"}
    with pytest.raises(HdrqError, match="found `only` 'merges'; choose among adapt, calibrate"):
        plan(stages, ["merges"])


def test_the_published_schema_is_that_of_the_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command.main(["--schema"]) == 0
    published = (Path(schema_module.__file__).parent / SCHEMA_FILE).read_text()
    assert published == schema() == capsys.readouterr().out
    made = json.loads(published)
    jsonschema.Draft202012Validator.check_schema(made)
    assert set(made["properties"]) == set(RunFile.model_fields)
    elsewhere = {"method", "wbits", "abits", "seed"}
    keys = set(made["$defs"]["Calibrate"]["properties"])
    assert keys == set(Recipe.model_fields) - elsewhere


def test_the_schema_and_the_classes_accept_and_refuse_the_same(write: Any) -> None:
    checker = jsonschema.Draft202012Validator(json.loads(schema()))
    good = [
        SHORT,
        f"{SHORT}methods: rtn\nbits: [w8a8, W4A8]\nbench: false\n"
        "merges: {m: {weights: auto}, n: {weights: statistics}}\n",
        f"{SHORT}preprocess: {{size: 16}}\nbench: {{threads: 2}}\nengines: onnx\n",
        SHORT.replace("checkpoint: Tiny-day.safetensors", "adapt: true"),
        SHORT.replace("checkpoint: Tiny-day.safetensors", "adapt: {epochs: 2}"),
    ]
    for text in good:
        loaded = load(write(text))
        checker.validate(loaded.document.values)
        checker.validate(loaded.resolved())
    # Those that types alone refuse.
    for what in ("unknown key", "unknown key of a domain", "wrong type", "missing key", "bits"):
        document = Document.read(write(WRONG[what][0]))
        assert not checker.is_valid(document.values), what
    assert not checker.is_valid(Document.read(write(WRONG["unknown method"][0])).values)


def test_every_key_says_what_it_is() -> None:
    defs = json.loads(schema())
    for name in ("Domain", "Merge", "Bench", "Preprocess", "Adapt"):
        rows = defs["$defs"][name]["properties"]
        assert all(re.search(r"\w{3}", row.get("description", "")) for row in rows.values()), name
