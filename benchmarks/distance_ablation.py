"""What HDRQ's distance to the source and its noise do to single models and to their merges.

    python benchmarks/distance_ablation.py --out build/distance --results benchmarks/results

Calibrates HDRQ on the three domains of the digits benchmark (ResNet-14, one scale per tensor) with
distances of both forms and several weights, without noise and with uniform noise, and with the
other rule for first activation scales; and QDrop beside it. All learn at the rates that
``merge_statistics.py`` uses for these iterations. Pairs and the triple are merged to nearest, and
by regression with compensated rounding, and measured on the test split and on the calibration
split, by which choices are made. A row is one setting and one calibration seed, and lies on disk:
one that is there is not made again, so a stopped run resumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from evidence.records import write_record
from measured import gathered, keep_row
from merge_quality import DOMAINS, GROUPS, MODEL, Judge, harmonic, split
from merge_statistics import ITERS, RATES

from hdrq_deploy import Bundle
from hdrq_deploy.calibration.graph_cache import GraphCache
from hdrq_deploy.calibration.methods import Options
from hdrq_deploy.calibration.pipeline import run_calibration
from hdrq_deploy.calibration.request import CalibrationRequest
from hdrq_deploy.calibration_data.digits.make_checkpoints import CHECKPOINTS
from hdrq_deploy.calibration_data.readers import ImageSet
from hdrq_deploy.merging import Merger

BITS = ("w8a8", "w4a4", "w3a3")
# The paper's weight of the distance, and others beside it and beside none.
PUBLISHED, NORMS, RELATIVES = 0.05, (0.1, 0.01, 0.005), (0.1, 0.3, 1.0)
WAYS = {"nearest": ("nearest", "mean"), "compensated": ("compensated", "regression")}
# The graph is captured and written once.
GRAPHS = GraphCache()


@dataclass(frozen=True)
class Setting:
    """One method with its options at some bits."""

    label: str
    bits: str
    method: str = "hdrq"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name with the bits."""
        return f"{self.label}-{self.bits}"

    @property
    def learning(self) -> dict[str, Any]:
        """All options that differ from the method's own."""
        return {"iters": ITERS, "lr": RATES["digits"][self.method], **self.options}


def settings() -> Iterator[Setting]:
    """All settings, the most telling first."""
    for bits in reversed(BITS):
        yield Setting(f"norm-{PUBLISHED:g}", bits, options={"distance": PUBLISHED})
        yield Setting("norm-0", bits, options={"distance": 0.0})
        yield Setting("qdrop", bits, "qdrop")
    for bits in reversed(BITS[1:]):
        for noise in ("off", "uniform"):
            yield Setting(f"noise-{noise}", bits, options={"noise": noise})
    for value in RELATIVES:
        for bits in reversed(BITS):
            options = {"distance": value, "distance_form": "relative"}
            yield Setting(f"relative-{value:g}", bits, options=options)
    for value in NORMS:
        for bits in reversed(BITS):
            yield Setting(f"norm-{value:g}", bits, options={"distance": value})
    for bits in reversed(BITS[1:]):
        yield Setting("per-image-max", bits, options={"act_init": "per-image-max"})


def row_of(setting: Setting, seed: int, folder: Path) -> Path:
    """The file of a finished row."""
    return folder / f"{setting.name}-s{seed}.json"


def measure(setting: Setting, seed: int, folder: Path) -> None:
    """Write the row of one setting and seed where it is missing."""
    target = row_of(setting, seed, folder)
    if target.exists():
        return
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = {d: _calibrated(setting, seed, d, Path(scratch)) for d in DOMAINS}
        judge = Judge(bundles[DOMAINS[0]])
        measured = {name: _accuracies(bundles, judge, name) for name in ("calibration", "test")}
    row = {
        "setting": setting.label,
        "bits": setting.bits,
        "seed": seed,
        "options": setting.learning,
        "cpu_seconds": round(time.process_time() - started),
        **measured,
    }
    keep_row(row, target)
    print(f"{setting.name} seed {seed}: {measured['test']}", flush=True)


def _calibrated(setting: Setting, seed: int, domain: str, scratch: Path) -> Bundle:
    wbits, abits = (int(part) for part in setting.bits[1:].split("a"))
    request = CalibrationRequest(
        MODEL,
        ImageSet(split(domain, "calibration")[0], None, None, None),
        domain,
        scratch / f"{domain}.hdrq",
        CHECKPOINTS / f"{domain}.safetensors",
        CHECKPOINTS / "fonts.safetensors",
        method=setting.method,
        wbits=wbits,
        abits=abits,
        seed=seed,
        options=Options.of(setting.method, **setting.learning),
    )
    return run_calibration(request, GRAPHS)


def _accuracies(bundles: Mapping[str, Bundle], judge: Judge, name: str) -> dict[str, float]:
    """Harmonic means in %: of the single models, and of merges, pairs as their mean, by way."""
    single = {d: judge(b.tensors(), (d,), name)[d] for d, b in bundles.items()}
    result = {"single": harmonic(single)}
    for way, (rounding, method) in WAYS.items():
        found = {}
        for group in GROUPS:
            merger = Merger([bundles[d] for d in group], rounding, method=method)
            tensors = merger.tensors([1 / len(group)] * len(group))
            found[group] = harmonic(judge(tensors, group, name))
        result[f"{way} pairs"] = statistics.fmean(found[g] for g in GROUPS if len(g) == 2)
        result[f"{way} triple"] = found[DOMAINS]
    return {key: round(100 * value, 2) for key, value in result.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/distance"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--collect", action="store_true", help="write the finished rows, no more")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    grid = [(setting, seed) for seed in args.seeds for setting in settings()]
    for setting, seed in () if args.collect else grid:
        measure(setting, seed, args.out)
    missing = [place for place in grid if not row_of(*place, args.out).exists()]
    rows = [json.loads(row_of(*p, args.out).read_text()) for p in grid if p not in missing]
    record = {
        "schema_version": 2,
        "iterations_per_block": ITERS,
        "missing": [f"{setting.name}-s{seed}" for setting, seed in missing],
        **gathered(rows),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    write_record(args.results / "distance.json", record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
