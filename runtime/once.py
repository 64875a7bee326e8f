"""The process that runs a new engine once and then ends: ``python -m hdrq_deploy.runtime.once``.

An export that ends with a check starts it, so that a crash of native code does not take the
export with it, and so that exporting needs no runtime. Its argument is a JSON file with
``engine`` (the folder), ``inputs`` and ``outputs`` (safetensors files, one tensor a batch) and
``answer`` (a file for the error, or null).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ..errors import EngineError
from .loading import load_engine

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run as the job file says."""
    (path,) = sys.argv[1:] if argv is None else argv
    job = json.loads(Path(path).read_text())
    error = None
    try:
        with load_engine(job["engine"]) as engine:
            batches = load_file(job["inputs"])
            outputs = {n: np.ascontiguousarray(engine(rows)) for n, rows in batches.items()}
        save_file(outputs, job["outputs"])
    except EngineError as failure:
        error = str(failure)
    Path(job["answer"]).write_text(json.dumps(error))
    return 0 if error is None else 1


if __name__ == "__main__":
    raise SystemExit(main())
