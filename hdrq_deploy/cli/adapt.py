"""``hdrq adapt``: a source model learns a domain from unlabelled images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .start import importing, run

with importing("hdrq adapt"):
    from ..adaptation.options import AdaptationOptions
    from ..errors import ModelError
    from ..formats.atomic_files import check_output, check_scratch
    from ..formats.file_kinds import ADAPTED, ADAPTING, partial_of
    from .common import image_flags, parser, progress_bar, seed_number, wanted_of

__all__ = ["arguments", "main"]

_TEXT = (
    "Adapt a source model to a domain without labels or source data: SHOT for classifiers, "
    "class-balanced self-training for segmentation."
)
_EXAMPLE = """\
hdrq adapt --model timm:resnet18 --weights source.safetensors --data images/night \\
  -o night.safetensors"""
_DEFAULTS = AdaptationOptions()


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq adapt", _TEXT, _EXAMPLE)
    what = p.add_argument_group("model, images and output")
    what.add_argument(
        "--model", required=True, help="PKG.MOD:FACTORY, {timm,torchvision,transformers}:NAME"
    )
    what.add_argument("--weights", required=True, help="source checkpoint")
    what.add_argument("--data", required=True, help="image folder, street scenes or .npz")
    what.add_argument("--images", type=int, help="largest number of images (default: all)")
    what.add_argument("-o", "--output", required=True, help="adapted checkpoint (.safetensors)")
    run_flags = p.add_argument_group("the run")
    run_flags.add_argument(
        "--epochs", type=int, default=_DEFAULTS.epochs, help="passes over the images"
    )
    run_flags.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where torch computes"
    )
    run_flags.add_argument(
        "--resume", action="store_true", help="resume after the last epoch of a stopped run"
    )
    images = p.rarely_used("images")
    image_flags(images)
    images.add_argument("--skip-corrupt", action="store_true", help="leave out broken images")
    _learning_flags(p.rarely_used("learning"))
    return p


def _learning_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch",
        type=int,
        default=_DEFAULTS.batch,
        help="images per iteration; all where there are fewer",
    )
    group.add_argument(
        "--lr",
        type=float,
        default=_DEFAULTS.lr,
        help="learning rate of SGD; the backbone learns at a tenth of it",
    )
    group.add_argument(
        "--pseudo", type=float, default=_DEFAULTS.pseudo, help="weight of SHOT's pseudo-labels"
    )
    group.add_argument(
        "--share",
        type=float,
        nargs=2,
        default=_DEFAULTS.share,
        metavar=("FIRST", "LAST"),
        help="share of each class's pixels that get a pseudo-label, in the first and last epoch "
        "(segmentation)",
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS.flip,
        help="mirror half of the images",
    )
    group.add_argument(
        "--pull",
        type=float,
        default=_DEFAULTS.pull,
        help="weight of the distance to the source weights (L2-SP)",
    )
    group.add_argument("--seed", type=seed_number, default=0, help="seed of all random numbers")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq adapt``."""
    stopped = "no checkpoint was written; --resume goes on behind the last finished epoch"
    return run("hdrq adapt", lambda: _adapt(arguments().parse_args(argv)), stopped)


def _adapt(args: argparse.Namespace) -> int:
    inputs = [args.weights, args.data]
    check_output(args.output, ADAPTED, inputs)
    check_output(partial_of(Path(args.output)), ADAPTING, inputs)
    check_scratch()
    try:
        with importing("hdrq adapt"):
            from ..adaptation.adapt import adapt
    except ImportError as error:
        raise ModelError(
            f"adaptation needs {error.name}: pip install 'hdrq-deploy[calibrate]'"
        ) from error
    options = AdaptationOptions(
        args.epochs,
        args.batch,
        args.lr,
        args.pseudo,
        tuple(args.share),
        args.flip,
        args.pull,
    )
    with progress_bar("adapt") as progress:
        path = adapt(
            args.model,
            args.data,
            args.output,
            args.weights,
            options,
            args.images,
            wanted_of(args),
            args.seed,
            args.device,
            args.resume,
            progress,
            args.skip_corrupt,
        )
    print(path)
    return 0
