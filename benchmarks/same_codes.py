"""The same integers everywhere? Codes of every activation, one runtime beside the other.

    python benchmarks/same_codes.py --results benchmarks/results
    python benchmarks/same_codes.py --bundles DIR                     # keeps the bundles
    python benchmarks/same_codes.py --record ort BUNDLE -o codes.npz  # on another machine
    python benchmarks/same_codes.py --bundles DIR --codes "arm64 ort:resnet14-w8a8=codes.npz" ...

Weights are random and inputs drawn (no downloads). The reference is each bundle's graph computed
as written, by ONNX Runtime without any fusion. ``--record`` needs no torch: it writes the codes of
one runtime on the bundle's golden inputs, for a machine that has no PyTorch; ``--codes`` reads
them as one more runtime of the model that is named. Bundles of other machines are told by their
hash.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hdrq_deploy.checks.same_codes import RUNTIMES, Parted, Recorded, compare, record
from hdrq_deploy.comparison import golden
from hdrq_deploy.errors import EngineError, ExportError
from hdrq_deploy.formats.atomic_files import write_bytes
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.runtime.bench.environment import environment

# Name, model, side of the images, bits of weights and activations.
MODELS = (
    ("resnet14-w8a8", "hdrq_deploy.calibration_data.models:resnet14", 32, 8, 8),
    ("resnet14-w4a4", "hdrq_deploy.calibration_data.models:resnet14", 32, 4, 4),
    ("mobilenetv2_050-w8a8", "timm:mobilenetv2_050", 96, 8, 8),
    ("efficientnet_lite0-w8a8", "timm:tf_efficientnet_lite0", 96, 8, 8),
)
IMAGES = 8


def bundles(folder: Path) -> dict[str, Bundle]:
    """The bundles, made where they are missing."""
    found = {}
    for name, model, side, wbits, abits in MODELS:
        path = folder / f"{name}.hdrq"
        if not path.is_dir():
            from hdrq_deploy.calibration import calibrate
            from hdrq_deploy.calibration_data.readers import ImageSet

            rng = np.random.default_rng(0)
            x = rng.standard_normal((IMAGES, 3, side, side), dtype=np.float32)
            calibrate(
                model,
                ImageSet(x, None, None, None),
                "drawn",
                path,
                method="rtn",
                wbits=wbits,
                abits=abits,
                per_channel=True,
                statistics="off",
            )
        found[name] = Bundle.open(path)
    return found


def measured(name: str, bundle: Bundle, recorded: Mapping[str, Path]) -> dict[str, Any]:
    """One bundle in all runtimes of this machine, and in those that were recorded."""
    x, _ = golden.inputs(bundle)
    left_out = {}
    with tempfile.TemporaryDirectory() as scratch:
        runtimes: dict[str, Any] = {}
        for runtime in ("ort", "openvino"):
            try:
                runtimes[runtime] = RUNTIMES[runtime](bundle, Path(scratch))
            except (EngineError, ExportError) as error:
                left_out[runtime] = str(error)
        for runtime, path in recorded.items():
            runtimes[runtime] = Recorded.of_file(path, runtime, bundle, x)
        found = compare(bundle, runtimes, x)
    return {
        "name": name,
        "bundle_sha256": bundle.manifest_sha256,
        "images": len(x),
        "activations": len(bundle.manifest.activations),
        "runtimes": [{**asdict(each), "most_off": each.most_off} for each in found],
        "left_out": left_out,
    }


def line(name: str, parted: Parted | Mapping[str, Any]) -> str:
    """One runtime in words."""
    row = parted if isinstance(parted, Mapping) else asdict(parted)
    tensors = row["tensors"]
    first = next((t for t in tensors if t["free_off"]), None)
    where = "the same codes" if first is None else f"parts first at {first['module']}"
    free = max((t["free_off"] for t in tensors), default=0.0)
    steps = max((t["free_steps"] for t in tensors), default=0)
    off = max((t["off"] for t in tensors), default=0.0)
    ties, wrong = (sum(t[key] for t in tensors) for key in ("ties", "wrong"))
    return (
        f"{name:26} {row['name']:16} {len(tensors):4} shown {row['hidden']:3} hidden   free "
        f"{free:8.2%} by {steps}   from the same codes {off:8.3%}, {ties} at ties, {wrong} wrong"
        f"   {where}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and write JSON, or record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder for same_codes.json")
    parser.add_argument("--bundles", type=Path, help="folder that keeps the bundles")
    parser.add_argument("--codes", nargs="+", default=[], metavar="RUNTIME:MODEL=FILE")
    parser.add_argument("--record", nargs=2, metavar=("RUNTIME", "BUNDLE"))
    parser.add_argument("-o", "--output", type=Path, help="file that --record writes")
    args = parser.parse_args(argv)
    if args.record:
        if args.output is None:
            parser.error("found --record without -o; name the file to write")
        runtime, path = args.record
        bundle = Bundle.open(path)
        record(bundle, runtime, golden.inputs(bundle)[0], args.output)
        return 0
    recorded: dict[str, dict[str, Path]] = defaultdict(dict)
    for text in args.codes:
        runtime, _, rest = text.partition(":")
        model, _, file = rest.partition("=")
        if model not in {name for name, *_ in MODELS} or not file:
            parser.error(f"found --codes {text}; needed RUNTIME:MODEL=FILE")
        recorded[model][runtime] = Path(file)
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for name, bundle in bundles(args.bundles or Path(scratch)).items():
            rows.append(measured(name, bundle, recorded[name]))
            for each in rows[-1]["runtimes"]:
                print(line(name, each), flush=True)
    if args.results:
        result = {
            "schema_version": 1,
            "environment": environment(),
            "rows": rows,
        }
        text = json.dumps(result, indent=1) + "\n"
        write_bytes(args.results / "same_codes.json", text.encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
