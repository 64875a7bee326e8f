"""Refuse files that do not belong into the repository: ``python tests/large_files.py FILE ...``."""

from __future__ import annotations

import sys
from pathlib import Path

LARGEST = 1_000_000


def large(files: list[str]) -> list[str]:
    """Those of more than ``LARGEST`` bytes."""
    return [name for name in files if Path(name).is_file() and Path(name).stat().st_size > LARGEST]


if __name__ == "__main__":
    found = large(sys.argv[1:])
    for name in found:
        print(f"{name}: more than {LARGEST:,} bytes; keep data and checkpoints outside")
    raise SystemExit(bool(found))
