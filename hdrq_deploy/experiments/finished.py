"""Whether the figures of finished cells belong together: one run, its bundles, its test images.

Every row names the bundle that it measured, and a merged one those that it was merged from. A
calibration that was made anew and stopped half-way leaves rows of both; so do rows that were copied
from another run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..formats.atomic_files import read_json
from ..formats.bundle import Bundle
from ..formats.staleness import is_stamp
from .bundles import finished_change, inputs_of, whole_bundle
from .cells import CellContext, request_of
from .grid import Grid, Merge, bundle_path, read_row, row_path
from .ways import WAYS

__all__ = ["check_finished"]

# What all cells of a domain are made from, by its entry in their records.
_ORIGINS = {
    "weights": "an adapted checkpoint",
    "base": "a source checkpoint",
    "data": "calibration images",
}


def check_finished(grid: Grid, out: Path) -> None:
    """Refuse figures of another task, of other options, bundles or test images.

    Bundles that are gone are not missed; what earlier versions did not record is not compared.

    Raises:
        SpecError: A cell of the grid has such figures, or damaged ones.
    """
    _Check(grid, out).run()


class _Check:
    """What the rows that were looked at have said."""

    def __init__(self, grid: Grid, out: Path) -> None:
        self._grid, self._out = grid, out
        # Hashes of single bundles by cell; test images by domain, and the row that names them.
        self._measured: dict[str, str] = {}
        self._tests: dict[str, tuple[Any, Path]] = {}
        # Hashes of what cells of a domain were made from, and the cell that names them.
        self._origins: dict[tuple[str, str], tuple[str, str]] = {}

    def run(self) -> None:
        """Look at every row of the grid, singles before their merges."""
        grid, out = self._grid, self._out
        context = CellContext(grid.task, out, "auto")
        for run in grid.runs():
            for domain in grid.domains:
                cell = run.single(domain)
                row = self._row(cell, (domain,))
                if row is None:
                    continue
                needed = grid.needs_statistics(run)
                request = request_of(context, run, domain, needed, grid.rate(run))
                if change := finished_change(request):
                    raise SpecError(
                        f"{row_path(out, cell)}: found figures of another run ({change}); give "
                        "what that run was given, or another `out`"
                    )
                self._look_at_origin(cell, domain)
                self._look_at_bundle(cell, row)
            for merge in grid.merges(run):
                for draw in range(merge.draws):
                    self._look_at_merge(merge, draw)

    def _row(self, cell: str, members: tuple[str, ...]) -> dict[str, Any] | None:
        """A whole row on the test images of all others; None where there is none."""
        path, row = row_path(self._out, cell), read_row(self._out, cell, members)
        if row is None:
            if path.exists():
                raise SpecError(
                    f"{path}: found no whole figures of this cell; remove the file, and run "
                    "without `table` to measure it again"
                )
            return None
        for domain, images in row.get("tests", {}).items():
            known, other = self._tests.setdefault(domain, (images, path))
            if images != known:
                raise _mixed(path, f"on other test images of {domain} than {other}")
        return row

    def _look_at_origin(self, cell: str, domain: str) -> None:
        """What a single cell was made from, beside all others of its domain."""
        place = bundle_path(self._out, cell)
        record = read_json(inputs_of(place))
        if not isinstance(record, dict):
            if place.exists():  # a calibration anew was stopped, or the record was not copied
                raise _mixed(
                    row_path(self._out, cell),
                    f"of {place}, and no record of what that was made from",
                )
            return
        for name, words in _ORIGINS.items():
            found = _content(record, name)
            if found is None:
                continue
            known, other = self._origins.setdefault((domain, name), (found, cell))
            if found != known:
                raise _mixed(
                    row_path(self._out, cell),
                    f"of {words} other than that of {row_path(self._out, other)}",
                )

    def _look_at_bundle(self, cell: str, row: Mapping[str, Any]) -> Bundle | None:
        """The bundle of a row; None where it is gone."""
        place = bundle_path(self._out, cell)
        bundle = whole_bundle(place)
        known = row.get("bundle")
        if bundle is not None and known not in (None, bundle.manifest_sha256):
            raise _mixed(row_path(self._out, cell), f"of another bundle than {place}")
        if isinstance(known, str):
            self._measured[cell] = known
        return bundle

    def _look_at_merge(self, merge: Merge, draw: int) -> None:
        cell = merge.cell(draw)
        row = self._row(cell, merge.members)
        if row is None:
            return
        bundle = self._look_at_bundle(cell, row)
        record = read_json(inputs_of(bundle_path(self._out, cell)))
        recorded = {**(record if isinstance(record, dict) else {}), **row}
        if bundle is not None:
            recorded["parents"] = [parent.manifest_sha256 for parent in bundle.manifest.parents]
        read = {"parents": merge.run}
        if WAYS[merge.way].reads_floats:
            read["guides"] = merge.float_run
        for role, run in read.items():
            hashes = recorded.get(role)
            if not isinstance(hashes, list):
                continue
            for member, known in zip(merge.members, hashes, strict=False):
                single = run.single(member)
                if self._measured.get(single, known) != known:
                    raise _mixed(
                        row_path(self._out, cell),
                        f"of a merge of another bundle than {row_path(self._out, single)}",
                    )


def _content(record: Mapping[str, Any], name: str) -> str | None:
    """The hash of a file or folder that a bundle was made from; None where none is recorded."""
    stamp, contents = record.get(name), record.get("contents")
    if stamp is None or not (is_stamp(stamp) and isinstance(contents, dict)):
        return None
    found = contents.get(stamp[0])
    return found if isinstance(found, str) else None


def _mixed(path: Path, what: str) -> SpecError:
    return SpecError(f"{path}: found figures {what}; run without `table` to bring both up to date")
