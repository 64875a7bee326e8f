"""The table of dataset readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hdrq_deploy.calibration_data.readers import READERS, ImageSet, Reader, Wanted, read
from hdrq_deploy.calibration_data.readers.base import Selection
from hdrq_deploy.errors import DataError


def read_plain(path: Path, wanted: Wanted, selection: Selection) -> ImageSet:
    x = np.loadtxt(path, dtype=np.float32).reshape(-1, 1, 2, 2)
    return ImageSet(x[selection.rows(len(x))], None, None, None)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Reader("a text file .toy", lambda path: path.suffix == ".toy", read_plain)
    monkeypatch.setitem(READERS, "toy", toy)


def test_a_reader_of_the_table_reads_its_own_files(toy: None, tmp_path: Path) -> None:
    x = np.arange(20, dtype=np.float32).reshape(5, 4)
    np.savetxt(tmp_path / "images.toy", x)
    np.testing.assert_array_equal(read(tmp_path / "images.toy").x, x.reshape(5, 1, 2, 2))
    some = read(tmp_path / "images.toy", limit=2, seed=3)
    rows = np.sort(np.random.default_rng(3).permutation(5)[:2])
    np.testing.assert_array_equal(some.x, x[rows].reshape(2, 1, 2, 2))


def test_what_no_reader_claims_is_refused_with_all_forms(toy: None, tmp_path: Path) -> None:
    (tmp_path / "images.txt").write_text("0 0 0 0")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "images.txt")
    for reader in READERS.values():
        assert reader.form in str(caught.value)


def test_a_path_is_read_by_the_first_reader_that_claims_it(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / "scenes" / name).mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "arrays.NPZ")
    (tmp_path / "arrays.NPZ.npz").rename(tmp_path / "arrays.NPZ")
    forms = {"scenes": "street scenes", "folder": "image folder", "arrays.NPZ": "arrays"}
    for path, form in forms.items():
        claiming = [name for name, reader in READERS.items() if reader.reads(tmp_path / path)]
        assert claiming[0] == form


def test_a_selection_is_checked_when_it_is_made() -> None:
    for options, message in (({"limit": 0}, "limit of 0"), ({"seed": -1}, "seed -1")):
        with pytest.raises(DataError, match=message):
            Selection(**options)
