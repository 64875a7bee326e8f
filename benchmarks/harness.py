"""What the harness itself costs: an engine's call against the bare session it wraps.

    python benchmarks/harness.py --results benchmarks/results

One session is called in turn by ONNX Runtime's own ``run``, as ``hdrq-bench`` calls it (input
checked once) and as an application does (checked every time: names, shape, dtype, finite); beside
them stands ``overhead_us`` of ``hdrq-bench``, which times its own loop around no work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.records import write_record

from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.exporters import export
from hdrq_deploy.runtime import load_engine
from hdrq_deploy.runtime.bench.environment import Watch, environment
from hdrq_deploy.runtime.bench.timing import measure, overhead_us
from hdrq_deploy.runtime.ort import OrtEngine

MODELS = {
    "hdrq_deploy.calibration_data.models:resnet14": 32,
    "timm:mobilenetv2_100": 224,
    "timm:resnet50": 224,
}
CALLS, ROUNDS = 100, 10


def compare(engine: OrtEngine, side: int) -> dict[str, Any]:
    """Medians of one call in ms, and what is added to the bare one in µs."""
    x = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    session, name = engine._session, engine.inputs[0].name
    assert session is not None
    calls = {
        "bare": lambda: session.run(None, {name: x}),
        "bench": engine.bound(x),
        "application": lambda: engine(x),
    }
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(ROUNDS):
        for kind, call in calls.items():
            times[kind].append(statistics.median(measure(call, CALLS)))

    def added(kind: str) -> float:
        return round(1000 * float(np.median(np.subtract(times[kind], times["bare"]))), 1)

    return {
        "input": list(x.shape),
        "bare_ms": round(statistics.median(times["bare"]), 4),
        "bench_adds_us": added("bench"),
        "application_adds_us": added("application"),
        "overhead_us": round(overhead_us(engine, x), 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as scratch, Watch() as watch:
        for model, side in MODELS.items():
            folder = Path(scratch) / model.partition(":")[2]
            x = np.random.default_rng(1).standard_normal((8, 3, side, side)).astype(np.float32)
            images = ImageSet(x, None, None, None)
            made = calibrate(model, images, "any", folder / "b.hdrq", method="rtn")
            with load_engine(export(made, folder / "engine"), threads=1) as engine:
                assert isinstance(engine, OrtEngine)
                rows.append({"model": model, **compare(engine, side)})
    record = {
        "schema_version": 1,
        "environment": {**environment(), **watch.facts()},
        "marks": watch.marks(),
        "rows": rows,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    write_record(args.results / "harness.json", record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
