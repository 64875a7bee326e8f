"""``hdrq sensitivity``: which layers quantization hurts, and which to keep in float."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .start import importing, run

with importing("hdrq sensitivity"):
    from rich.console import Console
    from rich.table import Table

    from ..calibration_data.readers import Wanted, numbered, read
    from ..checks.sensitivity import FloatLayers, Sensitivity, sensitivity, suggest
    from ..errors import DataError, ModelError
    from ..formats.atomic_files import (
        check_output,
        check_scratch,
        new_directory,
        write_bytes,
        write_record,
    )
    from ..formats.bundle import Bundle
    from ..formats.file_kinds import SENSITIVITY
    from ..numerics.batches import class_count
    from ..reports.html import need_matplotlib
    from ..reports.sensitivity_plot import plot
    from .common import named, parser, paths_of, progress_bar, seed_number

__all__ = ["arguments", "main", "show"]

_EXAMPLE = """\
hdrq sensitivity merged.hdrq --data night=test/night --max-drop 0.01 -o sensitivity"""
_SHOWN = 20


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    text = "Quantize every layer alone and rank the layers by the loss."
    p = parser("hdrq sensitivity", text, _EXAMPLE)
    what = p.add_argument_group("bundle, images and output")
    what.add_argument("bundle", help="calibrated or merged bundle")
    what.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=PATH", help="images of each domain"
    )
    what.add_argument(
        "--weights",
        help="float checkpoint of the bundle (needs torch); without it only the activations of "
        "a layer are set free, its weights stay the bundle's",
    )
    what.add_argument("-o", "--output", help="folder for sensitivity.json and sensitivity.svg")
    what.add_argument("--images", type=int, default=128, help="images per domain at most")
    what.add_argument("--seed", type=seed_number, default=0, help="seed of the choice of images")
    layers = p.add_argument_group("layers to keep in float")
    bound = layers.add_mutually_exclusive_group()
    bound.add_argument("--keep-float", type=int, metavar="N", help="try the N worst in float")
    bound.add_argument(
        "--max-drop", type=float, help="fewest layers in float for this loss of accuracy (0 to 1)"
    )
    bound.add_argument("--min-sqnr", type=float, help="the same for this SQNR of the output, dB")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq sensitivity``."""
    return run("hdrq sensitivity", lambda: _sensitivity(arguments().parse_args(argv)))


def _sensitivity(args: argparse.Namespace) -> int:
    inputs = [args.bundle, *paths_of(args.data), args.weights]
    if args.output is not None:
        need_matplotlib()
        check_output(args.output, SENSITIVITY, inputs)
    check_scratch()
    if args.images < 1 or (args.keep_float is not None and args.keep_float < 0):
        raise DataError(
            f"found --images {args.images}, --keep-float {args.keep_float}; needed 1, 0 or more"
        )
    bundle = Bundle.open(args.bundle)
    manifest = bundle.manifest
    wanted = Wanted.like(manifest.preprocessing)
    shape = bundle.output_shape()
    data = {}
    for name, path in named(args.data).items():
        images = read(path, wanted, args.images, args.seed)
        if images.classes is not None and (len(shape) != 2 or class_count(shape) is None):
            images = replace(images, y=None)  # class folders are no labels of maps or numbers
        images = numbered(images, manifest.classes, class_count(shape), path)
        data[name] = (images.x, images.y)
    real = _real(bundle, args.weights, next(iter(data.values()))[0]) if args.weights else None
    with progress_bar("sensitivity") as progress:
        ranked = sensitivity(bundle, data, real, progress)
    show(ranked)
    scheme = None
    if args.keep_float is not None or args.max_drop is not None or args.min_sqnr is not None:
        scheme = suggest(bundle, data, ranked, real, args.keep_float, args.max_drop, args.min_sqnr)
        _show_scheme(scheme, ranked)
    if args.output is not None:
        target = Path(args.output).absolute()
        record = {
            "schema_version": 1,
            "bundle": str(bundle.path),
            "bundle_sha256": bundle.manifest_sha256,
            **_finite(asdict(ranked)),
            "scheme": _finite(asdict(scheme)) if scheme else None,
        }
        with new_directory(target, SENSITIVITY) as folder:
            write_bytes(folder / "sensitivity.svg", plot(ranked).encode())
            write_record(folder, SENSITIVITY, record)
        print(target / "sensitivity.svg")
    return 0


def _real(bundle: Bundle, path: str, x: Any) -> dict[str, Any]:
    try:
        from ..calibration import folded_weights
    except ImportError as error:
        raise ModelError(
            f"--weights needs {error.name}: pip install 'hdrq-deploy[calibrate]'"
        ) from error
    return dict(folded_weights(bundle.manifest.model, path, x[:2]))


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a layer that changes nothing has no SQNR."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(ranked: Sensitivity) -> None:
    """The most harmful layers, and both ends."""
    table = Table(caption=f"weights of layers that are not quantized: {ranked.weights}")
    for column in ("layer alone in codes", "weight bits", "SQNR dB", "accuracy", "lost"):
        table.add_column(column, overflow="fold")
    for row in ranked.layers[:_SHOWN]:
        table.add_row(row.module, str(row.weight_bits or "-"), *_figures(row, ranked))
    table.add_section()
    accuracy = "-" if ranked.full_accuracy is None else f"{100 * ranked.full_accuracy:.1f}"
    lost = _lost(ranked.full_accuracy, ranked)
    table.add_row("all layers", "", f"{ranked.full_sqnr_db:.1f}", accuracy, lost)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if len(ranked.layers) > _SHOWN:
        print(f"{len(ranked.layers) - _SHOWN} less sensitive layers are in the JSON (-o)")


def _figures(row: Any, ranked: Sensitivity) -> tuple[str, str, str]:
    accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
    return f"{row.sqnr_db:.1f}", accuracy, _lost(row.accuracy, ranked)


def _lost(accuracy: float | None, ranked: Sensitivity) -> str:
    if accuracy is None or ranked.float_accuracy is None:
        return "-"
    return f"{100 * (ranked.float_accuracy - accuracy):+.1f}"


def _show_scheme(scheme: FloatLayers, ranked: Sensitivity) -> None:
    accuracy = "" if scheme.accuracy is None else f", accuracy {100 * scheme.accuracy:.1f}%"
    print(
        f"{len(scheme.keep_float)} of {len(ranked.layers)} layers in float: SQNR "
        f"{scheme.sqnr_db:.1f} dB{accuracy}"
    )
    if scheme.keep_float:
        print("hdrq-export … --keep-float " + " ".join(scheme.keep_float))
