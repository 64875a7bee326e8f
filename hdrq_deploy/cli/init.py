"""``hdrq init``: write a starter run file."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from .start import importing, run

with importing("hdrq init"):
    from ..errors import HdrqError, ModelError
    from ..formats.atomic_files import write_bytes
    from ..runfile.document import need_yaml
    from ..runfile.loading import load
    from ..runfile.plan import stages_of
    from ..runfile.starter import ADAPT, given_domain, look, text
    from .common import image_flags, parser, progress_bar, wanted_of

__all__ = ["arguments", "main"]

_TEXT = (
    "Write a commented run file for hdrq run, after loading every checkpoint into the model and "
    "running it on a few images of each domain."
)
_EXAMPLE = """\
hdrq init --from timm:resnet18 --source source.safetensors \\
  --domain night=night.safetensors:images/night:test/night \\
  day=day.safetensors:images/day:test/day"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq init", _TEXT, _EXAMPLE)
    p.add_argument(
        "--from",
        "--model",
        dest="model",
        required=True,
        metavar="MODEL",
        help="PKG.MOD:FACTORY, {timm,torchvision,transformers}:NAME; the classes of a library's "
        "model are those of the source checkpoint",
    )
    p.add_argument("--source", required=True, help="checkpoint that all domains were adapted from")
    p.add_argument(
        "--domain",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=CHECKPOINT:IMAGES[:TEST]",
        help="checkpoint, calibration images and labelled test images of each domain; "
        f"the word {ADAPT} in place of a checkpoint makes it from the source",
    )
    about = "as in training; what is not given is a timm model's own, or taken from the images"
    image_flags(p.add_argument_group("images", about))
    p.add_argument(
        "-o", "--output", type=Path, default=Path("hdrq.yaml"), help="run file, a new one"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq init``."""
    return run("hdrq init", lambda: _init(arguments().parse_args(argv)))


def _init(args: argparse.Namespace) -> int:
    target: Path = args.output
    if os.path.lexists(target):
        raise HdrqError(
            f"found something at {target}; a starter replaces nothing: choose another -o"
        )
    need_yaml()
    domains = [given_domain(word) for word in args.domain]
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise HdrqError(f"found a name twice in --domain {shlex.join(names)}; give each its own")
    wanted = wanted_of(args)
    try:
        with progress_bar("look at") as progress:
            seen = look(args.model, args.source, domains, wanted, progress)
    except ImportError as error:
        raise ModelError(
            f"a look at checkpoints needs {error.name}: pip install 'hdrq-deploy[calibrate]'"
        ) from error
    folder = target.absolute().parent
    written = text(args.source, domains, seen, wanted, folder)
    write_bytes(target.absolute(), written.encode())
    stages = stages_of(load(target))
    for note in seen.notes:
        print(f"note: {note}")
    print(f"{target}: {len(domains)} domains, {len(stages)} stages; next: hdrq run {target}")
    return 0
