"""``hdrq-verify``: torch, bundle, lowered graph and engine of one model compared."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .start import importing, run

with importing("hdrq-verify"):
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console
    from rich.table import Table

    from ..calibration_data.readers import Wanted, read
    from ..checks.stages import compare_engine, compare_stages
    from ..comparison.differences import Stage, check
    from ..errors import DataError
    from ..formats.atomic_files import check_output, check_scratch, write_bytes
    from ..formats.bundle import Bundle
    from ..formats.bundle_manifest import Preprocessing
    from ..formats.file_kinds import VERIFY_JSON
    from .common import named, parser, paths_of

__all__ = ["stages", "verify_engine"]

Array = npt.NDArray[Any]


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser(
        "hdrq-verify",
        "Compare PyTorch, the bundle, the lowered graph and the engine on the same images: "
        "those of --data, or the few golden inputs that bundle and engine carry.",
    )
    p.add_argument("bundle", help="bundle; or an engine folder alone, checked on its golden inputs")
    p.add_argument("engine", nargs="?", help="engine folder made of the bundle")
    p.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH")
    p.add_argument("--images", type=int, default=512, help="images of each --data at most")
    torch = p.add_mutually_exclusive_group()
    torch.add_argument("--torch", action="store_true", help="PyTorch must be compared too")
    torch.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    p.add_argument(
        "--max-flips", type=float, help="share of decisions that may differ (manifest: 0.02)"
    )
    p.add_argument(
        "--max-rms", type=float, help="relative RMS that outputs may be apart (manifest: 0.05)"
    )
    p.add_argument("--json", help="write all that was found, tensor by tensor")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-verify``."""
    return run("hdrq-verify", lambda: _verify(arguments().parse_args(argv)))


def _verify(args: argparse.Namespace) -> int:
    inputs = [args.bundle, args.engine, *paths_of(args.data)]
    if args.json is not None:
        check_output(args.json, VERIFY_JSON, inputs, "--json")
    check_scratch()
    if args.engine is None and _is_engine(Path(args.bundle)):
        if args.data:
            raise DataError(
                f"{args.bundle} is an engine; --data needs its bundle too: BUNDLE ENGINE --data …"
            )
        found, tolerances = compare_engine(args.bundle)
    else:
        bundle = Bundle.open(args.bundle)
        tolerances = bundle.manifest.tolerances
        torch = True if args.torch else False if args.no_torch else None
        x = _images(bundle.manifest.preprocessing, args.data, args.images) if args.data else None
        found = stages(bundle, args.engine, x, torch)
    show(found)
    if args.json:
        record = {
            "schema_version": 1,
            "kind": VERIFY_JSON.kind,
            "tolerances": {
                **tolerances.model_dump(),
                **({} if args.max_flips is None else {"decision_flips": args.max_flips}),
                **({} if args.max_rms is None else {"output_rms": args.max_rms}),
            },
            "stages": [_plain(asdict(stage)) for stage in found],
        }
        text = json.dumps(record, indent=1) + "\n"
        write_bytes(Path(args.json).absolute(), text.encode(), VERIFY_JSON)
    check(found, tolerances, args.max_flips, args.max_rms)
    return 0


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which is how far stages are apart that cannot be compared."""
    return {k: None if v in (float("inf"), -float("inf")) else v for k, v in record.items()}


def verify_engine(bundle: str, engine: Path) -> None:
    """Compare a bundle with an engine on golden inputs, and print it.

    Raises:
        CheckFailed: They are further apart than the bundle allows.
    """
    opened = Bundle.open(bundle)
    found = stages(opened, engine, None, False)
    show(found)
    check(found, opened.manifest.tolerances)


def stages(
    bundle: Bundle, engine: str | Path | None, x: Array | None, torch: bool | None
) -> list[Stage]:
    """:func:`hdrq_deploy.checks.stages.compare_stages`, which says on stderr what it leaves out."""
    return compare_stages(bundle, engine, x, torch, lambda text: print(text, file=sys.stderr))


def _is_engine(path: Path) -> bool:
    file = path / "manifest.json"
    return file.is_file() and b'"hdrq-engine"' in file.read_bytes()


def _images(preprocessing: Preprocessing | None, data: Sequence[str], limit: int) -> Array:
    wanted = Wanted.like(preprocessing) if preprocessing else Wanted()
    return np.concatenate([read(path, wanted, limit).x for path in named(data).values()])


def show(found: Sequence[Stage]) -> None:
    """One line a comparison."""
    table = Table()
    for column in (
        "stages",
        "images",
        "decision flips",
        "output RMS",
        "SQNR dB",
        "largest difference",
        "first difference",
    ):
        table.add_column(column, overflow="fold")
    for stage in found:
        table.add_row(
            stage.name,
            str(stage.images),
            f"{stage.decision_flips} of {stage.decisions} ({stage.flip_share:.2%})",
            f"{stage.output_rms:.2g}",
            "equal" if stage.sqnr_db is None else f"{stage.sqnr_db:.1f}",
            f"{stage.max_steps} steps" if stage.tensors else "-",
            stage.first_difference or "none",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
