"""Old import paths work for one release and say where to go."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hdrq_deploy
from hdrq_deploy._moved import MOVED, NAMES, REMOVED_IN, RENAMED, targets

ROOT = Path(__file__).resolve().parents[1]


# The public names that every old path had in version 0.1.
PUBLIC: dict[str, list[str]] = json.loads(Path(__file__).with_name("moved_names.json").read_text())


@pytest.fixture(autouse=True)
def _other_tests_see_the_package_as_it_is() -> Iterator[None]:
    """An import of an old path leaves it as a name of the package, such as ``merge``."""
    before = dict(vars(hdrq_deploy))
    yield
    vars(hdrq_deploy).clear()
    vars(hdrq_deploy).update(before)


def old_module(old: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module under its old path, imported anew."""
    monkeypatch.delitem(sys.modules, f"hdrq_deploy.{old}", raising=False)
    new = " and ".join(f"hdrq_deploy.{target}" for target in targets(old))
    with pytest.warns(DeprecationWarning, match=re.escape(f"is now {new};")):
        return importlib.import_module(f"hdrq_deploy.{old}")


# What has no successor: a script's own function, files of a demonstration that hdrq run writes now,
# a bound that merges do not have.
GONE = {
    "calibration_data.make_checkpoints.publish",
    "kinds.DEMO_COMMANDS",
    "kinds.DEMO_HTML",
    "kinds.DEMO_JSON",
    "merge.rounding.TIE_DISTANCE",
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_has_its_names_and_warns(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = old_module(old, monkeypatch)
    new = [importlib.import_module(f"hdrq_deploy.{target}") for target in targets(old)]
    assert old in PUBLIC or module is new[0]
    for name in PUBLIC.get(old, ()):
        if f"{old}.{name}" in GONE:
            continue
        today = RENAMED.get(f"{old}.{name}", name)
        holders = [part for part in new if hasattr(part, today)]
        assert holders, f"hdrq_deploy.{old}.{name} is in none of {targets(old)}"
        assert getattr(module, name) is getattr(holders[0], today)


@pytest.mark.parametrize(("path", "new"), NAMES.items())
def test_a_name_that_moved_out_of_a_module_is_found(path: str, new: str) -> None:
    old, _, name = path.rpartition(".")
    with pytest.warns(DeprecationWarning, match=re.escape(f"is now hdrq_deploy.{new};")):
        found = getattr(importlib.import_module(f"hdrq_deploy.{old}"), name)
    place, _, today = new.rpartition(".")
    assert found is getattr(importlib.import_module(f"hdrq_deploy.{place}"), today)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        importlib.import_module(f"hdrq_deploy.{old}").absent  # noqa: B018


def test_a_split_module_serves_the_names_of_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOVED, "bundle", ("formats.bundle", "numerics.spec"))
    monkeypatch.setitem(RENAMED, "bundle.Range", "QuantSpec")
    module = old_module("bundle", monkeypatch)
    from hdrq_deploy.formats.bundle import Bundle
    from hdrq_deploy.numerics.spec import QuantSpec

    assert module.Bundle is Bundle
    assert module.QuantSpec is module.Range is QuantSpec
    assert {"Bundle", "QuantSpec", "Range"} <= set(module.__all__)
    with pytest.raises(AttributeError, match="'hdrq_deploy.bundle' has no attribute 'Absent'"):
        module.Absent  # noqa: B018


def test_the_warning_names_the_line_that_imports(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\n\nfrom hdrq_deploy.manifest import Manifest\n")
    done = subprocess.run(
        [sys.executable, "-W", "always", str(script)], capture_output=True, text=True, check=True
    )
    assert f"{script}:3: DeprecationWarning: hdrq_deploy.manifest is now" in done.stderr


def test_public_functions_can_be_called_after_an_old_import() -> None:
    code = (
        "import hdrq_deploy.calibrate.draws, hdrq_deploy.merge.rounding, hdrq_deploy\n"
        "for function in (hdrq_deploy.calibrate, hdrq_deploy.merge):\n"
        "    try: function()\n"
        "    except TypeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("missing") == 2


def test_the_table_ends_with_its_release() -> None:
    """An entry that is due makes this fail: remove it."""
    version = tuple(map(int, hdrq_deploy.__version__.split(".")[:2]))
    assert version < tuple(map(int, REMOVED_IN.split(".")))
