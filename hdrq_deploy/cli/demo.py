"""``hdrq demo``: ``hdrq run`` on the digits benchmark, whose file it leaves for users to copy."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from .start import importing, run

with importing("hdrq demo"):
    from ..errors import HdrqError, ModelError
    from ..formats.atomic_files import (
        Kind,
        check_container,
        check_scratch,
        make_directory,
        new_directory,
        scratch_folder,
        write_bytes,
    )
    from ..formats.file_kinds import DEMO_FILE, DIGITS
    from ..formats.staleness import code_of, record_written, versions_of, written_change
    from ..runfile.loading import load
    from ..runfile.plan import stages_of
    from ..runfile.running import check
    from .common import parser, progress_bar, seed_number
    from .run import Where, make

__all__ = ["arguments", "main", "run_file"]

_FILE = "hdrq.yaml"
_TITLE = "hdrq demo: digits, three domains, one engine"
_EVIDENCE = (
    "These digits show how it works; figures on real images are in docs/evidence/ of the source"
)
# What a short run has instead.
_QUICK = {
    "bits: [w8a8, w4a8, w3a3]": "bits: [w8a8, w3a3]",
    "iters: 150 ": "iters: 25  ",
    "iterations: 300": "iterations: 100",
}
_RTX = "  - trt-rtx: hdrq-w3a3-merged"


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    text = "Calibrate, merge, export and measure three domains of digits."
    p = parser("hdrq demo", text, "hdrq demo --quick --out hdrq-demo")
    p.add_argument("--out", type=Path, default=Path("hdrq-demo"), help="folder of all results")
    p.add_argument("--quick", action="store_true", help="two bit-widths, fewer iterations")
    p.add_argument("--seed", type=seed_number, default=0, help="seed of all random numbers")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq demo``."""
    kept = "finished stages are kept; the same command resumes"
    return run("hdrq demo", lambda: _demo(arguments().parse_args(argv)), kept)


def run_file(quick: bool, seed: int, rtx: bool) -> str:
    """The run file of the demonstration, from the one that the package carries.

    Args:
        quick: Fewer bit-widths and iterations.
        seed: Of all random numbers.
        rtx: TensorRT-RTX is installed, and an engine of it is built too.
    """
    text = (files("hdrq_deploy.runfile") / "demo.yaml").read_text("utf-8")
    changes = {**(_QUICK if quick else {}), "seed: 0": f"seed: {seed}"}
    if not rtx:
        changes[_RTX] = f"  #{_RTX[3:]}  # pip install 'hdrq-deploy[trt-rtx]'"
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def _demo(args: argparse.Namespace) -> int:
    for module in ("torch", "onnxscript", "sklearn"):
        if importlib.util.find_spec(module) is None:
            raise ModelError(f"the demo needs {module}: pip install 'hdrq-deploy[demo]'")
    started, out = time.monotonic(), args.out.absolute()
    text = run_file(args.quick, args.seed, importlib.util.find_spec("tensorrt_rtx") is not None)
    _check(out, text)
    make_directory(out)
    write_bytes(out / _FILE, text.encode(), DEMO_FILE)
    _write_data(out, args.seed)
    _provide_checkpoints(out)
    loaded, threads = load(out / _FILE), os.cpu_count() or 1
    make(loaded, stages_of(loaded, threads, _TITLE), (), Where(threads=threads))
    print(f"{time.monotonic() - started:.0f} s. The run: {out / _FILE}, for you to copy")
    print(_EVIDENCE)
    return 0


def _check(out: Path, text: str) -> None:
    """Whether all may be written that the demonstration and the run of its file write."""
    check_container(out, list(_outputs()), label="out")
    check_scratch()
    with scratch_folder() as scratch:
        (scratch / _FILE).write_text(text, "utf-8")
        coming = load(scratch / _FILE, out, exists=False)
        check(coming, stages_of(coming))
    file = out / _FILE
    if not file.is_file():
        return
    found = file.read_text("utf-8")
    seed = re.search(r"^seed: (\d+)$", found, re.MULTILINE)
    kinds = [(quick, rtx) for quick in (False, True) for rtx in (False, True)]
    if seed is None or found not in {run_file(q, int(seed[1]), rtx) for q, rtx in kinds}:
        raise HdrqError(
            f"found {file} edited; run it with hdrq run {file}, or choose another --out for the "
            "demonstration"
        )


def _outputs() -> Iterator[tuple[str, Kind]]:
    """Name and kind of all that is written before the run."""
    from ..calibration_data.digits.make_checkpoints import TRAINING

    yield _FILE, DEMO_FILE
    yield "data", DIGITS
    yield from ((f"checkpoints/{name}", kind) for name, kind in TRAINING.outputs())


def _write_data(out: Path, seed: int) -> None:
    """Write the images where they are missing or made otherwise."""
    from ..calibration_data import digits

    record = {
        "seed": seed,
        "versions": versions_of("numpy", "pillow", "scikit-learn"),
        "code": code_of("calibration_data.digits.images"),
    }
    data = out / "data"
    if not written_change(data, DIGITS, record):
        return
    print(f"writing images of {', '.join(digits.TARGETS)} to {data}", file=sys.stderr, flush=True)
    with new_directory(data, DIGITS, sync=False) as folder:
        digits.write(folder, digits.TARGETS, ("calibration", "test"), seed)
        record_written(folder, DIGITS, record)


def _provide_checkpoints(out: Path) -> None:
    """Copy the checkpoints, or train them where this installation does not carry them."""
    from ..calibration_data.digits.make_checkpoints import TRAINING

    folder = out / "checkpoints"
    if TRAINING.folder(folder) == folder:
        print(
            f"training the source model and one of each domain into {folder}, unless they are "
            "there: they are not part of the installed package (about two minutes)",
            file=sys.stderr,
            flush=True,
        )
    with progress_bar("train") as progress:
        TRAINING.provide(folder, progress)
