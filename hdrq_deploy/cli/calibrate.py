"""``hdrq-calibrate``: an adapted checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import ModelError
from ..spec import GRIDS, METHODS
from .common import parser, progress_bar, run


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq-calibrate", "Quantize one adapted model so that it stays mergeable.")
    p.add_argument("--model", required=True, help="PKG.MOD:FACTORY, timm:NAME, transformers:NAME")
    p.add_argument("--weights", help="adapted checkpoint (.safetensors, .pt)")
    p.add_argument("--base", help="source checkpoint that all domains started from")
    p.add_argument("--data", required=True, help="image folder (one folder per class) or .npz")
    p.add_argument("--domain", required=True, help="name of the domain")
    p.add_argument("--method", default="hdrq", choices=METHODS)
    p.add_argument("--wbits", type=int, default=8, help="bits of weights, 2 to 8")
    p.add_argument("--abits", type=int, default=8, help="bits of activations, 2 to 8")
    p.add_argument("--per-channel", action="store_true", help="one weight step per channel")
    p.add_argument("--grid", default="int8", choices=GRIDS)
    p.add_argument("--images", type=int, default=1024, help="calibration images at most")
    p.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="resize images")
    p.add_argument("--mean", type=float, nargs="+", help="per channel, of pixels in [0, 1]")
    p.add_argument("--std", type=float, nargs="+", help="per channel, of pixels in [0, 1]")
    p.add_argument("--skip-corrupt", action="store_true", help="leave out broken images")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("-o", "--output", required=True, help="bundle folder (NAME.hdrq)")
    knobs = p.add_argument_group("hdrq", "learning, per block")
    knobs.add_argument("--iters", type=int, default=20000, help="iterations")
    knobs.add_argument("--batch", type=int, default=32, help="images per iteration")
    knobs.add_argument("--lr", type=float, default=1e-4, help="weights and their steps")
    knobs.add_argument("--act-lr", type=float, default=4e-5, help="activation steps")
    knobs.add_argument("--distance", type=float, default=0.05, help="lambda, pull to the source")
    knobs.add_argument("--noise-fraction", type=float, default=0.8, help="share with noise")
    knobs.add_argument(
        "--step-change", type=float, default=2e-3, help="bound of a step's update; 0: none"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-calibrate``."""
    args = arguments().parse_args(argv)
    return run("hdrq-calibrate", lambda: _calibrate(args))


def _calibrate(args: argparse.Namespace) -> int:
    try:
        from ..calibrate import calibrate
        from ..calibrate.reconstruct import Options
    except ImportError as error:
        raise ModelError(
            f"calibration needs {error.name}, which is not installed: "
            "pip install 'hdrq-deploy[calibrate]'"
        ) from error
    from ..calibration_data.readers import Wanted

    options = Options(
        iters=args.iters,
        batch=args.batch,
        lr=args.lr,
        act_lr=args.act_lr,
        distance=args.distance,
        noise_fraction=args.noise_fraction,
        step_change=args.step_change,
    )
    wanted = Wanted(
        tuple(args.size) if args.size else None,
        tuple(args.mean) if args.mean else None,
        tuple(args.std) if args.std else None,
    )
    with progress_bar(f"calibrate {args.domain}") as progress:
        bundle = calibrate(
            model=args.model,
            data=args.data,
            domain=args.domain,
            output=args.output,
            weights=args.weights,
            base=args.base,
            method=args.method,
            wbits=args.wbits,
            abits=args.abits,
            per_channel=args.per_channel,
            grid=args.grid,
            options=options,
            images=args.images,
            wanted=wanted,
            skip_corrupt=args.skip_corrupt,
            seed=args.seed,
            device=args.device,
            progress=progress,
        )
    print(bundle.path)
    return 0
