"""``hdrq analyze``: why a merge works or fails."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from typing import Any

from .start import importing, run

with importing("hdrq analyze"):
    import numpy as np

    from ..calibration_data.readers import Wanted, numbered, read
    from ..errors import DataError, ModelError
    from ..formats.atomic_files import (
        check_output,
        check_scratch,
        new_directory,
        write_bytes,
        write_record,
    )
    from ..formats.bundle import Bundle
    from ..formats.file_kinds import ANALYSIS
    from ..numerics.batches import class_count
    from .common import named, parser, paths_of, progress_bar, seed_number

__all__ = ["arguments", "main"]

_EXAMPLE = """\
hdrq analyze night.hdrq day.hdrq --data night=test/night day=test/day -o why"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    text = "Barriers, curvature, distances and rounding of a merge, in a report."
    p = parser("hdrq analyze", text, _EXAMPLE)
    what = p.add_argument_group("bundles, images and output")
    what.add_argument("bundles", nargs="+", help="two or more bundles of one model and source")
    what.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=PATH", help="labelled images per domain"
    )
    what.add_argument("--base", help="source checkpoint; distances to it are shown too")
    what.add_argument("-o", "--output", required=True, help="folder of report.html and report.json")
    depth = p.add_argument_group("how much is computed")
    depth.add_argument("--images", type=int, default=256, help="images per domain at most")
    depth.add_argument("--points", type=int, default=11, help="values of lambda along a barrier")
    depth.add_argument(
        "--grid", type=int, default=13, help="surface points per axis; 0: no surface"
    )
    depth.add_argument("--seeds", type=int, default=32, help="rounding seeds")
    depth.add_argument("--candidates", type=int, default=100, help="draws of advanced rounding")
    depth.add_argument("--products", type=int, default=20, help="products with the Hessian")
    depth.add_argument("--seed", type=seed_number, default=0, help="seed of all random numbers")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq analyze``."""
    return run("hdrq analyze", lambda: _analyze(arguments().parse_args(argv)))


def _analyze(args: argparse.Namespace) -> int:
    target = check_output(args.output, ANALYSIS, [*args.bundles, *paths_of(args.data), args.base])
    check_scratch()
    for module, extra in (("torch", "calibrate"), ("matplotlib", "report")):
        if importlib.util.find_spec(module) is None:
            raise ModelError(
                f"the analysis needs {module}, which is not installed: "
                f"pip install 'hdrq-deploy[{extra}]'"
            )
    with importing("hdrq analyze"):
        from ..analysis import Settings, analyze
        from ..reports.analysis_page import page

    names = ("points", "grid", "seeds", "candidates", "products", "seed")
    settings = Settings(**{name: getattr(args, name) for name in names})
    bundles = [Bundle.open(path) for path in args.bundles]
    data = {
        n: _labelled(p, bundles[0], args.images, args.seed) for n, p in named(args.data).items()
    }
    base = _source(args.base, bundles[0], next(iter(data.values()))[0]) if args.base else None
    with progress_bar("analyze") as progress:
        result = analyze(bundles, data, base, settings, progress)
    with new_directory(target, ANALYSIS) as folder:
        write_bytes(folder / "report.html", page(result).encode())
        write_record(folder, ANALYSIS, result)
    print(target / "report.html")
    return 0


def _labelled(path: str, like: Bundle, limit: int, seed: int) -> tuple[Any, Any]:
    if limit < 2:
        raise DataError(f"found --images {limit}; needed 2 or more")
    manifest = like.manifest
    wanted = Wanted.like(manifest.preprocessing)
    images = read(path, wanted, limit, seed)
    images = numbered(images, manifest.classes, class_count(like.output_shape()), path)
    if images.y is None:
        raise DataError(
            f"{path}: found images without labels; a loss needs one folder per class, or y in "
            "the .npz"
        )
    if tuple(images.x.shape[1:]) != manifest.input_shape:
        raise DataError(
            f"{path}: found images of shape {images.x.shape[1:]}; the model reads "
            f"{manifest.input_shape}"
        )
    return images.x, images.y


def _source(path: str, like: Bundle, x: Any) -> dict[str, Any]:
    """The source model's weights with BatchNorm folded, as the bundles' graph has them."""
    from ..calibration import folded_weights

    return {
        name: np.asarray(value)
        for name, value in folded_weights(like.manifest.model, path, x[:2]).items()
    }
