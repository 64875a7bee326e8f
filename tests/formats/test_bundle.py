from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from hdrq_deploy import Bundle
from hdrq_deploy.errors import BundleError, HdrqError
from hdrq_deploy.formats.atomic_files import new_directory
from hdrq_deploy.formats.file_kinds import BUNDLE


def test_a_bundle_holds_four_files_and_its_graph_points_into_the_weights(make: Any) -> None:
    bundle = make()
    names = sorted(f.name for f in bundle.path.iterdir())
    assert names == ["golden.safetensors", "manifest.json", "model.onnx", "weights.safetensors"]
    initializers = bundle.graph().graph.initializer
    outside = {i.name for i in initializers if i.external_data}
    assert outside == set(bundle.manifest.tensors)
    # Inside are only shapes and axes.
    assert all(len(i.raw_data) <= 64 for i in initializers if not i.external_data)
    onnx.checker.check_model(str(bundle.path / "model.onnx"), full_check=True)
    entry = bundle.manifest.tensors["conv1.weight_codes"]
    assert (entry.dtype, entry.bits) == ("int4", 4)
    assert bundle.manifest.tensors["stem.weight_codes"].bits == 8
    assert bundle.manifest.tensors["fc.weight_codes"].bits == 8


@pytest.mark.parametrize("file", ["weights.safetensors", "model.onnx"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(make: Any, tmp_path: Path, file: str, damage: str) -> None:
    copy = tmp_path / "copy.hdrq"
    shutil.copytree(make().path, copy)
    data = bytearray((copy / file).read_bytes())
    if damage == "remove":
        (copy / file).unlink()
    else:
        data[len(data) // 2] ^= 1
        (copy / file).write_bytes(data if damage == "flip" else data[:-9])
    with pytest.raises(BundleError, match=f"{file}: (missing|found)"):
        Bundle.open(copy)


def test_manifests_of_another_schema_and_wrong_steps_are_refused(make: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy.hdrq"
    shutil.copytree(make().path, copy)
    record = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**record, "schema_version": 99}))
    with pytest.raises(BundleError, match="schema_version"):
        Bundle.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="does not fit schema"):
        Bundle.open(copy)
    bundle = make()
    tensors = {**bundle.tensors(), "input.act_scale": bundle.tensor("input.act_scale") * 0}
    graph = (bundle.path / "model.onnx").read_bytes()
    with pytest.raises(BundleError, match="input.act_scale holds a scale that is not > 0"):
        Bundle.write(tmp_path / "zero.hdrq", bundle.manifest, tensors, graph)
    assert not (tmp_path / "zero.hdrq").exists()
    with pytest.raises(BundleError, match="nothing there"):
        Bundle.open(tmp_path / "absent.hdrq")


def test_an_output_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="stop"), new_directory(target, BUNDLE) as folder:
        (folder / "manifest.json").write_text("{}")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []
    with new_directory(target, BUNDLE) as folder:
        (folder / "manifest.json").write_text('{"kind": "hdrq-bundle", "n": 1}')
    with new_directory(target, BUNDLE) as folder:
        (folder / "manifest.json").write_text('{"kind": "hdrq-bundle", "n": 2}')
    assert json.loads((target / "manifest.json").read_text())["n"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(HdrqError, match="other content"), new_directory(mine, BUNDLE):
        raise AssertionError("not reached")
    assert (mine / "thesis.tex").read_text() == "x"
