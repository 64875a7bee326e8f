"""Old import paths work for one release and say where to go."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hdrq_deploy
from hdrq_deploy._moved import MOVED, REMOVED_IN

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_path_is_the_new_module_and_warns(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"hdrq_deploy.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=re.escape(f"is now hdrq_deploy.{new};")):
        module = importlib.import_module(f"hdrq_deploy.{old}")
    moved = importlib.import_module(f"hdrq_deploy.{new}")
    public = getattr(moved, "__all__", [])
    assert public or module is moved
    for name in public:
        assert getattr(module, name) is getattr(moved, name)


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
