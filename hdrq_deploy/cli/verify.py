"""``hdrq verify``: torch, graph and engine of one bundle compared on images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import reference
from ..bundle import GRAPH, Bundle
from ..calibration_data.readers import Wanted, read
from ..errors import CheckFailed, ModelError
from ..runtime import load_engine
from .common import named, parser, run


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq verify", "Compare a bundle with torch and with an engine made from it.")
    p.add_argument("bundle")
    p.add_argument("engine", nargs="?", help="engine folder (ort or onnx)")
    p.add_argument("--data", nargs="+", required=True, metavar="NAME=PATH")
    p.add_argument("--torch", action="store_true", help="compare with the torch model too")
    p.add_argument(
        "--max-flips", type=float, default=0.01, help="share of decisions that may differ"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq verify``."""
    args = arguments().parse_args(argv)
    return run("hdrq verify", lambda: _verify(args))


def _verify(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    wanted = Wanted()
    if bundle.manifest.preprocessing:
        wanted = Wanted.like(bundle.manifest.preprocessing)
    x = np.concatenate([read(path, wanted).x for path in named(args.data).values()])
    result = compare(bundle, x, args.engine, args.torch)
    print(json.dumps(result, indent=1))
    for name, found in result.items():
        share = found["decision_flips"] / len(x)
        if share > args.max_flips:
            raise CheckFailed(
                f"found {found['decision_flips']} of {len(x)} decisions changed ({name}); needed "
                f"at most {args.max_flips:.2%}: export again, or raise --max-flips"
            )
    return 0


def compare(
    bundle: Bundle, x: Any, engine: str | None, with_torch: bool
) -> dict[str, dict[str, Any]]:
    """Torch against the bundle's graph, and the graph against an engine."""
    result: dict[str, dict[str, Any]] = {}
    if with_torch:
        try:
            from ..calibrate.parity import parity
        except ImportError as error:
            raise ModelError(
                f"--torch needs {error.name}: pip install 'hdrq-deploy[calibrate]'"
            ) from error
        result["torch to graph"] = parity(bundle, x)
    if engine:
        session = reference.unfused_session(bundle.path / GRAPH)
        name = session.get_inputs()[0].name
        batches = [x[i : i + 64] for i in range(0, len(x), 64)]
        expected = np.concatenate([session.run(None, {name: b})[0] for b in batches])
        with load_engine(engine) as loaded:
            got = np.concatenate([loaded(b) for b in batches])
        result["graph to engine"] = {"images": len(x), **reference.compare(expected, got)}
    return result
