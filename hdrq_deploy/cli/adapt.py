"""``hdrq adapt``: a source model learns a domain from unlabelled images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .start import importing, run

with importing("hdrq adapt"):
    from ..errors import ModelError
    from ..formats.atomic_files import check_output, check_scratch
    from ..formats.file_kinds import ADAPTED, ADAPTING
    from .common import image_flags, parser, progress_bar, seed_number, wanted_of

__all__ = ["arguments", "main"]


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser(
        "hdrq adapt",
        "Adapt a source model to a domain without labels or source data: SHOT for classifiers, "
        "class-balanced self-training for segmentation.",
    )
    p.add_argument("--model", required=True, help="PKG.MOD:FACTORY, {timm,torchvision,...}:NAME")
    p.add_argument("--weights", required=True, help="source checkpoint")
    p.add_argument("--data", required=True, help="image folder, street scenes or .npz")
    p.add_argument("--images", type=int, help="at most so many (all)")
    image_flags(p)
    p.add_argument("--skip-corrupt", action="store_true", help="leave out broken images")
    p.add_argument("--epochs", type=int, default=15)
    p.add_argument("--batch", type=int, default=64, help="images per step")
    p.add_argument(
        "--lr",
        type=float,
        default=1e-2,
        help="learning rate of SGD; the backbone learns at a tenth of it",
    )
    p.add_argument("--pseudo", type=float, default=0.3, help="weight of SHOT's pseudo-labels")
    p.add_argument(
        "--share",
        type=float,
        nargs=2,
        default=(0.2, 0.5),
        metavar=("FIRST", "LAST"),
        help="share of each class's pixels that get a pseudo-label, in the first and last epoch "
        "(segmentation)",
    )
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--pull", type=float, default=0.0, help="towards the source weights (L2-SP)")
    p.add_argument("--seed", type=seed_number, default=0)
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--resume", action="store_true", help="go on behind a stopped run's last epoch")
    p.add_argument("-o", "--output", required=True, help="adapted checkpoint (.safetensors)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq adapt``."""
    stopped = "no checkpoint was written; --resume goes on behind the last finished epoch"
    return run("hdrq adapt", lambda: _adapt(arguments().parse_args(argv)), stopped)


def _adapt(args: argparse.Namespace) -> int:
    inputs = [args.weights, args.data]
    check_output(args.output, ADAPTED, inputs)
    check_output(f"{args.output}.partial", ADAPTING, inputs)
    check_scratch()
    try:
        with importing("hdrq adapt"):
            from ..adaptation.adapt import AdaptationOptions, adapt
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
