"""Models are found beside the caller, and the search path is left as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.loading import load_model
from hdrq_deploy.errors import ModelError

LAZY = '''
from torch import nn


class Lazy(nn.Module):
    """Imports a module beside it when it is run."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        from path_sibling import pooled

        return pooled(self.conv(x))


def broken():
    raise RuntimeError("no")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which holds modules that no other test has imported."""
    (tmp_path / "path_model.py").write_text(LAZY)
    (tmp_path / "path_sibling.py").write_text("def pooled(x):\n    return x.mean((2, 3))\n")
    monkeypatch.chdir(tmp_path)
    # As in a console script: the current folder is not searched.
    elsewhere = [path for path in sys.path if path not in {"", str(tmp_path)}]
    monkeypatch.setattr(sys, "path", elsewhere)
    for name in ("path_model", "path_sibling"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_loading_leaves_the_search_path_as_it_was(folder: Path) -> None:
    before = list(sys.path)
    load_model("path_model:Lazy")
    assert sys.path == before and "path_model" in sys.modules
    for name in ("path_model:Absent", "path_model:broken", "absent_model:Lazy"):
        with pytest.raises(ModelError):
            load_model(name)
        assert sys.path == before


def test_a_model_that_imports_its_neighbour_when_run_is_calibrated(folder: Path) -> None:
    before = list(sys.path)
    np.savez(folder / "data.npz", x=np.random.default_rng(0).random((4, 3, 8, 8), np.float32))
    bundle = calibrate("path_model:Lazy", "data.npz", "here", "b.hdrq", method="float")
    assert bundle.manifest.model == "path_model:Lazy"
    assert sys.path == before and "path_sibling" in sys.modules


def test_a_model_of_a_folder_on_the_search_path_keeps_it_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend("")
    before = list(sys.path)
    load_model("path_model:Lazy")
    assert sys.path == before
