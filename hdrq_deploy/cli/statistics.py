"""``hdrq statistics``: what the layers of a float network read, for a merge of checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .start import importing, run

with importing("hdrq statistics"):
    from ..errors import ModelError
    from ..formats.atomic_files import check_output, check_scratch
    from ..formats.file_kinds import CHECKPOINT_STATISTICS
    from .common import image_flags, parser, rank_or_full, seed_number, wanted_of

__all__ = ["arguments", "main"]

_TEXT = (
    "Run images through a float checkpoint and keep mean and covariance of every layer's inputs, "
    "for merges of checkpoints by regression, which read one file for every checkpoint. Bundles "
    "hold theirs already."
)
_EXAMPLE = """\
hdrq statistics --model shop.models:resnet18 --weights night.safetensors --data images/night \\
  -o night.statistics.safetensors
hdrq-merge night.safetensors day.safetensors --method regression \\
  --statistics night.statistics.safetensors day.statistics.safetensors -o merged.safetensors"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq statistics", _TEXT, _EXAMPLE)
    what = p.add_argument_group("model, images and output")
    what.add_argument(
        "--model", required=True, help="PKG.MOD:FACTORY, {timm,torchvision,transformers}:NAME"
    )
    what.add_argument("--weights", required=True, help="checkpoint (.safetensors, .pt)")
    what.add_argument("--data", required=True, help="image folder, street scenes or .npz")
    what.add_argument("--images", type=int, default=1024, help="largest number of images")
    what.add_argument("-o", "--output", required=True, help="file to write (.safetensors)")
    run_flags = p.add_argument_group("the run")
    run_flags.add_argument(
        "--rank",
        type=rank_or_full,
        metavar="RANK|full",
        help="eigenvectors kept of every covariance (default: as many as take no more room than "
        "the weights would at 8 bits, 8 at least)",
    )
    run_flags.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where torch computes"
    )
    run_flags.add_argument(
        "--seed", type=seed_number, default=0, help="seed of the rows that are read"
    )
    images = p.rarely_used("images")
    image_flags(images)
    images.add_argument(
        "--skip-corrupt", action="store_true", help="leave out images that cannot be decoded"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq statistics``."""
    return run("hdrq statistics", lambda: _statistics(arguments().parse_args(argv)))


def _statistics(args: argparse.Namespace) -> int:
    check_output(args.output, CHECKPOINT_STATISTICS, [args.weights, args.data])
    check_scratch()
    try:
        with importing("hdrq statistics"):
            from ..calibration.checkpoint_statistics import write_statistics
    except ImportError as error:
        raise ModelError(
            f"statistics need {error.name}, which is not installed: "
            "pip install 'hdrq-deploy[calibrate]'"
        ) from error
    path = write_statistics(
        args.model,
        args.weights,
        args.data,
        args.output,
        "auto" if args.rank is None else args.rank,
        args.images,
        wanted_of(args),
        args.skip_corrupt,
        args.seed,
        args.device,
    )
    print(path)
    return 0
