"""``hdrq-verify``: torch, bundle, lowered graph and engine of one model compared."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from .start import importing, run

with importing("hdrq-verify"):
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console
    from rich.table import Table

    from ..bundle import GOLDEN, GRAPH, Bundle, read_golden
    from ..calibration_data.readers import Wanted, read
    from ..errors import DataError, HdrqError, ModelError
    from ..files import check_output, check_scratch, write_bytes
    from ..frames import feed, in_batches
    from ..kinds import VERIFY_JSON
    from ..manifest import EngineManifest, Preprocessing, Tolerances
    from ..runtime import load_engine
    from ..runtime.engine import read_manifest
    from ..runtime.ort import session_options
    from ..verification import (
        Stage,
        Tapped,
        check,
        difference,
        graph_order,
        tapped,
    )
    from .common import named, parser, paths_of

__all__ = ["stages", "verify_engine"]

_BATCH = 32

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
        found, tolerances = _golden_engine(Path(args.bundle), args.data)
    else:
        bundle = Bundle.open(args.bundle)
        tolerances = bundle.manifest.tolerances
        torch = True if args.torch else False if args.no_torch else None
        x = _images(bundle.manifest.preprocessing, args.data, args.images) if args.data else None
        found = stages(bundle, args.engine, x, torch)
    if args.max_flips is not None:
        tolerances = tolerances.model_copy(update={"decision_flips": args.max_flips})
    show(found)
    if args.json:
        record = {
            "schema_version": 1,
            "kind": "hdrq-verify",
            "tolerances": tolerances.model_dump(),
            "stages": [asdict(stage) for stage in found],
        }
        text = json.dumps(record, indent=1) + "\n"
        write_bytes(Path(args.json).absolute(), text.encode(), VERIFY_JSON)
    check(found, tolerances)
    return 0


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
    """Every two neighbouring stages that are at hand, compared.

    Args:
        bundle: Calibrated or merged.
        engine: Engine folder made of it, or None.
        x: Network inputs (N, C, H, W) float32; None takes the golden ones.
        torch: With PyTorch, without, or (None) where it is installed and knows the model.

    Raises:
        DataError: No images and no golden inputs.
        ModelError: ``torch`` is True and the model cannot be rebuilt.
        EngineError: The engine cannot be loaded, or was made of another bundle.
    """
    golden = bundle.golden()
    if x is None:
        if not golden:
            raise DataError(
                f"{bundle.path}: holds no golden inputs (an older bundle); pass --data NAME=PATH"
            )
        x = golden["input"]
    order = graph_order(bundle)
    activations = {a.scale: a for a in bundle.manifest.activations}
    mine = tapped(bundle.path / GRAPH, "bundle")
    chain: list[tuple[Tapped, EngineManifest | None]] = [(mine, None)]
    if torch is not False:
        first = _torch(bundle, x[:2], must=torch is True)
        chain = [(first, None), *chain] if first else chain
    if engine is not None:
        chain += _engine_stages(Path(engine), bundle)
    size = _fixed_batch([m for _, m in chain if m is not None])
    rows_of = _whole(x, size)
    found = []
    for (a, before), (b, after) in pairwise(chain):
        if before is None and after is not None:
            a = _decided(a, after)

        def pairs(
            before: EngineManifest | None = before, after: EngineManifest | None = after
        ) -> Iterator[tuple[Array, Array]]:
            for rows in in_batches(rows_of, size or _BATCH):
                yield tuple(  # type: ignore[misc]
                    feed(rows, m) if m is not None else rows for m in (before, after)
                )

        found.append(difference(a, b, pairs, activations, order))
    return found


def _fixed_batch(manifests: Sequence[EngineManifest]) -> int | None:
    """The batch that an engine was exported for, where it is not free."""
    fixed = [m.inputs[0].shape[0] for m in manifests]
    return next((size for size in fixed if isinstance(size, int)), None)


def _whole(x: Array, size: int | None) -> Array:
    """``x``, its first rows repeated until whole batches are full."""
    if size is None or len(x) % size == 0:
        return x
    return np.resize(x, (-(-len(x) // size) * size, *x.shape[1:]))


def _is_engine(path: Path) -> bool:
    file = path / "manifest.json"
    return file.is_file() and b'"hdrq-engine"' in file.read_bytes()


def _images(preprocessing: Preprocessing | None, data: Sequence[str], limit: int) -> Array:
    wanted = Wanted.like(preprocessing) if preprocessing else Wanted()
    return np.concatenate([read(path, wanted, limit).x for path in named(data).values()])


def _torch(bundle: Bundle, example: Array, must: bool) -> Tapped | None:
    try:
        from ..calibrate.parity import torch_stage

        return torch_stage(bundle, example)
    except ImportError as error:
        if must:
            raise ModelError(
                f"--torch needs {error.name}: pip install 'hdrq-deploy[calibrate]'"
            ) from error
    except HdrqError as error:
        if must:
            raise
        print(f"PyTorch left out: {error}", file=sys.stderr)
    return None


def _engine_stages(path: Path, bundle: Bundle) -> list[tuple[Tapped, EngineManifest | None]]:
    """The lowered graph as written, and the engine that runs it."""
    manifest = read_manifest(path)
    if manifest.bundle_sha256 != bundle.manifest_sha256:
        raise DataError(
            f"{path}: made of another bundle than {bundle.path}; export this bundle, or name the "
            "one it was made of"
        )
    lowered = tapped(path / "model.onnx", "lowered graph")
    result: list[tuple[Tapped, EngineManifest | None]] = [(lowered, manifest)]
    if manifest.engine == "ort":
        result.append((tapped(path / "model.onnx", "engine", session_options(0)), manifest))
    elif manifest.engine != "onnx":
        result.append((_loaded(path), manifest))
    return result


def _loaded(path: Path) -> Tapped:
    engine = load_engine(path)
    return Tapped("engine", lambda x: (engine(x), {}))


def _decided(stage: Tapped, manifest: EngineManifest) -> Tapped:
    """What an engine's appended softmax or argmax would make of a stage's scores."""

    def run(x: Array) -> tuple[Array, dict[str, Array]]:
        scores, codes = stage.run(x)
        if manifest.postprocess == "argmax":
            return scores.argmax(1), codes
        if manifest.postprocess == "softmax":
            shifted = np.exp(scores - scores.max(1, keepdims=True))
            scores = shifted / shifted.sum(1, keepdims=True)
        return scores, codes

    return Tapped(stage.name, run)


def _golden_engine(path: Path, data: Sequence[str]) -> tuple[list[Stage], Tolerances]:
    """An engine on this machine against what its bundle computed where it was exported."""
    if data:
        raise DataError(f"{path} is an engine; --data needs its bundle too: BUNDLE ENGINE --data …")
    manifest = read_manifest(path)
    if GOLDEN not in manifest.files:
        raise DataError(f"{path}: holds no golden inputs; verify it beside its bundle, with --data")
    golden = read_golden(path / GOLDEN)
    fixed = _fixed_batch([manifest])
    x, output = (_whole(golden[name], fixed) for name in ("input", "output"))
    size = fixed or len(x)
    outputs = in_batches(output, size)
    recorded = _decided(Tapped("record", lambda _: (next(outputs), {})), manifest)
    with load_engine(path) as engine:
        here = Tapped("engine", lambda rows: (engine(rows), {}))

        def pairs() -> Iterator[tuple[Array, Array]]:
            yield from ((rows, feed(rows, manifest)) for rows in in_batches(x, size))

        return [difference(recorded, here, pairs, {}, [])], manifest.tolerances


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
