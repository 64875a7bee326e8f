"""``hdrq-merge``: bundles of several domains become one."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .start import importing, run

with importing("hdrq-merge"):
    from ..bundle import Bundle
    from ..calibration_data.readers import Wanted, read
    from ..errors import MergeError
    from ..files import check_output, check_parent, check_scratch
    from ..kinds import BUNDLE, MERGED
    from ..merge import (
        CHECKPOINT_METHODS,
        CRITERIA,
        ROUNDINGS,
        Merger,
        choose_weights,
        merge,
        merge_checkpoints,
        re_estimate,
    )
    from .common import named, parser, paths_of, progress_bar, seed_number

_EPILOG = """\
two .safetensors checkpoints instead of bundles are merged in float:
  hdrq-merge night.safetensors day.safetensors --method mean -o merged.safetensors
"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq-merge", "Merge calibrated bundles; needs neither torch nor data.", _EPILOG)
    p.add_argument("bundles", nargs="+", help="two or more bundles of one model and source")
    p.add_argument(
        "--weights",
        nargs="+",
        help="one per bundle, sum 1 (equal); auto chooses them from --data without labels",
    )
    p.add_argument("--rounding", default="advanced", choices=ROUNDINGS)
    p.add_argument("--candidates", type=int, default=100, help="draws of advanced rounding")
    p.add_argument("--seed", type=seed_number, default=0)
    p.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH", help="images for --weights auto"
    )
    p.add_argument(
        "--criterion",
        choices=CRITERIA,
        help="of --weights auto: surest predictions (entropy, information), or most like each "
        "domain's own bundle (agreement; where the names in --data are the bundles' domains)",
    )
    p.add_argument(
        "--re-estimate",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="unlabelled images for BatchNorm moments and activation steps of the merge "
        "(bundles of --fold steps)",
    )
    p.add_argument("--images", type=int, default=256, help="images per domain for --weights auto")
    p.add_argument(
        "--re-estimate-images", type=int, default=64, help="images per domain for --re-estimate"
    )
    p.add_argument("-o", "--output", required=True, help="bundle folder, or .safetensors file")
    floats = p.add_argument_group("checkpoints", "float merging of .safetensors files")
    floats.add_argument("--method", default="mean", choices=CHECKPOINT_METHODS)
    floats.add_argument("--base", help="source checkpoint of task-arithmetic and ties")
    floats.add_argument("--scaling", type=float, default=1.0, help="factor of the task vector")
    floats.add_argument("--density", type=float, default=0.2, help="share that ties keeps")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-merge``."""
    return run("hdrq-merge", lambda: _merge(arguments().parse_args(argv)))


def _merge(args: argparse.Namespace) -> int:
    floats = all(path.endswith(".safetensors") for path in args.bundles)
    others = [*paths_of(args.data), *paths_of(args.re_estimate), args.base]
    check_output(args.output, MERGED if floats else BUNDLE, [*args.bundles, *others])
    check_scratch()
    if floats:
        return _merge_checkpoints(args)
    auto = args.weights == ["auto"]
    weights = None if auto else _numbers(args.weights)
    if auto and not args.data:
        raise MergeError("found --weights auto without images; pass --data NAME=PATH ...")
    merger = Merger(args.bundles, args.rounding, args.candidates, args.seed)
    if not auto:
        merger.check_weights(weights)
    first = merger.parents[0]
    renewed = _images(args.re_estimate, first, args.re_estimate_images, args.seed)
    options: dict[str, Any] = {}
    if auto:
        images = _images(args.data, first, args.images, args.seed)
        with progress_bar("choose weights") as progress:
            mix = choose_weights(
                Merger(merger.parents),
                images,
                args.criterion,
                renewed,
                lambda done, total: progress(done, total, ""),
            )
        weights = list(mix.weights)
        options["auto"] = mix.record()
        print("weights " + " ".join(f"{w:g}" for w in weights))
    target = Path(args.output).absolute()
    check_parent(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        goal = Path(scratch) / "merged.hdrq" if renewed else target
        with progress_bar("merge") as progress:
            bundle = merge(
                merger.parents,
                goal,
                weights,
                args.rounding,
                args.candidates,
                args.seed,
                lambda done, total: progress(done, total, ""),
                options=options,
            )
        if renewed:
            bundle = re_estimate(bundle, renewed, target, args.seed)
    print(bundle.path)
    return 0


def _numbers(words: Sequence[str] | None) -> list[float] | None:
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError as error:
        raise MergeError(
            f"found --weights {' '.join(words or ())}; needed one number per bundle, or auto"
        ) from error


def _images(values: Sequence[str], like: Bundle, limit: int, seed: int) -> dict[str, Any]:
    """Inputs of each domain as the bundles were calibrated for; labels are not looked at."""
    if limit < 2:
        raise MergeError(f"found {limit} images per domain; needed 2 or more")
    preprocessing = like.manifest.preprocessing
    wanted = Wanted.like(preprocessing) if preprocessing else Wanted()
    return {name: read(path, wanted, limit, seed).x for name, path in named(values).items()}


def _merge_checkpoints(args: argparse.Namespace) -> int:
    given = {"--data": args.data, "--re-estimate": args.re_estimate}
    wrong = [flag for flag, value in given.items() if value]
    if wrong or args.weights == ["auto"]:
        raise MergeError(
            f"found {wrong[0] if wrong else '--weights auto'} with float checkpoints; it works "
            "on bundles: calibrate them first (--method float keeps them float)"
        )
    with progress_bar("merge") as progress:
        path = merge_checkpoints(
            args.bundles,
            args.output,
            _numbers(args.weights),
            args.method,
            args.base,
            args.scaling,
            args.density,
            lambda done, total: progress(done, total, ""),
        )
    print(path)
    return 0
